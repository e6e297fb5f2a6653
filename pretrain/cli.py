"""The command line: ``python -m pretrain COMMAND …``.

Commands that train start a process for each GPU (``--processes``), or are started by torchrun.
"""

import argparse
import contextlib
import gc
import io
import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pretrain.errors import LostRankError, PretrainError
from pretrain.runtime import command_line, output, stopping
from pretrain.runtime.command_line import add_command as _add
from pretrain.runtime.command_line import print_error as _print_error

if TYPE_CHECKING:
    from pretrain.config import Config
    from pretrain.generate import Ask

_EPILOG = """\
examples:
  python -m pretrain train configs/laptop.yaml --processes 2
  python -m pretrain train configs/laptop.yaml --processes 2 steps=1000 optimizer.lr=5e-3
  python -m pretrain eval  configs/laptop.yaml --processes 2
  torchrun --nnodes 64 --nproc-per-node 8 … -m pretrain train configs/kimi_k25.yaml
  python -m pretrain export RUN_DIR --to hf
  python -m pretrain import HF_DIR RUN_DIR
  python -m pretrain sample RUN_DIR --image FILE --prompt TEXT
  python -m pretrain sample RUN_DIR --chat --prompt QUESTION

  python -m pretrain report runs/laptop
  python -m pretrain plan configs/kimi_k25.yaml --processes 1024

A run writes metrics.jsonl, tensorboard/, checkpoints/, curves.png and parameters.txt into its
run_dir. Started again with the same run_dir, it resumes from its newest checkpoint.
A configuration file may change another one (base: laptop.yaml).
`python -m pretrain settings` lists every setting with its default and meaning.
"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pretrain",
        description="Joint vision-text pretraining of an MLA + MoE language model with MuonClip.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_training(commands, "train", "train a model, or resume its training")
    text = "evaluate a run's newest checkpoint on held-out data and show transcriptions"
    _add_training(commands, "eval", text)
    report = _add(commands, "report", "write one HTML page about a run")
    report.add_argument("run_dir", type=Path, metavar="RUN", help="the run's folder (run_dir)")
    report.add_argument("--out", type=Path, metavar="FILE", help="default: RUN/report.html")
    compare = _add(commands, "compare", "draw metrics of several runs in one image")
    compare.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folders of runs")
    compare.add_argument(
        "--metrics", nargs="+", default=["max_logit"], metavar="NAME", help="default: max_logit"
    )
    compare.add_argument(
        "--out", type=Path, default=Path("comparison.png"), metavar="FILE",
        help="default: comparison.png",
    )  # fmt: skip
    _add_model_commands(commands)
    _add_data_commands(commands)
    text = "show parameters, memory per rank, FLOPs and traffic of a step; allocates nothing"
    plan = _add(commands, "plan", text)
    _add_config(plan)
    plan.add_argument("--processes", type=int, help="default: the smallest possible number")
    plan.add_argument(
        "--image-patches", type=int, help="per image; default: 1024, or seq_length / 4"
    )
    device = plan.add_mutually_exclusive_group()
    device.add_argument(
        "--memory", type=float, metavar="GIB", help="a device's memory, to compare with"
    )
    device.add_argument(
        "--fit", type=float, metavar="GIB", help="find parallel sizes that fit a device's memory"
    )
    plan.add_argument("--json", action="store_true", help="print JSON, in bytes and FLOPs")
    _add(commands, "settings", "list every setting with its default and meaning")
    return parser


def _add_config(
    command: argparse.ArgumentParser, text: str = "a YAML file, such as configs/laptop.yaml"
) -> None:
    command_line.add_config(command, text)


def _add_training(commands: Any, name: str, text: str) -> None:
    command = _add(commands, name, text)
    _add_config(command)
    command.add_argument(
        "--processes", type=int, metavar="N",
        help="start N processes on this machine; default: one, or those that torchrun has started",
    )  # fmt: skip


def _add_model_commands(commands: Any) -> None:
    """Add the commands that use a run's model in a single process."""
    step: dict[str, Any] = {"type": int, "help": "step of the checkpoint; default: the newest"}
    export = _add(commands, "export", "write a run's model for transformers, vLLM and SGLang")
    export.add_argument("run", type=Path, help="the run's folder (run_dir)")
    export.add_argument("--to", required=True, choices=["hf"], help="the format")
    export.add_argument("--out", type=Path, help="a new folder; default: RUN/hf or RUN/hf-text")
    export.add_argument("--step", **step)
    export.add_argument("--text-only", action="store_true", help="the language model alone")
    export.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: that of the run")
    text = "make a run from a Hugging Face checkpoint (docs/serving.md lists the supported models)"
    importing = _add(commands, "import", text)
    importing.add_argument("source", type=Path, help="a folder with config.json and safetensors")
    importing.add_argument("run", type=Path, help="the new run's folder (run_dir)")
    importing.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="key.sub=value",
        help="settings for the run's config.yaml",
    )
    sample = _add(commands, "sample", "generate text after images, videos and a prompt")
    sample.add_argument("run", type=Path, help="the run's folder (run_dir)")
    sample.add_argument("--prompt", default="", help="text after the images and videos")
    sample.add_argument(
        "--chat", action="store_true", help="reply to the prompt as a user's message"
    )
    sample.add_argument(
        "--thinking", action=argparse.BooleanOptionalAction,
        help="with --chat: reason before the reply, or reply at once; default: the model chooses",
    )  # fmt: skip
    sample.add_argument(
        "--tools", type=Path, metavar="FILE",
        help="with --chat: a JSON list of the tools that the model may call, in OpenAI's format",
    )  # fmt: skip
    # One list for both, in the order in which the model sees them.
    media: dict[str, Any] = {
        "dest": "media", "nargs": "+", "action": "extend", "default": [], "metavar": "FILE"
    }  # fmt: skip
    sample.add_argument(
        "--image", type=lambda path: (path, False), **media, help="of an animation: its first frame"
    )
    sample.add_argument(
        "--video", type=lambda path: (path, True), **media, help="also an animation: all its frames"
    )
    sample.add_argument("--max-tokens", type=int, help="default: up to the model's sequence length")
    sample.add_argument("--temperature", type=float, default=1.0, help="0: greedy; default: 1")
    sample.add_argument("--top-p", type=float, default=1.0, help="nucleus sampling; default: 1")
    sample.add_argument("--seed", type=int, default=0, help="default: 0")
    sample.add_argument("--step", **step)


def _add_data_commands(commands: Any) -> None:
    data = commands.add_parser("data", help="inspect, tokenize or convert data")
    actions = data.add_subparsers(dest="action", required=True, metavar="ACTION")
    text = (
        "show packed sequences with their images, tokens and labels on one HTML page; or print the "
        "configuration that reads a file or folder of data"
    )
    inspect = _add(actions, "inspect", text)
    _add_config(inspect, "a YAML file; or data: a file, a folder, a pattern or a URL")
    inspect.add_argument("--out", type=Path, default=Path("inspect.html"), metavar="FILE")
    inspect.add_argument("--count", type=int, default=8, metavar="N", help="sequences; default: 8")
    inspect.add_argument("--held-out", action="store_true", help="show the held-out split")
    inspect.add_argument(
        "--duplicates", action="store_true", help="compare all documents and report duplicates"
    )
    text = "tokenize text before training, into files of Megatron's format; resumes after a kill"
    tokenize = _add(actions, "tokenize", text)
    _add_config(tokenize)
    tokenize.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, metavar="N",
        help="processes; default: one for each processor core",
    )  # fmt: skip
    text = (
        "write text or conversations as Megatron's files, or captioned images as WebDataset shards"
    )
    convert = _add(actions, "convert", text)
    convert.add_argument(
        "config", help="a YAML file; or data: a file, a folder, a pattern or a URL"
    )
    convert.add_argument("out", type=Path, help="a new folder")
    convert.add_argument(
        "overrides", nargs="*", default=[], metavar="key.sub=value", help="changed settings"
    )
    convert.add_argument(
        "--to", choices=["megatron", "shards", "parquet"], required=True,
        help="megatron: .bin and .idx of text and conversations; shards: .tar of captioned images, "
        "for megatron-energon; parquet: any documents, with their images",
    )  # fmt: skip
    convert.add_argument(
        "--per-shard", type=int, default=1000, metavar="N",
        help="documents in a shard or in a file of Parquet; default: 1000",
    )  # fmt: skip
    convert.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, metavar="N",
        help="processes that tokenize; default: one for each processor core",
    )  # fmt: skip
    text = "the same as `convert --to shards`, for a folder of images and captions"
    shards = _add(actions, "make-shards", text)
    shards.add_argument("folder", type=Path, help="contains captions.jsonl, or a.txt for a.jpg")
    shards.add_argument("out", type=Path, help="a new folder")
    shards.add_argument(
        "--per-shard", type=int, default=1000, metavar="N", help="pairs; default: 1000"
    )
    shards.add_argument(
        "--held-out", type=float, default=0.02, metavar="SHARE", help="default: 0.02"
    )


def _launch(options: argparse.Namespace) -> int:
    """Start the processes of a command, after checking its configuration once."""
    count = options.processes
    if count < 1:
        raise PretrainError(f"--processes must be > 0, not {count}")
    print(f"starting {count} process{'es' if count > 1 else ''}", flush=True)
    from pretrain import config
    from pretrain.runtime import launcher

    config.load(options.config, options.overrides).check_world_size(count)
    return launcher.launch([options.command, options.config, *options.overrides], count)


def _train(options: argparse.Namespace) -> None:
    settings = _load_training(options)
    with _without_garbage():
        from pretrain import train

    train.train(settings)


def _evaluate(options: argparse.Namespace) -> None:
    settings = _load_training(options)
    with _without_garbage():
        from pretrain import train

    train.evaluate(settings)


@contextlib.contextmanager
def _without_garbage() -> Iterator[None]:
    """Context of imports, whose million objects stay: no garbage collection looks at them.

    Saves a second while importing megatron-core, and a third of one in each full collection.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
    gc.freeze()


def _load_training(options: argparse.Namespace) -> "Config":
    """Load the configuration, before megatron-core is imported, which takes seconds."""
    from pretrain import config

    settings = config.load(options.config, options.overrides)
    if os.environ.get("RANK", "0") == "0":
        print(f"{options.command} {options.config}: loading Megatron", flush=True)
    _prepare_megatron()
    return settings


def _plan(options: argparse.Namespace) -> None:
    from pretrain import config
    from pretrain.plan import fit, format_fit, format_plan, plan

    if options.json and options.memory is not None:
        raise PretrainError("--json compares with no device: leave --memory out")
    settings = config.load(options.config, options.overrides)
    if options.fit is not None:
        found = fit(settings, options.fit, options.processes, options.image_patches)
        print(json.dumps(found) if options.json else format_fit(found, options.fit))
        return
    planned = plan(settings, options.processes, options.image_patches)
    print(json.dumps(planned) if options.json else format_plan(planned, options.memory))


def _report(options: argparse.Namespace) -> None:
    from pretrain import html_report

    print(html_report.write(options.run_dir, options.out))


def _compare(options: argparse.Namespace) -> None:
    from pretrain import plots

    print(plots.compare(options.runs, options.metrics, options.out))


def _settings(_options: argparse.Namespace) -> None:
    from pretrain import config

    print(*config.describe(config.Config), sep="\n")


def _export(options: argparse.Namespace) -> None:
    from pretrain import checkpoint
    from pretrain.export.to_hf import export

    step = checkpoint.newest_step(options.run) if options.step is None else options.step
    choices = {"step": step, "text_only": options.text_only, "dtype": options.dtype}
    print(f"wrote {export(options.run, options.out, **choices)} from the checkpoint of step {step}")


def _import(options: argparse.Namespace) -> None:
    from pretrain.export.from_hf import import_hf

    for note in import_hf(options.source, options.run, options.overrides).notes:
        print(note)
    print(
        f"made {options.run}; train it with: python -m pretrain train {options.run / 'config.yaml'}"
    )


def _ask(options: argparse.Namespace) -> "Ask | None":
    """The reply that the options of ``sample`` ask for; None without ``--chat``."""
    from pretrain.generate import Ask

    if not options.chat:
        if options.thinking is not None or options.tools:
            raise PretrainError("--thinking, --no-thinking and --tools need --chat")
        return None
    if not options.tools:
        return Ask(options.thinking)
    try:
        tools = json.loads(options.tools.read_text(encoding="utf-8"))
    except ValueError as error:
        raise PretrainError(f"{options.tools} is not JSON: {error}") from error
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise PretrainError(f"{options.tools} must contain a list of tools, not {tools!r:.60}")
    return Ask(options.thinking, tools)


def _sample(options: argparse.Namespace) -> None:
    from pretrain import generate
    from pretrain.data.media.frames import Media
    from pretrain.data.media.video import is_video

    for path, moving in options.media:
        if not moving and is_video(path):
            raise PretrainError(f"{path} is a video: show it with --video")
        if not os.path.exists(path):
            raise PretrainError(
                f"{path} does not exist: --image and --video name files, --prompt text"
            )
    ask = _ask(options)
    model = generate.load(options.run, options.step)
    for piece in generate.sample(
        model,
        options.prompt,
        [Media((path,), moving) for path, moving in options.media],
        max_tokens=options.max_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        seed=options.seed,
        ask=ask,
    ):
        print(piece, end="", flush=True)
    print()


def _data(options: argparse.Namespace) -> None:
    from pretrain.data.tools import commands

    commands.run(options)


_Command = Callable[[argparse.Namespace], int | None]
_COMMANDS: dict[str, _Command] = {
    "train": _train, "eval": _evaluate, "plan": _plan, "report": _report, "compare": _compare,
    "settings": _settings, "data": _data, "export": _export, "import": _import, "sample": _sample,
}  # fmt: skip
# These import megatron-core later, or not at all.
_LOADING_LATER = (_train, _evaluate, _launch, _report, _compare, _settings)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    return command_line.parse(_parser(), arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        The exit status: 0, or 1 after an error that the user can resolve, which is printed as one
        line on stderr. Other errors are raised.
    """
    options = _parse(arguments)
    output.open_closed()
    if isinstance(sys.stdout, io.TextIOWrapper):
        # File names may contain bytes that are not UTF-8, and a terminal may not support Unicode.
        sys.stdout.reconfigure(errors="backslashreplace")
    # megatron-core warns about every optional package that is not installed,
    warnings.filterwarnings("ignore", module=r"megatron\..*")
    # calls collectives by names that newer versions of torch deprecate,
    collectives = "(all_gather_into|reduce_scatter)_tensor"
    warnings.filterwarnings("ignore", message=rf".*{collectives}.* is deprecated")
    # and asks users of its GPTModel to migrate to another model.
    logging.getLogger("megatron.core.models.gpt.gpt_model").setLevel(logging.ERROR)
    training = options.command in ("train", "eval")
    command = _COMMANDS[options.command]
    if training and options.processes is not None:
        command, training = _launch, False
    with contextlib.ExitStack() as stack:
        if training:
            stack.enter_context(output.durable())
            stack.enter_context(stopping.on_signals())
            stack.enter_context(stopping.end_with_launcher())
        else:
            stack.enter_context(output.ending_with_reader())
        return _run(command, options)


def _prepare_megatron() -> None:
    # Importing torch takes seconds, in which Ctrl-C must not leave a traceback.
    from pretrain.runtime import without_transformer_engine

    without_transformer_engine.hide_if_unusable()


def _run(command: _Command, options: argparse.Namespace) -> int:
    """Run a command in this process and return the exit status."""
    try:
        if command not in _LOADING_LATER:
            _prepare_megatron()
        return command(options) or 0
    except LostRankError as error:
        _print_error(error)
        return 1
    except PretrainError as error:
        # All ranks have the same error, and rank 0 prints it.
        if os.environ.get("RANK", "0") == "0":
            _print_error(error)
        elif "TORCHELASTIC_RUN_ID" in os.environ:
            time.sleep(3)  # until rank 0 has printed it: torchrun ends all ranks once one has ended
        return 1
    except BrokenPipeError:
        raise
    except (OSError, UnicodeError, MemoryError) as error:
        _print_error(error)
        return 1
    finally:
        # The threads of a process group that still exists would abort the interpreter at its end.
        if parallel := sys.modules.get("pretrain.parallel"):
            parallel.stop()
