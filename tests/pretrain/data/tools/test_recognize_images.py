"""From files with images as people have them to the suggested configuration, and to a step."""

from typing import Any

import pytest
import yaml

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
    assert steps[1]["loss"] > 0
