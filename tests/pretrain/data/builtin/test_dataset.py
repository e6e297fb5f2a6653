"""Sequences are functions of seed, split and index; splits are disjoint; the cache is safe."""

import dataclasses
import logging
import multiprocessing
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.config import DataConfig, ImageConfig
from pretrain.data import Category, PackedSample, open_data
from pretrain.data.builtin.dataset import BuiltIn
from pretrain.data.builtin.standard_library import caption_split
from pretrain.errors import PretrainError
from tests.pretrain.data.conftest import PATCH
from tests.pretrain.data.test_packing import check


@pytest.fixture(scope="module")
def small_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("small")


def same(one: PackedSample, other: PackedSample) -> bool:
    values = vars(one) | {"left_out": torch.tensor(one.left_out)}
    others = vars(other) | {"left_out": torch.tensor(other.left_out)}
    return all(torch.equal(values[f.name], others[f.name]) for f in dataclasses.fields(one))


def _sample_in_another_process(config: DataConfig, index: int) -> PackedSample:
    return open_data(config, PATCH, seed=3).sample("train", index)


def test_samples_are_reproducible_in_any_order_and_process(data: BuiltIn) -> None:
    first = [data.sample("train", index) for index in range(6)]
    assert all(same(data.sample("train", index), first[index]) for index in reversed(range(6)))
    assert not same(first[0], first[1])
    assert not same(first[0], dataclasses.replace(data, seed=4).sample("train", 0))
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        other = pool.apply(_sample_in_another_process, (data.config, 5))
    assert same(other, first[5])


def test_samples_are_full_and_correctly_labelled(data: BuiltIn) -> None:
    for index in range(40):
        sample = data.sample("train", index)
        check(sample)
        assert sample.tokens.shape == (data.config.seq_length,)
        assert (sample.tokens == 0).sum() <= 1


@pytest.mark.parametrize("share", [0.0, 0.1, 0.25])
def test_the_vision_share_is_kept(data: BuiltIn, share: float) -> None:
    config = dataclasses.replace(data.config, vision_share=share)
    shared = dataclasses.replace(data, config=config)
    samples = [shared.sample("train", index) for index in range(100)]
    measured = (
        sum(int((s.tokens == data.tokenizer.media_pad).sum()) for s in samples)
        / 100
        / config.seq_length
    )
    assert measured == pytest.approx(share, rel=0.05)


def test_nothing_held_out_is_in_training(data: BuiltIn) -> None:
    train, held_out = data.corpora["train"], data.corpora["held_out"]
    assert not set(train.lines) & set(held_out.lines)
    assert len(held_out.lines) > 50
    # Except for boilerplate, no 64 tokens in a row of held-out text are in the training text.
    text = train.tokens.tobytes()
    chunks = [held_out.tokens[i : i + 64].tobytes() for i in range(0, len(held_out.tokens), 512)]
    assert sum(chunk in text for chunk in chunks) <= 0.02 * len(chunks)


@pytest.mark.parametrize("max_words", [1, None])
def test_no_held_out_caption_is_ever_drawn_for_training(
    data: BuiltIn, max_words: int | None
) -> None:
    images = ImageConfig(max_words=max_words, min_chars=3, max_chars=8, pieces_share=0.5)
    drawn = dataclasses.replace(data, config=dataclasses.replace(data.config, images=images))
    held_out, trained_on = (
        {item.caption for item in drawn.captioned_items(split, 60)}
        for split in ("held_out", "train")
    )
    assert len(held_out) == len(trained_on) == 60
    assert {caption_split(caption.upper()) for caption in held_out} == {"held_out"}
    assert {caption_split(caption.upper()) for caption in trained_on} == {"train"}
    if max_words == 1:
        assert all(caption.isalpha() and 3 <= len(caption) <= 8 for caption in held_out)


def test_swapped_captions_follow_other_images(data: BuiltIn) -> None:
    items = data.captioned_items("held_out", 20)
    right, swapped = data.caption_documents("held_out", 20)
    assert len({item.caption for item in items}) == 20
    for one, other in zip(right, swapped, strict=True):
        caption, also = (
            [t for t, c in zip(d.tokens, d.categories, strict=True) if c == Category.CAPTION]
            for d in (one, other)
        )
        assert caption == also
        assert one.patches[0].shape != other.patches[0].shape or not torch.equal(
            one.patches[0], other.patches[0]
        )


@given(
    font=st.integers(4, 128), chars=st.integers(4, 60), patch=st.sampled_from([2, 5, 14]),
    length=st.sampled_from([64, 128, 1024]),
)  # fmt: skip
@settings(max_examples=6, deadline=None)
def test_images_too_large_for_a_sequence_are_skipped_or_rejected(
    data: BuiltIn, font: int, chars: int, patch: int, length: int
) -> None:
    options = ImageConfig(min_font_size=font, max_font_size=font, max_chars=chars)
    drawn = dataclasses.replace(
        data,
        config=dataclasses.replace(data.config, images=options, seq_length=length),
        patch_size=patch,
    )
    try:
        drawn.require_images_that_fit()
    except PretrainError as error:
        assert f"no image of text fits data.seq_length={length}: raise it" in str(error)
    else:
        for documents in drawn.caption_documents("held_out", 3):
            assert all(sample.grids.numel() for sample in drawn.pack(documents, length))
        assert len(drawn.sample("train", 0).tokens) == length


def test_all_captions_are_returned_if_there_are_fewer_than_requested(data: BuiltIn) -> None:
    held_out = data.corpora["held_out"]
    some = dataclasses.replace(held_out, lines=held_out.lines[:3])
    few = dataclasses.replace(data, corpora={**data.corpora, "held_out": some})
    found = few.captioned_items("held_out", 50)
    assert 1 <= len(found) < 50
    assert len({item.caption for item in found}) == len(found)


@pytest.mark.parametrize("name", ["train.npy", "tokenizer.json", "held_out.json"])
def test_a_damaged_cache_is_rebuilt_with_a_warning(
    small_cache: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    config = DataConfig(vocab_size=300, max_corpus_mb=0.5, cache_dir=str(small_cache))
    whole = open_data(config, PATCH, seed=3)
    (folder,) = (path for path in small_cache.iterdir() if path.is_dir())
    (folder / name).write_bytes((folder / name).read_bytes()[:100])
    with caplog.at_level(logging.WARNING):
        rebuilt = open_data(config, PATCH, seed=3)
    assert "rebuilding the damaged cache" in caplog.text
    assert same(rebuilt.sample("train", 0), whole.sample("train", 0))


def test_concurrent_processes_share_the_cache_safely(data: BuiltIn, tmp_path: Path) -> None:
    config = dataclasses.replace(
        data.config, cache_dir=str(tmp_path), max_corpus_mb=0.5, vocab_size=300
    )
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        one, other = pool.starmap(_sample_in_another_process, [(config, 0)] * 2)
    assert same(one, other)
    made = [path.name for path in tmp_path.iterdir() if path.is_dir()]
    assert [name.startswith("partial-") for name in made] == [False]


def test_a_run_does_not_continue_with_other_data(data: BuiltIn) -> None:
    """Another Python has another text; before the fonts were matplotlib's, nothing was recorded."""
    state = data.state_dict(3)
    data.load_state_dict([state])
    other = dataclasses.replace(data, key="other")
    without_images = dataclasses.replace(
        data, config=dataclasses.replace(data.config, vision_share=0.0)
    )
    without_images.load_state_dict([{}])
    for changed, saved in ((other, state), (data, {}), (data, {"fingerprint": ["of a file"]})):
        with pytest.raises(PretrainError, match="is not that of the checkpoint"):
            changed.load_state_dict([saved])
