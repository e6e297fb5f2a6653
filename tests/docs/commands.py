"""Commands in Markdown: their programs, options, settings and parallel sizes are valid."""

import re
import shlex
from pathlib import Path

from torch.distributed.run import get_args_parser

from benchmarks import __main__ as benchmarks
from benchmarks import runner
from posttrain import cli as posttrain_cli
from posttrain.config import Config as PosttrainConfig
from pretrain import cli, config
from pretrain.plan import plan

ROOT = Path(__file__).parents[2]
# The beginnings of commands that are not executed.
NOT_EXECUTED = {
    "pip install": "changes the environment; tests/test_distribution.py installs the package",
    "make .venv/.ready": "makes the environment",
    "make test": "runs the tests",
    "make test-py312": "runs the tests",
    "make lint": "is a part of `make test`",
    "make docs": "is a part of `make test`",
    "make gpu": "needs a GPU",
    ".venv/bin/python -m pytest": "runs the tests",
    "vllm serve": "is not installed here; `make serving` serves a model with it",
    "python -m sglang.launch_server": "is not installed here",
    "python -m posttrain": "takes minutes; tests/posttrain runs the commands in small",
    "python -m benchmarks run": "takes minutes; tests/benchmarks runs the benchmarks in small",
    "torchrun --nproc-per-node 8 -m pretrain train configs/h200.yaml": "needs eight GPUs",
}


def blocks(text: str, language: str) -> list[str]:
    """The blocks of code in a Markdown text."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def commands(text: str) -> list[list[str]]:
    """The words of every command in the blocks of a Markdown text."""
    lines = "".join(blocks(text, "sh")).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def inline_commands(text: str, programs: str = "make|python|torchrun") -> list[list[str]]:
    """The words of every command in the sentences of a Markdown text."""
    return [
        shlex.split(line, comments=True) for line in re.findall(rf"`((?:{programs}) [^`]*)`", text)
    ]


def split_launcher(words: list[str]) -> tuple[str, list[str], int | None]:
    """Split a command of Python or torchrun.

    Returns:
        The module, its arguments, and the number of processes if it is given.
    """
    program, *arguments = words
    if Path(program).name == "torchrun":
        launch = get_args_parser().parse_args(arguments)
        assert launch.module
        return launch.training_script, launch.training_script_args, int(launch.nproc_per_node)
    assert Path(program).name == "python" and arguments[0] == "-m"
    return arguments[1], arguments[2:], None


def is_executed(words: list[str]) -> bool:
    """Whether tests/docs/test_commands_run.py executes a command."""
    return not any(shlex.join(words).startswith(first) for first in NOT_EXECUTED)


def check(words: list[str]) -> None:
    """Raise for a command that would be refused. Nothing is trained, measured or installed."""
    program = Path(words[0]).name
    if program == "make":
        _check_make(words[1:])
    elif program in ("torchrun", "python"):
        _check_module(*split_launcher(words))


def _check_make(arguments: list[str]) -> None:
    makefile = (ROOT / "Makefile").read_text().replace("$(VENV)", ".venv")
    (target,) = (argument for argument in arguments if "=" not in argument)
    assert re.search(rf"^{re.escape(target)}:", makefile, re.MULTILINE), target
    for variable, value in (a.split("=", 1) for a in arguments if "=" in a):
        assert f"$({variable})" in makefile, variable
        if variable == "CONFIG":
            config.load(ROOT / value, [])
        if variable == "ARGS":
            config.load(ROOT / "configs" / "laptop.yaml", value.split())


def _check_module(module: str, arguments: list[str], processes: int | None) -> None:
    if module == "pretrain":
        options = cli._parse(arguments)
        if options.command == "train":
            plan(config.load(ROOT / options.config, options.overrides), processes, None)
    elif module == "posttrain":
        settings = posttrain_cli.parse(arguments)
        if "config" in settings:
            config.load_as(PosttrainConfig, str(ROOT / settings.config), settings.overrides)
    elif module == "benchmarks" and arguments:
        command, *rest = arguments
        assert command in ("list", "run", "table", "readme")
        if command == "run":
            runner.parse(rest[0], benchmarks.benchmark(rest[0]), rest[1:])
