"""Commands in Markdown: their programs, options, settings and parallel sizes are valid."""

import re
import shlex
from pathlib import Path

from torch.distributed.run import get_args_parser

from benchmarks import __main__ as benchmarks
from benchmarks import runner
from pretrain import cli, config
from pretrain.metrics import METRICS
from pretrain.plan import plan

ROOT = Path(__file__).parents[2]
# Programs and modules that are not called, not even for their options.
NOT_CALLED = {
    "pip": "changes the environment; tests/test_distribution.py installs the package",
    "vllm": "is not installed here; `make serving` serves a model with it",
    "sglang.launch_server": "is not installed here",
    "pytest": "runs the tests",
}
# Training is planned for these, which takes no time.
_SMALL = "configs/laptop"


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


def check(words: list[str]) -> None:
    """Raise for a command that would be refused. Nothing is trained, measured or installed."""
    program, *arguments = words
    program = Path(program).name
    if program == "make":
        _check_make(arguments)
    elif program == "torchrun":
        launch = get_args_parser().parse_args(arguments)
        assert launch.module
        _check_module(
            launch.training_script, launch.training_script_args, int(launch.nproc_per_node)
        )
    elif program == "python":
        flag, module, *rest = arguments
        assert flag == "-m"
        _check_module(module, rest)
    else:
        assert program in NOT_CALLED, program


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


def _check_module(module: str, arguments: list[str], processes: int | None = None) -> None:
    if module == "pretrain":
        options = cli._parse(arguments)
        if options.command == "settings":
            assert cli.main(arguments) == 0
        if options.command == "compare":
            assert set(options.metrics) <= METRICS.keys()
        if options.command in ("train", "eval", "plan") or "config" in options:
            launched = getattr(options, "processes", None) if options.command != "plan" else None
            _check_config(options.config, options.overrides, processes or launched)
    elif module == "benchmarks":
        command, *rest = arguments or ["list"]
        assert command in ("list", "run", "table", "readme")
        if command == "run":
            runner.parse(rest[0], benchmarks.benchmark(rest[0]), rest[1:])
    else:
        assert module in NOT_CALLED, module


def _check_config(name: str, overrides: list[str], processes: int | None) -> None:
    # A run's own configuration, or data to inspect.
    if name.startswith("runs/") or not name.endswith(".yaml"):
        return
    settings = config.load(ROOT / name, overrides)
    if processes is not None and name.startswith(_SMALL):
        plan(settings, processes, None)
