"""The source distribution and the wheel: contents, metadata, and installation with torch alone.

Also the files that describe the project to its users and to the tools of its host.
"""

import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from email.message import Message
from email.parser import Parser
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

import muonclip

ROOT = Path(__file__).parents[1]
NAME = f"muonclip-{muonclip.__version__}"
DESCRIPTIONS = ("CHANGELOG.md", "CITATION.cff", "LICENSE", "MANIFEST.in", "README.md")


def run(*command: object, cwd: Path) -> str:
    ended = subprocess.run(
        [*map(str, command)], cwd=cwd, capture_output=True, text=True, timeout=300, check=False
    )
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-2000:]
    return ended.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the source distribution, and the wheel that is built from it.

    The sources are those of the repository, with the caches that tests and tools leave in it.
    """
    root = tmp_path_factory.mktemp("sources")
    for name in ("pyproject.toml", *DESCRIPTIONS):
        shutil.copy(ROOT / name, root)
    for name in ("muonclip", "pretrain", "posttrain", "benchmarks", "docs/examples"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("results"))
    (root / "tests").mkdir()
    for path in (ROOT / "tests").glob("test_*.py"):
        shutil.copy(path, root / "tests")
    for folder in ("muonclip/__pycache__", "muonclip/.mypy_cache", "build/lib/other"):
        (root / folder).mkdir(parents=True, exist_ok=True)
        (root / folder / "module.cpython-311.pyc").touch()
    run(sys.executable, "-m", "build", "--no-isolation", cwd=root)
    return root / "dist"


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    (path,) = built.glob("*.whl")
    assert path.name == f"{NAME}-py3-none-any.whl"
    return path


def modules() -> set[str]:
    """The files of the package, relative to the root of the repository."""
    files = [*(ROOT / "muonclip").rglob("*.py"), ROOT / "muonclip" / "py.typed"]
    return {file.relative_to(ROOT).as_posix() for file in files}


def test_the_wheel_contains_the_typed_package_alone(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    information = {name for name in names if name.startswith(f"{NAME}.dist-info/")}
    assert names - information == modules() and "muonclip/py.typed" in names
    assert f"{NAME}.dist-info/licenses/LICENSE" in information


def test_the_source_distribution_contains_the_sources_of_the_wheel(built: Path) -> None:
    with tarfile.open(built / f"{NAME}.tar.gz") as archive:
        names = {member.name for member in archive if member.isfile()}
    files = {name.removeprefix(f"{NAME}/") for name in names}
    generated = {name for name in files if name.startswith("muonclip.egg-info/")}
    assert files - generated == {
        *modules(),
        *DESCRIPTIONS,
        "pyproject.toml",
        "PKG-INFO",
        "setup.cfg",
    }


def metadata_of(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        return Parser().parsestr(archive.read(f"{NAME}.dist-info/METADATA").decode())


def test_the_metadata_describe_the_package(wheel: Path) -> None:
    """Only torch is required, and the README is the description."""
    found = metadata_of(wheel)
    required = [one for one in found.get_all("Requires-Dist", []) if "extra ==" not in one]
    assert found["Name"] == "muonclip" and found["Version"] == muonclip.__version__
    assert required == ["torch>=2.9"] and found["Requires-Python"] == ">=3.10"
    assert found["License-Expression"] == "Apache-2.0" and found["Author"]
    assert found["Description-Content-Type"] == "text/markdown"
    assert found.get_payload().strip() == (ROOT / "README.md").read_text().strip()
    assert "Typing :: Typed" in found.get_all("Classifier", [])


def test_twine_accepts_both(built: Path) -> None:
    output = run(sys.executable, "-m", "twine", "check", "--strict", *built.iterdir(), cwd=built)
    assert output.count("PASSED") == 2


def with_dependencies(name: str) -> set[str]:
    """The distributions that an installation of one brings, by name."""
    names, todo = set[str](), [name]
    while todo:
        name = todo.pop().lower()
        if name in names:
            continue
        names.add(name)
        for line in metadata.requires(name) or ():
            required = Requirement(line)
            if required.marker is None or required.marker.evaluate({"extra": ""}):
                todo.append(required.name)
    return names


ONE_STEP = """
import importlib, pkgutil, sys
import torch
import muonclip

for module in pkgutil.walk_packages(muonclip.__path__, "muonclip."):
    if not module.name.endswith("_triton"):  # imported by the module that chooses between kernels
        importlib.import_module(module.name)

model = torch.nn.TransformerEncoderLayer(16, nhead=2, dim_feedforward=32)
before = [parameter.detach().clone() for parameter in model.parameters()]
optimizer = muonclip.for_model(model, lr=1e-3, qk_clip_threshold=1e-3, report=None)
model(torch.randn(4, 1, 16)).square().mean().backward()
optimizer.step()
assert optimizer.qk_clip.result.num_clipped == 2
assert not any(map(torch.equal, before, model.parameters()))
print(muonclip.__file__)
"""


def test_it_works_where_nothing_but_torch_is_installed(wheel: Path, tmp_path: Path) -> None:
    """In a new environment, into which torch and the packages that it requires are linked."""
    environment = tmp_path / "environment"
    venv.create(environment, symlinks=True)
    (packages,) = environment.glob("lib/python*/site-packages")
    for name in with_dependencies("torch"):
        files = metadata.files(name) or ()
        for top in {file.parts[0] for file in files} - {"..", "__pycache__"}:
            if not (packages / top).exists():  # as several packages are parts of ``nvidia``
                (packages / top).symlink_to(Path(str(metadata.distribution(name).locate_file(top))))
    python = environment / "bin" / "python"
    install = ("install", "--no-deps", "--no-index", "--disable-pip-version-check", wheel)
    run(sys.executable, "-m", "pip", "--python", python, *install, cwd=tmp_path)
    output = run(python, "-I", "-c", ONE_STEP, cwd=tmp_path)
    assert Path(output.strip()).is_relative_to(packages)


def test_the_citation_is_that_of_the_package() -> None:
    """By the required keys of the Citation File Format 1.2, and the metadata of pyproject.toml."""
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert citation["cff-version"] == "1.2.0" and citation["type"] == "software"
    assert citation["version"] == muonclip.__version__
    assert citation["license"] == project["license"]
    assert citation["authors"] == project["authors"]
    for one in citation["references"]:
        assert {"type", "title", "authors"} <= one.keys() and one["url"].startswith("https://")


def test_the_changelog_names_the_version() -> None:
    headings = [
        line.split()[1].strip("[]")
        for line in (ROOT / "CHANGELOG.md").read_text().splitlines()
        if line.startswith("## [")
    ]
    assert headings[0] == "Unreleased"
    assert headings[1:2] in ([], [muonclip.__version__])


@pytest.mark.parametrize("name", ["bug_report", "feature_request"])
def test_issue_forms_are_well_formed(name: str) -> None:
    """The host ignores a form with an unknown type or without a name, without an error."""
    form = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / f"{name}.yml").read_text())
    assert form["name"] and form["description"]
    fields = [field for field in form["body"] if field["type"] != "markdown"]
    assert len({field["id"] for field in fields}) == len(fields) > 0
    for field in form["body"]:
        assert field["type"] in ("markdown", "textarea", "input", "dropdown", "checkboxes")
        assert field["attributes"]["value" if field["type"] == "markdown" else "label"]
