"""Tokenizers: a byte-level BPE trained on the run's own text, or one that exists already."""

import base64
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as _Tokenizer

from pretrain import untrusted_files
from pretrain.errors import PretrainError, one_line

ROLES = ("system", "user", "assistant")
SPECIAL_TOKENS = (
    "<|pad|>",
    "<|bos|>",
    "<|eos|>",
    "<|media_begin|>",
    "<|media_pad|>",
    "<|media_end|>",
    "<|im_system|>",
    "<|im_user|>",
    "<|im_assistant|>",
    "<|im_middle|>",
    "<|im_end|>",
)
# What each is called elsewhere, the likeliest first: Kimi K2's, then other families'.
_NAMES: Mapping[str, tuple[str, ...]] = {
    "eos": ("<|eos|>", "[EOS]", "</s>", "<|end_of_text|>", "<|endoftext|>", "<eos>"),
    "bos": ("<|bos|>", "[BOS]", "<s>", "<|begin_of_text|>", "<bos>"),
    "pad": ("<|pad|>", "[PAD]", "<pad>"),
    "media_begin": ("<|media_begin|>", "<|media_start|>", "<|vision_start|>"),
    "media_pad": ("<|media_pad|>", "<|image_pad|>"),
    "media_end": ("<|media_end|>", "<|vision_end|>"),
    # The chat template is Kimi K2's, and so are the names.
    **{f"im_{part}": (f"<|im_{part}|>",) for part in (*ROLES, "middle", "end")},
}
# The specials of Kimi K2's and K2.5's tokenizers, by their place after the text tokens (163584).
_KIMI_RESERVED = 256
_KIMI_SPECIALS = {
    **{0: "[BOS]", 1: "[EOS]", 2: "<|im_end|>", 3: "<|im_user|>", 4: "<|im_assistant|>"},
    **{6: "<|start_header_id|>", 7: "<|end_header_id|>", 9: "[EOT]", 10: "<|im_system|>"},
    **{17: "<|im_middle|>", 18: "<|media_begin|>", 19: "<|media_content|>"},
    **{20: "<|media_end|>", 21: "<|media_pad|>", 254: "[UNK]", 255: "[PAD]"},
}
_MOST_TOKENS = 1 << 24
# Limits of a tokenizer's file, far above those of published ones.
_MAX_BYTES = 256 << 20
_MAX_TOKEN_BYTES = 1024
# How Kimi K2 cuts text before it merges: Han apart, words with their contractions, three digits.
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_ENDING = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
KIMI_PATTERN = "|".join(
    (
        r"[\p{Han}]+",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_ENDING}",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_ENDING}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)


class Tokenizer:
    """Text to ids and back; what looks like a special token in a text is text.

    Attributes:
        eos, bos, pad: ids; ``bos`` and ``pad`` are ``eos`` where a tokenizer has none of its own.
        media_begin, media_pad, media_end: ids of what stands for an image; -1 where a tokenizer
            has none (it serves for text alone).
        newline: the id that ends a caption.
        roles, im_middle, im_end: ids of what begins each role's message, of what ends its heading,
            and of what ends it; no roles and -1 where a tokenizer lacks one of them.
    """

    def __init__(self, backend: _Tokenizer, name: str = "the tokenizer") -> None:
        backend.encode_special_tokens = True
        self._backend = backend
        self.name = name
        found = {role: self._find(names) for role, names in _NAMES.items()}
        if found["eos"] is None:
            raise PretrainError(
                f"{name} has no token that ends a text ({', '.join(_NAMES['eos'])}): "
                "add one to its added_tokens"
            )
        self.eos = found["eos"]
        self.bos = self.eos if found["bos"] is None else found["bos"]
        self.pad = self.eos if found["pad"] is None else found["pad"]
        media = [found[f"media_{part}"] for part in ("begin", "pad", "end")]
        known = [number for number in media if number is not None]
        # One alone is of no use.
        self.media_begin, self.media_pad, self.media_end = known if len(known) == 3 else (-1,) * 3
        chat = {role: found[f"im_{role}"] for role in (*ROLES, "middle", "end")}
        whole = {role: number for role, number in chat.items() if number is not None}
        if len(whole) < len(chat):
            whole = {"middle": -1, "end": -1}
        self.im_middle, self.im_end = whole.pop("middle"), whole.pop("end")
        self.roles = whole
        try:
            newline = self.encode("\n")
        except ValueError as error:
            raise PretrainError(one_line(str(error))) from error
        if not len(newline):
            raise PretrainError(f"{name} has no token for the end of a line, which ends a caption")
        self.newline = int(newline[-1])

    def _find(self, names: Iterable[str]) -> int | None:
        ids = (self._backend.token_to_id(name) for name in names)
        return next((int(found) for found in ids if found is not None), None)

    def name_of(self, token: int) -> str:
        """A token as the vocabulary writes it; empty for an id without a token."""
        return str(self._backend.id_to_token(token) or "")

    @property
    def vocab_size(self) -> int:
        """One more than the largest id: as many rows as the embedding needs."""
        return 1 + max(self._backend.get_vocab().values())

    @property
    def dtype(self) -> type[np.uint16] | type[np.uint32]:
        """The smallest type that every id fits."""
        return np.uint16 if self.vocab_size <= 1 << 16 else np.uint32

    @property
    def digest(self) -> str:
        """Digest of everything that decides which ids a text becomes."""
        described = json.loads(self._backend.to_str()) | {"post_processor": None}
        return hashlib.sha256(json.dumps(described).encode()).hexdigest()[:16]

    def require_media(self) -> None:
        """Refuse a tokenizer that has no tokens to put an image in place of.

        Raises:
            PretrainError: with what is to be added.
        """
        if self.media_pad < 0:
            names = ", ".join(_NAMES[f"media_{part}"][0] for part in ("begin", "pad", "end"))
            raise PretrainError(
                f"{self.name} has no tokens for images: add {names} to its added_tokens, or take "
                "the sources of images out of data.sources"
            )

    def require_chat(self) -> None:
        """Refuse a tokenizer that has no tokens to tell who says what.

        Raises:
            PretrainError: with what is to be added.
        """
        if not self.roles:
            names = ", ".join(_NAMES[f"im_{part}"][0] for part in (*ROLES, "middle", "end"))
            raise PretrainError(
                f"{self.name} has not all the tokens of a conversation: {names}. Start from a run "
                "whose tokenizer has them, or add them to its added_tokens"
            )

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
        """A Hugging Face ``tokenizer.json``, or a tiktoken file as Kimi K2 comes with.

        A tiktoken file has no special tokens in it. They are read from the
        ``added_tokens_decoder`` of a ``tokenizer_config.json`` beside it; without one they are
        Kimi's, 256 after the text tokens. It is cut into words as Kimi K2's is.

        Raises:
            PretrainError: the file is missing or neither of these.
        """
        content = _read(path)
        try:
            if content.lstrip()[:1] == b"{":
                backend = _from_json(json.loads(content))
            else:
                backend = _from_tiktoken(_read_ranks(content), _specials_beside(path))
        except PretrainError:
            raise
        except Exception as error:  # the tokenizers library raises bare Exceptions
            reason = one_line(str(error))[:300]
            raise PretrainError(
                f"{path} is neither a tokenizer.json nor a tiktoken file ({reason})"
            ) from error
        return cls(backend, f"the tokenizer {path}")

    def save(self, path: Path) -> None:
        """Write it as a Hugging Face ``tokenizer.json``, wherever it came from."""
        # The library's own save() raises bare Exceptions for a disk that is full.
        path.write_text(self._backend.to_str(pretty=True), encoding="utf-8")

    def encode(self, text: str) -> npt.NDArray[np.int64]:
        """[n] ids; special tokens written out in the text are plain text.

        Raises:
            ValueError: the tokenizer cannot encode it.
        """
        with self._failures():
            encoded = self._backend.encode(text, add_special_tokens=False)
        return np.asarray(encoded.ids, dtype=np.int64)

    def encode_many(self, texts: list[str]) -> list[npt.NDArray[np.int64]]:
        """The ids of each text; raises as :meth:`encode`."""
        with self._failures():
            encoded = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        return [np.asarray(one.ids, dtype=np.int64) for one in encoded]

    @contextmanager
    def _failures(self) -> Iterator[None]:
        """Errors of the tokenizers library, some of which are no Exceptions, become ValueErrors."""
        try:
            yield
        except BaseException as error:
            # Its regular expressions give up after a number of steps, by a panic.
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise ValueError(f"{self.name} cannot encode it ({one_line(str(error))})") from error

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        return str(
            self._backend.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens)
        )


def _read(path: Path) -> bytes:
    """
    Raises:
        PretrainError: it cannot be read, or it is too large for a tokenizer.
    """
    try:
        return untrusted_files.read_bytes(path, _MAX_BYTES)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise PretrainError(
            f"cannot read the tokenizer {path}: {reason}; give a tokenizer.json or a tiktoken file"
        ) from error


def _from_json(description: dict[str, Any]) -> _Tokenizer:
    """A tokenizer.json in which every token of ours is special: none comes out of a text."""
    vocabulary = (description.get("model") or {}).get("vocab") or {}
    ids = list(vocabulary.values()) if isinstance(vocabulary, dict) else [len(vocabulary)]
    _require_sizes([*ids, *(token["id"] for token in description.get("added_tokens") or ())])
    ours = {name for names in _NAMES.values() for name in names}
    for token in description.get("added_tokens") or ():
        token["special"] = token["special"] or token["content"] in ours
    # Made for prompts of a fixed length: neither is wanted of a corpus.
    description["truncation"] = description["padding"] = None
    return _Tokenizer.from_str(json.dumps(description))


def _require_sizes(ids: Iterable[int]) -> None:
    """Refuse ids for which the library, or a model, would need more memory than there is."""
    for number in ids:
        if not 0 <= number < _MOST_TOKENS:
            raise ValueError(f"it has a token of the id {number}; ids are below {_MOST_TOKENS:,}")


def _read_ranks(content: bytes) -> dict[bytes, int]:
    """Bytes of each token to its rank: lines of base64 and number."""
    pairs = (line.split() for line in content.splitlines() if line)
    ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
    if max(map(len, ranks), default=0) > _MAX_TOKEN_BYTES:
        raise ValueError(f"a token of it is longer than {_MAX_TOKEN_BYTES} bytes")
    return ranks


def _specials_beside(path: Path) -> dict[int, str] | None:
    config = path.with_name("tokenizer_config.json")
    if not config.exists():
        return None
    added = json.loads(_read(config)).get("added_tokens_decoder", {})
    return {int(number): token["content"] for number, token in added.items()} or None


def _from_tiktoken(ranks: dict[bytes, int], specials: dict[int, str] | None) -> _Tokenizer:
    """The same tokenizer as byte-level BPE of the tokenizers library."""
    first = len(ranks)
    whole = all(bytes([byte]) in ranks for byte in range(256))
    if not whole or sorted(ranks.values()) != list(range(first)):
        raise ValueError("its ranks are not 0, 1, 2, … with all 256 bytes among them")
    if specials is None:
        specials = {first + place: name for place, name in _KIMI_SPECIALS.items()}
    _require_sizes(specials)
    for number in range(first, max(max(specials) + 1, first + _KIMI_RESERVED)):
        specials.setdefault(number, f"<|reserved_token_{number}|>")
    if min(specials) < first:
        raise ValueError(f"tokenizer_config.json's special token {min(specials)} is a text token's")

    letters = _byte_letters()

    def spell(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    merges = [
        (spell(left), spell(right))
        for token, rank in sorted(ranks.items(), key=lambda item: item[1])
        if len(token) > 1
        for left, right in (_last_merge(token, rank, ranks),)
    ]
    vocabulary = {spell(token): rank for token, rank in ranks.items()}
    # A whole word that is a token is that token, as in tiktoken, whatever merges lead there.
    backend = _Tokenizer(models.BPE(vocabulary, merges, ignore_merges=True))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(KIMI_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(
        [AddedToken(name, normalized=False, special=True) for _, name in sorted(specials.items())]
    )
    for number, name in specials.items():
        if backend.token_to_id(name) != number:
            raise ValueError(f"the special token {name} cannot have the id {number}")
    return backend


def _last_merge(token: bytes, rank: int, ranks: Mapping[bytes, int]) -> tuple[bytes, bytes]:
    """The two tokens that merges of lower rank leave of this one."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        pairs = [ranks.get(parts[i] + parts[i + 1], rank) for i in range(len(parts) - 1)]
        lowest = min(pairs)
        if lowest >= rank:
            break
        place = pairs.index(lowest)
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
    if len(parts) != 2:
        raise ValueError(f"the token {token!r} is not made of two earlier ones")
    return parts[0], parts[1]


def _byte_letters() -> dict[int, str]:
    """Byte-level BPE's printable stand-in for each byte (GPT-2's table)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {byte: chr(byte) for byte in printable} | {
        byte: chr(256 + place) for place, byte in enumerate(others)
    }
