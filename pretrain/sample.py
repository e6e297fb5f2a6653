"""What a run's model writes after images and a prompt, token by token.

One process, and megatron-core's own forward with its cache of keys and values: the prompt goes
through the model once, and after it each new token alone.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.models.gpt.gpt_model import GPTModel
from PIL import Image, ImageOps
from torch import Tensor, nn

from pretrain import state
from pretrain.build import names_in_checkpoint, set_precision
from pretrain.config import Config, ParallelConfig
from pretrain.data import Document, chat
from pretrain.data.fit import fit
from pretrain.data.images import VisionItem
from pretrain.data.tokenizer import Tokenizer
from pretrain.errors import PretrainError
from pretrain.model.language import build_language_model
from pretrain.model.multimodal import merge_features
from pretrain.model.projector import VisionTower
from pretrain.runtime import checkpoint, processes


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
    if processes.world_size() > 1:
        raise PretrainError("this command is one process: start it with python, not torchrun")
    saved = state.saved(run_dir, step)
    tokenizer = Tokenizer.load(state.tokenizer_file(run_dir))
    config = saved.config
    here = processes.start(ParallelConfig(), config.seed)
    dtype: torch.dtype = getattr(torch, config.precision)
    (language,) = build_language_model(
        config.language,
        tokenizer.vocab_size,
        config.data.seq_length,
        ParallelConfig(),
        dtype=dtype,
    )
    tower = VisionTower(config.vision, config.language.hidden_size)
    whole = nn.ModuleDict({"language": language, "vision": tower}).to(here.device)
    set_precision(whole, dtype)
    whole.eval().requires_grad_(False)
    named = names_in_checkpoint([language], tower)
    checkpoint.load(saved.path, {f"model.{name}": tensor for name, tensor in named.items()})
    return Model(config, tokenizer, language, tower, here.device)


def read_image(path: Path) -> VisionItem:
    """An image file, upright and in RGB; of an animation the first frame.

    Raises:
        PretrainError: it cannot be read, or is no image.
    """
    try:
        with Image.open(path) as image:
            pixels = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise PretrainError(f"cannot read the image {path}: {' '.join(reason.split())}") from error
    return VisionItem(pixels[None], "")


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
    images: Sequence[Path] = (),
    *,
    max_tokens: int | None = None,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    reply: bool = False,
) -> Iterator[str]:
    """Yield what the model writes after the images and the prompt, as it comes.

    With ``reply``, these are a user's message, and the assistant's follows. It ends with the token
    that ends a text (or a message), or after ``max_tokens`` (by default as many as the
    model's sequence length leaves). A character is yielded when all its bytes are there.

    Raises:
        PretrainError: an image cannot be read, an option is out of its range, the text is longer
            than the model has learned to read, or its tokenizer knows no conversations.
    """
    if temperature < 0:
        raise PretrainError(f"--temperature must be >= 0, not {temperature}")
    if not 0 < top_p <= 1:
        raise PretrainError(f"--top-p must be in (0, 1], not {top_p}")
    if max_tokens is not None and max_tokens < 1:
        raise PretrainError(f"--max-tokens must be >= 1, not {max_tokens}")
    patch_size, longest = model.config.vision.patch_size, model.config.data.seq_length
    document = Document(model.tokenizer)
    if reply:
        model.tokenizer.require_chat()
        chat.begin(document, "user")
    if images and model.tokenizer.media_pad < 0:
        raise PretrainError("this run's tokenizer has no tokens for images: leave --image out")
    for path in images:
        item = read_image(path)
        document.add_image(VisionItem(fit(item.pixels, patch_size), ""), patch_size)
    document.add_tokens(model.tokenizer.encode(prompt))
    if reply:
        chat.begin(document.add_tokens([model.tokenizer.im_end]), chat.REPLY)
    room = longest - len(document)
    if room < (max_tokens or 1):
        raise PretrainError(
            f"the images and the prompt are {len(document)} tokens, which leaves {max(room, 0)} of "
            f"the {longest} that this model has learned to read: take a smaller image, a shorter "
            "prompt or fewer --max-tokens"
        )
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
