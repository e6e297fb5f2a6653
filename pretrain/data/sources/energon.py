"""Sources of images and text in WebDataset shards, which megatron-energon reads and shuffles."""

import base64
import contextlib
import dataclasses
import hashlib
import itertools
import json
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import yaml
from PIL import Image

from pretrain.config import DataConfig
from pretrain.data.composer import Composer, as_pair
from pretrain.data.interface import RankShare, Split
from pretrain.data.media.patches import VisionItem
from pretrain.data.media.pixels import ImageFile, Pixels, decode
from pretrain.data.packing import Document
from pretrain.data.skipped import Skip
from pretrain.data.sources.indexed import DocumentCursor, too_long
from pretrain.data.sources.interface import Cursor, Documents, Segment, Source
from pretrain.data.sources.order import Integers
from pretrain.data.sources.text import Text
from pretrain.errors import PretrainError
from pretrain.model.geometry import MAX_FRAMES

# Held-out documents, which are read at the start and kept.
_HELD_OUT_DOCUMENTS = 256
# Samples in the buffer in which energon shuffles, in addition to shuffling shards and slices.
_SHUFFLE_BUFFER = 256
# Maximum size in bytes of a file in a shard, and of one with text or JSON.
_MAX_BYTES = 2**28
_MAX_TEXT_BYTES = 2**24
# Maximum number of shard names in a split.
_MAX_SHARDS = 10**6
# Stands for the number of a training sample.
_UNNUMBERED = -1
# The only class in energon's state.
_SLICE = "SliceState"
_TEXT = ("txt", "text", "transcript")
_JSON = ("json", "jsn")
# Sample types that are read, and their older names in dataset.yaml.
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


class _TooLarge(bytes):
    """Takes the place of a file that exceeds :data:`_MAX_BYTES`; contains its size in words."""


def _limit_parts() -> None:
    """Keep energon from reading files in shards that exceed :data:`_MAX_BYTES`.

    A sparse file of a terabyte occupies a kilobyte in a tar. Energon offers no hook for this.
    """
    from megatron.energon.flavors.webdataset import itar, itar_reader

    class LimitedTar(itar.ITarFile):  # type: ignore[misc]
        def extractfile(self, member: Any) -> Any:
            if member.size > _MAX_BYTES:
                return SimpleNamespace(read=lambda: _TooLarge(f"{member.size:,} bytes".encode()))
            return super().extractfile(member)

    itar_reader.ITarFile = LimitedTar


def _decoder(images: bool, trusted: bool) -> Any:
    """A decoder of text, JSON and images.

    It replaces energon's decoder, which unpickles by suffix and does not turn images upright. If
    the shards are trusted to run code, energon's decoder decodes everything else; otherwise that
    stays bytes.
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
            text = suffix in _TEXT or suffix in _JSON
            try:
                if isinstance(part, _TooLarge) or (text and len(part) > _MAX_TEXT_BYTES):
                    size = part.decode() if isinstance(part, _TooLarge) else f"{len(part):,} bytes"
                    raise ValueError(f"too large: {size}")
                if text:
                    return part.decode() if suffix in _TEXT else json.loads(part)
                if not images:
                    return part
                if trusted and f".{suffix}" not in Image.registered_extensions():
                    return super().__call__({key: part})[key]
                return Image.fromarray(decode(part))
            except Exception as error:  # some would end energon, such as deeply nested JSON
                raise ValueError(f"its {suffix}: {_reason(error)}") from error

    return Decoder()


def _reason(error: BaseException) -> str:
    """The message of an error in one line; if it is empty, that of its cause."""
    while not str(error) and (error.__cause__ or error.__context__):
        error = error.__cause__ or error.__context__ or error
    return " ".join(str(error).split())[:300] or type(error).__name__


def _parts(sample: Any) -> list[str | Pixels]:
    """Text and pixels of a sample.

    Raises:
        ValueError: the sample is neither a captioned image nor a sequence of images and text.
    """
    if hasattr(sample, "caption") and hasattr(sample, "image"):
        if not isinstance(sample.caption, str):
            raise ValueError(f"its caption is a {type(sample.caption).__name__}")
        parts = [sample.image, sample.caption.strip()]
    elif isinstance(getattr(sample, "sequence", None), list | tuple):
        parts = list(sample.sequence)
    else:
        raise ValueError(
            f"it is a {type(sample).__name__}: CaptioningSample and InterleavedSample are read"
        )
    for part in parts:
        if not isinstance(part, str | Image.Image):
            raise ValueError(f"its image is a {type(part).__name__}")
    return [part if isinstance(part, str) else ImageFile(part).rgb()[None] for part in parts]


class Meta(NamedTuple):
    """Description of prepared shards.

    Attributes:
        fingerprint: digest of energon's metadata.
        train: number of training samples.
        has_val: whether there are held-out samples.
        dataset: the sample type, and the items of its field map; None if energon shall load
            ``dataset.yaml`` itself and run the code that it names.
    """

    fingerprint: str
    train: int
    has_val: bool
    dataset: tuple[str, tuple[tuple[str, str], ...]] | None


def read_meta(folder: Path, *, trust_code: bool = False) -> Meta:
    """Read the metadata of prepared shards.

    Args:
        trust_code: allow ``dataset.yaml`` to name Python code.

    Raises:
        ValueError: the folder is missing or not prepared, or its metadata names shards in other
            folders or code that is not trusted.
    """
    if not folder.is_dir():
        raise ValueError(f"the folder {folder} does not exist")
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
        raise ValueError(
            f"{folder} is not prepared for energon ({_reason(error)}): run `energon prepare` on "
            "it, or make shards with `python -m pretrain data make-shards`"
        ) from error
    if not training:
        raise ValueError(f"{meta}/split.yaml has no shards in 'train'")
    if outside:
        raise ValueError(f"{meta} names a shard outside {folder}: {outside[0]!r}")
    digest = hashlib.sha256((info + split + described).encode()).hexdigest()[:16]
    read = None if trust_code else _without_code(dataset, meta / "dataset.yaml")
    return Meta(digest, train, bool(parts.get("val")), read)


def _expanded(patterns: Any) -> list[str]:
    """Expand patterns such as ``train-{000..127}.tar`` to names.

    Raises:
        ValueError: there are more than :data:`_MAX_SHARDS` names, or a pattern is not text.
    """
    from braceexpand import braceexpand

    if not isinstance(patterns, list) or not all(isinstance(one, str) for one in patterns):
        raise ValueError("a part of split.yaml is not a list of names")
    if sum(map(_num_expansions, patterns)) > _MAX_SHARDS:
        raise ValueError(f"split.yaml names more than {_MAX_SHARDS:,} shards")
    return [name for pattern in patterns for name in braceexpand(pattern)]


def _num_expansions(pattern: str) -> int:
    """An upper bound of the number of names that braceexpand would make in memory."""
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


def _without_code(dataset: Any, file: Path) -> tuple[str, tuple[tuple[str, str], ...]]:
    """The sample type and field map of a ``dataset.yaml`` that names no code.

    Energon would import any module, call any function and run any file named there.

    Raises:
        ValueError: the file names code, or a sample type that is not read.
    """
    settings = dict(dataset) if isinstance(dataset, dict) else {}
    named = settings.pop("sample_type", None)
    if named is None:
        named = {name: settings.pop(name, None) for name in ("__module__", "__class__")}
    if not any((named if isinstance(named, dict) else {"": named}).values()):
        raise ValueError(f"{file} has no sample_type")
    fields = settings.pop("field_map", None)
    settings.pop("subflavors", None)  # labels, which are not read
    if (
        isinstance(named, dict)
        and named.keys() == {"__module__", "__class__"}
        and re.fullmatch(r"megatron\.energon(\.\w+)*", str(named["__module__"]))
    ):
        sample_type = _OLDER.get(str(named["__class__"]), str(named["__class__"]))
    else:
        sample_type, settings = "", settings | {"sample_type": named}
    if settings:
        raise ValueError(
            f"{file} sets {', '.join(map(repr, settings))}, by which energon would run Python code "
            "that comes with the shards. If you trust it, set the source's trust_code: true; "
            "otherwise give a sample_type of megatron.energon and a field_map only"
        )
    if sample_type not in _SAMPLE_TYPES:
        read = " and ".join(_SAMPLE_TYPES)
        raise ValueError(f"{file} has samples of type {sample_type}: {read} are read")
    if not isinstance(fields, dict) or not all(isinstance(one, str) for one in fields.values()):
        raise ValueError(f"{file} has no field_map of names to suffixes")
    return sample_type, tuple((str(name), suffixes) for name, suffixes in fields.items())


class EnergonSource(Source):
    """A folder of WebDataset shards that is prepared for megatron-energon."""

    has_images = True
    reads_field = False
    may_run_code = True

    def __init__(self, number: int, data: DataConfig, seed: int) -> None:
        super().__init__(number, data, seed)
        require_energon()
        self.folder = Path(self.config.path)
        try:
            self.meta = read_meta(self.folder, trust_code=self.config.trust_code)
        except ValueError as error:
            raise PretrainError(f"{self.setting}.path: {error}") from error
        self.key = self.meta.fingerprint

    def records(self) -> Iterator[Text]:
        """The text of as many training samples as there are; their images are not decoded."""
        skips: list[Skip] = []
        with self.errors_named(skips):
            loader = self.loader("train", RankShare(), skips, images=False)
            for sample in itertools.islice(loader, self.meta.train):
                parts = getattr(sample, "sequence", None) or [getattr(sample, "caption", None)]
                yield from (Text("", part) for part in parts if isinstance(part, str))

    def open(self, composer: Composer) -> "EnergonDocuments":
        composer.tokenizer.require_media()
        return EnergonDocuments(self, composer)

    def loader(self, part: str, share: RankShare, skips: list[Skip], *, images: bool = True) -> Any:
        """Energon's savable loader, which reads in this process; it is endless for ``train``.

        Args:
            part: energon's name of the split.
            skips: samples that cannot be decoded are appended to it.
            images: decode images; otherwise they stay bytes.
        """
        from megatron import energon
        from megatron.energon.dataset_config import get_dataset_from_config
        from megatron.energon.epathlib import EPath
        from megatron.energon.metadataset.loader_interface import LoadedDataset

        warnings.filterwarnings("ignore", message="'pin_memory' argument is set as true")
        _limit_parts()

        class Encoder(energon.DefaultTaskEncoder):  # type: ignore[misc]
            decoder = _decoder(images, trusted=self.meta.dataset is None)

            @energon.stateless  # type: ignore[untyped-decorator]
            def encode_sample(self, sample: Any) -> Any:
                return sample

        def note(error: Exception, sample: Any, sources: Any) -> None:
            # Energon passes its raw sample: the files of one key in a shard.
            raw: dict[str, Any] = next(iter(getattr(sample, "data", None) or ()), {})
            name = f"{raw.get('__shard__', 'a shard')}:{raw.get('__key__', 'a sample')}"
            skips.append(Skip(f"{self.folder}/{name}", _reason(error)))

        workers = energon.WorkerConfig(
            rank=share.rank,
            world_size=share.ranks,
            num_workers=0,
            seed_offset=self.seed,
            global_error_handler=note,
        )
        encoder, training = Encoder(), part == "train"
        options: dict[str, Any] = {
            "split_part": part,
            "training": training,
            "worker_config": workers,
            "decoder": encoder.decoder,
            **({"max_samples_per_sequence": 100} if training else {}),
        }
        if self.meta.dataset is None:
            samples: Any = get_dataset_from_config(self.folder, **options)
        else:  # not made by energon, which would import what dataset.yaml names
            sample_type, fields = self.meta.dataset
            options |= {"sample_type": getattr(energon, sample_type), "field_map": dict(fields)}
            samples = energon.StandardWebdatasetFactory(EPath(self.folder), **options)
        settings = {
            "datasets": [LoadedDataset(dataset=samples)],
            "worker_config": workers,
            "batch_size": None,
        }
        dataset = (
            encoder.build_train_datasets(shuffle_buffer_size=_SHUFFLE_BUFFER, **settings)
            if training
            else encoder.build_val_datasets(**settings)
        )
        return energon.get_savable_loader(dataset, watchdog_timeout_seconds=None)

    @contextlib.contextmanager
    def errors_named(self, skips: Sequence[Skip]) -> Iterator[None]:
        """Name the source when energon gives up: everything is damaged, or shards are missing.

        Raises:
            PretrainError: in place of any exception.
        """
        try:
            yield
        except Exception as error:
            corrupt = [skip for skip in skips if skip.corrupt][-1:]
            latest = "".join(f"; the latest sample: {s.name} ({s.reason})" for s in corrupt)
            raise PretrainError(
                f"{self.setting}: energon cannot read {self.folder}: {_reason(error)}{latest}"
            ) from error


class EnergonDocuments(Documents):
    """The samples of prepared shards. Held-out samples are read at the start and kept."""

    one_pass = True

    def __init__(self, source: EnergonSource, composer: Composer) -> None:
        self.source: EnergonSource = source
        self.composer = composer
        self.met: list[Skip] = []  # samples that could not be used
        self.held_out: list[list[str | Pixels]] = []
        self._sizes: list[tuple[int, int]] = []
        if source.meta.has_val:
            with source.errors_named(self.met):
                loader = source.loader("val", RankShare(), self.met)
                for sample in itertools.islice(loader, _HELD_OUT_DOCUMENTS):
                    if composed := self.compose(sample):
                        self.held_out.append(composed[0])
                        self._sizes.append(_size(composed[1]))

    @property
    def fingerprint(self) -> str:
        return self.source.meta.fingerprint

    def count(self, split: Split) -> int:
        return self.source.meta.train if split == "train" else len(self.held_out)

    def cursor(self, split: Split, share: RankShare) -> Cursor:
        if split == "train":
            return EnergonCursor(self, share)
        return DocumentCursor(self, np.arange(len(self.held_out)), share)

    def sizes_of(self, numbers: Integers) -> tuple[Integers, Integers]:
        """Tokens, and image placeholders among them, of held-out documents; both int64 [n]."""
        tokens, placeholders = np.array(self._sizes, np.int64)[numbers].T
        return tokens, placeholders

    def document(self, segment: Segment, *, pixels: bool = True) -> Document:
        if segment.document is not None:
            return segment.document
        return self.composer.document(self.held_out[segment.number])

    def pairs(self, split: Split) -> Iterator[VisionItem]:
        for parts in self.held_out if split == "held_out" else ():
            if (pair := as_pair(parts)) and len(pair[0]) <= MAX_FRAMES:
                yield VisionItem(*pair)

    def take_skipped(self) -> list[Skip]:
        return [self.met.pop(0) for _ in range(len(self.met))]  # a thread may be appending

    def compose(self, sample: Any) -> tuple[list[str | Pixels], Document] | None:
        """A sample's fitted parts and document; None, and an entry in :attr:`met`, if it cannot be
        used."""
        name, length = f"{self.source.folder}/{sample.__key__}", self.source.data.seq_length
        try:
            parts = [p if isinstance(p, str) else self.composer.fit(p) for p in _parts(sample)]
        except ValueError as error:
            self.met.append(Skip(name, str(error)))
            return None
        document = self.composer.document(parts)
        if len(document) > length:
            self.met.append(too_long(name, len(document), length))
            return None
        return parts, document


def _size(document: Document) -> tuple[int, int]:
    return len(document), document.tokens.count(document.tokenizer.media_pad)


@dataclass
class EnergonCursor:
    """A position in a rank's share of the training samples, which energon shuffles."""

    documents: EnergonDocuments
    share: RankShare
    whole: bool = True
    taken: int = 0

    def __post_init__(self) -> None:
        self.source = self.documents.source
        self._loader = self._new_loader()
        self._samples: Iterator[Any] | None = None
        # The next document, and the key by which energon can restore its sample.
        self._waiting: tuple[Document, Any] | None = None

    def _new_loader(self) -> Any:
        with self.source.errors_named(self.documents.met):
            return self.source.loader("train", self.share, self.documents.met)

    def _next(self) -> tuple[Document, Any]:
        with self.source.errors_named(self.documents.met):
            if self._samples is None:
                self._samples = iter(self._loader)
            # The loader is endless: after one pass it is known that no sample can be used.
            for sample in itertools.islice(self._samples, self.source.meta.train + 1):
                if composed := self.documents.compose(sample):
                    return composed[1], sample.__restore_key__
        latest = "".join(f"; the latest: {skip.reason}" for skip in self.documents.met[-1:])
        raise PretrainError(
            f"{self.source.setting}: {self.source.folder} has nothing for rank {self.share.rank} "
            f"that can be used{latest}"
        )

    def _peek(self) -> Document:
        if self._waiting is None:
            self._waiting = self._next()
        return self._waiting[0]

    def peek(self) -> tuple[int, int]:
        return _size(self._peek())

    def take(self, room: int) -> Segment | None:
        document = self._peek()
        if len(document) > room:
            return None
        self._waiting = None
        self.taken += len(document)
        return Segment(self.source.number, _UNNUMBERED, 0, len(document), document)

    def state(self) -> dict[str, Any]:
        """Energon's state, and the key of the next sample if it has been read."""
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
        with self.source.errors_named(self.documents.met):
            if state["waiting"] is not None:
                key = _unplain(state["waiting"])
                composed = self.documents.compose(self._loader.restore_sample(key))
                assert composed is not None
                self._waiting = composed[1], key
            self._loader.restore_state_rank(
                SavableDataLoaderState(
                    worker_states=_unplain(state["loader"]),
                    next_worker_id=state["next_worker"],
                    micro_batch_size=None,
                )
            )


def _plain(value: Any) -> Any:
    """Convert energon's state to values that JSON has."""
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
    """The inverse of :func:`_plain`. It creates no objects of classes that a file names."""
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
    fields = {key: _unplain(item) for key, item in value.items()}
    if "__class__of__" in fields:
        kind = fields.pop("__class__of__")
        if kind != _SLICE:
            raise ValueError(f"energon's state has no objects of the class {kind}")
        return SliceState(**fields)
    return FlexState(fields)
