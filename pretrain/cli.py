"""The command line: ``torchrun --nproc-per-node N -m pretrain COMMAND …``."""

import argparse
import contextlib
import io
import json
import os
import signal
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pretrain.errors import PretrainError, one_line
from pretrain.runtime import output, stopping

_EPILOG = """\
examples:
  torchrun --nproc-per-node 2 -m pretrain train configs/laptop.yaml
  torchrun --nproc-per-node 2 -m pretrain train configs/laptop.yaml steps=50 optimizer.lr=1e-3
  torchrun --nproc-per-node 2 -m pretrain eval  configs/laptop.yaml
  python -m pretrain export RUN_DIR --to hf
  python -m pretrain import HF_DIR RUN_DIR
  python -m pretrain sample RUN_DIR --image FILE --prompt TEXT
  python -m pretrain sample RUN_DIR --chat --prompt QUESTION

  python -m pretrain report runs/laptop
  python -m pretrain plan configs/kimi_k25.yaml --processes 1024

A run writes into its run_dir: metrics.jsonl, tensorboard/, checkpoints/, curves.png and
parameters.txt. Started again with the same run_dir, it goes on from its newest checkpoint.
`python -m pretrain settings` lists every setting with its default and meaning.
"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pretrain",
        description="Joint vision-text pretraining of an MLA + MoE language model with MuonClip.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in (
        ("train", "train a model, or go on with one"),
        ("eval", "evaluate a run's newest checkpoint on held-out data and show transcriptions"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("config", help="a YAML file, such as configs/laptop.yaml")
        command.add_argument(
            "overrides", nargs="*", metavar="key.sub=value", help="settings that differ from it"
        )
    page = commands.add_parser(
        "report",
        help="write one HTML page about a run",
        description="write one HTML page about a run",
    )
    page.add_argument("run_dir", type=Path, metavar="RUN", help="the run's folder (run_dir)")
    page.add_argument("--out", type=Path, metavar="FILE", help="default: RUN/report.html")
    _add_model_commands(commands)
    _data_parsers(
        commands.add_parser("data", help="look at data, or write shards").add_subparsers(
            dest="action", required=True, metavar="ACTION"
        )
    )
    text = "parameters, memory of a rank, FLOPs and messages of a step; nothing is allocated"
    command = commands.add_parser("plan", help=text, description=text)
    command.add_argument("config", help="a YAML file, such as configs/kimi_k25.yaml")
    command.add_argument(
        "overrides", nargs="*", metavar="key.sub=value", help="settings that differ from it"
    )
    command.add_argument(
        "--processes", type=int, help="default: as few as the parallel sizes allow"
    )
    command.add_argument(
        "--image-patches", type=int, help="of an image; default: 1024, or a quarter of a sequence"
    )
    command.add_argument("--memory", type=float, metavar="GIB", help="of a device: does it fit?")
    command.add_argument("--json", action="store_true", help="everything, in bytes and FLOPs")
    commands.add_parser("settings", help="list every setting with its default and meaning")
    return parser


def _add_model_commands(commands: Any) -> None:
    """Commands of one process on a run's model; without torchrun."""
    text = "write a run's model for transformers, vLLM and SGLang"
    command = commands.add_parser("export", help=text, description=text)
    command.add_argument("run", type=Path, help="the run_dir of a run")
    command.add_argument("--to", required=True, choices=["hf"], help="the layout to write")
    command.add_argument("--out", type=Path, help="the folder to make (RUN/hf or RUN/hf-text)")
    command.add_argument("--step", type=int, help="of which checkpoint (the newest)")
    command.add_argument(
        "--text-only", action="store_true", help="the language model alone, as DeepSeek-V3"
    )
    command.add_argument(
        "--dtype", choices=["float32", "bfloat16"], help="of the weights (as in the checkpoint)"
    )
    text = "make a run of a Hugging Face checkpoint of Kimi-K2.5 or DeepSeek-V3, to train on"
    command = commands.add_parser("import", help=text, description=text)
    command.add_argument("source", type=Path, help="a folder with config.json and safetensors")
    command.add_argument("run", type=Path, help="the run_dir to make")
    command.add_argument(
        "overrides", nargs="*", metavar="key.sub=value", help="settings of the run's config.yaml"
    )
    text = "let a run's model write after images, videos and a prompt"
    command = commands.add_parser("sample", help=text, description=text)
    command.add_argument("run", type=Path, help="the run_dir of a run")
    command.add_argument("--prompt", default="", help="text after the images and videos")
    command.add_argument(
        "--chat", action="store_true", help="they are a user's message; the assistant replies"
    )
    # In one list, as it is the order in which they are shown.
    shown: dict[str, Any] = {
        "dest": "media", "nargs": "+", "action": "extend", "default": [], "metavar": "FILE"
    }  # fmt: skip
    command.add_argument(
        "--image", type=lambda path: (path, False), **shown, help="of an animation the first frame"
    )
    command.add_argument(
        "--video", type=lambda path: (path, True), **shown, help="or an animation, all its frames"
    )
    command.add_argument("--max-tokens", type=int, help="at most (as many as the model can read)")
    command.add_argument("--temperature", type=float, default=1.0, help="0 for the likeliest (1)")
    command.add_argument("--top-p", type=float, default=1.0, help="share of the likeliest (1)")
    command.add_argument("--seed", type=int, default=0, help="of the draws (0)")
    command.add_argument("--step", type=int, help="of which checkpoint (the newest)")


def _export(options: argparse.Namespace) -> None:
    from pretrain.export.to_hf import export

    folder = export(
        options.run,
        options.out,
        step=options.step,
        text_only=options.text_only,
        dtype=options.dtype,
    )
    print(f"wrote {folder}")


def _import(options: argparse.Namespace) -> None:
    from pretrain.export.from_hf import import_hf

    for note in import_hf(options.source, options.run, options.overrides).notes:
        print(note)
    print(f"made {options.run}; train it with: pretrain train {options.run / 'config.yaml'}")


def _sample(options: argparse.Namespace) -> None:
    from pretrain import generate
    from pretrain.data.media.video import is_video
    from pretrain.data.sources import Media

    for path, moving in options.media:
        if not moving and is_video(path):
            raise PretrainError(f"{path} is a video: show it with --video")
    model = generate.load(options.run, options.step)
    for piece in generate.sample(
        model,
        options.prompt,
        [Media((path,), moving) for path, moving in options.media],
        max_tokens=options.max_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        seed=options.seed,
        reply=options.chat,
    ):
        print(piece, end="", flush=True)
    print()


def _data_parsers(actions: Any) -> None:
    text = "show packed sequences with their pictures, tokens and labels on one HTML page"
    inspect = actions.add_parser("inspect", help=text, description=text)
    inspect.add_argument("config", help="a YAML file; its data is prepared, and kept in the cache")
    inspect.add_argument("overrides", nargs="*", metavar="key.sub=value")
    inspect.add_argument("--out", type=Path, default=Path("inspect.html"), metavar="FILE")
    inspect.add_argument("--count", type=int, default=8, metavar="N", help="sequences (8)")
    inspect.add_argument("--held-out", action="store_true", help="of the held-out split")
    text = "write a folder of images and captions as WebDataset shards for megatron-energon"
    shards = actions.add_parser("make-shards", help=text, description=text)
    shards.add_argument("folder", type=Path, help="with a captions.jsonl, or a.txt beside a.jpg")
    shards.add_argument("out", type=Path, help="a new folder")
    shards.add_argument("--per-shard", type=int, default=1000, metavar="N", help="pairs (1000)")
    shards.add_argument(
        "--held-out", type=float, default=0.02, metavar="SHARE", help="of the pairs (0.02)"
    )


def _data(options: argparse.Namespace) -> None:
    from pretrain.data.tools import commands

    commands.run(options)


_OF_ONE_PROCESS = {"data": _data, "export": _export, "import": _import, "sample": _sample}


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options; overrides may stand before them and behind them."""
    parser = _parser()
    # argparse gives all of a list that stands apart to its first part.
    options, others = parser.parse_known_args(arguments)
    if others:
        unknown = [text for text in others if text.startswith("-") or "=" not in text]
        if unknown or "overrides" not in options:
            parser.error(f"unrecognized arguments: {' '.join(unknown or others)}")
        options.overrides += others
    return options


def _print_error(error: BaseException) -> None:
    """One line about a failure of a file, of its encoding or of memory, or of a PretrainError."""
    message = str(error)
    if isinstance(error, OSError) and error.strerror:
        names = [str(name) for name in (error.filename, error.filename2) if name is not None]
        message = ": ".join([*names, error.strerror])
    elif isinstance(error, MemoryError):
        message = f"out of memory {message}"
    print(f"error: {one_line(message)}", file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        The exit status: 0, or 1 after a failure that the user can resolve, which is one line on
        stderr. Errors of the program itself are raised.
    """
    options = _parse(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # File names may have bytes that are not UTF-8, and a terminal may have no Unicode.
        sys.stdout.reconfigure(errors="backslashreplace")
    # megatron-core remarks on every optional package that it goes without.
    warnings.filterwarnings("ignore", module=r"megatron\..*")
    # and calls a collective by a name that newer torch has another one for.
    warnings.filterwarnings("ignore", message=r".*all_gather_into_tensor.* is deprecated")
    training = options.command in ("train", "eval")
    with contextlib.ExitStack() as stack:
        if training:
            stack.enter_context(output.durable())
            stack.enter_context(stopping.on_signals())
            stack.enter_context(stopping.end_with_launcher())
        try:
            exit_status = _run(options)
            if sys.stdout is not None:
                sys.stdout.flush()
            return exit_status
        except BrokenPipeError:  # as in `pretrain settings | head`
            if training:  # standard output is no cause
                raise
            output.discard(sys.stdout)
            return stopping.status(signal.SIGPIPE)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return stopping.status(signal.SIGINT)


def _run(options: argparse.Namespace) -> int:
    """Run a command in this process; returns the exit status."""
    from pretrain import config

    if options.command == "settings":
        print(config.describe())
        return 0
    try:
        if options.command == "report":
            from pretrain import html_report

            print(html_report.write(options.run_dir, options.out))
            return 0
        if options.command in _OF_ONE_PROCESS:
            _OF_ONE_PROCESS[options.command](options)
            return 0
        settings = config.load(options.config, options.overrides)
        if options.command == "plan":
            from pretrain.plan import format_plan, plan

            found = plan(settings, options.processes, options.image_patches)
            print(json.dumps(found) if options.json else format_plan(found, options.memory))
            return 0
        from pretrain import train

        run = {"train": train.train, "eval": train.evaluate}[options.command]
        run(settings)
    except PretrainError as error:
        # All ranks have the same error: one of them prints it.
        if os.environ.get("RANK", "0") == "0":
            _print_error(error)
        elif "TORCHELASTIC_RUN_ID" in os.environ:
            time.sleep(3)  # torchrun ends all ranks once one has left: let rank 0 print it first
        return 1
    except (OSError, UnicodeError, MemoryError) as error:
        if isinstance(error, BrokenPipeError):
            raise
        _print_error(error)
        return 1
    finally:
        # Threads of a process group that is left standing abort the interpreter at its end.
        if options.command != "plan" and "torch" in sys.modules:
            from pretrain import parallel

            parallel.stop()
    return 0
