"""The command line: ``torchrun --nproc-per-node N -m pretrain COMMAND …``."""

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from pretrain.errors import PretrainError

_EPILOG = """\
examples:
  torchrun --nproc-per-node 2 -m pretrain train configs/laptop.yaml
  torchrun --nproc-per-node 2 -m pretrain train configs/laptop.yaml steps=50 optimizer.lr=1e-3
  torchrun --nproc-per-node 2 -m pretrain eval  configs/laptop.yaml

  python -m pretrain report runs/laptop

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
    commands.add_parser("settings", help="list every setting with its default and meaning")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, or 1 after an error that is told in one line."""
    options = _parser().parse_args(arguments)
    # megatron-core remarks on every optional package that it goes without.
    warnings.filterwarnings("ignore", module=r"megatron\..*")
    # and calls a collective by a name that newer torch has another one for.
    warnings.filterwarnings("ignore", message=r".*all_gather_into_tensor.* is deprecated")
    from pretrain import config

    if options.command == "settings":
        print(config.describe())
        return 0
    try:
        if options.command == "report":
            from pretrain import page

            print(page.write(options.run_dir, options.out))
            return 0
        settings = config.load(options.config, options.overrides)
        from pretrain import train

        run = {"train": train.train, "eval": train.evaluate}[options.command]
        run(settings)
    except PretrainError as error:
        # All ranks have the same error: one of them tells it.
        if int(os.environ.get("RANK", "0")) == 0:
            print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    finally:
        # Threads of a process group that is left standing abort the interpreter at its end.
        if "torch" in sys.modules:
            from pretrain.runtime import processes

            processes.stop()
    return 0
