"""From files with images as people have them to the suggested configuration, and to a step."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pytest
import webdataset
import yaml
from pyarrow import parquet

from pretrain.data.tools.recognize import recognize
from pretrain.errors import PretrainError
from tests.pretrain.data.tools import suggested
from tests.pretrain.data.tools.suggested import Layout
from tests.pretrain.data.vision_text import make

IMAGES = {"type": "images"}
CAPTIONED = "images or videos with captions"
LAYOUTS = {
    "an imagefolder": Layout(
        "folder", make.imagefolder, "a folder of images with metadata.jsonl", [IMAGES]
    ),
    "splits of an imagefolder": Layout(
        "splits",
        make.imagefolder_splits,
        "a folder of images with metadata.csv; its splits: test, train",
        [
            {**IMAGES, "path": "splits/test", "field": "additional_feature", "split": "held_out"},
            {**IMAGES, "path": "splits/train", "field": "additional_feature", "split": "train"},
        ],
    ),
    "images and text files": Layout(
        "captioned", make.captioned, "24 images with captions", [IMAGES]
    ),
    "formats of Pillow": Layout(
        "formats", make.pillow_formats, "a folder of images with metadata.jsonl", [IMAGES]
    ),
    "videos, also with pixels that are not square": Layout(
        "films", make.video_folder, "a folder of images with metadata.jsonl", [IMAGES]
    ),
    "several captions": Layout(
        "captions.parquet",
        make.several_captions,
        f"a file of Parquet, 2 columns; {CAPTIONED}",
        [{**IMAGES, "field": "captions"}],
    ),
    "a compressed shard": Layout(
        "packed.tar.gz", make.compressed_shard, "1 WebDataset shard", [IMAGES]
    ),
    "shards with an index": Layout(
        "energon", make.energon_shards, "shards for megatron-energon", [{"type": "energon"}]
    ),
    "several images for a text": Layout(
        "several", make.several_images, "a folder of images with metadata.parquet", [IMAGES]
    ),
    "Parquet of datasets": Layout(
        "a.parquet",
        lambda path: make.dataset().to_parquet(path),
        f"a file of Parquet, 3 columns; {CAPTIONED}",
        [IMAGES],
    ),
    "a saved dataset": Layout(
        "saved",
        lambda path: make.dataset().save_to_disk(str(path), num_shards=2),
        f"2 files of Arrow, 3 columns; {CAPTIONED}",
        [IMAGES],
    ),
    "saved splits": Layout(
        "saved_splits",
        make.saved_splits,
        "a saved dataset with the splits train, test",
        [
            {**IMAGES, "path": "saved_splits/train", "split": "train"},
            {**IMAGES, "path": "saved_splits/test", "split": "held_out"},
        ],
    ),
    "lists of images": Layout(
        "lists.parquet",
        make.image_lists,
        f"a file of Parquet, 2 columns; {CAPTIONED}",
        [{**IMAGES, "field": "summary"}],
    ),
    "Parquet of img2dataset": Layout(
        "00000.parquet",
        make.img2dataset_parquet,
        f"a file of Parquet, 5 columns; {CAPTIONED}",
        [IMAGES],
    ),
    "shards of img2dataset": Layout(
        "shards", make.img2dataset_shards, "2 WebDataset shards", [IMAGES]
    ),
    "videos in shards": Layout("videos", make.videos_in_shards, "1 WebDataset shard", [IMAGES]),
    "OBELICS in Parquet": Layout(
        "obelics.parquet",
        make.obelics_parquet,
        "a file of Parquet, 3 columns; documents as in OBELICS",
        [IMAGES],
    ),
    "OBELICS in JSON": Layout(
        "obelics", make.obelics_lines, "a file of JSON lines; documents as in OBELICS", [IMAGES]
    ),
    "MMC4": Layout("mmc4", make.mmc4, "a file of JSON lines; documents as in MMC4", [IMAGES]),
    "MMC4 with an archive": Layout(
        "archived", make.mmc4_archived, "a file of JSON lines; documents as in MMC4", [IMAGES]
    ),
    "MDS": Layout("mds", make.mds, "compressed MDS shards of MosaicML", [IMAGES]),
    "MDS, not compressed": Layout("plain_mds", make.plain_mds, "MDS shards of MosaicML", [IMAGES]),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, list[Any]]]:
    """The suggested configuration of each layout, and the metrics of a step with it."""
    return suggested.train(tmp_path_factory.mktemp("layouts"), LAYOUTS, make.CAPTIONS)


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_suggested_configuration_trains(
    trained: dict[str, tuple[str, list[Any]]], name: str
) -> None:
    layout = LAYOUTS[name]
    text, steps = trained[name]
    assert text.splitlines()[0] == f"# {layout.file}: {layout.description}"
    entries = [{"path": layout.file} | entry for entry in layout.entries]
    assert yaml.safe_load(text) == {"data": {"sources": entries}}
    assert [step["step"] for step in steps] == [0, 1]
    interleaved = "documents as in" in layout.description
    assert steps[1]["text_loss" if interleaved else "caption_loss"] > 0


def test_shards_are_recognized_by_file_and_pattern(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make.img2dataset_shards(Path("shards"))
    make.mds(Path("mds"))
    for path in ("shards/00000.tar", "shards/*.tar", "shards/{00000..00001}.tar"):
        found = recognize(path)
        assert found.entries == [{"type": "images", "path": path}]
        assert "WebDataset shard" in found.description
    assert recognize("mds/shard.00000.mds.zstd").entries[0]["type"] == "images"


def test_columns_are_suggested_by_name_and_type(tmp_path: Path) -> None:
    image = {"bytes": make.encoded(0), "path": "a.png"}
    rows: dict[str, Any] = {"left": [image], "right": [image], "sha256": ["ab" * 32], "alt": ["a"]}
    parquet.write_table(pa.table(rows), tmp_path / "a.parquet")
    (entry,) = recognize(str(tmp_path / "a.parquet")).entries
    assert (entry["field"], entry["image_field"]) == ("alt", "left")


@pytest.mark.parametrize("name", ["a.tar.gz", "a.tar"])
def test_a_compressed_shard_is_not_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    make.compressed_shard(tmp_path / "a.tar.gz")
    (tmp_path / "a.tar.gz").rename(name)
    assert recognize(name).entries == [{"type": "images", "path": name}]
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("key", ["img", "image_path", "filename", "picture"])
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_names_of_images_are_recognized_under_any_key(
    tmp_path: Path, key: str, suffix: str
) -> None:
    rows = [{"caption": "a cat", key: "pictures/a.PNG"}, {"caption": "a dog", key: "b.jpg"}]
    path = tmp_path / f"a{suffix}"
    make.jsonl(path, rows) if suffix == ".jsonl" else pd.DataFrame(rows).to_parquet(path)
    (entry,) = recognize(str(path)).entries
    assert entry == {"type": "images", "path": str(path), "image_field": key}


def test_single_values_do_not_change_the_kind_of_a_key(tmp_path: Path) -> None:
    rows = [{"image": value, "caption": "a"} for value in ("a.png", "b.png", 5, ["c.png"])]
    make.jsonl(tmp_path / "a.jsonl", rows)
    assert recognize(str(tmp_path / "a.jsonl")).entries[0]["type"] == "images"
    rows = [{"file_name": "a.png", "text": "a"}, {"file_names": ["a.png", "b.png"], "text": "b"}]
    make.pictures(tmp_path / "folder", 1)
    make.jsonl(tmp_path / "folder" / "metadata.jsonl", rows)
    assert "image_field" not in recognize(str(tmp_path / "folder")).entries[0]


def foreign_urls(path: Path) -> None:
    pd.DataFrame({"image": ["s3://a/a.png"], "text": ["a"]}).to_parquet(path)


def urls(count: int) -> list[str]:
    return [f"https://{number}.org/a.png" for number in range(count)]


def captions_by_url(path: Path) -> None:
    pd.DataFrame({"image": urls(2), "text": ["a", "b"]}).to_parquet(path)


def chat_by_url(path: Path) -> None:
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls(4)]
    reply = {"role": "assistant", "content": "a"}
    path.write_text(json.dumps({"messages": [{"role": "user", "content": parts}, reply]}) + "\n")


def laion(path: Path) -> None:
    columns = {"URL": ["https://a.org"], "TEXT": ["a"], "WIDTH": [9], "HEIGHT": [9]}
    pd.DataFrame(columns).to_parquet(path)


def text_mds(path: Path) -> None:
    make.plain_mds(path)
    shard = path / "shard.00000.mds"
    shard.write_bytes(shard.read_bytes().replace(b'"jpeg"', b'"json"', 1))


def obelics_of_urls(path: Path) -> None:
    rows = {"images": [["https://a.org/a.png", None]], "texts": [[None, "a"]]}
    pd.DataFrame(rows).to_parquet(path)


def classes(path: Path) -> None:
    for name in ("cat", "dog"):
        make.pictures(path / name, 2)


def labelled(path: Path) -> None:
    make.dataset().remove_columns("caption").to_parquet(path)


def sound(path: Path) -> None:
    stored = {"bytes": b"RIFF", "path": "a.wav"}  # as datasets.Audio stores it
    parquet.write_table(pa.table({"audio": [stored], "text": ["a"]}), path)


def coco(path: Path) -> None:
    annotations = [{"image_id": 1, "caption": "a"}]
    images = [{"id": 1, "file_name": "a.jpg"}]
    path.write_text(json.dumps({"info": {}, "images": images, "annotations": annotations}))


def brotli_mds(path: Path) -> None:
    """As MDSWriter names it with compression="br"; the index is that of such a folder."""
    path.mkdir()
    (path / "shard.00000.mds.br").write_bytes(b"\x0b\x02\x80hello\x03")
    shard = {"raw_data": {"basename": "shard.00000.mds"}, "compression": "br", "format": "mds"}
    (path / "index.json").write_text(json.dumps({"shards": [shard], "version": 2}))


def labelled_shards(path: Path) -> None:
    with webdataset.TarWriter(str(path)) as writer:
        writer.write({"__key__": "a", "png": make.encoded(0), "cls": 3})


def cauldron(path: Path) -> None:
    stored = [{"bytes": make.encoded(0), "path": None}]
    rows = {"images": [stored], "texts": [[{"user": "a", "assistant": "b", "source": "c"}]]}
    parquet.write_table(pa.table(rows), path)


def named_elsewhere(path: Path) -> None:
    make.pictures(path, 1)
    make.jsonl(path / "llava.json", [{"image": "0.png", "conversations": []}])


def csv_of_classes(path: Path) -> None:
    make.pictures(path, 1)
    (path / "metadata.csv").write_text("file_name,label\n000.png,1\n")


REFUSED: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "the Cauldron": ("a.parquet", cauldron, "as in the Cauldron, which is not read: write its"),
    "described elsewhere": ("a", named_elsewhere, r"inspect a file that .* \(llava.json\), or"),
    "metadata of classes": ("a", csv_of_classes, "no captions in its fields, which are file_name"),
    "images in base64": (
        "a.jsonl",
        lambda path: make.jsonl(path, [{"image": "abcd" * 99, "text": "a"}]),
        "images and text that are not read: its image is in base64",
    ),
    "sound": ("a.parquet", sound, "sound, which is not read: set field to the text"),
    "COCO": ("a.json", coco, "annotations as in COCO, which is not read: write a line for each"),
    "MDS with Brotli": ("a", brotli_mds, "MDS, .*: compressed with Brotli: write it again with"),
    "answers about images": (
        "a.jsonl",
        lambda path: make.jsonl(path, [{"image": "a.png", "question": "b", "answer": "c"}]),
        "'question' with its reply in 'answer', .*: write them as instruction and output",
    ),
    "images by URL": ("a.parquet", foreign_urls, "URLs of other schemes than http, .*download"),
    "LAION": ("a.parquet", laion, "URLs of images, as in LAION, .*img2dataset"),
    "MDS of text": ("a", text_mds, "MosaicML's MDS, .*: it has no images, only .*: convert it to"),
    "folders of classes": ("a", classes, "images without captions, .* write metadata.jsonl"),
    "a column of classes": ("a.parquet", labelled, "no captions in its fields"),
    "shards of classes": ("a.tar", labelled_shards, "WebDataset shards, .*: no caption"),
    "a damaged shard": ("a.tar", lambda path: path.write_bytes(b"\1" * 999), "a damaged archive"),
    "a damaged shard of MosaicML": (
        "a.mds",
        lambda path: path.write_bytes(b"\1" * 999),
        "MosaicML's MDS, .*its header is damaged",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_layouts_without_captions_or_images_are_refused_by_name(tmp_path: Path, name: str) -> None:
    file, write, message = REFUSED[name]
    write(tmp_path / file)
    with pytest.raises(PretrainError, match=message) as raised:
        recognize(str(tmp_path / file))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("file", "write", "type", "hosts"),
    [
        ("a.parquet", captions_by_url, "images", ["0.org", "1.org"]),
        ("a.parquet", obelics_of_urls, "images", ["a.org"]),
        ("a.jsonl", chat_by_url, "vision_chat", ["*"]),
    ],
)
def test_the_hosts_of_urls_are_suggested(
    tmp_path: Path, file: str, write: Callable[[Path], None], type: str, hosts: list[str]
) -> None:
    write(tmp_path / file)
    found = recognize(str(tmp_path / file))
    expected = {"type": type, "path": str(tmp_path / file), "media_urls": hosts}
    assert [{k: v for k, v in one.items() if k != "field"} for one in found.entries] == [expected]
    assert "images are copied from the hosts in media_urls" in found.description
