"""The command line: ``python -m posttrain COMMAND …``."""

import argparse
import sys
from collections.abc import Callable, Sequence

from pretrain.errors import PretrainError
from pretrain.runtime import command_line


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m posttrain",
        description="Post-training of a model that `python -m pretrain export` wrote.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    command_line.add_command(commands, "settings", "list every setting with its default")
    return parser


def _settings(_options: argparse.Namespace) -> None:
    from posttrain.config import Config
    from pretrain import config

    print(*config.describe(Config), sep="\n")


_COMMANDS: dict[str, Callable[[argparse.Namespace], None]] = {
    "settings": _settings,
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
    try:
        _COMMANDS[options.command](options)
    except (PretrainError, OSError, UnicodeError, MemoryError) as error:
        command_line.print_error(error)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0
