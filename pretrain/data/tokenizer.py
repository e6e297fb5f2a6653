"""Tokenizers: a byte-level BPE trained on the run's own text, or an existing one."""

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
from pretrain.data.megatron_format import token_dtype
from pretrain.errors import PretrainError, one_line

ROLES = ("system", "user", "assistant")
SPECIAL_TOKENS = (
    *("<|pad|>", "<|bos|>", "<|eos|>", "<|media_begin|>", "<|media_pad|>", "<|media_end|>"),
    *("<|im_system|>", "<|im_user|>", "<|im_assistant|>", "<|im_middle|>", "<|im_end|>"),
)
# Names of each special token in published tokenizers, in order of preference. DeepSeek's have
# full-width bars and the block that stands for a space.
_NAMES: Mapping[str, tuple[str, ...]] = {
    "eos": (
        *("<|eos|>", "[EOS]", "</s>", "<|end_of_text|>", "<|endoftext|>", "<eos>"),
        "<\uff5cend\u2581of\u2581sentence\uff5c>",
    ),
    "bos": (
        *("<|bos|>", "[BOS]", "<s>", "<|begin_of_text|>", "<bos>"),
        "<\uff5cbegin\u2581of\u2581sentence\uff5c>",
    ),
    "pad": ("<|pad|>", "[PAD]", "<pad>", "<\uff5c\u2581pad\u2581\uff5c>"),
    "media_begin": ("<|media_begin|>", "<|media_start|>", "<|vision_start|>"),
    "media_pad": ("<|media_pad|>", "<|image_pad|>"),
    "media_end": ("<|media_end|>", "<|vision_end|>"),
    # The chat template is Kimi K2's, with its names.
    **{f"im_{name}": (f"<|im_{name}|>",) for name in (*ROLES, "middle", "end")},
}
# Special tokens of Kimi K2's and K2.5's tokenizers, by their offset from the text tokens (163584).
_KIMI_RESERVED = 256
_KIMI_SPECIALS = {
    **{0: "[BOS]", 1: "[EOS]", 2: "<|im_end|>", 3: "<|im_user|>", 4: "<|im_assistant|>"},
    **{6: "<|start_header_id|>", 7: "<|end_header_id|>", 9: "[EOT]", 10: "<|im_system|>"},
    **{17: "<|im_middle|>", 18: "<|media_begin|>", 19: "<|media_content|>"},
    **{20: "<|media_end|>", 21: "<|media_pad|>", 254: "[UNK]", 255: "[PAD]"},
}
_MAX_TOKENS = 1 << 24
# Limits of a tokenizer file, far above the sizes of published ones.
_MAX_BYTES = 256 << 20
_MAX_TOKEN_BYTES = 1024
# Kimi K2's pre-tokenization: runs of Han, words with contractions, up to three digits.
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
    """Text to ids and back; special tokens written out in a text are encoded as plain text.

    Attributes:
        eos, bos, pad: ids; ``bos`` and ``pad`` default to ``eos``.
        media_begin, media_pad, media_end: ids around an image and of its placeholders; all -1 if
            the tokenizer lacks one (it is then for text only).
        newline: the id that ends a caption.
        roles, im_middle, im_end: ids that start the message of each role, that end its header, and
            that end the message; no roles and -1 if the tokenizer lacks one.
    """

    def __init__(self, backend: _Tokenizer, name: str = "the tokenizer") -> None:
        backend.encode_special_tokens = True
        self._backend = backend
        self.name = name
        ids = {key: self._find(names) for key, names in _NAMES.items()}
        if ids["eos"] is None:
            raise PretrainError(
                f"{name} has no end-of-text token ({', '.join(_NAMES['eos'])}): "
                "add one to its added_tokens"
            )
        self.eos = ids["eos"]
        self.bos = self.eos if ids["bos"] is None else ids["bos"]
        self.pad = self.eos if ids["pad"] is None else ids["pad"]
        # Images and conversations each need all of their tokens.
        media = [id for key, id in ids.items() if key.startswith("media_") and id is not None]
        self.media_begin, self.media_pad, self.media_end = media if len(media) == 3 else (-1,) * 3
        chat = {key: ids[f"im_{key}"] for key in (*ROLES, "middle", "end")}
        present = {key: id for key, id in chat.items() if id is not None}
        if len(present) < len(chat):
            present = {"middle": -1, "end": -1}
        self.im_middle, self.im_end = present.pop("middle"), present.pop("end")
        self.roles = present
        try:
            newline = self.encode("\n")
        except ValueError as error:
            raise PretrainError(one_line(str(error))) from error
        if not len(newline):
            raise PretrainError(f"{name} has no newline token, which ends a caption")
        self.newline = int(newline[-1])

    def _find(self, names: Iterable[str]) -> int | None:
        ids = (self._backend.token_to_id(name) for name in names)
        return next((int(id) for id in ids if id is not None), None)

    def name_of(self, token: int) -> str:
        """The token of an id, as in the vocabulary; empty if the id has none."""
        return str(self._backend.id_to_token(token) or "")

    def id_of(self, name: str) -> int | None:
        """The id of a special token or of another token by its name in the vocabulary."""
        found = self._backend.token_to_id(name)
        return None if found is None else int(found)

    def is_special(self, token: int) -> bool:
        """Whether no text is encoded to an id."""
        added = self._backend.get_added_tokens_decoder().get(token)
        return added is not None and added.special

    @property
    def vocab_size(self) -> int:
        """The largest id plus one: the number of rows of the embedding."""
        return 1 + max(self._backend.get_vocab().values())

    @property
    def dtype(self) -> type[np.uint16] | type[np.int32]:
        """The dtype of ids in files, the one that Megatron chooses."""
        return token_dtype(self.vocab_size)

    @property
    def digest(self) -> str:
        """Digest of everything that determines the ids of a text."""
        description = json.loads(self._backend.to_str()) | {"post_processor": None}
        return hashlib.sha256(json.dumps(description).encode()).hexdigest()[:16]

    def require_media(self) -> None:
        """
        Raises:
            PretrainError: the tokenizer has no tokens for images.
        """
        if self.media_pad < 0:
            names = ", ".join(_NAMES[f"media_{name}"][0] for name in ("begin", "pad", "end"))
            raise PretrainError(
                f"{self.name} has no tokens for images: add {names} to its added_tokens, or "
                "remove the sources of images from data.sources"
            )

    def require_chat(self) -> None:
        """
        Raises:
            PretrainError: the tokenizer lacks tokens of the chat format.
        """
        if not self.roles:
            names = ", ".join(_NAMES[f"im_{name}"][0] for name in (*ROLES, "middle", "end"))
            raise PretrainError(
                f"{self.name} lacks tokens of the chat format, which are {names}. Start from a run "
                "whose tokenizer has them, or add them to its added_tokens"
            )

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "Tokenizer":
        """Train a byte-level BPE on texts.

        Args:
            vocab_size: number of tokens, including the special ones and 256 bytes.
        """
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
        """Load a Hugging Face ``tokenizer.json``, or a tiktoken file such as Kimi K2's.

        A tiktoken file does not contain its special tokens. They are read from the
        ``added_tokens_decoder`` of a ``tokenizer_config.json`` in the same folder; without one they
        are Kimi's 256, after the text tokens. The pre-tokenization is Kimi K2's.

        Raises:
            PretrainError: the file is missing, or is neither of these.
        """
        content = _read(path)
        try:
            if content.lstrip()[:1] == b"{":
                backend = _from_json(json.loads(content))
            else:
                backend = _from_tiktoken(_read_ranks(content), _special_tokens_of(path))
        except PretrainError:
            raise
        except Exception as error:  # the tokenizers library raises bare Exceptions
            reason = one_line(str(error))[:300]
            raise PretrainError(
                f"{path} is neither a tokenizer.json nor a tiktoken file ({reason})"
            ) from error
        return cls(backend, f"the tokenizer {path}")

    def save(self, path: Path) -> None:
        """Write a Hugging Face ``tokenizer.json``."""
        # The library's own save() raises a bare Exception if the disk is full.
        path.write_text(self._backend.to_str(pretty=True), encoding="utf-8")

    def encode(self, text: str) -> npt.NDArray[np.int64]:
        """The ids of a text, int64 [n].

        Raises:
            ValueError: the tokenizer cannot encode the text.
        """
        with self._failures():
            encoded = self._backend.encode(text, add_special_tokens=False)
        return np.asarray(encoded.ids, dtype=np.int64)

    def encode_many(self, texts: list[str]) -> list[npt.NDArray[np.int64]]:
        """The ids of each text; raises as :meth:`encode`."""
        with self._failures():
            encoded = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        return [np.asarray(text.ids, dtype=np.int64) for text in encoded]

    @contextmanager
    def _failures(self) -> Iterator[None]:
        """Turn errors of the tokenizers library, including Rust panics, into ValueErrors."""
        try:
            yield
        except BaseException as error:
            # Regular expressions panic after a number of steps.
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise ValueError(
                f"{self.name} cannot encode the text ({one_line(str(error))})"
            ) from error

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        return str(
            self._backend.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens)
        )


def _read(path: Path) -> bytes:
    """
    Raises:
        PretrainError: the file cannot be read, or is too large for a tokenizer.
    """
    try:
        return untrusted_files.read_bytes(path, _MAX_BYTES)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise PretrainError(
            f"cannot read the tokenizer {path}: {reason}; give a tokenizer.json or a tiktoken file"
        ) from error


def _from_json(description: dict[str, Any]) -> _Tokenizer:
    """Load a tokenizer.json; the tokens in _NAMES become special, so that no text contains them."""
    vocabulary = (description.get("model") or {}).get("vocab") or {}
    ids = list(vocabulary.values()) if isinstance(vocabulary, dict) else [len(vocabulary)]
    _require_sizes([*ids, *(token["id"] for token in description.get("added_tokens") or ())])
    special = {name for names in _NAMES.values() for name in names}
    for token in description.get("added_tokens") or ():
        token["special"] = token["special"] or token["content"] in special
    # Settings for prompts of fixed length, which a corpus must not use.
    description["truncation"] = description["padding"] = None
    return _Tokenizer.from_str(json.dumps(description))


def _require_sizes(ids: Iterable[int]) -> None:
    """Reject ids so large that the library or the model would exhaust the memory."""
    for number in ids:
        if not 0 <= number < _MAX_TOKENS:
            raise ValueError(f"a token has the id {number}; ids must be below {_MAX_TOKENS:,}")


def _read_ranks(content: bytes) -> dict[bytes, int]:
    """The rank of each token: lines of base64-encoded bytes and a number."""
    pairs = (line.split() for line in content.splitlines() if line)
    ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
    if max(map(len, ranks), default=0) > _MAX_TOKEN_BYTES:
        raise ValueError(f"a token is longer than {_MAX_TOKEN_BYTES} bytes")
    return ranks


def _special_tokens_of(path: Path) -> dict[int, str] | None:
    config = path.with_name("tokenizer_config.json")
    if not config.exists():
        return None
    added = json.loads(_read(config)).get("added_tokens_decoder", {})
    return {int(number): token["content"] for number, token in added.items()} or None


def _from_tiktoken(ranks: dict[bytes, int], specials: dict[int, str] | None) -> _Tokenizer:
    """Convert a tiktoken tokenizer to a byte-level BPE of the tokenizers library."""
    first = len(ranks)
    has_bytes = all(bytes([byte]) in ranks for byte in range(256))
    if not has_bytes or sorted(ranks.values()) != list(range(first)):
        raise ValueError("its ranks are not 0, 1, 2, … with all 256 bytes among them")
    if specials is None:
        specials = {first + offset: name for offset, name in _KIMI_SPECIALS.items()}
    _require_sizes(specials)
    for number in range(first, max(max(specials) + 1, first + _KIMI_RESERVED)):
        specials.setdefault(number, f"<|reserved_token_{number}|>")
    if min(specials) < first:
        raise ValueError(
            f"tokenizer_config.json's special token {min(specials)} has the id of a text token"
        )

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
    # As in tiktoken, a word that is a token is not split, even if no merges lead to it.
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
    """The two tokens that remain of this one after all merges of lower rank."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        pairs = [ranks.get(parts[i] + parts[i + 1], rank) for i in range(len(parts) - 1)]
        if (lowest := min(pairs)) >= rank:
            break
        i = pairs.index(lowest)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    if len(parts) != 2:
        raise ValueError(f"the token {token!r} is not made of two earlier ones")
    return parts[0], parts[1]


def _byte_letters() -> dict[int, str]:
    """The printable character that represents each byte in byte-level BPE (GPT-2's table)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {byte: chr(byte) for byte in printable} | {
        byte: chr(256 + index) for index, byte in enumerate(others)
    }
