"""A user's own data: sources opened, split, and mixed into sequences."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pretrain.config import DataConfig, SourceConfig
from pretrain.data import packing, sources
from pretrain.data.builtin.standard_library import SPLITS, Split, TextFile, questions, read_corpus
from pretrain.data.cache import Progress, cached, key_of, stamp
from pretrain.data.chat import REPLY, Message
from pretrain.data.composer import Composer, is_pair
from pretrain.data.index import (
    ChatIndex,
    Index,
    MixedIndex,
    Part,
    TextIndex,
    chat_index,
    mixed_index,
    text_index,
    too_long,
)
from pretrain.data.interface import Data, RankShare
from pretrain.data.media.patches import VisionItem
from pretrain.data.mixture.stream import (
    Cursor,
    IndexCursor,
    OnwardSequences,
    Piece,
    Sequences,
    Stream,
)
from pretrain.data.packing import Document, PackedSample
from pretrain.data.skipped import Skip, Skipped, within_limit
from pretrain.data.sources import Chat, Text
from pretrain.data.sources.energon import EnergonCursor, Shards, read_meta, require_energon
from pretrain.data.sources.energon import texts as energon_texts
from pretrain.data.tokenizer import SPECIAL_TOKENS, Tokenizer
from pretrain.errors import PretrainError

_LONG_RUN = re.compile(r"(\S{1000}|\s{1000})")
# Room that a caption test leaves for what the model writes.
_ANSWER = 24


ALL = RankShare()


@dataclass(frozen=True)
class Source:
    """An opened source.

    Attributes:
        number, key: its place in ``data.sources``, and what it is called in messages.
        documents: those of each split, by their number in the index.
    """

    number: int
    key: str
    config: SourceConfig
    index: TextIndex | ChatIndex | MixedIndex | Shards
    documents: dict[Split, npt.NDArray[np.int64]]

    @property
    def vision(self) -> bool:
        return self.config.has_images

    def num_documents(self, split: Split) -> int:
        if isinstance(self.index, Shards) and split == "train":
            return self.index.train  # energon knows which
        return len(self.documents[split])

    def cursor(self, split: Split, seed: int, turn: "RankShare") -> Cursor:
        if isinstance(self.index, Shards) and split == "train":
            return EnergonCursor(self.number, self.config.weight, self.index, turn.rank, turn.ranks)
        return IndexCursor(
            self.number,
            self.config.weight,
            self.vision,
            self.index,
            self.documents[split],
            seed,
            turn.rank,
            turn.ranks,
        )


class MixtureData(Data):
    """Sequences of a mixture of sources."""

    def __init__(
        self,
        config: DataConfig,
        seed: int,
        composer: Composer,
        opened: Sequence[Source],
        share: RankShare,
        skips: Sequence[Skip],
    ) -> None:
        self.config, self.seed = config, seed
        self.tokenizer, self.patch_size = composer.tokenizer, composer.patch_size
        self._composer, self._sources, self._share = composer, list(opened), share
        self._by_number = {source.number: source for source in opened}
        self._skips = list(skips)
        self._listed = list(skips)
        # Energon reads as it goes: then every rank has a stream of its own, which goes one way.
        self._one_way = any(isinstance(source.index, Shards) for source in opened)
        self._sequences: dict[Split, Sequences | OnwardSequences] = {}
        for split in SPLITS:
            if not any(source.num_documents(split) for source in opened):
                continue
            make = partial(self._stream, split)
            if self._one_way and split == "train":
                self._sequences[split] = OnwardSequences(make, share.local_batch_size)
            else:
                self._sequences[split] = Sequences(make)
        self._captioned = lru_cache(maxsize=8)(self._find_captioned)

    def _cursors(self, split: Split, turn: RankShare = ALL) -> list[Cursor]:
        return [
            source.cursor(split, self.seed, turn)
            for source in self._sources
            if source.num_documents(split)
        ]

    def _stream(self, split: Split) -> Stream:
        turn = self._share if self._one_way and split == "train" else ALL
        cursors = self._cursors(split, turn)
        return Stream(cursors, self.config.seq_length, self.config.vision_share)

    def _place(self, split: Split, index: int) -> int:
        """The number of a sequence in this rank's stream."""
        if not self._one_way or split != "train":
            return index
        step, within = divmod(index, self._share.global_batch_size)
        return within + (step - self._share.rank) * self._share.local_batch_size

    @property
    def has_held_out(self) -> bool:
        return "held_out" in self._sequences

    @property
    def has_images(self) -> bool:
        return any(source.vision and source.num_documents("train") for source in self._sources)

    def sample(self, split: Split, index: int) -> PackedSample:
        """Packed sequence number ``index``; the place of what is found corrupt stays empty."""
        pieces = self._sequences[split][self._place(split, index)]
        documents = [self._document(piece) for piece in pieces]
        found = [document for document in documents if document is not None]
        rng = np.random.default_rng([self.seed, SPLITS.index(split), index])
        shuffled = [found[place] for place in rng.permutation(len(found))]
        return packing.join(shuffled, self.config.seq_length, self.patch_size, self.tokenizer.pad)

    def _document(self, piece: Piece) -> Document | None:
        if isinstance(piece.document, Document):
            return piece.document
        index = self._by_number[piece.source].index
        if isinstance(index, TextIndex):
            tokens = index.read(piece.document, piece.start, piece.stop)
            return Document(self.tokenizer).add_tokens(tokens)
        if isinstance(index, ChatIndex):
            return Document(self.tokenizer, *index.read(piece.document))
        try:
            return self._composer.document(index.load(piece.document, self._composer))
        except ValueError as error:
            name, _, _ = index.describe(piece.document)
            self._skips.append(Skip(name, str(error)))
            return None

    def captioned_items(self, split: Split, count: int) -> list[VisionItem]:
        return list(self._captioned(split, count))

    def _find_captioned(self, split: Split, count: int) -> list[VisionItem]:
        items: dict[str, VisionItem] = {}
        for item in self._pairs(split):
            if len(items) == count:
                break
            caption = len(self.tokenizer.encode(item.caption)) + 1
            if len(self.question(item)) + max(caption, _ANSWER) <= self.config.seq_length:
                items.setdefault(item.caption, item)
        return list(items.values())

    def _pairs(self, split: Split) -> Iterator[VisionItem]:
        """Images with their captions, and clips that are one item of the encoder."""
        for source in self._sources:
            if isinstance(source.index, TextIndex | ChatIndex):
                continue
            for number in source.documents[split]:
                _, parts, shapes = source.index.describe(int(number))
                if is_pair(parts) and shapes[0][0] <= 4:
                    try:
                        pixels, caption = source.index.load(int(number), self._composer)
                    except ValueError:
                        continue  # told when a sequence meets it
                    assert isinstance(caption, str) and not isinstance(pixels, str)
                    yield VisionItem(pixels, caption)

    def take_skipped(self) -> list[Skip]:
        taken = []
        shards = (s.index.skips for s in self._sources if isinstance(s.index, Shards))
        for skips in (self._skips, *shards):
            while skips:  # a thread may be adding to it
                taken.append(skips.pop(0))
        return taken

    def state_dict(self, step: int) -> dict[str, Any]:
        share = self._share
        before = step * (share.local_batch_size if self._one_way else share.global_batch_size)
        return {
            "ranks": share.ranks if self._one_way else None,
            "fingerprint": [source.index.fingerprint for source in self._sources],
            "train": self._sequences["train"].state(before),
        }

    def load_state_dict(self, states: Sequence[dict[str, Any]]) -> None:
        state = states[min(self._share.rank, len(states) - 1)]
        for source, then in zip(self._sources, state["fingerprint"], strict=True):
            if source.index.fingerprint != then:
                raise PretrainError(
                    f"{source.key}: the documents of {_where(source.config)} are not those that "
                    "the checkpoint was made with, or data.max_image_tokens or data.video_fps is "
                    "another: put them back to go on, or choose another run_dir to start anew"
                )
        if self._one_way and state["ranks"] != self._share.ranks:
            raise PretrainError(
                f"the checkpoint was made with {state['ranks']} data-parallel ranks, among which "
                f"energon dealt the shards, not {self._share.ranks}: start as many processes as "
                "then to go on"
            )
        self._sequences["train"].restore(state["train"])

    @property
    def fingerprint(self) -> str:
        return "-".join(source.index.fingerprint for source in self._sources)

    def describe(self) -> str:
        lines = []
        for source in self._sources:
            train, held_out = (source.num_documents(split) for split in SPLITS)
            lines.append(
                f"{source.key}: {_where(source.config)}, weight {source.config.weight:g}: "
                f"{train:,} documents, {held_out:,} held out"
            )
        corrupt = sum(skip.corrupt for skip in self._listed)
        if self._listed:
            lines.append(
                f"skipped: {corrupt} corrupt, {len(self._listed) - corrupt} empty, too long or not "
                "read; see skipped.jsonl"
            )
            if any(isinstance(s.index, Index) and s.index.cached for s in self._sources):
                lines.append(
                    f"they were found when the index in {self.config.cache_dir} was made; their "
                    "files have not changed since"
                )
        if not self.has_held_out:
            lines.append("nothing is held out: no evaluation (data.held_out, or a source's split)")
        elif len(self.captioned_items("held_out", 2)) < 2 and any(s.vision for s in self._sources):
            lines.append("fewer than 2 held-out captions: whether the model sees is not tested")
        return "\n".join(lines)


def _where(source: SourceConfig) -> str:
    return source.path or "the standard library"


def open_mixture(config: DataConfig, patch_size: int, seed: int, share: RankShare) -> MixtureData:
    """Open every source, tokenizer and index made or taken from the cache.

    Raises:
        PretrainError: a source is missing, empty or damaged past the limit, or they do not go
            together.
    """
    readers = {
        number: _reader(config, number, seed)
        for number, source in enumerate(config.sources)
        if source.weight > 0
    }
    tokenizer = _tokenizer(config, readers)
    composer = Composer.of(config, tokenizer, patch_size)
    cache = Path(config.cache_dir)
    opened: list[Source] = []
    skips: list[Skip] = []
    for number, reader in readers.items():
        source, key = config.sources[number], f"data.sources[{number}]"
        if source.type == "energon":
            tokenizer.require_media()
            shards = Shards(
                Path(source.path), key, composer, config.seq_length, seed, source.trust_code
            )
            held_out = np.arange(len(shards.held_out))
            nothing = np.empty(0, np.int64)
            opened.append(
                Source(number, key, source, shards, {"train": nothing, "held_out": held_out})
            )
            continue
        index: TextIndex | ChatIndex | MixedIndex
        name = key_of(source.type, source.path, source.field, tokenizer.digest)
        if source.is_chat:
            tokenizer.require_chat()
            folder = cache / f"chat-{name}-{config.seq_length}-{reader.key}"
            index = chat_index(folder, reader.parts, tokenizer, config.seq_length, reader.limit)
        elif source.has_images:
            tokenizer.require_media()
            settings = (patch_size, *composer.limits, composer.video_fps)
            name = "-".join(map(str, ("images", name, *settings)))
            index = mixed_index(
                *(cache, name, reader.key, reader.records, reader.media), composer, reader.limit
            )
        else:
            folder = cache / f"text-{name}-{reader.key}"
            index = text_index(folder, reader.parts, tokenizer, reader.limit)
        here, usable = [*reader.skips, *index.skips], np.arange(len(index.ends))
        if isinstance(index, MixedIndex):  # text is cut, and of conversations these are left out
            here = [*here, *too_long(index, config.seq_length)]
            usable = np.flatnonzero(index.sizes[:, 0] <= config.seq_length)
        if not len(usable):
            first = next((skip for skip in here if skip.corrupt), here[0] if here else None)
            why = f"; the first: {first.name} ({first.reason})" if first else ""
            raise PretrainError(
                f"{key}.path: none of the documents in {_where(source)} can be used{why}"
            )
        skips += here
        opened.append(Source(number, key, source, index, _split(source, index, usable, config)))
    Skipped(config.max_corrupt).add(skips)
    _check_together(config, opened)
    return MixtureData(config, seed, composer, opened, share, skips)


def _split(
    source: SourceConfig,
    index: TextIndex | ChatIndex | MixedIndex,
    usable: npt.NDArray[np.int64],
    config: DataConfig,
) -> dict[Split, npt.NDArray[np.int64]]:
    nothing = np.empty(0, np.int64)
    if source.split == "train":
        return {"train": usable, "held_out": nothing}
    if source.split == "held_out":
        return {"train": nothing, "held_out": usable}
    held_out = index.hashes[usable] < np.uint64(_threshold(config))
    if held_out.all():  # a single document, say
        held_out[:] = False
    return {"train": usable[~held_out], "held_out": usable[held_out]}


def _threshold(config: DataConfig) -> int:
    return int(config.held_out * 2**64)


def _check_together(config: DataConfig, opened: Sequence[Source]) -> None:
    training = [source for source in opened if source.num_documents("train")]
    if not training:
        raise PretrainError(
            "data.sources: no documents to train on: every source has split: held_out"
        )
    vision = [source for source in training if source.vision]
    chats = [source for source in opened if source.config.is_chat]
    if vision and chats:
        raise PretrainError(
            f"data.sources: {chats[0].key} has conversations of text alone, whose runs see no "
            f"images: take out {vision[0].key}, or the conversations"
        )
    if len(vision) == len(training):
        return  # images fill everything
    if vision and config.vision_share == 0:
        raise PretrainError(
            f"data.vision_share=0 leaves {vision[0].key} out: raise it, or remove the source"
        )
    for source in vision:
        if not isinstance(source.index, MixedIndex):
            continue  # what is in shards is seen when it is read
        tokens, placeholders = source.index.sizes[source.documents["train"]].sum(0, dtype=np.int64)
        if placeholders < config.vision_share * tokens:
            raise PretrainError(
                f"data.vision_share={config.vision_share:g} cannot be met: only "
                f"{placeholders / tokens:.3g} of the tokens of {source.key} are images; lower it "
                "below that"
            )


@dataclass(frozen=True)
class _Reader:
    """A source before it is indexed.

    Attributes:
        key: a digest of everything that its records depend on.
        parts: its files, each with its records.
        limit: more corrupt records end the run.
        skips: files and folders that are left out.
        files: the files that are read.
    """

    key: str
    parts: Sequence[Part[Any]]
    limit: int
    skips: Sequence[Skip] = ()
    files: Sequence[Path] = ()

    def media(self) -> Iterator[str]:
        """The paths of all images and videos that the files name."""
        return (path for file in self.files for path in sources.media_paths(file))

    def records(self) -> Iterator[Any]:
        return within_limit((one for part in self.parts for one in part.records()), self.limit)

    def sample_texts(self, most: int, threshold: int) -> Iterator[str]:
        """Text of up to about ``most`` characters that is not held out.

        It is cut where a run has no end: merges within a word take time quadratic in its length.
        """
        progress = Progress("reading text to train the tokenizer on")
        for number, record in enumerate(self.records()):
            progress(number)
            if most <= 0:
                return
            if isinstance(record, Skip) or record.hash < threshold:
                continue
            most -= len(record.text)
            yield from filter(None, _LONG_RUN.split(record.text))


def _reader(config: DataConfig, number: int, seed: int) -> _Reader:
    source, name = config.sources[number], f"data.sources[{number}]"

    def built_in(key: str, records: Callable[[], Iterator[Any]]) -> _Reader:
        return _Reader(key, [Part("", (int(key, 16),), records)], config.max_corrupt)

    if source.type == "energon":
        require_energon()
        folder, trust = Path(source.path), source.trust_code
        key = read_meta(folder, name, trust_code=trust).fingerprint
        texts = partial(energon_texts, folder, name, seed, trust_code=trust)
        return built_in(key, lambda: (Text("", text) for text in texts()))
    if source.type in ("standard_library", "standard_library_chat"):
        corpus = read_corpus(int(config.max_corpus_mb * 1e6))
        key = key_of("corpus", *(file.text for file in corpus))
        if source.is_chat:
            return built_in(key, lambda: _questions(corpus))
        return built_in(key, lambda: (Text(file.name, file.text) for file in corpus))
    find, read = _READERS[source.type]
    found = find(source, name)
    files = [item for item in found if isinstance(item, Path)]
    skips = [item for item in found if isinstance(item, Skip)]
    captions = map(sources.caption_of, files) if source.has_images else ()
    stamps = {str(file): stamp(file) for file in (*files, *captions)}
    key = key_of(source.type, source.field, stamps=stamps.items())
    parts = [Part(str(file), stamps[str(file)], partial(read, source, file)) for file in files]
    return _Reader(key, parts, config.max_corrupt, skips, files)


_READERS: dict[str, tuple[Callable[..., list[Path | Skip]], Callable[..., Iterator[Any]]]] = {
    "text": (sources.text_files, sources.read_text_file),
    "chat": (sources.chat_files, sources.read_chat_file),
    "images": (sources.mixed_files, sources.read_mixed_file),
}


def _questions(corpus: Sequence[TextFile]) -> Iterator[Chat]:
    """A question and its answer each; no answer twice."""
    answers: set[str] = set()
    for file in corpus:
        for question, answer in questions(file):
            if answer not in answers:
                answers.add(answer)
                messages = Message("user", question), Message(REPLY, answer)
                yield Chat(f"{file.name}: {question}", messages)


def _tokenizer(config: DataConfig, readers: dict[int, _Reader]) -> Tokenizer:
    """The one that is named; or one trained on what is not held out, an equal part a source."""
    if config.tokenizer is not None:
        return Tokenizer.load(Path(config.tokenizer))
    keys = [reader.key for reader in readers.values()]
    key = key_of(
        *("tokenizer", keys, config.vocab_size, config.max_corpus_mb, config.held_out),
        SPECIAL_TOKENS,
    )

    def build(folder: Path) -> None:
        most = int(config.max_corpus_mb * 1e6 / len(readers))
        texts = (
            text
            for reader in readers.values()
            for text in reader.sample_texts(most, _threshold(config))
        )
        Tokenizer.train(texts, config.vocab_size).save(folder / "tokenizer.json")

    def load(folder: Path) -> Tokenizer:
        return Tokenizer.load(folder / "tokenizer.json")

    return cached(Path(config.cache_dir) / f"tokenizer-{key}", build, load)[0]
