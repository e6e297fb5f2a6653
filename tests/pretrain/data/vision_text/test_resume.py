"""Runs resume at the exact document of every layout, and decode only what they use."""

import itertools
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.config import DataConfig, SourceConfig
from pretrain.data import open_data
from pretrain.data.cache import Stamp
from pretrain.data.interface import RankShare
from pretrain.data.media import frames
from pretrain.data.media.span import Span
from pretrain.data.mixture.data import MixtureData
from pretrain.data.sources import described
from tests.pretrain.data.vision_text import make

SOURCES: dict[str, tuple[Any, dict[str, str]]] = {
    "folder": (make.imagefolder, {}),
    "a.parquet": (lambda path: make.dataset().to_parquet(path), {}),
    "saved": (lambda path: make.dataset().save_to_disk(str(path)), {}),
    "lists.parquet": (make.image_lists, {"field": "summary"}),
    "shards": (make.img2dataset_shards, {}),
    "videos": (make.videos_in_shards, {}),
    "obelics.parquet": (make.obelics_parquet, {}),
    "mmc4": (make.mmc4, {}),
    "archived": (make.mmc4_archived, {}),
    "mds": (make.mds, {}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sources")
    for name, (write, _) in SOURCES.items():
        write(root / "data" / name if "." not in name else _parent(root / "data" / name))
    return root


def _parent(path: Path) -> Path:
    path.parent.mkdir(exist_ok=True)
    return path


def opened(folder: Path, names: Any = SOURCES, ranks: int = 1, rank: int = 0) -> MixtureData:
    config = DataConfig(
        seq_length=128,
        vocab_size=400,
        held_out=0.1,
        cache_dir=str(folder / "cache"),
        sources=tuple(
            SourceConfig("images", str(folder / "data" / name), **SOURCES[name][1])  # type: ignore[arg-type]
            for name in names
        ),
    )
    data = open_data(config, 14, 3, RankShare(rank, ranks, 2))
    assert isinstance(data, MixtureData)
    return data


def sequences(data: MixtureData, numbers: range) -> list[Any]:
    samples = data.samples("train", numbers)
    return [(s.tokens.tolist(), s.patches.tolist(), s.grids.tolist()) for s in samples]


@settings(max_examples=5, deadline=None)
@given(st.integers(0, 12))
def test_a_mixture_of_all_layouts_resumes_exactly(folder: Path, step: int) -> None:
    data = opened(folder)
    numbers = range(2 * step, 2 * step + 4)
    expected = sequences(data, numbers)
    state = json.loads(json.dumps(data.state_dict(step)))
    again = opened(folder, ranks=2, rank=1)
    again.load_state_dict([state])
    assert sequences(again, numbers) == expected


@pytest.mark.parametrize("name", SOURCES)
def test_every_document_is_read_once_an_epoch(folder: Path, name: str) -> None:
    data = opened(folder, [name])
    (documents,) = data._documents
    count = documents.count("train")
    stream = data._stream("train")
    read = [segment.number for _ in range(count) for segment in stream.next()][:count]
    assert len(set(read)) == count >= 4
    assert not data.take_skipped() or all(not skip.corrupt for skip in data._skips_at_opening)


def test_a_moved_folder_and_a_new_cache_have_the_same_documents(
    folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(folder / "data", tmp_path / "data")
    data, moved = opened(folder), opened(tmp_path)
    assert moved.fingerprint == data.fingerprint
    moved.load_state_dict([json.loads(json.dumps(data.state_dict(1)))])
    assert sequences(moved, range(2, 4)) == sequences(data, range(2, 4))


def test_copies_that_are_removed_from_the_cache_are_made_again(
    folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(folder / "data", tmp_path / "data")
    names = ["a.parquet", "mds"]
    expected = sequences(opened(tmp_path, names), range(4))
    for copy in itertools.chain(
        (tmp_path / "cache").glob("stored-*"), (tmp_path / "cache").glob("unpacked-*")
    ):
        shutil.rmtree(copy)
    assert sequences(opened(tmp_path, names), range(4)) == expected


def test_without_pixels_no_image_is_opened(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = opened(folder)
    expected = [sample.grids.tolist() for sample in data.samples("train", range(4))]
    monkeypatch.setattr(Span, "open", lambda span: pytest.fail(f"{span} is opened"))
    monkeypatch.setattr(frames, "read", lambda media, fps: pytest.fail(f"{media} is read"))
    samples = data.samples("train", range(4), pixels=False)
    assert [sample.grids.tolist() for sample in samples] == expected
    assert all(len(sample.patches) == 0 for sample in samples)


def test_nothing_is_stamped_or_kept_for_images_in_shards_and_tables(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stamped: list[Path] = []
    plain = described.stamp

    def counted(path: Path) -> Stamp:
        stamped.append(path)
        return plain(path)

    monkeypatch.setattr(described, "stamp", counted)
    shutil.copytree(folder / "data", tmp_path / "data")
    names = ["a.parquet", "saved", "lists.parquet", "shards", "obelics.parquet", "mds"]
    data = opened(tmp_path, names)
    assert len(stamped) == 8  # as many as files
    for index in (tmp_path / "cache").glob("vision-*"):
        assert json.loads((index / "measured").read_text()) == {"lines": 0}
    assert np.mean([documents.count("train") for documents in data._documents]) > 15


def test_several_processes_open_new_data_at_once(folder: Path, tmp_path: Path) -> None:
    """Copies and indexes are written to the cache alone; threads stand for processes, since files
    are locked by descriptor."""
    shutil.copytree(folder / "data", tmp_path / "data")
    before = sorted((tmp_path / "data").rglob("*"))
    names = ["a.parquet", "shards", "archived", "mds"]
    with ThreadPoolExecutor(3) as pool:
        opening = [pool.submit(opened, tmp_path, names) for _ in range(3)]
    assert len({data.result().fingerprint for data in opening}) == 1
    assert sorted((tmp_path / "data").rglob("*")) == before
    assert not list((tmp_path / "cache").glob("unfinished-*"))
