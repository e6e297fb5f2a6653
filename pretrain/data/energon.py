"""Vision-text from WebDataset shards, through megatron-energon: its format, order and resume."""

import base64
import dataclasses
import hashlib
import importlib
import itertools
import json
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import yaml
from PIL import Image

from pretrain.data.index import Composer
from pretrain.data.mixture import Piece
from pretrain.data.packing import Document
from pretrain.data.pixels import Pixels
from pretrain.data.skipped import Skip
from pretrain.errors import PretrainError

# Held-out documents that are read, and kept, at the start.
_HELD_OUT = 256
# Samples that energon shuffles among, beyond its own order of shards and slices of them.
_SHUFFLE = 256
_THEIRS = "megatron.energon."


def require_energon() -> None:
    """
    Raises:
        PretrainError: megatron-energon is not installed.
    """
    try:
        import megatron.energon  # noqa: F401
    except ImportError as error:
        raise PretrainError(
            "shards need megatron-energon, which is not installed: pip install '.[energon]'"
        ) from error


def _loader(
    folder: Path,
    part: str,
    rank: int,
    ranks: int,
    seed: int,
    skips: list[Skip],
    images: bool = True,
) -> Any:
    """Energon's own savable loader, reading in this process; endless for ``train``. Without
    ``images``, these are left the bytes they are."""
    from megatron import energon
    from webdataset.autodecode import IMAGE_EXTENSIONS

    warnings.filterwarnings("ignore", message="'pin_memory' argument is set as true")

    class TextDecoder(energon.SampleDecoder):  # type: ignore[misc]
        def __call__(self, sample: dict[str, Any]) -> dict[str, Any]:
            raw = {k: v for k, v in sample.items() if k.rpartition(".")[2] in IMAGE_EXTENSIONS}
            others = {k: v for k, v in sample.items() if k not in raw}
            decoded: dict[str, Any] = super().__call__(others)
            return decoded | raw

    class Encoder(energon.DefaultTaskEncoder):  # type: ignore[misc]
        decoder = energon.SampleDecoder(image_decode="pilrgb") if images else TextDecoder()

        @energon.stateless  # type: ignore[untyped-decorator]
        def encode_sample(self, sample: Any) -> Any:
            return sample

    def note(error: Exception, sample: Any, sources: Any) -> None:
        # What energon hands over is its raw sample: the files of one key in a shard.
        raw: dict[str, Any] = next(iter(getattr(sample, "data", None) or ()), {})
        name = f"{raw.get('__shard__', 'a shard')}:{raw.get('__key__', 'a sample')}"
        skips.append(Skip(f"{folder}/{name}", _reason(error)))

    settings = {
        "worker_config": energon.WorkerConfig(
            rank=rank, world_size=ranks, num_workers=0, seed_offset=seed, global_error_handler=note
        ),
        "batch_size": None,
        "task_encoder": Encoder(),
        "split_part": part,
    }
    if part == "train":
        dataset = energon.get_train_dataset(
            folder, shuffle_buffer_size=_SHUFFLE, max_samples_per_sequence=100, **settings
        )
    else:
        dataset = energon.get_val_dataset(folder, **settings)
    return energon.get_savable_loader(dataset, watchdog_timeout_seconds=None)


def _reason(error: BaseException) -> str:
    """In one line; of what lies below it, where it says nothing itself."""
    while not str(error) and (error.__cause__ or error.__context__):
        error = error.__cause__ or error.__context__ or error
    return " ".join(str(error).split())[:300] or type(error).__name__


def _parts(sample: Any) -> list[str | Pixels]:
    """Text and pixels of a sample.

    Raises:
        ValueError: it has neither an image with a caption nor a sequence, or other things in it.
    """
    if hasattr(sample, "caption") and hasattr(sample, "image"):
        if not isinstance(sample.caption, str):
            raise ValueError(f"its caption is a {type(sample.caption).__name__}")
        found = [sample.image, sample.caption.strip()]
    elif isinstance(getattr(sample, "sequence", None), list | tuple):
        found = list(sample.sequence)
    else:
        raise ValueError(
            f"it is a {type(sample).__name__}: CaptioningSample and InterleavedSample are read"
        )
    return [part if isinstance(part, str) else _pixels(part) for part in found]


def _pixels(image: Any) -> Pixels:
    if isinstance(image, Image.Image):
        return np.asarray(image.convert("RGB"))[None]
    raise ValueError(f"its image is a {type(image).__name__}")


class Meta(NamedTuple):
    """What is known of prepared shards: a digest, samples to train on, if some are held out."""

    fingerprint: str
    train: int
    has_val: bool


def read_meta(folder: Path, key: str) -> Meta:
    """
    Raises:
        PretrainError: the folder is missing or not prepared; ``key`` is the setting's.
    """
    if not folder.is_dir():
        raise PretrainError(f"{key}.path: the folder {folder} does not exist")
    meta = folder / ".nv-meta"
    try:
        info, split = (meta / ".info.json").read_text(), (meta / "split.yaml").read_text()
        counts = json.loads(info)["shard_counts"]
        parts = yaml.safe_load(split)["split_parts"]
        (meta / "dataset.yaml").read_text()
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        raise PretrainError(
            f"{key}.path: {folder} is not prepared for energon ({error}): run `energon prepare` "
            "on it, or make shards with `python -m pretrain data make-shards`"
        ) from error
    if not parts.get("train"):
        raise PretrainError(f"{key}.path: {meta}/split.yaml has no shards in 'train'")
    from braceexpand import braceexpand

    training = {name for pattern in parts["train"] for name in braceexpand(pattern)}
    count = sum(count for name, count in counts.items() if name in training)
    digest = hashlib.sha256((info + split).encode()).hexdigest()[:16]
    return Meta(digest, count, bool(parts.get("val")))


def texts(folder: Path, key: str, seed: int) -> Iterator[str]:
    """Text to train a tokenizer on: of as many training samples as there are, images undecoded."""
    count = read_meta(folder, key).train
    for sample in itertools.islice(_loader(folder, "train", 0, 1, seed, [], images=False), count):
        found = getattr(sample, "sequence", None) or [getattr(sample, "caption", None)]
        yield from (part for part in found if isinstance(part, str))


@dataclass
class Shards:
    """A prepared folder of shards, and its held-out documents.

    Attributes:
        sizes: int32 [n, 2], tokens and placeholders of each held-out document.
        skips: what could not be taken in.
        train: samples to train on.
    """

    folder: Path
    key: str
    composer: Composer
    length: int
    seed: int
    skips: list[Skip] = field(default_factory=list)
    train: int = 0
    fingerprint: str = ""
    held_out: list[list[str | Pixels]] = field(default_factory=list)
    sizes: npt.NDArray[np.int32] = field(init=False)

    def __post_init__(self) -> None:
        meta = read_meta(self.folder, self.key)
        self.fingerprint, self.train = meta.fingerprint, meta.train
        if meta.has_val:
            for sample in itertools.islice(self._held_out_samples(), _HELD_OUT):
                parts = self._fitted(sample)
                if parts is not None:
                    self.held_out.append(parts)
        sizes = [self._size(parts) for parts in self.held_out]
        self.sizes = np.array(sizes, np.int32).reshape(-1, 2)

    def _held_out_samples(self) -> Iterator[Any]:
        try:
            yield from _loader(self.folder, "val", 0, 1, self.seed, self.skips)
        except Exception as error:
            raise self.failure(error) from error

    def failure(self, error: Exception) -> PretrainError:
        """Energon gave up: everything is damaged, or shards are missing."""
        corrupt = [skip for skip in self.skips if skip.corrupt][-1:]
        latest = "".join(f"; the latest sample: {skip.name} ({skip.reason})" for skip in corrupt)
        return PretrainError(
            f"{self.key}: energon cannot read {self.folder}: {_reason(error)}{latest}"
        )

    def _size(self, parts: list[str | Pixels]) -> tuple[int, int]:
        document = self.composer.document(parts)
        return len(document), document.tokens.count(self.composer.tokenizer.media_pad)

    def _fitted(self, sample: Any) -> list[str | Pixels] | None:
        """A sample's parts; None, and a note of it, where it cannot be used."""
        name = f"{self.folder}/{sample.__key__}"
        try:
            parts = [p if isinstance(p, str) else self.composer.fit(p) for p in _parts(sample)]
        except ValueError as error:
            self.skips.append(Skip(name, str(error)))
            return None
        tokens, _ = self._size(parts)
        if tokens > self.length:
            reason = f"its {tokens} tokens do not fit data.seq_length={self.length}"
            self.skips.append(Skip(name, reason, corrupt=False))
            return None
        return parts

    def document(self, sample: Any) -> Document | None:
        parts = self._fitted(sample)
        return None if parts is None else self.composer.document(parts)

    def describe(self, document: int) -> tuple[str, list[Any], list[Any]]:
        """As of an index, of a held-out document."""
        parts = self.held_out[document]
        return (
            f"{self.folder}/val:{document}",
            parts,
            [list(p.shape[:3]) for p in parts if not isinstance(p, str)],
        )

    def load(self, document: int, composer: Composer) -> list[str | Pixels]:
        return self.held_out[document]


@dataclass
class EnergonCursor:
    """In the training samples of a folder of shards: this rank's part, as energon deals it."""

    source: int
    weight: float
    shards: Shards
    rank: int
    ranks: int
    vision: bool = True
    whole: bool = True
    taken: int = 0

    def __post_init__(self) -> None:
        self._loader = self._new_loader()
        self._samples: Iterator[Any] | None = None
        # Read, and waiting for room: the document, and the key that energon gives it out by.
        self._waiting: tuple[Document, Any] | None = None

    def _new_loader(self) -> Any:
        shards = self.shards
        return _loader(shards.folder, "train", self.rank, self.ranks, shards.seed, shards.skips)

    def _next(self) -> tuple[Document, Any]:
        try:
            if self._samples is None:
                self._samples = iter(self._loader)
            # Endless: as many as a whole pass has are enough to know that none can be used.
            for sample in itertools.islice(self._samples, self.shards.train + 1):
                document = self.shards.document(sample)
                if document is not None:
                    return document, sample.__restore_key__
        except Exception as error:
            raise self.shards.failure(error) from error
        latest = "".join(f"; the latest: {skip.reason}" for skip in self.shards.skips[-1:])
        raise PretrainError(
            f"{self.shards.key}: {self.shards.folder} has nothing for rank {self.rank} that can be "
            f"used{latest}"
        )

    def peek(self) -> tuple[int, int]:
        if self._waiting is None:
            self._waiting = self._next()
        document, _ = self._waiting
        return len(document), document.tokens.count(document.tokenizer.media_pad)

    def take(self, room: int) -> Piece:
        if self._waiting is None:
            self._waiting = self._next()
        document, _ = self._waiting
        self._waiting = None
        self.taken += len(document)
        return Piece(self.source, document)

    def state(self) -> dict[str, Any]:
        """Energon's own state, and the sample that waits."""
        state = self._loader.save_state_rank()
        return {
            "taken": self.taken,
            "waiting": None if self._waiting is None else _plain(self._waiting[1]),
            "loader": _plain(state.worker_states),
            "next_worker": state.next_worker_id,
        }

    def restore(self, state: dict[str, Any]) -> None:
        from megatron.energon.savable_loader import SavableDataLoaderState

        self._loader, self._samples = self._new_loader(), None
        self.taken, self._waiting = state["taken"], None
        try:
            if state["waiting"] is not None:
                key = _unplain(state["waiting"])
                document = self.shards.document(self._loader.restore_sample(key))
                assert document is not None
                self._waiting = document, key
            self._loader.restore_state_rank(
                SavableDataLoaderState(
                    worker_states=_unplain(state["loader"]),
                    next_worker_id=state["next_worker"],
                    micro_batch_size=None,
                )
            )
        except Exception as error:
            raise self.shards.failure(error) from error


def _plain(value: Any) -> Any:
    """Energon's state in what JSON has."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, bytes):
        return {"__bytes__": base64.b64encode(value).decode()}
    if isinstance(value, tuple):
        return {"__tuple__": [_plain(item) for item in value]}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, str | int | float):
        return value
    if dataclasses.is_dataclass(value) and type(value).__module__.startswith(_THEIRS):
        fields = {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"__class__of__": [type(value).__module__, type(value).__qualname__], **fields}
    raise TypeError(f"energon's state has a {type(value).__name__} in it")


def _unplain(value: Any) -> Any:
    from megatron.energon.state import FlexState

    if isinstance(value, list):
        return [_unplain(item) for item in value]
    if not isinstance(value, dict):
        return value
    if "__bytes__" in value:
        return base64.b64decode(value["__bytes__"])
    if "__tuple__" in value:
        return tuple(_unplain(item) for item in value["__tuple__"])
    found = {key: _unplain(item) for key, item in value.items()}
    if "__class__of__" in found:
        module, name = found.pop("__class__of__")
        if not module.startswith(_THEIRS):
            raise ValueError(f"{module} is no module of energon's")
        return getattr(importlib.import_module(module), name)(**found)
    return FlexState(found)
