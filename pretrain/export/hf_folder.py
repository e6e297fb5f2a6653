"""An untrusted Hugging Face folder, read without running code from it.

This module does not import transformers or Python files of the folder, unpickle, or follow links
out of the folder. It reads JSON, safetensors and tokenizer files only.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pretrain import untrusted_files
from pretrain.errors import PretrainError

INDEX = "model.safetensors.index.json"
_SINGLE_FILE = "model.safetensors"
_DTYPES = ("F32", "F16", "BF16")
_FP8 = "F8_E4M3"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# More than the largest index of a published checkpoint.
_MAX_TEXT_BYTES = 1 << 28
# Names under which versions of transformers save Kimi-K2.5, and the published names.
_VISION_RENAMES = (
    (re.compile(r"^model\.(?=(language_model|vision_tower|mm_projector)\.)"), ""),
    (re.compile(r"^(?=lm_head\.)"), "language_model."),
    (re.compile(r"^language_model\.(?=(embed_tokens|layers|norm)\.)"), "language_model.model."),
    (re.compile(r"^language_model\.(model\.)?blocks\."), "language_model.model.layers."),
    (re.compile(r"^vision_tower\.encoder\.(?=patch_embed\.)"), "vision_tower."),
)
# Names within transformers, whose tensors differ from the published ones.
_INTERNAL = re.compile(r"\.experts\.(gate_up_proj|down_proj)$|vision_tower\.layers\.|\.in_proj\.")

_LAYER = re.compile(r"^(language_model\.)?model\.layers\.(\d{1,9})\.")


class _StoredTensor(NamedTuple):
    """A tensor in a file.

    Attributes:
        reader: the open file.
        name: of the tensor in the file.
    """

    file: Path
    reader: Any
    name: str


class HfFolder:
    """Files of a folder.

    Raises:
        PretrainError: the path is not a folder with config.json, or is the folder of a run.
    """

    def __init__(self, path: Path) -> None:
        exported = path / "hf"
        if (exported / "config.json").is_file() and not any(path.glob("*.safetensors")):
            raise PretrainError(f"{path} is a run's folder: give its exported model, {exported}")
        if not (path / "config.json").is_file():
            raise PretrainError(
                f"cannot read {path}: give a folder with config.json, safetensors and a tokenizer, "
                "as `python -m pretrain export RUN --to hf` writes it"
            )
        self.path = path

    def file(self, name: str) -> Path | None:
        """Path of a file; None if it does not exist.

        Links of the Hugging Face cache to its blobs are followed.

        Raises:
            PretrainError: the name, or another link, leads out of the folder.
        """
        file = self.path / name
        if Path(name).name != name:
            raise PretrainError(f"{self.path} names a file outside the folder: {name!r}")
        try:
            target, folder = file.resolve(strict=False), self.path.resolve()
            blobs = folder.parent.parent / "blobs"
            if not (target.is_relative_to(folder) or target.is_relative_to(blobs)):
                raise PretrainError(
                    f"{file} is a link out of the folder, to {target}: copy the file itself"
                )
            return file if file.is_file() else None
        except (OSError, ValueError, RuntimeError) as error:
            raise PretrainError(f"cannot read {file}: {error}") from error

    def json(self, name: str) -> dict[str, Any] | None:
        """Content of a file with a JSON object; None if it does not exist.

        Raises:
            PretrainError: the file cannot be read, or is not a JSON object.
        """
        file = self.file(name)
        if file is None:
            return None
        try:
            value = json.loads(untrusted_files.read_text(file, _MAX_TEXT_BYTES))
        except OSError as error:
            raise PretrainError(f"cannot read {file}: {error.strerror}") from error
        except RecursionError as error:
            raise PretrainError(f"{file} is not valid JSON: it is nested too deeply") from error
        except ValueError as error:
            raise PretrainError(f"{file} is not valid JSON: {error}") from error
        if not isinstance(value, dict):
            raise PretrainError(f"{file} must be a JSON object")
        return value

    def required_json(self, name: str) -> dict[str, Any]:
        """:meth:`json` of a file that must exist."""
        value = self.json(name)
        if value is None:
            raise PretrainError(f"cannot read {self.path / name}: the file does not exist")
        return value

    def text(self, name: str) -> str | None:
        """Content of a text file; None if it does not exist."""
        file = self.file(name)
        try:
            return None if file is None else untrusted_files.read_text(file, _MAX_TEXT_BYTES)
        except (OSError, ValueError) as error:
            raise PretrainError(f"cannot read {file}: {error}") from error

    def weight_files(self) -> tuple[list[Path], dict[str, str] | None]:
        """Safetensors files, and the file name of each tensor if there is an index.

        Raises:
            PretrainError: a file is missing, or the weights are pickled.
        """
        weight_map = None
        names = [_SINGLE_FILE]
        index = self.json(INDEX)
        if index is not None:
            weight_map = index.get("weight_map")
            if not isinstance(weight_map, dict) or not all(
                type(file) is str for file in weight_map.values()
            ):
                raise PretrainError(f"{self.path / INDEX} has no weight_map of names to files")
            names = sorted(set(weight_map.values()))
        files = []
        for name in names:
            file = self.file(name)
            if file is None:
                raise self._missing(name)
            if file.suffix != ".safetensors":
                raise PretrainError(
                    f"{self.path / INDEX} names {name}: only safetensors files are read, because "
                    "other files of weights can run code"
                )
            files.append(file)
        return files, weight_map

    def _missing(self, name: str) -> PretrainError:
        pickled = sorted(file.name for file in self.path.iterdir() if file.suffix in _PICKLES)
        if pickled:
            return PretrainError(
                f"{self.path} has its weights in {pickled[0]}, a pickle, which can run code when "
                "read: save the model as safetensors (save_pretrained of transformers does)"
            )
        return PretrainError(f"{self.path} is incomplete: {name} is missing")


class HfWeights:
    """Tensors of a folder's safetensors files, by their published names, read on demand.

    Args:
        vision: the model is Kimi-K2.5, whose names transformers changes.
        fp8_block: rows and columns of the blocks of fp8 weights, which share a scale; None for a
            model without fp8 weights.

    Raises:
        PretrainError: a file is missing or damaged, or the files and the index have different
            tensors.
    """

    def __init__(
        self, folder: HfFolder, *, vision: bool, fp8_block: tuple[int, int] | None = None
    ) -> None:
        self.folder = folder.path
        self._fp8_block = fp8_block
        self._scales: set[str] = set()
        self._tensors: dict[str, _StoredTensor] = {}
        files, weight_map = folder.weight_files()
        for file in files:
            try:
                reader: Any = safe_open(file, "pt")
                names = list(reader.keys())
            except (SafetensorError, OSError) as error:
                raise _damaged(file, error) from error
            for name in names:
                if weight_map is not None and weight_map.get(name) != file.name:
                    listed = weight_map.get(name, "no file")
                    raise PretrainError(
                        f"{file} has a tensor {name}, which {INDEX} lists in {listed}"
                    )
                tensor = _StoredTensor(file, reader, name)
                self._add(published_name(name) if vision else name, tensor)
        for name in weight_map or ():
            if (published_name(name) if vision else name) not in self._tensors:
                raise PretrainError(f"{folder.path} lacks the tensor {name}, which {INDEX} lists")

    def _add(self, name: str, tensor: _StoredTensor) -> None:
        if _INTERNAL.search(name):
            raise PretrainError(
                f"{tensor.file} has a tensor {tensor.name}, a name within transformers: save the "
                "model with save_pretrained(..., save_original_format=True)"
            )
        if name in self._tensors:
            other = self._tensors[name]
            raise PretrainError(
                f"{self.folder} has the tensor {name} twice: as {other.name} in "
                f"{other.file.name}, and as {tensor.name} in {tensor.file.name}"
            )
        self._tensors[name] = tensor

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        """Raise PretrainError if a tensor is missing, or has another shape or an unknown dtype.

        An fp8 weight needs its scales, ``{name}_scale_inv``, one for each block.
        """
        if name not in self._tensors:
            raise PretrainError(
                f"{self.folder} has no tensor {name}, which its config.json requires"
            )
        _, reader, stored_name = self._tensors[name]
        stored = reader.get_slice(stored_name)
        if tuple(stored.get_shape()) != shape:
            raise PretrainError(
                f"{stored_name} in {self.folder} has shape {tuple(stored.get_shape())}, but its "
                f"config.json requires {shape}"
            )
        dtype = stored.get_dtype()
        if dtype == _FP8 and self._fp8_block is not None and len(shape) == 2:
            scale = f"{name}_scale_inv"
            grid = (-(-size // block) for size, block in zip(shape, self._fp8_block, strict=True))
            self.check(scale, tuple(grid))
            self._scales.add(scale)
        elif dtype not in _DTYPES:
            raise PretrainError(
                f"{stored_name} in {self.folder} has dtype {dtype}: only checkpoints in float32, "
                "float16 or bfloat16, or with matrices in fp8 that quantization_config describes, "
                "can be imported"
            )

    @property
    def has_fp8(self) -> bool:
        """Whether any of the tensors that have been checked is in fp8."""
        return bool(self._scales)

    def drop_layers(self, layers: range) -> list[str]:
        """Forget the tensors of some layers of the language model.

        Returns:
            Prefixes of their names, such as ``model.layers.61.``
        """
        dropped = {}
        for name in list(self._tensors):
            match = _LAYER.match(name)
            if match and int(match[2]) in layers:
                dropped[match[0]] = int(match[2])
                del self._tensors[name]
        return sorted(dropped, key=dropped.__getitem__)

    def check_no_others(self, known: Sequence[str]) -> None:
        """Raise PretrainError if there are tensors that our models do not have.

        Args:
            known: tensors that have been checked.
        """
        for name in sorted(self._tensors.keys() - set(known) - self._scales):
            _, reader, stored_name = self._tensors[name]
            empty = 0 in reader.get_slice(stored_name).get_shape()  # as of no shared expert
            if not (empty or name.endswith(".inv_freq")):  # a constant of early transformers
                raise PretrainError(
                    f"{self.folder} has a tensor {name}, which its config.json does not describe: "
                    "the architecture is not supported"
                )

    def read(self, name: str) -> Tensor:
        """Read a tensor that has been checked; fp8 weights become bfloat16.

        Raises:
            PretrainError: the file is damaged, or a value is not finite.
        """
        file, reader, stored_name = self._tensors[name]
        try:
            tensor: Tensor = reader.get_tensor(stored_name)
        except (SafetensorError, OSError) as error:
            raise _damaged(file, error) from error
        if tensor.dtype == torch.float8_e4m3fn:
            assert self._fp8_block is not None  # check() accepts no fp8 weights otherwise
            tensor = dequantize(tensor, self.read(f"{name}_scale_inv"), self._fp8_block)
        if not torch.isfinite(tensor).all():
            raise PretrainError(
                f"{stored_name} in {file} has NaN or infinite values: the model is damaged, or its "
                "training diverged"
            )
        return tensor


def dequantize(weight: Tensor, scales: Tensor, block: tuple[int, int]) -> Tensor:
    """Dequantize a weight whose blocks are multiplied by their scales, as in DeepSeek-V3.

    Args:
        weight: float8_e4m3fn [rows, columns].
        scales: [ceil(rows / block rows), ceil(columns / block columns)]; the last blocks may be
            partial.

    Returns:
        bfloat16 [rows, columns], rounded once, as DeepSeek's own conversion does
        (``inference/fp8_cast_bf16.py`` in its repository).
    """
    factors = scales.float()
    for dim, size in enumerate(weight.shape):
        # A block may be larger than the weight.
        factors = factors.repeat_interleave(min(block[dim], size), dim).narrow(dim, 0, size)
    return (weight.float() * factors).bfloat16()


def published_name(name: str) -> str:
    """Name in the published checkpoints of a tensor that transformers may have saved."""
    for pattern, replacement in _VISION_RENAMES:
        name = pattern.sub(replacement, name)
    return name


def _damaged(file: Path, error: Exception) -> PretrainError:
    return PretrainError(f"{file} is damaged: {' '.join(str(error).split())}")
