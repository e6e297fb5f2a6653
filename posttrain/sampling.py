"""A model of transformers as the function that rollouts call."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from posttrain.environment.rollouts import Sample
from pretrain.data.tokenizer import Tokenizer
from pretrain.errors import PretrainError


@contextmanager
def finite_logits(model: nn.Module) -> Iterator[None]:
    """Context in which a model's forward passes are for sampling.

    Without it, sampling ends in an error of torch, on a GPU in one after which CUDA cannot be used.

    Raises:
        PretrainError: a logit of the last token is not finite.
    """

    def check(_model: nn.Module, _arguments: Any, output: Any) -> None:
        if not output.logits[:, -1].isfinite().all():
            raise PretrainError(
                "the model's logits are not finite: if it was being trained, start again with a "
                "lower optimizer.lr, in another run_dir"
            )

    handle = model.register_forward_hook(check)
    try:
        yield
    finally:
        handle.remove()


class Sampler:
    """Samples one reply to each prompt, with the log-probabilities of its tokens.

    Args:
        model: of transformers; its training mode is restored after each call.
        end: id that ends a reply.
        pad: id for padding.
        suppressed: ids that are never sampled.
        temperature: of the distribution that is sampled from.
        max_tokens: limit of a reply.
        batch_size: prompts that are continued at the same time.
    """

    def __init__(
        self,
        model: Any,
        *,
        end: int,
        pad: int,
        suppressed: Sequence[int] = (),
        temperature: float = 1.0,
        max_tokens: int = 128,
        batch_size: int = 128,
    ) -> None:
        self._model, self._end, self._pad = model, end, pad
        self._suppressed = list(suppressed)
        self._temperature, self._max_tokens = temperature, max_tokens
        self._batch_size = batch_size

    @classmethod
    def of_chat(
        cls, model: Any, tokenizer: Tokenizer, *, temperature: float, max_tokens: int
    ) -> "Sampler":
        """A sampler of messages in the chat format; arguments as above."""
        return cls(
            model,
            end=tokenizer.im_end,
            pad=tokenizer.pad,
            # A generated image would have no features.
            suppressed=[tokenizer.media_pad] if tokenizer.media_pad >= 0 else [],
            temperature=temperature,
            max_tokens=max_tokens,
        )

    def __call__(self, prompts: list[list[int]]) -> list[Sample]:
        was_training = self._model.training
        self._model.eval()
        try:
            # Prompts of similar lengths have little padding.
            order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
            samples: dict[int, Sample] = {}
            for start in range(0, len(order), self._batch_size):
                batch = order[start : start + self._batch_size]
                with finite_logits(self._model):
                    found = self._sample([prompts[i] for i in batch])
                samples |= zip(batch, found, strict=True)
        finally:
            self._model.train(was_training)
        return [samples[index] for index in range(len(prompts))]

    @torch.no_grad()
    def _sample(self, prompts: list[list[int]]) -> list[Sample]:
        """Sample with a cache of keys and values, from which replies that have ended are dropped:
        a long reply does not cost the time of all."""
        length, device = max(map(len, prompts)), self._model.device
        ids = torch.tensor([[self._pad] * (length - len(p)) + p for p in prompts], device=device)
        mask = torch.tensor([[0] * (length - len(p)) + [1] * len(p) for p in prompts])
        mask = mask.to(device)
        samples = [Sample([], []) for _ in prompts]
        running, cache = list(range(len(prompts))), None  # of replies without an end
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        for _ in range(self._max_tokens):
            output = self._model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                cache=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            cache = output.cache
            tokens, logprobs = self._choose(output.logits[:, -1])
            for index, token, logprob in zip(
                running, tokens.tolist(), logprobs.tolist(), strict=True
            ):
                samples[index].tokens.append(token)
                samples[index].logprobs.append(logprob)
            left = (tokens != self._end).nonzero()[:, 0]
            if len(left) == 0:
                break
            if len(left) < len(running):
                running = [running[row] for row in left.tolist()]
                cache.batch_select_indices(left)
            ids, mask, positions = tokens[left, None], mask[left], positions[left, -1:] + 1
            mask = torch.cat([mask, mask.new_ones(len(left), 1)], 1)
        return samples

    def _choose(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """A token for each reply, and its log-probability among all tokens, [batch] each."""
        distribution = (logits.float() / self._temperature).log_softmax(-1)
        probabilities = distribution.exp()
        probabilities[:, self._suppressed] = 0
        tokens = probabilities.multinomial(1)
        return tokens[:, 0], distribution.gather(1, tokens)[:, 0]
