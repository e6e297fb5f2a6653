"""Imports go in one direction: no module imports itself by a detour, no package one above it."""

import ast
import re
import subprocess
from collections.abc import Iterator, Mapping
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("benchmarks", "muonclip", "posttrain", "pretrain")
# Who may import whom.
ALLOWED = {
    "benchmarks": {"muonclip", "posttrain", "pretrain"},
    "posttrain": {"muonclip", "pretrain"},
    "pretrain": {"muonclip"},
    "muonclip": set[str](),
}


def modules() -> dict[str, Path]:
    """Name and file of every module of the project."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", *PACKAGES]
    files = map(Path, subprocess.check_output(command, cwd=ROOT, text=True).split())
    paths = [file for file in files if file.suffix == ".py" and (ROOT / file).exists()]
    return {".".join(p.with_suffix("").parts).removesuffix(".__init__"): ROOT / p for p in paths}


def imported(file: Path, known: Mapping[str, Path]) -> Iterator[str]:
    """The project's modules that a file imports, at its top or in a function."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}:{node.lineno}: a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:  # a module, or something defined in its parent
            parent = name.rpartition(".")[0]
            if name in known or parent in known:
                yield name if name in known else parent


@cache
def graph() -> dict[str, set[str]]:
    """Every module with the modules that it imports."""
    known = modules()
    return {name: set(imported(file, known)) - {name} for name, file in known.items()}


def units(parent: str) -> dict[str, set[str]]:
    """The modules and packages directly in ``parent``, each with those of them that it imports."""
    depth = parent.count(".") + 2

    def unit(name: str) -> str:
        return ".".join(name.split(".")[:depth])

    found: dict[str, set[str]] = {}
    for name, others in graph().items():
        if name.startswith(f"{parent}."):
            inside = {unit(other) for other in others if other.startswith(f"{parent}.")}
            found.setdefault(unit(name), set()).update(inside - {unit(name)})
    return found


def require_order(imports: Mapping[str, set[str]]) -> None:
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        pytest.fail(f"a cycle of imports: {' -> '.join(reversed(error.args[1]))}")


def test_no_module_imports_itself_by_a_detour() -> None:
    assert len(graph()) > 100
    require_order(graph())


@pytest.mark.parametrize(
    "parent", ["muonclip", "pretrain", "pretrain.data", "pretrain.export", "posttrain"]
)
def test_packages_import_in_one_direction(parent: str) -> None:
    assert len(units(parent)) > 3
    require_order(units(parent))


def test_packages_import_only_packages_below_them() -> None:
    for name, others in graph().items():
        package = name.split(".")[0]
        wrong = {
            other for other in others if other.split(".")[0] not in {package, *ALLOWED[package]}
        }
        assert not wrong, f"{name} imports {sorted(wrong)}"


def test_arrows_of_the_diagram_are_imports() -> None:
    imports = units("muonclip") | units("pretrain")
    edges = {(a.split(".")[1], b.split(".")[1]) for a in imports for b in imports[a]}
    text = (ROOT / "docs/architecture.md").read_text()
    arrows = re.findall(r"^ {8}(.+) --> (.+)$", text, re.MULTILINE)
    assert len(arrows) > 20
    for sources, targets in arrows:
        assert {(a, b) for a in sources.split(" & ") for b in targets.split(" & ")} <= edges


def test_an_upward_import_is_found(tmp_path: Path) -> None:
    file = tmp_path / "module.py"
    file.write_text("def f():\n    from pretrain.train import train\n    import muonclip.muon\n")
    names = dict.fromkeys(("pretrain.train", "muonclip.muon"), file)
    assert set(imported(file, names)) == {"pretrain.train", "muonclip.muon"}
    with pytest.raises(pytest.fail.Exception, match="a cycle of imports: a -> b -> a"):
        require_order({"a": {"b"}, "b": {"a"}})
