"""Checkpoint files: readable by other tools, exact for any split, and safe with any content."""

import itertools
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, state_dict_loader

from pretrain.checkpoint import storage, tensor_files
from pretrain.errors import PretrainError
from tests.distributed.launch import launch

VALUES = {
    "matrix": torch.arange(12.0).view(3, 4),
    "half": torch.arange(5).to(torch.bfloat16),
    "count": torch.tensor(7, dtype=torch.int64),
    "flags": torch.tensor([True, False, True]),
    "nothing": torch.zeros(0, 3, dtype=torch.float16),
}


def split(whole: Tensor, cuts: list[int]) -> storage.LocalShard:
    """Cut a tensor along its first dimension into blocks."""
    if not whole.ndim:
        return storage.LocalShard((), [((), whole)])
    edges = [0, *sorted(cut % (len(whole) + 1) for cut in cuts), len(whole)]
    pieces = [
        ([first, *[0] * (whole.ndim - 1)], whole[first:last])
        for first, last in itertools.pairwise(edges)
        if last > first or not whole.numel()
    ]
    return storage.LocalShard(whole.shape, pieces[:1] if not whole.numel() else pieces)


def save_split(folder: str) -> None:
    parts = {name: split(value, [2]) for name, value in VALUES.items()}
    storage.save(Path(folder), 1, parts, {"fact": 1}, keep=1)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    launch(save_split, 1, str(folder))
    return storage.path_of(folder, 1)


def test_torch_distributed_checkpoint_and_safetensors_read_the_files(path: Path) -> None:
    loaded = {name: torch.zeros_like(value) for name, value in VALUES.items()}
    reader = HuggingFaceStorageReader(str(path))
    state_dict_loader.load(loaded, storage_reader=reader, no_dist=True)
    for name, value in VALUES.items():
        assert torch.equal(loaded[name], value), name
    assert torch.equal(load_file(path / "rank-00000-0.safetensors")["matrix"], VALUES["matrix"][:2])


def save_and_load_any_split(folder: str) -> None:
    cuts = st.lists(st.integers(0, 9), max_size=3)
    shapes = st.lists(st.integers(0, 5), max_size=3)

    @settings(max_examples=60, deadline=None, database=None)
    @given(shapes, cuts, cuts, st.sampled_from([torch.float32, torch.bfloat16, torch.int64]))
    def check(shape: list[int], saved: list[int], wanted: list[int], dtype: torch.dtype) -> None:
        whole = torch.arange(torch.Size(shape).numel()).view(shape).to(dtype)
        storage.save(Path(folder), 1, {"x": split(whole, saved)}, {}, keep=1)
        loaded = torch.full_like(whole, -1)
        saved_split = storage.Checkpoint.open(storage.path_of(Path(folder), 1))
        saved_split.load({"x": split(loaded, wanted)})
        assert torch.equal(loaded, whole)

    check()


def test_tensors_saved_in_any_blocks_load_in_any_others(tmp_path: Path) -> None:
    launch(save_and_load_any_split, 1, str(tmp_path))


def read_all(path: Path) -> None:
    saved = storage.Checkpoint.open(path)
    saved.verify()
    saved.load({name: torch.zeros_like(value) for name, value in VALUES.items()})


def nodes(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) in a JSON value."""
    if isinstance(value, dict | list):
        keys = list(value) if isinstance(value, dict) else range(len(value))
        return [pair for key in keys for pair in [(value, key), *nodes(value[key])]]
    return []


JUNK = st.sampled_from(
    [None, -1, 0, 3, 2**70, 1.5, float("nan"), "", "../rank-00000-0.safetensors", "/etc/passwd",
     "F32", "BF16", "I64", [], [[]], [2**62, 2**62], [-1, 4], {}, {"a": 1}, True]
)  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_crafted_manifest_raises_one_error(path: Path, data: st.DataObject) -> None:
    text = (path / "manifest.json").read_text()
    manifest = json.loads(text)
    container, key = data.draw(st.sampled_from(nodes(manifest)))
    container[key] = data.draw(JUNK)
    try:
        (path / "manifest.json").write_text(json.dumps(manifest))
        read_all(path)
    except PretrainError as error:
        assert "\n" not in str(error)
    finally:
        (path / "manifest.json").write_text(text)
    read_all(path)


@pytest.mark.parametrize("text", ["", "[" * 200_000, "[]", "null", '{"step": 1}', "\x00", "1e999"])
def test_an_invalid_manifest_is_refused(path: Path, text: str) -> None:
    kept = (path / "manifest.json").read_text()
    (path / "manifest.json").write_text(text)
    with pytest.raises(PretrainError, match="is not a checkpoint of this program"):
        read_all(path)
    (path / "manifest.json").write_text(kept)


def flip_header(content: bytes) -> bytes:
    return b"\xff" * 8 + content[8:]


def pickled(_content: bytes) -> bytes:
    return pickle.dumps({"matrix": [1.0]})


@pytest.mark.parametrize("damage", [lambda b: b[:-3], flip_header, pickled, lambda _: b""])
def test_a_crafted_file_with_a_matching_digest_raises_one_error(
    path: Path, damage: Callable[[bytes], bytes]
) -> None:
    """An attacker can write a matching digest into the manifest."""
    file, manifest = path / "rank-00000-0.safetensors", path / "manifest.json"
    content, text = file.read_bytes(), manifest.read_text()
    file.write_bytes(damage(content))
    values = json.loads(text)
    values["files"][file.name] = storage._checksum(file)
    manifest.write_text(json.dumps(values))
    with pytest.raises(PretrainError, match=r"is damaged: rank-00000-0\.safetensors is not"):
        read_all(path)
    file.write_bytes(content)
    manifest.write_text(text)


def test_an_unsupported_dtype_is_refused(tmp_path: Path) -> None:
    block = tensor_files.Block("x", (0,), torch.zeros(2, dtype=torch.complex64))
    with pytest.raises(ValueError, match="complex64 cannot be stored"):
        tensor_files.write(tmp_path / "file", [block])
