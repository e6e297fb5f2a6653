"""``python -m benchmarks``: list the benchmarks, run one, or print stored results as tables."""

import argparse
import ast
import importlib
import re
import sys
from pathlib import Path
from typing import cast

from benchmarks import runner
from pretrain.runtime import output, without_transformer_engine

HERE = Path(__file__).parent
README = HERE / "README.md"
# Modules of this package that are not benchmarks.
SUPPORT = {"__init__", "__main__", "optimizers", "posttraining", "runner", "training", "workloads"}


def names() -> list[str]:
    """Names of the benchmarks: all other modules of this package."""
    return sorted(path.stem for path in HERE.glob("*.py") if path.stem not in SUPPORT)


def summary(name: str) -> str:
    """First line of a benchmark's docstring, read without importing the module."""
    docstring = ast.get_docstring(ast.parse((HERE / f"{name}.py").read_text()))
    return docstring.splitlines()[0] if docstring else ""


def benchmark(name: str) -> runner.Benchmark:
    without_transformer_engine.hide_if_unusable()
    return cast(runner.Benchmark, importlib.import_module(f"benchmarks.{name}"))


def with_tables(text: str) -> str:
    """A README with the table after each ``<!-- table FILE -->`` generated from that result.

    A result that does not exist was not yet measured.
    """

    def table(match: re.Match[str]) -> str:
        file = runner.RESULTS / match[1]
        name = match[1].partition("-")[0]
        text = runner.table(benchmark(name), file) if file.exists() else "Not yet run.\n"
        return f"<!-- table {match[1]} -->\n{text}<!-- end -->"

    return re.sub(r"<!-- table (\S+) -->\n.*?<!-- end -->", table, text, flags=re.DOTALL)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser("python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command")
    commands.add_parser("list", help="list the benchmarks (the default)")
    run = commands.add_parser("run", help="run a benchmark and store its result", add_help=False)
    run.add_argument("name", choices=names())
    table = commands.add_parser("table", help="print stored results as Markdown")
    table.add_argument("name", choices=names())
    table.add_argument("files", nargs="*", type=Path, help="default: all its results")
    commands.add_parser("readme", help="update the tables in benchmarks/README.md")
    options, rest = parser.parse_known_args(arguments)

    lines: list[str] = []
    if options.command == "run":
        runner.run(options.name, benchmark(options.name), rest)
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    elif options.command == "table":
        files = options.files or sorted(runner.RESULTS.glob(f"{options.name}-*.json"))
        if not files:
            parser.error(f"no stored result of {options.name}: run it first")
        for file in files:
            try:
                lines.append(runner.table(benchmark(options.name), file))
            except (OSError, ValueError, KeyError, TypeError):
                parser.error(f"{file} is not a stored result of {options.name}")
    elif options.command == "readme":
        README.write_text(with_tables(README.read_text()))
    else:
        width = max(map(len, names()))
        lines = [f"{name:{width}}  {summary(name)}" for name in names()]
    with output.ending_with_reader():
        for line in lines:
            print(line)


if __name__ == "__main__":
    main(sys.argv[1:])
