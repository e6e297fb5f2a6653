"""A Hugging Face folder that somebody else made: read as data, never run.

Nothing here imports transformers or a Python file of the folder, unpickles, or follows a link out
of the folder. Only JSON, safetensors and tokenizer files are read.
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
_ONE_FILE = "model.safetensors"
_TYPES = ("F32", "F16", "BF16")
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# More than the index of the largest published checkpoint.
_MAX_TEXT_BYTES = 1 << 28
# transformers saves Kimi-K2.5 under other names than the published ones, of which it is a mixture.
_VISION_RENAMES = (
    (re.compile(r"^model\.(?=(language_model|vision_tower|mm_projector)\.)"), ""),
    (re.compile(r"^(?=lm_head\.)"), "language_model."),
    (re.compile(r"^language_model\.(?=(embed_tokens|layers|norm)\.)"), "language_model.model."),
    (re.compile(r"^language_model\.(model\.)?blocks\."), "language_model.model.layers."),
    (re.compile(r"^vision_tower\.encoder\.(?=patch_embed\.)"), "vision_tower."),
)
_INTERNAL = re.compile(r"\.experts\.(gate_up_proj|down_proj)$|vision_tower\.layers\.|\.in_proj\.")


class _Place(NamedTuple):
    """Where a tensor is stored.

    Attributes:
        stored: its name in the file.
    """

    file: Path
    opened: Any
    stored: str


class HfFolder:
    """The files of a folder.

    Raises:
        PretrainError: it is not a folder.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_dir():
            raise PretrainError(
                f"cannot read {path}: not a folder; give a folder with config.json, safetensors "
                "and a tokenizer"
            )
        self.path = path

    def file(self, name: str) -> Path | None:
        """A file of the folder; None where there is none.

        Raises:
            PretrainError: the name, or a link, leads out of the folder (links of the Hugging Face
                cache to its own blobs are followed).
        """
        file = self.path / name
        if Path(name).name != name:
            raise PretrainError(f"{self.path} names a file outside of itself: {name!r}")
        try:
            real, here = file.resolve(strict=False), self.path.resolve()
            blobs = here.parent.parent / "blobs"
            if not (real.is_relative_to(here) or real.is_relative_to(blobs)):
                raise PretrainError(
                    f"{file} is a link out of the folder, to {real}: copy the file itself"
                )
            return file if file.is_file() else None
        except (OSError, ValueError, RuntimeError) as error:
            raise PretrainError(f"cannot read {file}: {error}") from error

    def json(self, name: str) -> dict[str, Any] | None:
        """A JSON object; None where there is no such file.

        Raises:
            PretrainError: it is not one, or unreadable.
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
        """A JSON object that has to be there."""
        value = self.json(name)
        if value is None:
            raise PretrainError(f"cannot read {self.path / name}: there is no such file")
        return value

    def text(self, name: str) -> str | None:
        """A text file; None where there is no such file."""
        file = self.file(name)
        try:
            return None if file is None else untrusted_files.read_text(file, _MAX_TEXT_BYTES)
        except (OSError, ValueError) as error:
            raise PretrainError(f"cannot read {file}: {error}") from error

    def weights(self, *, vision: bool) -> "HfWeights":
        """The tensors, by their published names.

        Args:
            vision: they are Kimi-K2.5's, and not DeepSeek-V3's.
        """
        return HfWeights(self, vision=vision)

    def weight_files(self) -> tuple[list[Path], dict[str, str] | None]:
        """The safetensors files, and which tensor is in which, if there is an index.

        Raises:
            PretrainError: one is missing, or the weights are pickled.
        """
        placed = None
        names = [_ONE_FILE]
        index = self.json(INDEX)
        if index is not None:
            placed = index.get("weight_map")
            if not isinstance(placed, dict) or not all(type(v) is str for v in placed.values()):
                raise PretrainError(f"{self.path / INDEX} has no weight_map of names to files")
            names = sorted(set(placed.values()))
        files = []
        for name in names:
            file = self.file(name)
            if file is None:
                raise self._missing(name)
            if file.suffix != ".safetensors":
                raise PretrainError(
                    f"{self.path / INDEX} names {name}: only safetensors files are read, as other "
                    "files of weights can run code"
                )
            files.append(file)
        return files, placed

    def _missing(self, name: str) -> PretrainError:
        pickled = sorted(file.name for file in self.path.iterdir() if file.suffix in _PICKLED)
        if pickled:
            return PretrainError(
                f"{self.path} has its weights in {pickled[0]}, a pickle, which can run code when "
                "it is read: save the model as safetensors (save_pretrained of transformers does)"
            )
        return PretrainError(f"{self.path} is incomplete: {name} is missing")


class HfWeights:
    """Tensors of one or more safetensors files, each opened and read when needed.

    Raises:
        PretrainError: a file is missing or damaged, or a tensor is there twice, or not in the file
            that the index names.
    """

    def __init__(self, folder: HfFolder, *, vision: bool) -> None:
        self.folder = folder.path
        self._places: dict[str, _Place] = {}
        files, placed = folder.weight_files()
        for file in files:
            try:
                opened: Any = safe_open(file, "pt")
                stored = list(opened.keys())
            except (SafetensorError, OSError) as error:
                raise _damaged(file, error) from error
            for name in stored:
                if placed is not None and placed.get(name) != file.name:
                    raise PretrainError(
                        f"{file} has a tensor {name}, which {INDEX} "
                        f"{'places in ' + placed[name] if name in placed else 'does not list'}"
                    )
                self._add(_published(name) if vision else name, _Place(file, opened, name))
        for name in placed or ():
            if (_published(name) if vision else name) not in self._places:
                raise PretrainError(f"{folder.path} lacks the tensor {name}, which {INDEX} lists")

    def _add(self, name: str, place: _Place) -> None:
        if _INTERNAL.search(name):
            raise PretrainError(
                f"{place.file} has a tensor {place.stored}, a name within transformers: save the "
                "model with save_pretrained(..., save_original_format=True)"
            )
        if name in self._places:
            other = self._places[name]
            raise PretrainError(
                f"{self.folder} has the tensor {name} twice: as {other.stored} in "
                f"{other.file.name}, and as {place.stored} in {place.file.name}"
            )
        self._places[name] = place

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        """Refuse a tensor that is missing, of another shape or of a type that is not supported."""
        if name not in self._places:
            raise PretrainError(
                f"{self.folder} has no tensor {name}, which its config.json asks for"
            )
        _, opened, stored = self._places[name]
        part = opened.get_slice(stored)
        if tuple(part.get_shape()) != shape:
            raise PretrainError(
                f"{stored} in {self.folder} is of shape {tuple(part.get_shape())}, where its "
                f"config.json means {shape}"
            )
        if part.get_dtype() not in _TYPES:
            raise PretrainError(
                f"{stored} in {self.folder} is of type {part.get_dtype()}: only checkpoints of "
                "float32, float16 or bfloat16 can be imported"
            )

    def check_no_others(self, known: Sequence[str]) -> None:
        """Refuse tensors that a model of ours does not have."""
        for name in sorted(self._places.keys() - set(known)):
            if not name.endswith(".inv_freq"):  # buffers that earlier versions stored
                raise PretrainError(
                    f"{self.folder} has a tensor {name}, which its config.json does not ask for: "
                    "it is of another architecture"
                )

    def read(self, name: str) -> Tensor:
        """A tensor's values.

        Raises:
            PretrainError: the file is damaged, or a value is not finite.
        """
        file, opened, stored = self._places[name]
        try:
            tensor: Tensor = opened.get_tensor(stored)
        except (SafetensorError, OSError) as error:
            raise _damaged(file, error) from error
        if not torch.isfinite(tensor).all():
            raise PretrainError(
                f"{stored} in {file} has values that are NaN or infinite: the model is damaged, "
                "or its training diverged"
            )
        return tensor


def _published(name: str) -> str:
    """A tensor's name in the published checkpoints, from whichever transformers saved it under."""
    for pattern, replacement in _VISION_RENAMES:
        name = pattern.sub(replacement, name)
    return name


def _damaged(file: Path, error: Exception) -> PretrainError:
    return PretrainError(f"{file} is damaged: {' '.join(str(error).split())}")
