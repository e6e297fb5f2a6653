"""The command line: ``python -m posttrain COMMAND …``."""

import argparse
import io
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from pretrain.errors import PretrainError
from pretrain.runtime import command_line, output, stopping

if TYPE_CHECKING:
    from posttrain.config import Config

_EPILOG = """\
examples:
  python -m posttrain sft  configs/posttrain/modes.yaml
  python -m posttrain rl   configs/posttrain/read.yaml
  python -m posttrain rl   configs/posttrain/read.yaml steps=50 optimizer.lr=1e-4
  python -m posttrain swarm configs/posttrain/swarm.yaml
  python -m posttrain eval configs/posttrain/read.yaml

A run writes metrics.jsonl, checkpoints/, report.html and hf/, the trained model, into its run_dir.
Started again with the same run_dir, it resumes from its newest checkpoint.
`python -m posttrain settings` lists every setting with its default and meaning.
"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m posttrain",
        description="Post-training of a model that `python -m pretrain export` wrote.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in (
        ("sft", "teach a model the modes of the chat format on text alone, or resume it"),
        ("rl", "reinforcement learning with outcome rewards, or resume it"),
        ("swarm", "agent swarm: a supervised start, then PARL, or resume it"),
        ("eval", "evaluate a run's trained model, or the one to start from, on held-out data"),
    ):
        command = command_line.add_command(commands, name, text)
        command_line.add_config(command, "a YAML file, such as configs/posttrain/read.yaml")
    command_line.add_command(commands, "settings", "list every setting with its default")
    return parser


def _load(options: argparse.Namespace) -> "Config":
    from posttrain.config import Config
    from pretrain import config

    settings = config.load_as(Config, options.config, options.overrides)
    if options.command != "eval":
        settings.require_fit(options.command)  # before imports that take seconds
    return settings


def _sft(options: argparse.Namespace) -> None:
    settings = _load(options)
    from posttrain import sft

    sft.train(settings)


def _rl(options: argparse.Namespace) -> None:
    settings = _load(options)
    from posttrain import rl

    rl.train(settings)


def _swarm(options: argparse.Namespace) -> None:
    settings = _load(options)
    from posttrain.swarm import train

    train.train(settings)


def _evaluate(options: argparse.Namespace) -> None:
    settings = _load(options)
    from posttrain import evaluate

    evaluate.run(settings)


def _settings(_options: argparse.Namespace) -> None:
    from posttrain.config import Config
    from pretrain import config

    print(*config.describe(Config), sep="\n")


_COMMANDS: dict[str, Callable[[argparse.Namespace], None]] = {
    "sft": _sft, "rl": _rl, "swarm": _swarm, "eval": _evaluate, "settings": _settings,
}  # fmt: skip


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    return command_line.parse(_parser(), arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        The exit status: 0, or 1 after an error that the user can resolve, which is printed as one
        line on stderr. Other errors are raised.
    """
    options = parse(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A terminal may not support all characters of transcriptions.
        sys.stdout.reconfigure(errors="backslashreplace")
    # TRL uses a name that transformers deprecates, and warns of functions that may change.
    warnings.filterwarnings("ignore", message=r"`is_gradient_checkpointing` is deprecated")
    warnings.filterwarnings("ignore", message=r"You are using 'rollout_func'")
    with output.durable(), stopping.on_signals():  # from here on: imports may catch Ctrl-C
        try:
            _COMMANDS[options.command](options)
        except (PretrainError, OSError, UnicodeError, MemoryError) as error:
            command_line.print_error(error)
            return 1
    return 0
