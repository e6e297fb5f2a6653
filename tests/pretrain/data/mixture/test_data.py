"""Mixtures read every document once, keep their shares, and skip or name what is wrong."""

import dataclasses
import gzip
import hashlib
import itertools
import json
import logging
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pretrain.config import DataConfig, SourceConfig
from pretrain.data import Category, PackedSample, RankShare, open_data
from pretrain.data.composer import Composer
from pretrain.data.mixture.data import MixtureData
from pretrain.data.mixture.stream import Sequences
from pretrain.errors import PretrainError
from tests.pretrain.data import make
from tests.pretrain.data.builtin.test_dataset import same
from tests.pretrain.data.test_packing import check_with

PATCH = 14
LENGTH = 128


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("own")
    make.captioned_folder(folder / "pictures", 60)
    make.jsonl(folder / "text" / "a.jsonl", range(60))
    make.jsonl(folder / "text" / "b.jsonl.gz", range(60, 90))
    make.jsonl(folder / "text" / "deeper" / "c.jsonl.zst", range(90, 120))
    (folder / "text" / "d.txt").write_text(make.text(120))
    make.jsonl(folder / "more.jsonl", range(200, 260), field="body")
    return folder


def config(folder: Path, *sources: SourceConfig, **options: Any) -> DataConfig:
    options = {"seq_length": LENGTH, "vocab_size": 400, "held_out": 0.1} | options
    return DataConfig(sources=sources, cache_dir=str(folder / "cache"), **options)


def opened(folder: Path, *sources: SourceConfig, **options: Any) -> MixtureData:
    data = open_data(config(folder, *sources, **options), PATCH, 3)
    assert isinstance(data, MixtureData)
    return data


def both(folder: Path) -> tuple[SourceConfig, SourceConfig]:
    return (
        SourceConfig("text", str(folder / "text")),
        SourceConfig("images", str(folder / "pictures")),
    )


@pytest.fixture(scope="module")
def data(folder: Path) -> MixtureData:
    return opened(folder, *both(folder))


def test_sequences_are_full_and_labels_are_next_tokens(data: MixtureData) -> None:
    for split, index in itertools.product(("train", "held_out"), range(20)):
        sample = data.sample(split, index)  # type: ignore[arg-type]
        check_with(data.tokenizer, sample)
        assert sample.tokens.shape == (LENGTH,)
        # A document's end can take the place of padding: both are special, one is a label.
        assert (sample.tokens == data.tokenizer.pad).sum() <= 1


def test_sequences_can_be_read_in_any_order(data: MixtureData) -> None:
    far = {i: data.sample("train", i) for i in (0, 1, 3, 255, 256, 300, 599)}
    for index in (599, 3, 256, 255, 0, 300):
        assert same(data.sample("train", index), far[index])
    assert not same(far[0], far[1])


def test_every_epoch_reads_every_training_document_once(folder: Path) -> None:
    data = opened(folder, *both(folder))
    for documents, cursor in zip(data._documents, data._stream("train").cursors, strict=True):
        epochs = []
        for _ in range(2):
            whole: list[int] = []
            while len(whole) < documents.count("train"):
                segment = cursor.take(LENGTH)
                if segment.stop == documents.sizes_of(np.array([segment.number]))[0][0]:
                    whole.append(segment.number)
            assert sorted(whole) == list(documents.numbers["train"])
            epochs.append(whole)
        assert epochs[0] != epochs[1]


def test_cursors_of_all_ranks_read_every_document_once(data: MixtureData) -> None:
    (text, _) = data._documents
    cursors = [text.cursor("train", RankShare(rank, 3, 3)) for rank in range(3)]
    seen: list[int] = []
    while len(seen) < text.count("train"):
        cursor = cursors[len(seen) % 3]
        seen.append(cursor.take(10**6).number)
    assert sorted(seen) == list(text.numbers["train"])


@settings(deadline=None, max_examples=20)
@given(share=st.floats(0.02, 0.2), weight=st.floats(0.1, 10))
def test_shares_hold_at_every_sequence(
    data: MixtureData, folder: Path, share: float, weight: float
) -> None:
    sources = (
        SourceConfig("text", str(folder / "text")),
        SourceConfig("images", str(folder / "pictures")),
        SourceConfig("text", str(folder / "more.jsonl"), weight=weight, field="body"),
    )
    path = folder / "tokenizer.json"
    data.tokenizer.save(path)
    options = {"vision_share": share, "tokenizer": str(path)}
    stream = opened(folder, *sources, **options)._stream("train")
    placed = []
    for _ in range(100):
        stream.next()
        placed.append(stream.placeholders)
    # What is due is placed; at most one picture too many, or one that waits for room.
    largest = 30
    for count, so_far in enumerate(placed, 1):
        assert abs(so_far - share * LENGTH * count) <= largest
    # Drawn only when behind, a source gets ahead by one piece at most.
    one, _, other = (cursor.taken for cursor in stream.cursors)
    assert -weight * LENGTH <= other - weight * one <= LENGTH


@given(where=st.integers(0, 700), more=st.integers(0, 40))
@settings(deadline=None, max_examples=20)
def test_a_stream_resumes_from_its_state(data: MixtureData, where: int, more: int) -> None:
    sequences = Sequences(lambda: data._stream("train"))
    state = json.loads(json.dumps(sequences.state(where)))
    resumed = Sequences(lambda: data._stream("train"))
    resumed.restore(state)
    assert resumed[where + more] == sequences[where + more]
    assert resumed[max(0, where - 5)] == sequences[max(0, where - 5)]


@given(where=st.integers(0, 12), ahead=st.integers(0, 40))
@settings(deadline=None, max_examples=20)
def test_sequences_return_to_an_earlier_state(data: MixtureData, where: int, ahead: int) -> None:
    expected = Sequences(lambda: data._stream("train"))
    sequences = Sequences(lambda: data._stream("train"), interval=2, kept=4)
    state = Sequences(lambda: data._stream("train")).state(where)
    for index in range(where + ahead):
        sequences[index]
    sequences.restore(state)
    for index in range(where, where + 12):
        assert sequences[index] == expected[index]
        if index % 2:
            assert sequences.state(index + 1) == expected.state(index + 1)


def test_sequences_can_consist_of_images_or_text_alone(folder: Path) -> None:
    text, pictures = both(folder)
    data = opened(folder, pictures)
    for index in range(30):
        sample = data.sample("train", index)
        check_with(data.tokenizer, sample)
        assert (sample.tokens != data.tokenizer.pad).sum() > LENGTH / 2
    data = opened(folder, text)
    assert data.caption_documents("held_out", 4) == ([], [])
    assert not len(data.sample("train", 0).patches)


def test_swapped_captions_differ_only_in_their_images(data: MixtureData) -> None:
    right, swapped = data.caption_documents("held_out", 100)
    assert 2 <= len(right) == len(swapped) <= 12
    for one, other in zip(right, swapped, strict=True):
        captions = [
            [t for t, c in zip(d.tokens, d.categories, strict=True) if c == Category.CAPTION]
            for d in (one, other)
        ]
        assert captions[0] == captions[1]


def test_documents_mix_text_images_and_videos(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name in ("a.png", *(f"{n}.png" for n in range(6))):
        Image.fromarray(rng.integers(0, 255, (28, 56, 3), np.uint8)).save(tmp_path / name)
    frames = [Image.fromarray(rng.integers(0, 255, (28, 28), np.uint8)) for _ in range(5)]
    frames[0].save(tmp_path / "clip.gif", save_all=True, append_images=frames[1:])
    lines = [
        {"parts": [{"text": "before "}, {"image": "a.png"}, " between ", {"video": "clip.gif"}]},
        {"video": [f"{n}.png" for n in range(6)], "caption": "six frames"},
    ]
    path = tmp_path / "documents.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = opened(tmp_path, SourceConfig("images", str(path)), max_image_tokens=40, held_out=0)
    samples = [data.sample("train", index) for index in range(2)]
    grids = {tuple(grid) for sample in samples for grid in sample.grids.tolist()}
    # Clips are cut into items of four frames and what is left.
    assert grids == {(1, 2, 4), (4, 2, 2), (1, 2, 2), (4, 2, 4), (2, 2, 4)}
    words = data.tokenizer.decode(torch.cat([s.tokens for s in samples]).tolist())
    assert "before  between" in words and "six frames\n" in words
    for sample in samples:
        check_with(data.tokenizer, sample)


def film_and_pictures(folder: Path) -> SourceConfig:
    """Pairs, animations of several items, and documents that mix them."""
    make.captioned_folder(folder, 12)
    rng = np.random.default_rng(0)
    frames = [Image.fromarray(rng.integers(0, 255, (45, 60), np.uint8)) for _ in range(6)]
    frames[0].save(folder / "clip.gif", save_all=True, append_images=frames[1:])
    lines: list[Any] = [{"image": f"{n:03}.png", "caption": f"number {n}"} for n in range(12)]
    lines += [{"video": "clip.gif", "caption": "a film"}]
    lines += [{"parts": ["before ", {"image": "001.png"}, {"video": "clip.gif"}, "after"]}]
    path = folder / "captions.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return SourceConfig("images", str(folder))


def without_patches(sample: PackedSample) -> PackedSample:
    return dataclasses.replace(sample, patches=sample.patches[:0])


def test_sequences_without_pixels_differ_only_in_their_patches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = film_and_pictures(tmp_path)
    data = opened(tmp_path, source, max_image_tokens=40, held_out=0)
    expected = data.samples("train", range(20))
    assert any(len(sample.grids) > 1 for sample in expected)

    def refuse(*arguments: Any) -> None:
        raise AssertionError("an image was decoded")

    monkeypatch.setattr(Composer, "read", refuse)
    for sample, whole in zip(data.samples("train", range(20), pixels=False), expected, strict=True):
        assert len(whole.patches) and same(sample, without_patches(whole))


def test_images_are_decoded_at_the_same_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = film_and_pictures(tmp_path)
    expected = opened(tmp_path, source, held_out=0).samples("train", range(4))
    meeting, read = threading.Barrier(2), Composer.read

    def meet(composer: Composer, media: Any, shape: Any) -> Any:
        meeting.wait(60)  # for another thread that decodes
        return read(composer, media, shape)

    data = opened(tmp_path, source, held_out=0, decode_workers=2)
    read_together = data._read
    pictures = [s for s in data._segments("train", 0) if s.number < 12][:2]
    monkeypatch.setattr(Composer, "read", meet)
    assert len(read_together(pictures, True, ())) == 2
    monkeypatch.undo()
    again = data.samples("train", range(4))
    assert all(map(same, again, expected))


@pytest.mark.parametrize("workers", [1, 5])
def test_ranks_without_pixels_leave_out_what_others_could_not_read(
    tmp_path: Path, workers: int
) -> None:
    source = film_and_pictures(tmp_path)
    opened(tmp_path, source, held_out=0)  # makes the index
    for name in ("003.png", "007.png"):
        path, status = tmp_path / name, (tmp_path / name).stat()
        with path.open("r+b") as file:
            file.truncate(status.st_size - 30)  # noticed only when all of it is read
    data = opened(tmp_path, source, held_out=0, decode_workers=workers)
    read = data.samples("train", range(8))
    left_out = {document for sample in read for document in sample.left_out}
    skips = data.take_skipped()
    assert len(left_out) == 2 and {Path(s.name).name for s in skips} == {
        "captions.jsonl:4",
        "captions.jsonl:8",
    }
    assert same(read[3], opened(tmp_path, source, held_out=0, decode_workers=1).sample("train", 3))
    blind = data.samples("train", range(8), pixels=False, left_out=left_out)
    for sample, whole in zip(blind, read, strict=True):
        assert same(sample, without_patches(whole))
    assert not data.take_skipped(), "they are listed by the rank that read them"


def test_large_images_are_shrunk_and_long_documents_are_listed(
    tmp_path: Path,
) -> None:
    Image.new("RGB", (2000, 1500), "red").save(tmp_path / "large.jpg")
    Image.new("RGB", (40, 40), "red").save(tmp_path / "small.jpg")
    for name, text in (("large", "a large one"), ("small", "words " * 300)):
        (tmp_path / f"{name}.txt").write_text(text)
    data = opened(tmp_path, SourceConfig("images", str(tmp_path)))
    sample = data.sample("train", 0)
    _, rows, columns = sample.grids[0].tolist()
    assert LENGTH // 8 <= rows * columns // 4 <= LENGTH // 3
    assert columns / rows == pytest.approx(4 / 3, rel=0.15)
    (skip,) = data.take_skipped()
    assert skip.name.endswith("small.jpg") and not skip.corrupt
    assert f"tokens do not fit data.seq_length={LENGTH}" in skip.reason


def damaged(tmp_path: Path) -> tuple[SourceConfig, SourceConfig]:
    """Sources with one of every kind of damage among valid documents."""
    lines = [json.dumps({"text": make.text(0)}), "{not json", "[1]", json.dumps({"other": "x"})]
    lines += [json.dumps({"text": 3}), json.dumps({"text": " "}), '{"text": "\\ud800"}']
    text = tmp_path / "text"
    text.mkdir()
    (text / "lines.jsonl").write_text("\n".join(lines))
    packed = gzip.compress("\n".join(json.dumps({"text": "x" * n}) for n in range(1, 999)).encode())
    (text / "cut.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    make.jsonl(text / "cut.jsonl.zst", range(500))
    packed = (text / "cut.jsonl.zst").read_bytes()
    (text / "cut.jsonl.zst").write_bytes(packed[: len(packed) // 2])
    (text / "latin.txt").write_bytes("é".encode("latin-1"))
    pictures = make.captioned_folder(tmp_path / "pictures", 4)
    (pictures / "broken.png").write_bytes(b"not an image")
    (pictures / "whole.png").write_bytes((pictures / "000.png").read_bytes()[:-40])
    (tmp_path / "outside.png").write_bytes((pictures / "000.png").read_bytes())
    names = ["000.png", "missing.png", "broken.png", "whole.png", "../outside.png", "001.png"]
    documents: list[Any] = [{"image": name, "caption": "a picture"} for name in names]
    documents += [{"image": "000.png"}, {"parts": 3}, {"parts": [{"sound": "a.wav"}]}]
    documents += [{"video": "film.mp4", "caption": "a film"}]
    lines = [json.dumps(document) for document in documents]
    (pictures / "captions.jsonl").write_text("\n".join(lines))
    return SourceConfig("text", str(text)), SourceConfig("images", str(pictures))


def test_corrupt_documents_are_listed_with_the_reason(tmp_path: Path) -> None:
    sources = damaged(tmp_path)
    data = opened(tmp_path, *sources, held_out=0)
    for index in range(60):
        check_with(data.tokenizer, data.sample("train", index))
    listed = {Path(s.name).name: s.reason for s in data.take_skipped() if s.corrupt}
    reasons = {
        "lines.jsonl:2": "not JSON",
        "lines.jsonl:3": "not a JSON object",
        "lines.jsonl:4": "has no field 'text'",
        "lines.jsonl:5": "has no text in its field 'text'",
        "lines.jsonl:7": "surrogate",
        "cut.jsonl.gz": "cannot be read after line",
        "cut.jsonl.zst": "it ends in the middle of a frame",
        "latin.txt": "not UTF-8 (byte 0xe9 at 0): convert it",
        "captions.jsonl:2": "missing.png does not exist",
        "captions.jsonl:3": "cannot identify image file",
        "captions.jsonl:4": "truncated",  # noticed only when it is read
        "captions.jsonl:5": "../outside.png lies outside",
        "captions.jsonl:7": "no caption in",
        "captions.jsonl:8": "'parts' is not a list",
        "captions.jsonl:9": "neither an image, a video nor text",
        "captions.jsonl:10": "film.mp4 does not exist",
    }
    assert listed.keys() == reasons.keys()
    for name, reason in reasons.items():
        assert reason in listed[name]
    # The cache lists them again.
    again = {Path(s.name).name for s in opened(tmp_path, *sources, held_out=0).take_skipped()}
    unnamed = {"002.png", "003.png"}
    assert again - {"lines.jsonl:6"} == (reasons.keys() | unnamed) - {"captions.jsonl:4"}


def test_too_many_corrupt_documents_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(PretrainError) as error:
        opened(tmp_path, *damaged(tmp_path), held_out=0, max_corrupt=9)
    assert "10 samples are corrupt, more than data.max_corrupt=9; the latest: " in str(error.value)


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ({"path": "nowhere"}, {}, r"sources\[0\].path: \S*/nowhere does not exist"),
        ({"path": "*.jsonl.gz"}, {}, r"no file matches \S*/\*.jsonl.gz"),
        ({"path": "empty"}, {}, r"the folder \S*/empty has no files of text"),
        ({"type": "images", "path": "empty"}, {}, r"the folder \S*/empty has no images in it"),
        ({"type": "images", "path": "page.txt"}, {}, "is neither a folder nor a .jsonl file"),
        ({"path": "blank.jsonl"}, {}, r"blank.jsonl is empty"),
        (
            {"path": "fields.jsonl"},
            {},
            r"no field 'text', only body, id: set the source's field",
        ),
        ({"path": "page.txt", "split": "held_out"}, {}, "no documents to train on"),
        ({"path": "page.txt"}, {"tokenizer": "none.json"}, "cannot read the tokenizer none.json"),
        ({"type": "images", "path": "alone"}, {}, "none of the documents in .* can be used; the f"),
    ],
)
def test_wrong_settings_are_named(
    tmp_path: Path, source: dict[str, str], options: dict[str, Any], message: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "alone").mkdir()
    Image.new("RGB", (40, 40)).save(tmp_path / "alone" / "a.png")
    (tmp_path / "blank.jsonl").write_text("")
    (tmp_path / "page.txt").write_text(make.text(1))
    (tmp_path / "fields.jsonl").write_text('{"body": "x", "id": 3}\n')
    source["path"] = str(tmp_path / source["path"])
    with pytest.raises(PretrainError, match=message) as error:
        opened(tmp_path, SourceConfig(**source), **options)  # type: ignore[arg-type]
    assert "\n" not in str(error.value)


def test_the_share_of_images_is_known_before_training(folder: Path) -> None:
    text, pictures = both(folder)
    (folder / "long").mkdir()
    shutil.copy(next((folder / "pictures").glob("*.png")), folder / "long/a.png")
    (folder / "long/a.txt").write_text(make.text(3)[:80])
    long = SourceConfig("images", str(folder / "long"), weight=0.5)
    assert opened(folder, text, pictures, vision_share=0.05).image_share == 0.05
    assert opened(folder, text).image_share == 0
    for sources in ([pictures], [pictures, long]):
        data = opened(folder, *sources, vision_share=0.05)
        stream = data._stream("train")
        for _ in range(200):
            stream.next()
        taken = sum(cursor.taken for cursor in stream.cursors)
        assert data.image_share == pytest.approx(stream.placeholders / taken, rel=0.03)


def test_an_unreachable_vision_share_is_refused(folder: Path) -> None:
    text, pictures = both(folder)
    with pytest.raises(PretrainError, match=r"vision_share=0.3 cannot be met: only 0\.\d+ of the"):
        opened(folder, text, pictures, vision_share=0.3, max_image_tokens=1)
    with pytest.raises(PretrainError, match=r"vision_share=0 leaves data.sources\[1\] out"):
        opened(folder, text, pictures, vision_share=0)


def test_a_damaged_index_is_rebuilt(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make.captioned_folder(tmp_path / "pictures", 12)
    make.jsonl(tmp_path / "text" / "a.jsonl", range(20))
    whole = opened(tmp_path, *both(tmp_path))
    expected = whole.sample("train", 0)
    for name in ("tokens.bin", "lines"):
        (path,) = (tmp_path / "cache").glob(f"*/{name}")
        path.write_bytes(path.read_bytes()[:-50])
    with caplog.at_level(logging.WARNING):
        rebuilt = opened(tmp_path, *both(tmp_path))
    assert caplog.text.count("rebuilding the damaged cache") == 2
    assert same(rebuilt.sample("train", 0), expected)


def test_resuming_with_other_documents_is_refused(tmp_path: Path) -> None:
    make.captioned_folder(tmp_path / "pictures", 12)
    path = make.jsonl(tmp_path / "text" / "a.jsonl", range(20))
    state = json.loads(json.dumps(opened(tmp_path, *both(tmp_path)).state_dict(4)))
    path.touch()  # other times, the same documents
    moved = path.with_name("b.jsonl")
    path.rename(moved)
    opened(tmp_path, *both(tmp_path)).load_state_dict([state])
    make.jsonl(moved, range(1, 21))
    message = r"sources\[0\]: the documents of .* are not those .* with start_from"
    with pytest.raises(PretrainError, match=message):
        opened(tmp_path, *both(tmp_path)).load_state_dict([state])


def test_resuming_from_another_order_of_documents_is_refused(tmp_path: Path) -> None:
    make.jsonl(tmp_path / "text" / "a.jsonl", range(20))
    data = opened(tmp_path, SourceConfig("text", str(tmp_path / "text")))
    state = data.state_dict(4)
    data.load_state_dict([state])
    del state["order"]  # as in checkpoints of earlier versions
    with pytest.raises(PretrainError, match="another version of this program, which orders doc"):
        data.load_state_dict([state])


def test_a_checkpoint_does_not_read_the_hashes_again(
    data: MixtureData, monkeypatch: pytest.MonkeyPatch
) -> None:
    fingerprints = [documents.fingerprint for documents in data._documents]

    def refuse(*arguments: Any) -> None:
        raise AssertionError("hashed again")

    monkeypatch.setattr(hashlib, "sha256", refuse)
    assert data.state_dict(4)["fingerprint"] == fingerprints


def test_resuming_with_other_image_sizes_is_refused(tmp_path: Path) -> None:
    """Other sizes are packed differently, so the position in the data would be another one."""
    make.captioned_folder(tmp_path / "pictures", 12)
    make.jsonl(tmp_path / "text" / "a.jsonl", range(20))
    state = json.loads(json.dumps(opened(tmp_path, *both(tmp_path)).state_dict(4)))
    with pytest.raises(PretrainError, match=r"data\.max_image_tokens or data\.video_fps"):
        opened(tmp_path, *both(tmp_path), max_image_tokens=1).load_state_dict([state])
