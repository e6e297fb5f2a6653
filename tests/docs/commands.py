"""Commands in Markdown: their programs, options, settings and parallel sizes are valid."""

import importlib.util
import os
import re
import shlex
import subprocess
import tomllib
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
    "source .venv/bin/activate": "changes the shell",
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


def inline_commands(text: str) -> list[list[str]]:
    """The words of every command in the sentences of a text.

    Without those that only name a program or command, or have placeholders, in capitals.
    """
    programs = r"make|pip|torchrun|(?:\.venv/bin/)?python"
    found = re.findall(
        rf"`((?:{programs}) [^`]*)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    )
    every = [shlex.split(line, comments=True) for line in found]
    return [words for words in every if words[0] in ("make", "pip") or _is_whole(words)]


def _is_whole(words: list[str]) -> bool:
    has_argument = any(set("./=") & set(word) for word in words[3:])
    return has_argument and not any(map(str.isupper, words))


def split_launcher(words: list[str]) -> tuple[str, list[str], int | None]:
    """Split a command of Python or torchrun.

    Returns:
        The module, its arguments, and the number of processes if it is given.
    """
    program, *arguments = words
    if Path(program).name == "torchrun":
        launch = get_args_parser().parse_args(arguments)
        assert launch.module
        processes = int(launch.nnodes.split(":")[0]) * int(launch.nproc_per_node)
        return launch.training_script, launch.training_script_args, processes
    assert Path(program).name == "python" and arguments[0] == "-m"
    return arguments[1], arguments[2:], None


def is_executed(words: list[str]) -> bool:
    """Whether tests/docs/test_commands_run.py executes a command."""
    return not any(shlex.join(words).startswith(first) for first in NOT_EXECUTED)


def recipe(words: list[str]) -> list[str]:
    """The words of the last command that make would run in an environment that is complete."""
    # Not with the options of a `make test` that runs this.
    given = {"MAKEFLAGS", "MFLAGS", "MAKEOVERRIDES", "MAKELEVEL", "ARGS", "CONFIG", "PROCESSES"}
    environment = {name: value for name, value in os.environ.items() if name not in given}
    old = [f"--old-file=.venv/.ready{kind}" for kind in ("", "-train", "-docs")]
    lines = subprocess.check_output(
        ["make", "--dry-run", "--no-print-directory", *old, *words[1:]],
        cwd=ROOT,
        env=environment,
        text=True,
    )
    *_, last = lines.replace("\\\n", " ").splitlines() or [""]
    return shlex.split(last)


def check(words: list[str], folder: Path = ROOT) -> None:
    """Raise for a command that would be refused. Nothing is trained, measured or installed.

    Args:
        words: of the command.
        folder: contains the files that it names.
    """
    program = Path(words[0]).name
    if program == "make":
        _check_make(words, folder)
    elif program in ("torchrun", "python"):
        _check_module(*split_launcher(words), folder)
    elif program == "pip":
        _check_extras(words)


def _check_make(words: list[str], folder: Path) -> None:
    (target,) = (word for word in words[1:] if "=" not in word)
    for variable in (word.partition("=")[0] for word in words[1:] if "=" in word):
        assert "probe" in recipe(["make", target, f"{variable}=probe"]), f"{variable} has no effect"
    command = recipe(words)
    if target == "train":
        check(command, folder)


def _check_extras(words: list[str]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for word in words:
        for extras in re.findall(r"^\.\[(.*)\]$", word):
            assert set(extras.split(",")) <= project["optional-dependencies"].keys(), word


def _check_module(module: str, arguments: list[str], processes: int | None, folder: Path) -> None:
    package = module.partition(".")[0]
    assert package in ("sglang", "vllm") or importlib.util.find_spec(package), module
    if module == "pretrain":
        options = cli._parse(arguments)
        if options.command in ("train", "eval", "plan") and not options.config.isupper():
            settings = config.load(folder / options.config, options.overrides)
            if options.command != "plan":
                plan(settings, processes or options.processes, None)
    elif module == "pytest":
        assert all((ROOT / path.partition("::")[0]).exists() for path in arguments if "/" in path)
    elif module == "posttrain":
        settings = posttrain_cli.parse(arguments)
        if "config" in settings:
            config.load_as(PosttrainConfig, str(folder / settings.config), settings.overrides)
    elif module == "benchmarks" and arguments:
        command, *rest = arguments
        assert command in ("list", "run", "table", "readme")
        assert not rest or rest[0] in benchmarks.names(), rest[0]
        if command == "run":
            runner.parse(rest[0], benchmarks.benchmark(rest[0]), rest[1:])
