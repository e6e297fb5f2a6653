"""What a run's model writes after images, videos and a prompt, token by token.

One process, and megatron-core's own forward with its cache of keys and values: the prompt goes
through the model once, and after it each new token alone.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor, nn

from pretrain import checkpoint, parallel
from pretrain.build import names_in_checkpoint, set_precision
from pretrain.config import Config, ParallelConfig
from pretrain.data import Document, chat
from pretrain.data.composer import Composer
from pretrain.data.media import frames
from pretrain.data.media.frames import Media
from pretrain.data.tokenizer import Tokenizer
from pretrain.errors import PretrainError
from pretrain.model.language import build_language_model
from pretrain.model.multimodal import merge_features
from pretrain.model.projector import VisionTower


@dataclass(frozen=True)
class Model:
    """A run's whole model in this process, without what training adds to it."""

    config: Config
    tokenizer: Tokenizer
    language: GPTModel
    tower: VisionTower
    device: torch.device


def load(run_dir: Path, step: int | None = None) -> Model:
    """Build the model of a run's newest checkpoint, or of a step's, and read its weights.

    Raises:
        PretrainError: there is no such checkpoint, it is damaged, or there are other processes.
    """
    if parallel.world_size() > 1:
        raise PretrainError("this command is one process: start it with python, not torchrun")
    saved, config = checkpoint.find(run_dir, step)
    tokenizer = Tokenizer.load(checkpoint.tokenizer_file(run_dir))
    context = parallel.start(ParallelConfig(), config.seed)
    dtype: torch.dtype = getattr(torch, config.precision)
    (language,) = build_language_model(
        config.language,
        tokenizer.vocab_size,
        config.data.seq_length,
        ParallelConfig(),
        dtype=dtype,
    )
    tower = VisionTower(config.vision, config.language.hidden_size)
    whole = nn.ModuleDict({"language": language, "vision": tower}).to(context.device)
    set_precision(whole, dtype)
    whole.eval().requires_grad_(False)
    named = names_in_checkpoint([language], tower)
    saved.load({f"model.{name}": tensor for name, tensor in named.items()})
    return Model(config, tokenizer, language, tower, context.device)


def compose(
    model: Model, prompt: str, media: Sequence[Media] = (), *, reply: bool = False
) -> Document:
    """Images and videos and the prompt after them, as the model has seen such in training: by its
    run's ``data.max_image_tokens`` and ``data.video_fps``.

    Args:
        reply: they are a user's message, and the assistant's begins.

    Raises:
        PretrainError: a file cannot be read, what is shown leaves no room for a token more, or the
            tokenizer knows no images or no conversations.
    """
    tokenizer, data = model.tokenizer, model.config.data
    document = Document(tokenizer)
    if reply:
        tokenizer.require_chat()
        chat.begin(document, "user")
    if media and tokenizer.media_pad < 0:
        raise PretrainError("this run's tokenizer has no tokens for images: show it none")
    composer = Composer.of(data, tokenizer, model.config.vision.patch_size)
    try:
        shapes = [frames.measure(one, data.video_fps) for one in media]
        # Before anything is decoded: a film may be far longer than what the model reads.
        least, _ = composer.size(shapes)
        if least > data.seq_length:
            raise _too_long(least, data.seq_length)
        for one, shape in zip(media, shapes, strict=True):
            composer.add(document, composer.read(one, shape))
    except ValueError as error:
        raise PretrainError(f"cannot be read: {' '.join(str(error).split())}") from error
    document.add_tokens(tokenizer.encode(prompt))
    if reply:
        chat.begin(document.add_tokens([tokenizer.im_end]), chat.REPLY)
    return document


def _too_long(length: int, longest: int) -> PretrainError:
    return PretrainError(
        f"what is shown and the prompt are {length} tokens, which leaves "
        f"{max(0, longest - length)} of the {longest} that this model has learned to read: take a "
        "smaller image, a shorter video or prompt, or fewer --max-tokens"
    )


class Conversation:
    """The model's state after a text: its keys and values, and the next token's logits.

    Args:
        max_length: tokens that the text may grow to.
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
        """Go on with one more token."""
        self.logits = self._forward([token], None)

    def _forward(self, new: Sequence[int], features: Tensor | None) -> Tensor:
        """[vocabulary], the logits after the new tokens."""
        language, past = self._model.language, self._cache.sequence_len_offset
        tokens = torch.tensor([list(new)], device=self._model.device)
        places = past + torch.arange(len(new), device=self._model.device)
        embedded = language.embedding(tokens, places[None])
        if features is not None:
            embedded = merge_features(embedded, tokens == self._model.tokenizer.media_pad, features)
        later = torch.arange(past + len(new), device=self._model.device) > places[:, None]
        logits = language(
            tokens,
            places[None],
            later[None, None],
            decoder_input=embedded,
            inference_context=self._cache,
            runtime_gather_output=True,
        )
        self._cache.sequence_len_offset += len(new)
        self._cache.enable_decode_mode()
        last: Tensor = logits[0, -1]
        return last


def pick(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    """A token drawn by its probability at a temperature, out of the likeliest that make up top_p.

    Args:
        logits: [vocabulary].
        temperature: 0 takes the likeliest token.
        top_p: in (0, 1]; the likeliest token is always among them.
    """
    if temperature == 0:
        return int(logits.argmax())
    chances, order = torch.softmax(logits.double().cpu() / temperature, -1).sort(descending=True)
    chances[chances.cumsum(-1) - chances >= top_p] = 0
    return int(order[torch.multinomial(chances, 1, generator=generator)])


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
    reply: bool = False,
) -> Iterator[str]:
    """Yield what the model writes after images, videos and the prompt, as it comes.

    With ``reply``, these are a user's message, and the assistant's follows. It ends with the token
    that ends a text (or a message), or after ``max_tokens`` (by default as many as the
    model's sequence length leaves). A character is yielded when all its bytes are there.

    Raises:
        PretrainError: as :func:`compose`, an option is out of its range, or there is not the room.
    """
    if temperature < 0:
        raise PretrainError(f"--temperature must be >= 0, not {temperature}")
    if not 0 < top_p <= 1:
        raise PretrainError(f"--top-p must be in (0, 1], not {top_p}")
    if max_tokens is not None and max_tokens < 1:
        raise PretrainError(f"--max-tokens must be >= 1, not {max_tokens}")
    longest = model.config.data.seq_length
    document = compose(model, prompt, media, reply=reply)
    room = longest - len(document)
    if room < (max_tokens or 1):
        raise _too_long(len(document), longest)
    generator = torch.Generator().manual_seed(seed)
    conversation = Conversation(model, document, longest)
    written: list[int] = []
    told = ""
    for _ in range(max_tokens or room):
        token = pick(conversation.logits, temperature, top_p, generator)
        if token == model.tokenizer.eos or (reply and token == model.tokenizer.im_end):
            break
        written.append(token)
        text = model.tokenizer.decode(written)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            yield text.removeprefix(told)
            told = text
        if len(document) + len(written) < longest:
            conversation.add(token)
    yield model.tokenizer.decode(written).removeprefix(told)
