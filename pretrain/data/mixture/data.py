"""Packed sequences of a mixture of sources."""

import itertools
from collections.abc import Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import numpy as np

from pretrain.config import DataConfig
from pretrain.data import packing, skipped
from pretrain.data.composer import Composer
from pretrain.data.duplicates import Duplicates
from pretrain.data.interface import SPLITS, Data, RankShare, Split
from pretrain.data.media.patches import VisionItem
from pretrain.data.mixture.stream import Sequences, Stream
from pretrain.data.packing import Document, PackedSample, Question
from pretrain.data.skipped import Skip, Skipped
from pretrain.data.sources.interface import Documents, Segment
from pretrain.errors import PretrainError

# Tokens that a captioned image leaves free for the model's own caption.
_CAPTION_ROOM = 24
_KEPT_STEPS = 4
# Sequences between states that are kept of small global batches.
_MIN_INTERVAL = 64
# Version of the order of documents, in checkpoints. Before 2, it was an array of numpy.
_ORDER = 2


class MixtureData(Data):
    """Sequences of documents from several sources, in proportion to their weights.

    Args:
        documents: the documents of each source.
        share: the sequences of each global batch that this rank reads.
        duplicates: the duplicates that are left out; None: they were not looked for.

    Raises:
        PretrainError: more than ``data.max_corrupt`` documents are corrupt, or the sources do not
            fit together.
    """

    def __init__(
        self,
        config: DataConfig,
        seed: int,
        composer: Composer,
        documents: Sequence[Documents],
        share: RankShare,
        duplicates: Duplicates | None = None,
    ) -> None:
        self._skips_at_opening = [skip for source in documents for skip in source.skips]
        self.duplicates = duplicates
        Skipped(config.max_corrupt).add(self._skips_at_opening)
        _check_together(config, documents)
        self.config, self.seed = config, seed
        self.tokenizer, self.patch_size = composer.tokenizer, composer.patch_size
        self._documents, self._share = list(documents), share
        self._by_number = {source.source.number: source for source in documents}
        self._skips = [*self._skips_at_opening, *(duplicates.skips() if duplicates else ())]
        # If any source can only be read in order, every rank has a stream over its own share.
        self._one_pass = any(source.one_pass for source in documents)
        self._sequences: dict[Split, Sequences] = {}
        for split in SPLITS:
            if not any(source.count(split) for source in documents):
                continue
            make = partial(self._stream, split)
            if self._reads_own_share(split):
                # Going back means reading again: states are kept for the steps read ahead.
                self._sequences[split] = Sequences(make, share.local_batch_size, _KEPT_STEPS)
            else:
                # A checkpoint finds the state between two steps among those that are kept.
                interval = max(share.global_batch_size, _MIN_INTERVAL)
                self._sequences[split] = Sequences(make, interval)
        self._captioned = lru_cache(maxsize=8)(self._find_captioned)

    def _reads_own_share(self, split: Split) -> bool:
        """Whether this rank's stream has only its own sequences instead of all."""
        return self._one_pass and split == "train"

    def _stream(self, split: Split) -> Stream:
        share = self._share if self._reads_own_share(split) else RankShare()
        cursors = [source.cursor(split, share) for source in self._documents if source.count(split)]
        return Stream(cursors, self.config.seq_length, self.config.vision_share)

    @property
    def documents(self) -> Sequence[Documents]:
        """The documents of each source."""
        return self._documents

    @property
    def has_held_out(self) -> bool:
        return "held_out" in self._sequences

    @property
    def has_images(self) -> bool:
        return any(source.source.has_images and source.count("train") for source in self._documents)

    @property
    def image_share(self) -> float | None:
        training = [documents for documents in self._documents if documents.count("train")]
        if not all(documents.source.has_images for documents in training):
            return self.config.vision_share if self.has_images else 0.0
        # Without text, images fill the sequences.
        counts = [documents.token_counts("train") for documents in training]
        weights = [documents.source.config.weight for documents in training]
        shares = [count[1] / count[0] for count in counts if count]
        return float(np.average(shares, weights=weights)) if all(counts) else None

    def sample(self, split: Split, index: int) -> PackedSample:
        """Packed sequence number ``index``. Documents that turn out to be corrupt leave a gap."""
        (sample,) = self.samples(split, [index])
        return sample

    def samples(
        self,
        split: Split,
        indices: Iterable[int],
        *,
        pixels: bool = True,
        left_out: Collection[tuple[int, int]] = (),
    ) -> list[PackedSample]:
        numbers = list(indices)
        segments = [self._segments(split, index) for index in numbers]
        documents = iter(self._read(list(itertools.chain(*segments)), pixels, left_out))
        return [
            self._join(split, index, found, list(itertools.islice(documents, len(found))))
            for index, found in zip(numbers, segments, strict=True)
        ]

    def _segments(self, split: Split, index: int) -> list[Segment]:
        """The segments of a sequence."""
        number = index
        if self._reads_own_share(split):
            step, within = divmod(index, self._share.global_batch_size)
            number = within + (step - self._share.rank) * self._share.local_batch_size
        return self._sequences[split][number]

    def _read(
        self, segments: Sequence[Segment], pixels: bool, left_out: Collection[tuple[int, int]]
    ) -> list[Document | Skip | None]:
        """The document of each segment, in order; None if it is in ``left_out``."""

        def read(segment: Segment) -> Document | Skip | None:
            if segment[:2] in left_out:
                return None
            document = self._by_number[segment.source].document(segment, pixels=pixels)
            if isinstance(document, Document):
                document.source = segment.source
            return document

        with_images = [self._by_number[one.source].source.has_images for one in segments]
        if not pixels or sum(with_images) < 2:
            return list(map(read, segments))
        with ThreadPoolExecutor(self.config.decode_workers) as pool:
            pairs = list(zip(segments, with_images, strict=True))
            decoding = [pool.submit(read, segment) for segment, slow in pairs if slow]
            decoded = iter(decoding)
            return [next(decoded).result() if slow else read(segment) for segment, slow in pairs]

    def _join(
        self,
        split: Split,
        index: int,
        segments: Sequence[Segment],
        documents: Sequence[Document | Skip | None],
    ) -> PackedSample:
        """Shuffle the documents of a sequence and pack them."""
        self._skips += [document for document in documents if isinstance(document, Skip)]
        pairs = list(zip(segments, documents, strict=True))
        left_out = tuple(s[:2] for s, document in pairs if not isinstance(document, Document))
        read = [document for document in documents if isinstance(document, Document)]
        rng = np.random.default_rng([self.seed, SPLITS.index(split), index])
        shuffled = [read[place] for place in rng.permutation(len(read))]
        length, pad = self.config.seq_length, self.tokenizer.pad
        return replace(packing.join(shuffled, length, self.patch_size, pad), left_out=left_out)

    def captioned_items(self, split: Split, count: int) -> list[VisionItem]:
        return list(self._captioned(split, count))

    def _find_captioned(self, split: Split, count: int) -> list[VisionItem]:
        items: dict[str, VisionItem] = {}
        for item in (item for source in self._documents for item in source.pairs(split)):
            if len(items) == count:
                break
            caption = len(self.tokenizer.encode(item.caption)) + 1
            room = self.config.seq_length - len(self.question(item))
            if max(caption, _CAPTION_ROOM) <= room:
                items.setdefault(item.caption, item)
        return list(items.values())

    def questions(self, split: Split, count: int) -> list[Question]:
        sources = (source.questions(split, _CAPTION_ROOM) for source in self._documents)
        asked = list(itertools.islice(itertools.chain.from_iterable(sources), count))
        # Sources of captions and of conversations have at least half of the questions each.
        captions = super().questions(split, max(count // 2, count - len(asked)))
        return [*asked[: count - len(captions)], *captions]

    def take_skipped(self) -> list[Skip]:
        skips = [self._skips.pop(0) for _ in range(len(self._skips))]  # a thread may be appending
        return skips + [skip for source in self._documents for skip in source.take_skipped()]

    def state_dict(self, step: int) -> dict[str, Any]:
        share = self._share
        before = step * (share.local_batch_size if self._one_pass else share.global_batch_size)
        return {
            "ranks": share.ranks if self._one_pass else None,
            "order": _ORDER,
            "fingerprint": [source.fingerprint for source in self._documents],
            "train": self._sequences["train"].state(before),
        }

    def load_state_dict(self, states: Sequence[dict[str, Any]]) -> None:
        state = states[min(self._share.rank, len(states) - 1)]
        for documents, saved in zip(self._documents, state["fingerprint"], strict=True):
            if documents.fingerprint != saved:
                source = documents.source
                raise PretrainError(
                    f"{source.setting}: the documents of {source.location} are not those that the "
                    "checkpoint was made with, or data.max_image_tokens or data.video_fps has "
                    "changed: restore them to resume, or start a new run with another run_dir, "
                    "from these weights with start_from"
                )
        if state.get("order") != _ORDER and not all(one.one_pass for one in self._documents):
            raise PretrainError(
                "the checkpoint was made by another version of this program, which orders "
                "documents differently: resume with that version, or start a new run from its "
                "weights (start_from)"
            )
        if self._one_pass and state["ranks"] != self._share.ranks:
            raise PretrainError(
                f"the checkpoint was made with {state['ranks']} data-parallel ranks, among which "
                f"energon distributed the shards, not {self._share.ranks}: resume with the same "
                "number of processes"
            )
        self._sequences["train"].restore(state["train"])

    @property
    def fingerprint(self) -> str:
        return "-".join(source.fingerprint for source in self._documents)

    def describe(self, skipped_file: str = skipped.FILE) -> str:
        lines = []
        for documents in self._documents:
            source = documents.source
            train, held_out = map(documents.count, SPLITS)
            lines.append(
                f"{source.setting}: {source.location}, weight {source.config.weight:g}: "
                f"{train:,} documents, {held_out:,} held out"
            )
        lines += [documents.note for documents in self._documents if documents.note]
        lines += [self.duplicates.describe(skipped_file)] if self.duplicates else []
        skips = self._skips_at_opening
        if skips:
            corrupt = sum(skip.corrupt for skip in skips)
            lines.append(
                f"skipped: {corrupt} corrupt, {len(skips) - corrupt} empty, too long or not read; "
                f"see {skipped_file}"
            )
            if any(documents.cached for documents in self._documents):
                lines.append(
                    f"they were found when the index in {self.config.cache_dir} was made; their "
                    "files have not changed since"
                )
        if not self.has_held_out:
            lines.append("nothing is held out: no evaluation (data.held_out, or a source's split)")
        elif any(documents.source.has_images for documents in self._documents) and (
            len(self.questions("held_out", 2)) < 2
        ):
            lines.append("fewer than 2 held-out captions or replies: vision is not evaluated")
        return "\n".join(lines)


def _check_together(config: DataConfig, documents: Sequence[Documents]) -> None:
    training = [source for source in documents if source.count("train")]
    if not training:
        raise PretrainError(
            "data.sources: no documents to train on: every source has split: held_out"
        )
    vision = [source for source in training if source.source.has_images]
    if len(vision) == len(training):
        return  # images fill the sequences
    if vision and config.vision_share == 0:
        raise PretrainError(
            f"data.vision_share=0 leaves {vision[0].source.setting} out: raise it, or remove the "
            "source"
        )
    for source in vision:
        # None: the counts are known only when the source is read.
        tokens, placeholders = source.token_counts("train") or (0, 0)
        if placeholders < config.vision_share * tokens:
            raise PretrainError(
                f"data.vision_share={config.vision_share:g} cannot be met: only "
                f"{placeholders / tokens:.3g} of the tokens of {source.source.setting} are images; "
                "lower it below that"
            )
