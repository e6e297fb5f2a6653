"""Files of tokens are those of megatron-core, in both directions."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

from pretrain.data import megatron_format
from pretrain.data.megatron_format import IndexedTokens, token_dtype, write_index

DOCUMENTS = st.lists(st.lists(st.lists(st.integers(0, 60000), max_size=5), max_size=3), max_size=9)


def built(prefix: Path, documents: list[list[list[int]]], dtype: type[np.number]) -> IndexedTokens:
    """Documents of sequences, written by megatron-core."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype)
    for document in documents:
        for sequence in document:
            builder.add_item(torch.tensor(sequence, dtype=torch.int64))
        builder.end_document()
    builder.finalize(f"{prefix}.idx")
    return IndexedTokens.open(prefix)


@settings(deadline=None, max_examples=50)
@given(DOCUMENTS, st.sampled_from([np.uint16, np.int32, np.int64]))
def test_files_of_megatron_core_are_read(
    tmp_path_factory: pytest.TempPathFactory,
    documents: list[list[list[int]]],
    dtype: type[np.number],
) -> None:
    tokens = built(tmp_path_factory.mktemp("a") / "web", documents, dtype)
    assert len(tokens) == len(documents)
    read = [tokens.tokens[tokens.extent(number)].tolist() for number in range(len(tokens))]
    assert read == [[*itertools.chain(*document)] for document in documents]
    start, stop = tokens.extents(np.arange(len(documents)))
    assert (stop - start).tolist() == [sum(map(len, document)) for document in documents]


@settings(deadline=None, max_examples=50)
@given(st.lists(st.lists(st.integers(0, 60000), max_size=5), max_size=9), st.integers(1, 4))
def test_an_index_has_the_bytes_of_megatron_core(
    tmp_path_factory: pytest.TempPathFactory, documents: list[list[int]], block: int
) -> None:
    folder = tmp_path_factory.mktemp("a")
    built(folder / "theirs", [[document] for document in documents], np.uint16)
    lengths = np.array([len(document) for document in documents], np.int32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(megatron_format, "_BLOCK", block)
        write_index(folder / "ours.idx", lengths, np.uint16)
    assert (folder / "ours.idx").read_bytes() == (folder / "theirs.idx").read_bytes()


def test_megatron_core_reads_an_index(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(np.arange(10, dtype=np.int32).tobytes())
    write_index(tmp_path / "a.idx", np.array([3, 0, 7], np.int32), np.int32)
    dataset = IndexedDataset(str(tmp_path / "a"))
    assert [sequence.tolist() for sequence in dataset[:]] == [[0, 1, 2], [], [*range(3, 10)]]
    assert dataset.document_indices.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("size", [300, 65499, 65500, 65536, 65537, 163840])
def test_the_dtype_is_the_choice_of_megatron_core(size: int) -> None:
    assert token_dtype(size) is DType.optimal_dtype(size)


def test_damaged_files_are_named(tmp_path: Path) -> None:
    prefix = tmp_path / "web"
    built(prefix, [[[1, 2, 3]], [[4]]], np.uint16)
    whole = {suffix: Path(f"{prefix}.{suffix}").read_bytes() for suffix in ("bin", "idx")}
    for suffix, content in whole.items():
        for size in (*range(0, len(content), 5), len(content) - 1):
            Path(f"{prefix}.{suffix}").write_bytes(content[:size])
            with pytest.raises(ValueError, match=rf"web\.{suffix} (has|is not)"):
                IndexedTokens.open(prefix)
        Path(f"{prefix}.{suffix}").write_bytes(content)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", np.uint16, multimodal=True)
    builder.add_item(torch.tensor([1, 2]), mode=1)
    builder.end_document()
    builder.finalize(f"{prefix}.idx")
    with pytest.raises(ValueError, match="several modalities"):
        IndexedTokens.open(prefix)
