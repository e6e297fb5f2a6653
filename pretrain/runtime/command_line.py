"""Parts of a command line that several programs share: overrides, and errors in one line."""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from pretrain.errors import one_line


def add_command(commands: Any, name: str, text: str) -> argparse.ArgumentParser:
    """Add a command with a description to the subparsers of a program."""
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
    return parser


def add_config(command: argparse.ArgumentParser, text: str) -> None:
    """Add a configuration file and overrides to a command.

    Args:
        text: help of the file.
    """
    command.add_argument("config", help=text)
    command.add_argument(
        "overrides",
        nargs="*",
        default=[],  # or argparse lists them as required
        metavar="key.sub=value",
        help="settings that change the file's",
    )


def parse(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line; overrides may precede or follow options."""
    # argparse assigns only the first group of overrides, and leaves the others as unknown.
    options, others = parser.parse_known_args(arguments)
    if others:
        unknown = [text for text in others if text.startswith("-") or "=" not in text]
        if unknown or "overrides" not in options:
            hint = ""
            if "overrides" in options and any(text.startswith("--") for text in unknown):
                hint = " (settings have no dashes: key.sub=value)"
            parser.error(f"unrecognized arguments: {' '.join(unknown or others)}{hint}")
        options.overrides = [*options.overrides, *others]
    return options


def print_error(error: BaseException) -> None:
    """Print an error of a file, its encoding or memory, or a PretrainError, in one line."""
    message = str(error)
    if isinstance(error, OSError) and error.strerror:
        names = [str(name) for name in (error.filename, error.filename2) if name is not None]
        message = ": ".join([*names, error.strerror])
    elif isinstance(error, MemoryError):
        message = f"out of memory {message}"
    print(f"error: {one_line(message)}", file=sys.stderr, flush=True)
