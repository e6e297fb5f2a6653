"""Every file in a folder of images is read or listed with the reason, and none ends the run."""

import json
import os
import shutil
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pretrain import cli
from pretrain.config import DataConfig, SourceConfig
from pretrain.data import open_data, skipped
from pretrain.data.mixture.data import MixtureData
from pretrain.data.tools import shards as shards_tool
from pretrain.data.tools.shards import make_shards
from pretrain.errors import PretrainError
from tests.pretrain.data import make
from tests.pretrain.data.media.test_pixels import MODES, file


def opened(folder: Path, **settings: object) -> MixtureData:
    config = DataConfig(
        seq_length=128,
        vocab_size=300,
        held_out=0,
        cache_dir=str(folder.parent / "cache"),
        sources=(SourceConfig("images", str(folder)),),
        **settings,  # type: ignore[arg-type]
    )
    data = open_data(config, 14, 0)
    assert isinstance(data, MixtureData)
    return data


def read(data: MixtureData) -> set[str]:
    """The names of all documents."""
    (documents,) = data._documents
    return {documents.describe(int(number))[0].name for number in documents.numbers["train"]}


def unusual_files(folder: Path) -> dict[str, str]:
    """Write a folder of unusual files; return the reasons for those that are not read, by name."""
    pictures = make.captioned_folder(folder, 2)
    image, _ = MODES["RGB"](np.random.default_rng(0))
    read = {"a.JPG": "JPEG", "b.avif": "AVIF", "c.ppm": "PPM", "d": "PNG", "e.dat": "WEBP"}
    read |= {"f.jp2": "JPEG2000", "g.Tga": "TGA", "h.x.png": "PNG"}
    for name, kind in read.items():
        (pictures / name).write_bytes(file(image, kind))
        (pictures / name).with_suffix(".txt").write_text(f"caption of {name}")
    (pictures / "upper.png").write_bytes(file(image, "PNG"))
    (pictures / "upper.TXT").write_text("\ufeffcaption")
    (pictures / "one.png").write_bytes(file(Image.new("RGB", (1, 1)), "PNG"))
    (pictures / "one.txt").write_text("one pixel")
    reasons = {
        "lonely.png": "no caption lonely.txt in its folder",
        "orphan.txt": "a caption without an image of its name",
        "blank.txt": "no text in it",
        "latin.txt": "not UTF-8 (byte 0xe9",
        "notes.json": "neither an image nor a caption",
        "film.mp4": "a video: name it in captions.jsonl",
        "empty.png": "cannot identify image file",
        "damaged.jpg": "cannot identify image file",
        "cut.png": "Truncated File Read",
        "wide.png": "more than the 178,956,970 pixels that are read",
        "long.png": "do not fit data.seq_length",
        "broken.png": "cannot be read: No such file",
        "pipe.png": "neither a file nor a folder",
        "caption_pipe.txt": "not a regular file",
        ".hidden.png": "hidden",
    }
    (pictures / "lonely.png").write_bytes(file(image, "PNG"))
    for name in ("blank", "latin"):
        (pictures / f"{name}.png").write_bytes(file(image, "PNG"))
    for name in ("empty", "damaged", "cut", "wide", "long", "broken"):
        (pictures / f"{name}.txt").write_text("caption")
    (pictures / "orphan.txt").write_text("caption")
    (pictures / "blank.txt").write_text(" \n")
    (pictures / "latin.txt").write_bytes("é".encode("latin-1"))
    (pictures / "notes.json").write_text("{}")
    (pictures / "film.mp4").write_bytes(b"")
    (pictures / "empty.png").write_bytes(b"")
    (pictures / "damaged.jpg").write_bytes(b"not an image")
    (pictures / "cut.png").write_bytes(file(image, "PNG")[:20])
    wide = bytearray(file(image, "PNG"))
    wide[16:24] = (30000).to_bytes(4, "big") * 2
    wide[29:33] = zlib.crc32(wide[12:29]).to_bytes(4, "big")
    (pictures / "wide.png").write_bytes(wide)
    (pictures / "long.png").write_bytes(file(Image.new("L", (10000, 1)), "PNG"))
    (pictures / "broken.png").symlink_to("nowhere")
    os.mkfifo(pictures / "pipe.png")
    (pictures / "caption_pipe.png").write_bytes(file(image, "PNG"))
    os.mkfifo(pictures / "caption_pipe.txt")  # reading it would wait for a writer
    (pictures / ".hidden.png").write_bytes(file(image, "PNG"))
    return reasons


def test_every_file_is_read_or_listed_with_the_reason(tmp_path: Path) -> None:
    reasons = unusual_files(tmp_path / "pictures")
    data = opened(tmp_path / "pictures")
    listed = {Path(skip.name).name: skip.reason for skip in data.take_skipped()}
    assert listed.keys() == reasons.keys() | {"broken.txt"}
    for name, reason in reasons.items():
        assert reason in listed[name], name
    expected = {"000.png", "001.png", "a.JPG", "b.avif", "c.ppm", "d", "e.dat", "f.jp2", "g.Tga"}
    expected |= {"h.x.png", "upper.png", "one.png"}
    assert {Path(name).name for name in read(data)} == expected
    for index in range(8):
        data.sample("train", index)
    assert not data.take_skipped()


def test_make_shards_reads_and_lists_the_same_files(tmp_path: Path) -> None:
    reasons = unusual_files(tmp_path / "pictures")
    counts, skips = make_shards(tmp_path / "pictures", tmp_path / "shards", held_out=0)
    listed = {Path(skip.name).name for skip in skips}
    assert listed == (reasons.keys() | {"broken.txt"}) - {"long.png"}  # no length is known here
    assert counts["train"] == 13


def test_links_are_followed_and_cycles_end(tmp_path: Path) -> None:
    pictures = make.captioned_folder(tmp_path / "pictures", 2)
    make.captioned_folder(tmp_path / "elsewhere" / "below", 3)
    (pictures / "link").symlink_to(tmp_path / "elsewhere")
    (pictures / "link" / "circle").symlink_to(pictures)
    data = opened(pictures)
    assert len(read(data)) == 5
    (skip,) = data.take_skipped()
    assert skip.name.endswith("link/circle") and "read already" in skip.reason
    counts, _ = make_shards(pictures, tmp_path / "shards", held_out=0)
    assert counts["train"] == 5


def test_unnamed_images_and_cycles_of_links_are_listed(
    tmp_path: Path,
) -> None:
    pictures = make.captioned_folder(tmp_path / "pictures", 3)
    lines = [{"image": "000.png", "caption": "a"}, {"image": "./001.png", "caption": "b"}]
    (pictures / "loop.png").symlink_to("loop.png")
    lines.append({"image": "loop.png", "caption": "c"})
    (pictures / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    data = opened(pictures)
    listed = {Path(skip.name).name: skip.reason for skip in data.take_skipped()}
    assert "loop" in listed["captions.jsonl:3"].lower()
    assert listed["002.png"] == "not named in captions.jsonl"
    assert len(listed) == 2 and len(read(data)) == 2


def test_file_names_that_are_not_utf8_are_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures = make.captioned_folder(tmp_path / "pictures", 3)
    for name in (b"caf\xe9", b"\xff\xfe"):
        for suffix in (b".png", b".txt"):
            source = os.fsencode(pictures / "000") + suffix
            shutil.copy(source, os.fsencode(pictures) + b"/" + name + suffix)
    shutil.copy(pictures / "000.png", os.fsencode(pictures) + b"/alone\xe9.png")
    (pictures / os.fsdecode(b"sub\xe9")).mkdir()
    make.captioned_folder(pictures / os.fsdecode(b"sub\xe9"), 1)
    data = opened(pictures)
    assert len(read(data)) == 6
    for index in range(4):
        data.sample("train", index)
    (skip,) = data.take_skipped()
    assert "no caption" in skip.reason
    config = tmp_path / "config.yaml"
    config.write_text("vision: {num_layers: 1, hidden_size: 64, num_heads: 4}\n")
    source = f"data.sources=[{{type: images, path: {pictures}}}]"
    options = ["data.vocab_size=300", f"data.cache_dir={tmp_path / 'cache'}"]
    page = ["--out", str(tmp_path / "page.html")]
    assert cli.main(["data", "inspect", str(config), source, *options, *page]) == 0
    shards = str(tmp_path / "shards")
    assert cli.main(["data", "make-shards", str(pictures), shards, "--held-out", "0"]) == 0
    assert "6 pairs" in capsys.readouterr().out


def test_a_folder_without_images_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(PretrainError, match=r"sources\[0\].path: the folder \S* has no images"):
        opened(tmp_path)


def test_shards_appear_when_all_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another job cannot write into the same folder, and nothing is left of a failure."""
    pytest.importorskip("megatron.energon")
    pictures, out = make.captioned_folder(tmp_path / "pictures", 2), tmp_path / "shards"
    index = shards_tool._index

    def other_job(*arguments: Any) -> None:
        assert not out.exists()
        monkeypatch.setattr(shards_tool, "_index", index)
        shards_tool.make_shards(pictures, out)
        index(*arguments)

    monkeypatch.setattr(shards_tool, "_index", other_job)
    with pytest.raises(PretrainError, match=r"cannot write .*shards: Directory not empty"):
        shards_tool.make_shards(pictures, out)
    assert {path.name for path in tmp_path.iterdir()} == {"pictures", "shards"}


def test_make_shards_lists_all_skipped_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("megatron.energon")
    pictures = make.captioned_folder(tmp_path / "pictures", 2)
    for number in range(11):
        (pictures / f"damaged{number}.png").write_bytes(b"not an image")
        (pictures / f"damaged{number}.txt").write_text("caption")
    shards = tmp_path / "shards"
    assert cli.main(["data", "make-shards", str(pictures), str(shards), "--held-out", "0"]) == 0
    assert f"and 1 more; all of them: {shards / 'skipped.jsonl'}" in capsys.readouterr().out
    assert len(skipped.read(shards / "skipped.jsonl")) == 11
