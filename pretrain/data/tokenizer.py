"""A byte-level BPE tokenizer, trained on the run's own text."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer as _Tokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

SPECIAL_TOKENS = (
    "<|pad|>",
    "<|bos|>",
    "<|eos|>",
    "<|media_begin|>",
    "<|media_pad|>",
    "<|media_end|>",
)
PAD, BOS, EOS, MEDIA_BEGIN, MEDIA_PAD, MEDIA_END = range(len(SPECIAL_TOKENS))


class Tokenizer:
    """Text to ids and back; every string survives the round trip."""

    def __init__(self, backend: _Tokenizer) -> None:
        self._backend = backend
        # What looks like a special token in a text is text.
        backend.encode_special_tokens = True
        self.newline = int(self.encode("\n")[0])

    @property
    def vocab_size(self) -> int:
        return int(self._backend.get_vocab_size())

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "Tokenizer":
        """Learn ``vocab_size`` tokens (special ones and 256 bytes included) from texts."""
        backend = _Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=list(SPECIAL_TOKENS),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        backend.train_from_iterator(texts, trainer)
        return cls(backend)

    @classmethod
    def load(cls, path: Path) -> "Tokenizer":
        return cls(_Tokenizer.from_file(str(path)))

    def save(self, path: Path) -> None:
        self._backend.save(str(path))

    def encode(self, text: str) -> npt.NDArray[np.int64]:
        """[n] ids; special tokens written out in the text are plain text."""
        return np.asarray(self._backend.encode(text, add_special_tokens=False).ids, dtype=np.int64)

    def encode_many(self, texts: list[str]) -> list[npt.NDArray[np.int64]]:
        encoded = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        return [np.asarray(one.ids, dtype=np.int64) for one in encoded]

    def decode(self, ids: Iterable[int]) -> str:
        return str(self._backend.decode([int(i) for i in ids], skip_special_tokens=True))
