"""Vision-text from WebDataset shards, through megatron-energon: its format, order and resume."""

import base64
import dataclasses
import hashlib
import itertools
import json
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import yaml
from PIL import Image

from pretrain.data.composer import Composer
from pretrain.data.media.pixels import ImageFile, Pixels, decode
from pretrain.data.mixture.stream import Piece
from pretrain.data.packing import Document
from pretrain.data.skipped import Skip
from pretrain.errors import PretrainError

# Held-out documents that are read, and kept, at the start.
_HELD_OUT = 256
# Samples that energon shuffles among, beyond its own order of shards and slices of them.
_SHUFFLE = 256
# Bytes of a file in a shard that are read at most: of an image, and of text or JSON.
_LARGEST = 2**28
_LARGEST_TEXT = 2**24
# Names of shards that a folder's split may expand to at most.
_MOST_SHARDS = 10**6
# The one class in energon's state.
_SLICE = "SliceState"
_TEXT = ("txt", "text", "transcript")
_JSON = ("json", "jsn")
# Sample types that are read, and the older way of naming them in dataset.yaml.
_SAMPLE_TYPES = ("CaptioningSample", "InterleavedSample")
_OLDER = {"CaptioningWebdataset": "CaptioningSample", "InterleavedWebdataset": "InterleavedSample"}


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
    meta: "Meta",
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
    from megatron.energon.dataset_config import get_dataset_from_config
    from megatron.energon.epathlib import EPath
    from megatron.energon.metadataset.loader_interface import LoadedDataset

    warnings.filterwarnings("ignore", message="'pin_memory' argument is set as true")
    _limit_parts()

    class Encoder(energon.DefaultTaskEncoder):  # type: ignore[misc]
        decoder = _decoder(images, trusted=meta.dataset is None)

        @energon.stateless  # type: ignore[untyped-decorator]
        def encode_sample(self, sample: Any) -> Any:
            return sample

    def note(error: Exception, sample: Any, sources: Any) -> None:
        # Energon passes its raw sample: the files of one key in a shard.
        raw: dict[str, Any] = next(iter(getattr(sample, "data", None) or ()), {})
        name = f"{raw.get('__shard__', 'a shard')}:{raw.get('__key__', 'a sample')}"
        skips.append(Skip(f"{folder}/{name}", _reason(error)))

    workers = energon.WorkerConfig(
        rank=rank, world_size=ranks, num_workers=0, seed_offset=seed, global_error_handler=note
    )
    encoder, training = Encoder(), part == "train"
    sequences = {"max_samples_per_sequence": 100} if training else {}
    if meta.dataset is None:
        made: Any = get_dataset_from_config(
            folder,
            split_part=part,
            training=training,
            worker_config=workers,
            decoder=encoder.decoder,
            **sequences,
        )
    else:  # made here: energon would import what dataset.yaml names
        sample_type, field_map = meta.dataset
        made = energon.StandardWebdatasetFactory(
            EPath(folder),
            sample_type=getattr(energon, sample_type),
            field_map=dict(field_map),
            split_part=part,
            training=training,
            worker_config=workers,
            decoder=encoder.decoder,
            **sequences,
        )
    settings = {
        "datasets": [LoadedDataset(dataset=made)],
        "worker_config": workers,
        "batch_size": None,
    }
    dataset = (
        encoder.build_train_datasets(shuffle_buffer_size=_SHUFFLE, **settings)
        if training
        else encoder.build_val_datasets(**settings)
    )
    return energon.get_savable_loader(dataset, watchdog_timeout_seconds=None)


class _TooLarge(bytes):
    """Stands for a file in a shard that is larger than :data:`_LARGEST`: its size, in words."""


def _limit_parts() -> None:
    """Make energon read no file of a shard that is larger than :data:`_LARGEST`.

    A sparse file of a terabyte takes a kilobyte in a tar. Energon offers no hook for this.
    """
    from megatron.energon.flavors.webdataset import itar, itar_reader

    class LimitedTar(itar.ITarFile):  # type: ignore[misc]
        def extractfile(self, member: Any) -> Any:
            if member.size > _LARGEST:
                return SimpleNamespace(read=lambda: _TooLarge(f"{member.size:,} bytes".encode()))
            return super().extractfile(member)

    itar_reader.ITarFile = LimitedTar


def _decoder(images: bool, trusted: bool) -> Any:
    """Decodes text, JSON and images.

    Energon's own decoder unpickles by suffix, and turns no image upright. It decodes everything
    else where the shards are trusted to run code; otherwise that stays the bytes it is.
    """
    from megatron import energon

    class Decoder(energon.SampleDecoder):  # type: ignore[misc]
        def __call__(self, sample: dict[str, Any]) -> dict[str, Any]:
            return {
                key: self._decoded(key, part) if isinstance(part, bytes) else part
                for key, part in sample.items()
            }

        def _decoded(self, key: str, part: bytes) -> Any:
            suffix = key.rpartition(".")[2].lower()
            try:
                return self._of_kind(key, suffix, part)
            except Exception as error:  # energon ends at some, such as that of deeply nested JSON
                raise ValueError(f"its {suffix}: {_reason(error)}") from error

        def _of_kind(self, key: str, suffix: str, part: bytes) -> Any:
            text = suffix in _TEXT or suffix in _JSON
            if isinstance(part, _TooLarge) or (text and len(part) > _LARGEST_TEXT):
                size = part.decode() if isinstance(part, _TooLarge) else f"{len(part):,} bytes"
                raise ValueError(f"too large: {size}")
            if text:
                return part.decode() if suffix in _TEXT else json.loads(part)
            if not images:
                return part
            if trusted and f".{suffix}" not in Image.registered_extensions():
                return super().__call__({key: part})[key]
            return Image.fromarray(decode(part))

    return Decoder()


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
        return ImageFile(image).rgb()[None]
    raise ValueError(f"its image is a {type(image).__name__}")


class Meta(NamedTuple):
    """Description of prepared shards.

    Attributes:
        fingerprint: digest of energon's description of them.
        train: number of training samples.
        has_val: whether some are held out.
        dataset: the sample type, and the pairs of its field map; None where energon is to load
            ``dataset.yaml`` itself and run the code that it names.
    """

    fingerprint: str
    train: int
    has_val: bool
    dataset: tuple[str, tuple[tuple[str, str], ...]] | None


def read_meta(folder: Path, key: str, *, trust_code: bool = False) -> Meta:
    """
    Args:
        key: the source's setting, for messages.
        trust_code: let ``dataset.yaml`` name Python code to run.

    Raises:
        PretrainError: the folder is missing or not prepared, names shards outside it, or code that
            is not trusted.
    """
    if not folder.is_dir():
        raise PretrainError(f"{key}.path: the folder {folder} does not exist")
    meta = folder / ".nv-meta"
    try:
        info, split = (meta / ".info.json").read_text(), (meta / "split.yaml").read_text()
        described = (meta / "dataset.yaml").read_text()
        counts = dict(json.loads(info)["shard_counts"])
        parts = dict(yaml.safe_load(split)["split_parts"])
        dataset = yaml.safe_load(described)
        training = set(_expanded(parts.get("train") or []))
        for part in parts.values():
            _expanded(part)
        _expanded((yaml.safe_load(split)).get("exclude") or [])
        outside = [name for name in {*counts, *training} if not _is_inside(name)]
        train = sum(int(count) for name, count in counts.items() if name in training)
    except (
        *(OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError),
        yaml.YAMLError,
    ) as error:
        raise PretrainError(
            f"{key}.path: {folder} is not prepared for energon ({_reason(error)}): run `energon "
            "prepare` on it, or make shards with `python -m pretrain data make-shards`"
        ) from error
    if not training:
        raise PretrainError(f"{key}.path: {meta}/split.yaml has no shards in 'train'")
    if outside:
        raise PretrainError(f"{key}.path: {meta} names a shard outside {folder}: {outside[0]!r}")
    digest = hashlib.sha256((info + split + described).encode()).hexdigest()[:16]
    read = None if trust_code else _without_code(dataset, meta / "dataset.yaml", key)
    return Meta(digest, train, bool(parts.get("val")), read)


def _expanded(patterns: Any) -> list[str]:
    """Names that patterns such as ``train-{000..127}.tar`` stand for.

    Raises:
        ValueError: they are more than :data:`_MOST_SHARDS`, or no text.
    """
    from braceexpand import braceexpand

    if not isinstance(patterns, list) or not all(isinstance(one, str) for one in patterns):
        raise ValueError("a part of split.yaml is not a list of names")
    if sum(map(_num_expansions, patterns)) > _MOST_SHARDS:
        raise ValueError(f"split.yaml names more than {_MOST_SHARDS:,} shards")
    return [name for pattern in patterns for name in braceexpand(pattern)]


def _num_expansions(pattern: str) -> int:
    """At least the number of names that braceexpand would make, all of them in memory."""
    count = 1
    while group := re.search(r"\{([^{}]*)\}", pattern):
        ends = re.match(r"(-?\d+)\.\.(-?\d+)", group[1])
        letters = 64 if ".." in group[1] else 1
        count *= abs(int(ends[2]) - int(ends[1])) + 1 if ends else letters + group[1].count(",")
        pattern = pattern[: group.start()] + pattern[group.end() :]
    return count


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and "://" not in name


def _without_code(dataset: Any, file: Path, key: str) -> tuple[str, tuple[tuple[str, str], ...]]:
    """The sample type and field map of a ``dataset.yaml`` that names no code.

    Energon would import any module, call any function and run any file that it names.

    Raises:
        PretrainError: it names code, or a type of sample that is not read.
    """
    settings = dict(dataset) if isinstance(dataset, dict) else {}
    named = settings.pop("sample_type", None)
    if named is None:
        named = {name: settings.pop(name, None) for name in ("__module__", "__class__")}
    if not any((named if isinstance(named, dict) else {"": named}).values()):
        raise PretrainError(f"{key}.path: {file} has no sample_type")
    fields = settings.pop("field_map", None)
    settings.pop("subflavors", None)  # labels that nothing here reads
    if (
        isinstance(named, dict)
        and named.keys() == {"__module__", "__class__"}
        and re.fullmatch(r"megatron\.energon(\.\w+)*", str(named["__module__"]))
    ):
        sample_type = _OLDER.get(str(named["__class__"]), str(named["__class__"]))
    else:
        sample_type, settings = "", settings | {"sample_type": named}
    if settings:
        raise PretrainError(
            f"{key}.path: {file} sets {', '.join(map(repr, settings))}, by which energon would run "
            f"Python code that comes with the shards. If you trust it, set {key}.trust_code: true; "
            "otherwise give a sample_type of megatron.energon and a field_map only"
        )
    if sample_type not in _SAMPLE_TYPES:
        raise PretrainError(
            f"{key}.path: {file} has samples of type {sample_type}: {' and '.join(_SAMPLE_TYPES)} "
            "are read"
        )
    if not isinstance(fields, dict) or not all(isinstance(one, str) for one in fields.values()):
        raise PretrainError(f"{key}.path: {file} has no field_map of names to suffixes")
    return sample_type, tuple((str(name), suffixes) for name, suffixes in fields.items())


def texts(folder: Path, key: str, seed: int, *, trust_code: bool = False) -> Iterator[str]:
    """Text to train a tokenizer on: of as many training samples as there are, images undecoded."""
    meta, skips = read_meta(folder, key, trust_code=trust_code), list[Skip]()
    try:
        loader = _loader(folder, meta, "train", 0, 1, seed, skips, images=False)
        for sample in itertools.islice(loader, meta.train):
            found = getattr(sample, "sequence", None) or [getattr(sample, "caption", None)]
            yield from (part for part in found if isinstance(part, str))
    except Exception as error:
        raise _failure(folder, key, skips, error) from error


def _failure(folder: Path, key: str, skips: Sequence[Skip], error: Exception) -> PretrainError:
    """Energon gave up: everything is damaged, or shards are missing."""
    corrupt = [skip for skip in skips if skip.corrupt][-1:]
    latest = "".join(f"; the latest sample: {skip.name} ({skip.reason})" for skip in corrupt)
    return PretrainError(f"{key}: energon cannot read {folder}: {_reason(error)}{latest}")


@dataclass
class Shards:
    """A prepared folder of shards, and its held-out documents.

    Attributes:
        sizes: int32 [n, 2], tokens and placeholders of each held-out document.
        skips: what could not be taken in.
        trust_code: see :class:`pretrain.config.SourceConfig`.
    """

    folder: Path
    key: str
    composer: Composer
    length: int
    seed: int
    trust_code: bool = False
    skips: list[Skip] = field(default_factory=list)
    meta: Meta = field(init=False)
    held_out: list[list[str | Pixels]] = field(default_factory=list)
    sizes: npt.NDArray[np.int32] = field(init=False)

    def __post_init__(self) -> None:
        self.meta = read_meta(self.folder, self.key, trust_code=self.trust_code)
        if self.meta.has_val:
            for sample in itertools.islice(self._held_out_samples(), _HELD_OUT):
                parts = self._fitted(sample)
                if parts is not None:
                    self.held_out.append(parts)
        sizes = [self._size(parts) for parts in self.held_out]
        self.sizes = np.array(sizes, np.int32).reshape(-1, 2)

    @property
    def fingerprint(self) -> str:
        return self.meta.fingerprint

    @property
    def train(self) -> int:
        return self.meta.train

    def loader(self, part: str, rank: int = 0, ranks: int = 1) -> Any:
        """Energon's loader of a split, for this rank's part of the samples."""
        try:
            return _loader(self.folder, self.meta, part, rank, ranks, self.seed, self.skips)
        except Exception as error:
            raise self.failure(error) from error

    def _held_out_samples(self) -> Iterator[Any]:
        try:
            yield from self.loader("val")
        except Exception as error:
            raise self.failure(error) from error

    def failure(self, error: Exception) -> PretrainError:
        return _failure(self.folder, self.key, self.skips, error)

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
        """Name, parts and image shapes of a held-out document, as of an index."""
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
        return self.shards.loader("train", self.rank, self.ranks)

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
    if type(value).__name__ == _SLICE and dataclasses.is_dataclass(value):
        fields = {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"__class__of__": _SLICE, **fields}
    raise TypeError(f"energon's state has a {type(value).__name__} in it")


def _unplain(value: Any) -> Any:
    """The reverse of :func:`_plain`; it makes no object of a class that the file names."""
    from megatron.energon.flavors.webdataset.sample_loader import SliceState
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
        kind = found.pop("__class__of__")
        if kind != _SLICE:
            raise ValueError(f"energon's state has no objects of the class {kind}")
        return SliceState(**found)
    return FlexState(found)
