"""Files from others run no code, whatever is in them.

Each case writes files that would create a marker if a reader ran what they name, and opens them as
the project does. A refusal is one line. Every new kind of file that is read gets a case here.
"""

import gzip
import io
import os
import pickle
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from pretrain.config import DataConfig, SourceConfig
from pretrain.data import Dealing, prepare, sources
from pretrain.data.shards import _index, _Writer
from pretrain.data.sources import Media
from pretrain.errors import PretrainError
from tests.pretrain.data import make

Bait = Callable[[Path, Path], None]
"""Writes a case's files into a folder; the marker is the second path."""


class Touch:
    """Unpickling it creates the marker."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.marker}",)


def shards(folder: Path, parts: dict[str, bytes] | None = None) -> Path:
    """Prepared shards of pictures whose samples have further parts; their description."""
    writer = _Writer(folder, "train", 100)
    for number in range(4):
        picture, caption = make.picture(number)
        content = io.BytesIO()
        picture.save(content, "PNG")
        files = {"png": content.getvalue(), "txt": caption.encode()}
        writer.add(f"{number}", files | (parts or {}))
    writer.close()
    _index(folder, ["train"], ["png"])
    return folder / ".nv-meta" / "dataset.yaml"


def read_shards(folder: Path, *, trust_code: bool = False) -> None:
    source = SourceConfig("energon", str(folder), trust_code=trust_code)
    cache = str(folder / "cache")
    config = DataConfig(seq_length=128, vocab_size=300, cache_dir=cache, sources=(source,))
    prepare(config, 14, 0, Dealing()).sample("train", 0)


def described(**settings: object) -> Bait:
    """Shards whose dataset.yaml has these settings; FOLDER stands for theirs."""

    def write(folder: Path, marker: Path) -> None:
        dataset = shards(folder)
        (folder / ".nv-meta" / "evil.py").write_text(
            f"open({str(marker)!r}, 'w')\n"
            "def sample_loader(sample):\n    return dict(image=sample['png'], caption='a')\n"
            "def part_filter(part):\n    return part == 'png'\n"
        )
        (folder / "evil_module.py").write_text(
            f"open({str(marker)!r}, 'w')\nfrom megatron.energon import CaptioningSample as Evil\n"
            "def evil(**settings):\n    raise ValueError\n"
        )
        text = yaml.safe_dump(yaml.safe_load(dataset.read_text()) | settings)
        text = text.replace("FOLDER", str(folder))
        if "sample_loader" in settings or "__module__" in settings:
            text = yaml.safe_dump({k: v for k, v in yaml.safe_load(text).items() if k in settings})
        dataset.write_text(text)

    return write


def pickled(suffix: str) -> Bait:
    """Shards whose captions are pickles."""

    def write(folder: Path, marker: Path) -> None:
        content = io.BytesIO()
        if suffix == "pth":
            torch.save(Touch(marker), content)
        else:
            pickle.dump(Touch(marker), content)
        part = content.getvalue()
        part = gzip.compress(part) if suffix.endswith(".gz") else part
        dataset = shards(folder, {suffix: part})
        dataset.write_text(dataset.read_text().replace("caption: txt", f"caption: {suffix}"))

    return write


ENERGON_TYPE = {"__module__": "megatron.energon", "__class__": "CaptioningSample"}
LOADER = {"sample_type": ENERGON_TYPE, "sample_loader": "evil.py", "part_filter": "evil.py"}
TOUCH = {"__module__": "evil_module", "__function__": "evil"}
SHARDS: dict[str, Bait] = {
    "sample_loader": described(**LOADER),
    "sample_loader elsewhere": described(
        **LOADER | {"sample_loader": "FOLDER/.nv-meta/evil.py:sample_loader"}
    ),
    "sample_type of a module": described(
        sample_type={"__module__": "evil_module", "__class__": "Evil"}
    ),
    "a class of a module": described(__module__="evil_module", __class__="Evil"),
    "a function that is called": described(**TOUCH),
    "a function in another setting": described(part_filter=TOUCH),
    "a pickle": pickled("pkl"),
    "a pickle called pickle": pickled("pickle"),
    "a pickle called pyd": pickled("pyd"),
    "a compressed pickle": pickled("pkl.gz"),
    "a torch file": pickled("pth"),
}


def check(marker: Path, read: Callable[[], object]) -> None:
    try:
        read()
    except (PretrainError, ValueError) as error:
        assert str(error) and "\n" not in str(error)
    assert not marker.exists()


@pytest.mark.parametrize("name", SHARDS)
def test_shards_run_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    folder, marker = tmp_path / "shards", tmp_path / "marker"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    SHARDS[name](folder, marker)
    check(marker, lambda: read_shards(folder))
    sys.modules.pop("evil_module", None)
    with suppress(PretrainError):
        read_shards(folder, trust_code=True)
    assert marker.exists()  # the bait is alive: with trust, energon takes it
    sys.modules.pop("evil_module", None)


@pytest.mark.parametrize("file", ["split.yaml", "dataset.yaml"])
def test_descriptions_of_shards_run_no_code(tmp_path: Path, file: str) -> None:
    folder, marker = tmp_path / "shards", tmp_path / "marker"
    folder.mkdir()
    shards(folder)
    tag = f"!!python/object/apply:os.system ['touch {marker}']\n"
    (folder / ".nv-meta" / file).write_text(f"split_parts: {tag}")
    check(marker, lambda: read_shards(folder))
    check(marker, lambda: read_shards(folder, trust_code=True))


@pytest.mark.parametrize("name", ["a.eps", "a.ps", "a.jpg", "a"])
def test_postscript_is_given_to_no_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Pillow runs Ghostscript for it, whatever the file is called."""
    marker, program = tmp_path / "marker", tmp_path / "gs"
    program.write_text(f"#!/bin/sh\ntouch {marker}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)
    path = tmp_path / name
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    media = Media((str(path),), moving=False)
    check(marker, lambda: sources.measure(media, 1))
    check(marker, lambda: list(sources.frames(media, 1)))
    with pytest.raises(OSError), Image.open(path) as image:  # the bait is alive
        image.load()
    assert marker.exists()
