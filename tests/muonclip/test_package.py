"""The package as a whole: its example runs, and it is installed alone and requires torch only."""

import doctest
import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import torch

import muonclip


def test_package_example_runs() -> None:
    torch.manual_seed(0)
    result = doctest.testmod(muonclip)
    assert result.attempted > 10
    assert result.failed == 0


def test_import_needs_torch_only() -> None:
    """`import muonclip`, with integrations, imports neither the trainer nor megatron-core, nor
    torch's compiler, which takes seconds."""
    code = (
        "import sys, muonclip, muonclip.integrations.megatron_core\n"
        "print([m for m in sys.modules if m.split('.')[0] in ('megatron', 'pretrain')\n"
        "    or m == 'torch._dynamo'])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_every_public_name_exists() -> None:
    assert all(hasattr(muonclip, name) for name in muonclip.__all__)


def test_the_wheel_contains_muonclip_alone(tmp_path: Path) -> None:
    root = Path(__file__).parent.parent.parent
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(root / name, tmp_path)
    for name in ("muonclip", "pretrain", "benchmarks"):
        shutil.copytree(root / name, tmp_path / name, ignore=shutil.ignore_patterns("results"))
    build = "from setuptools.build_meta import build_wheel; print(build_wheel('dist'))"
    run = subprocess.run(
        [sys.executable, "-c", build], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    with zipfile.ZipFile(tmp_path / "dist" / run.stdout.split()[-1]) as wheel:
        folder = f"muonclip-{muonclip.__version__}.dist-info"
        assert {name.split("/")[0] for name in wheel.namelist()} == {"muonclip", folder}
        assert "muonclip/py.typed" in wheel.namelist()
        metadata = Parser().parsestr(wheel.read(f"{folder}/METADATA").decode())
    required = [one for one in metadata.get_all("Requires-Dist", []) if "extra ==" not in one]
    assert metadata["Version"] == muonclip.__version__
    assert required == ["torch>=2.9"]
