"""Safetensors files of blocks of tensors: written and hashed in one pass, read without pickle.

The header contains each block's offsets in its whole tensor in the format of
torch.distributed.checkpoint, so that its ``HuggingFaceStorageReader`` reads a folder of these
files. Every reader of safetensors reads each file.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

# The names of dtypes in the safetensors format.
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
DTYPES_BY_NAME = {name: dtype for dtype, name in _DTYPES.items()}


class Block(NamedTuple):
    """A block of a tensor: its offsets in the whole tensor, and its values."""

    name: str
    offsets: tuple[int, ...]
    values: Tensor


class Read(NamedTuple):
    """A part ``[start, start + target.shape)`` of a stored block, to be copied to ``target``."""

    name: str
    start: tuple[int, ...]
    target: Tensor


def dtype_name(dtype: torch.dtype) -> str:
    """The safetensors name of a dtype.

    Raises:
        ValueError: the format does not support the dtype.
    """
    if dtype not in _DTYPES:
        raise ValueError(f"{dtype} cannot be stored in a safetensors file")
    return _DTYPES[dtype]


def write(path: Path, blocks: Sequence[Block]) -> str:
    """Write a file with at most one block per name, and force it to disk.

    Blocks are written one by one, without a second copy in memory unless they are on a device.

    Returns:
        The file's SHA-256.

    Raises:
        OSError: the file cannot be written.
        ValueError: for a dtype that the format does not support.
    """
    # The widest dtypes first, since the format requires aligned values.
    blocks = sorted(blocks, key=lambda block: -block.values.dtype.itemsize)
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for chunk in _chunks(blocks):
            file.write(chunk)
            digest.update(chunk)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def _chunks(blocks: Sequence[Block]) -> Iterator[bytes | memoryview]:
    yield _header(blocks)
    for block in blocks:
        yield _bytes(block.values)


def _header(blocks: Sequence[Block]) -> bytes:
    offsets = {block.name: {"saved_offsets": list(block.offsets)} for block in blocks}
    header: dict[str, object] = {
        "__metadata__": {
            "format": "pt",
            "DCP_VERSION": "1.0",
            "DCP_SHARDING_INFO": json.dumps(offsets),
        }
    }
    end = 0
    for block in blocks:
        begin, end = end, end + block.values.nbytes
        header[block.name] = {
            "dtype": dtype_name(block.values.dtype),
            "shape": list(block.values.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _bytes(values: Tensor) -> memoryview:
    """The bytes of a tensor's values in order; a view if the tensor is contiguous."""
    flat = values.detach().cpu().contiguous().flatten()
    return flat.view(torch.uint8).numpy().data


def read(path: Path, reads: Sequence[Read]) -> None:
    """Copy parts of stored blocks to their targets, converted to the targets' dtypes.

    Raises:
        OSError, ValueError: the file cannot be read, is damaged, or lacks a part.
    """
    try:
        with safe_open(path, framework="pt") as file:
            for name, start, target in reads:
                stored = file.get_slice(name)
                slices = tuple(
                    slice(first, first + size)
                    for first, size in zip(start, target.shape, strict=True)
                )
                # A 0-d tensor has no slices.
                values = stored[slices] if slices else file.get_tensor(name)
                if values.shape != target.shape:
                    raise ValueError(f"{name} has shape {stored.get_shape()} in {path.name}")
                target.copy_(values)
    except SafetensorError as error:
        raise ValueError(f"{path.name} is not a readable safetensors file: {error}") from error
