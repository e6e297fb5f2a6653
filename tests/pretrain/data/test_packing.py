"""Labels are the next token of the same document, and every image has its placeholders."""

import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pretrain.data.media.patches import VisionItem
from pretrain.data.packing import Category, Document, PackedSample, join, pack
from pretrain.data.tokenizer import Tokenizer

PATCH = 2
TOKENIZER = Tokenizer.train(["some words\n"] * 10, 300)
PAD = TOKENIZER.pad

texts = st.lists(st.integers(6, 299), max_size=12)
grids = st.tuples(st.integers(1, 4), st.integers(1, 2), st.integers(1, 3))
parts = st.one_of(texts, grids)


def build(content: list[list[int] | tuple[int, int, int]]) -> Document:
    document = Document(TOKENIZER)
    for part in content:
        if isinstance(part, tuple):
            frames, rows, columns = part
            shape = (frames, 2 * PATCH * rows, 2 * PATCH * columns, 3)
            item = VisionItem(np.zeros(shape, np.uint8), "word")
            document.add_image(item, PATCH).add_caption("word")
        else:
            document.add_tokens(part)
    return document


def check(sample: PackedSample) -> None:
    """Check a sample of any built-in tokenizer: all have the same special tokens."""
    check_with(TOKENIZER, sample)


def check_with(tokenizer: Tokenizer, sample: PackedSample) -> None:
    """Check the invariants of a packed sample."""
    never = {tokenizer.pad, tokenizer.bos, tokenizer.media_begin, tokenizer.media_end}
    never.add(tokenizer.media_pad)
    tokens, labels, weights = (x.tolist() for x in (sample.tokens, sample.labels, sample.weights))
    documents = sample.documents.tolist()
    for i, weight in enumerate(weights):
        if weight == 0:
            assert labels[i] == 0
        else:
            assert documents[i] == documents[i + 1]
            assert labels[i] == tokens[i + 1]
            assert labels[i] not in never
    placeholders = sum(token == tokenizer.media_pad for token in tokens)
    features = (sample.grids[:, 1] // 2 * (sample.grids[:, 2] // 2)).sum()
    assert placeholders == features
    assert len(sample.patches) == sample.grids.prod(1).sum()


@given(st.lists(st.lists(parts, max_size=4), min_size=1, max_size=6))
def test_labels_are_the_next_tokens_of_the_same_document(contents: list[list[list[int]]]) -> None:
    documents = [build(content) for content in contents]
    length = max(64, max(map(len, documents)))
    samples = pack(documents, length, PATCH, PAD)
    for sample in samples:
        check(sample)
    packed = torch.cat([sample.tokens[sample.tokens != PAD] for sample in samples])
    assert packed.tolist() == [token for document in documents for token in document.tokens]
    grids = torch.cat([sample.grids for sample in samples])
    assert grids.tolist() == [list(g) for document in documents for g in document.grids]


def test_captions_are_learned_from_the_end_of_the_image_to_the_newline() -> None:
    document = build([[10, 11], (1, 1, 2)])
    sample = join([document], len(document), PATCH, PAD)
    end = sample.tokens.tolist().index(TOKENIZER.media_end)
    caption = [*TOKENIZER.encode("word"), TOKENIZER.newline]
    assert sample.labels[end:-1].tolist() == caption
    assert sample.categories[end:-1].tolist() == [Category.CAPTION] * len(caption)
    assert sample.categories[:end].tolist() == [Category.TEXT] * end
    # Not learned: begin, two placeholders, end.
    assert sample.weights.tolist() == [1, 1, *[0] * 4, *[1] * len(caption), 0]


@pytest.mark.parametrize("weight", [-0.5, 1e39, math.inf, math.nan])
def test_weights_that_are_negative_or_not_finite_are_rejected(weight: float) -> None:
    with pytest.raises(
        ValueError, match=re.escape(f"at least 0 and finite (float32), not {weight}")
    ):
        Document(TOKENIZER).add_tokens([10], weight=weight)


def test_documents_longer_than_a_sequence_are_rejected() -> None:
    with pytest.raises(ValueError, match="documents of 9 tokens do not fit a sequence of 8"):
        pack([build([[10] * 8])], 8, PATCH, PAD)


def test_a_sample_without_labels_has_no_weights() -> None:
    sample = join([build([[10, 11], (1, 1, 2)])], 32, PATCH, PAD).without_labels()
    assert sample.weights.sum() == 0
    assert sample.labels.sum() == 0
