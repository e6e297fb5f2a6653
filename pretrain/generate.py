"""Text generation with a trained model from a prompt with images and videos.

One process runs megatron-core's forward with its key-value cache: the prompt passes through the
model once, then each new token alone.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor, nn

from pretrain import checkpoint, parallel
from pretrain.build import set_precision
from pretrain.config import Config, ParallelConfig
from pretrain.data import Document, chat
from pretrain.data.chat import Message
from pretrain.data.composer import Composer
from pretrain.data.media import frames
from pretrain.data.media.frames import Media
from pretrain.data.tokenizer import Tokenizer
from pretrain.errors import PretrainError
from pretrain.model.language import build_language_model
from pretrain.model.multimodal import merge_features
from pretrain.model.names import named_tensors
from pretrain.model.projector import VisionTower


@dataclass(frozen=True)
class Ask:
    """The prompt as a user's message, to which the assistant replies.

    Attributes:
        thinking: whether the reply begins with reasoning; None: the model chooses.
        tools: declarations of the tools that it may call, in OpenAI's format.
    """

    thinking: bool | None = None
    tools: Sequence[Any] = ()


@dataclass(frozen=True)
class Model:
    """The complete model of a run in this process, without the state of training."""

    config: Config
    tokenizer: Tokenizer
    language: GPTModel
    tower: VisionTower
    device: torch.device


def load(run_dir: Path, step: int | None = None) -> Model:
    """Build the model of a run and load its weights.

    Args:
        run_dir: folder of the run.
        step: step of the checkpoint; default: the newest one.

    Raises:
        PretrainError: the checkpoint does not exist or is damaged, or this is one of several
            processes.
    """
    if parallel.world_size() > 1:
        raise PretrainError("this command runs in one process: start it with python, not torchrun")
    saved, config = checkpoint.find(run_dir, step)
    tokenizer = Tokenizer.load(checkpoint.tokenizer_file(run_dir))
    context = parallel.start(ParallelConfig(), config.seed)
    dtype: torch.dtype = getattr(torch, config.precision)
    (language,) = build_language_model(
        config.language,
        config.language.vocab_rows(tokenizer.vocab_size),
        config.data.seq_length,
        ParallelConfig(),
        dtype=dtype,
    )
    tower = VisionTower(config.vision, config.language.hidden_size)
    whole = nn.ModuleDict({"language": language, "vision": tower}).to(context.device)
    set_precision(whole, dtype)
    whole.eval().requires_grad_(False)
    named = named_tensors([language], tower)
    saved.load({f"model.{name}": tensor for name, tensor in named.items()})
    return Model(config, tokenizer, language, tower, context.device)


def compose(
    model: Model, prompt: str, media: Sequence[Media] = (), *, ask: Ask | None = None
) -> Document:
    """Build the document of images, videos and a prompt, in the form used in training.

    ``data.max_image_tokens`` and ``data.video_fps`` are those of the run.

    Args:
        model: the model that will read the document.
        prompt: text after the images and videos.
        media: images and videos.
        ask: the document is the message of a user; the reply of the assistant follows.

    Raises:
        PretrainError: a file or the prompt cannot be read, the document leaves no room for another
            token, or the tokenizer has no tokens for images, for conversations or for reasoning.
    """
    tokenizer, data = model.tokenizer, model.config.data
    if ask:
        tokenizer.require_chat()
    if media and tokenizer.media_pad < 0:
        raise PretrainError(
            "this run's tokenizer has no tokens for images: give a prompt without images"
        )
    composer = Composer.of(data, tokenizer, model.config.vision.patch_size)
    try:
        shapes = {medium: frames.measure(medium, data.video_fps) for medium in media}
        # Check the length before decoding: a video may be far longer than the model's sequences.
        min_length, _ = composer.size([shapes[medium] for medium in media])
        if min_length > data.seq_length:
            raise _too_long(min_length, data.seq_length)
        prompt.encode()  # a command line that is not UTF-8 has surrogates in place of its bytes

        def add_media(document: Document, medium: Media) -> None:
            kind = chat.kind_of(tokenizer, medium) if ask else ()
            composer.add(document, composer.read(medium, shapes[medium]), kind)

        if ask:
            message = Message("user", (*media, prompt))
            document = chat.render(tokenizer, [message], ask.tools, add_media)
            return chat.open_reply(document, ask.thinking)
        document = Document(tokenizer)
        for medium in media:
            add_media(document, medium)
        return document.add_tokens(tokenizer.encode(prompt))
    except UnicodeEncodeError as error:
        raise PretrainError("the prompt is not UTF-8: give it in that encoding") from error
    except ValueError as error:
        raise PretrainError(f"cannot be read: {' '.join(str(error).split())}") from error


def _too_long(length: int, max_length: int) -> PretrainError:
    return PretrainError(
        f"images, videos and prompt have {length} tokens, which leaves "
        f"{max(0, max_length - length)} of the {max_length} of this model's sequences: use a "
        "smaller image, a shorter video or prompt, or fewer --max-tokens"
    )


class CachedForward:
    """Forward passes of new tokens, with the key-value cache of the tokens before them.

    Args:
        model: the model.
        document: tokens and patches to begin with.
        max_length: size of the cache in tokens.

    Attributes:
        logits: [vocabulary], the logits of the next token, of the tokenizer's tokens.
    """

    def __init__(self, model: Model, document: Document, max_length: int) -> None:
        self._model = model
        self._cache = StaticInferenceContext(max_batch_size=1, max_sequence_length=max_length)
        patch_size = model.config.vision.patch_size
        patches = [torch.empty(0, 3 * patch_size**2, dtype=torch.uint8), *document.patches]
        grids = torch.tensor(document.grids, dtype=torch.int64).view(-1, 3)
        features = model.tower(torch.cat(patches).to(model.device), grids.to(model.device))
        self.logits = self._forward(document.tokens, features)

    def add(self, token: int) -> None:
        """Append a token and update :attr:`logits`."""
        self.logits = self._forward([token], None)

    def _forward(self, new_tokens: Sequence[int], features: Tensor | None) -> Tensor:
        """[vocabulary], the logits after the new tokens."""
        language, length = self._model.language, self._cache.sequence_len_offset
        device, num_new = self._model.device, len(new_tokens)
        tokens = torch.tensor([list(new_tokens)], device=device)
        positions = length + torch.arange(num_new, device=device)
        embedded = language.embedding(tokens, positions[None])
        if features is not None:
            embedded = merge_features(embedded, tokens == self._model.tokenizer.media_pad, features)
        logits = language(
            tokens,
            positions[None],
            None,
            decoder_input=embedded,
            inference_context=self._cache,
            runtime_gather_output=True,
        )
        self._cache.sequence_len_offset += num_new
        self._cache.enable_decode_mode()
        last: Tensor = logits[0, -1, : self._model.tokenizer.vocab_size]
        return last


def sample_token(
    logits: Tensor, temperature: float, top_p: float, generator: torch.Generator
) -> int:
    """Draw a token by nucleus sampling (arXiv 1904.09751).

    Args:
        logits: [vocabulary].
        temperature: divides the logits; 0: the most probable token.
        top_p: in (0, 1]; draw from the most probable tokens with this total probability, at least
            from one.
        generator: on the CPU.
    """
    if temperature == 0:
        return int(logits.argmax())
    below = logits.double().cpu() - logits.max().double().cpu()  # divided, it is never infinity
    probabilities, order = torch.softmax(below / temperature, -1).sort(descending=True)
    probabilities[probabilities.cumsum(-1) - probabilities >= top_p] = 0
    return int(order[torch.multinomial(probabilities, 1, generator=generator)])


@torch.inference_mode()
def sample(
    model: Model,
    prompt: str,
    media: Sequence[Media] = (),
    *,
    max_tokens: int | None = None,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    ask: Ask | None = None,
) -> Iterator[str]:
    """Generate text after images, videos and a prompt.

    Generation ends with the token that ends a document (or a message), or after ``max_tokens``.

    Args:
        model: the model.
        prompt: text after the images and videos.
        media: images and videos.
        max_tokens: maximum number of tokens; default: the rest of the model's sequence length.
        temperature: see :func:`sample_token`.
        top_p: see :func:`sample_token`.
        seed: seed of the random generator.
        ask: generate the reply to a user's message; see :func:`compose`.

    Yields:
        The text in pieces of complete characters; a reply as :func:`pretrain.data.chat.readable`.

    Raises:
        PretrainError: as in :func:`compose`, an option is out of range, the sequence length
            leaves too few tokens, or the model's logits are not finite.
    """
    if not temperature >= 0:
        raise PretrainError(f"--temperature must be >= 0, not {temperature}")
    if not 0 < top_p <= 1:
        raise PretrainError(f"--top-p must be in (0, 1], not {top_p}")
    if max_tokens is not None and max_tokens < 1:
        raise PretrainError(f"--max-tokens must be >= 1, not {max_tokens}")
    if not 0 <= seed < 2**64:
        raise PretrainError(f"--seed must be in [0, 2^64), not {seed}")
    max_length = model.config.data.seq_length
    document = compose(model, prompt, media, ask=ask)
    room = max_length - len(document)
    if room < (max_tokens or 1):
        raise _too_long(len(document), max_length)
    generator = torch.Generator().manual_seed(seed)
    forward = CachedForward(model, document, max_length)
    generated: list[int] = []
    decode = partial(chat.readable, model.tokenizer) if ask else model.tokenizer.decode
    yielded = ""
    if ask and ask.thinking:
        yield chat.THINK
    for _ in range(max_tokens or room):
        if not forward.logits.isfinite().all():
            raise PretrainError(
                "the model's logits are not finite, so no token can be drawn: its weights are "
                "damaged by a diverged training; give an earlier checkpoint with --step, or train "
                "again with a lower optimizer.lr"
            )
        if model.tokenizer.media_pad >= 0:
            # A generated image would have no features.
            forward.logits[model.tokenizer.media_pad] = -torch.inf
        token = sample_token(forward.logits, temperature, top_p, generator)
        if token == model.tokenizer.eos or (ask and token == model.tokenizer.im_end):
            break
        generated.append(token)
        text = decode(generated)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            yield text.removeprefix(yielded)
            yielded = text
        if len(document) + len(generated) < max_length:
            forward.add(token)
    yield decode(generated).removeprefix(yielded)
