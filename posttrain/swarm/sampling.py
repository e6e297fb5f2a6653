"""A model of transformers as the function that rollouts call."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from posttrain.environment.rollouts import Sample


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
        batch_size: int = 64,
    ) -> None:
        self._model, self._end, self._pad = model, end, pad
        self._suppressed = list(suppressed) or None
        self._temperature, self._max_tokens = temperature, max_tokens
        self._batch_size = batch_size

    def __call__(self, prompts: list[list[int]]) -> list[Sample]:
        was_training = self._model.training
        self._model.eval()
        try:
            # Prompts of similar lengths have little padding.
            order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
            samples: dict[int, Sample] = {}
            for start in range(0, len(order), self._batch_size):
                batch = order[start : start + self._batch_size]
                samples |= zip(batch, self._sample([prompts[i] for i in batch]), strict=True)
        finally:
            self._model.train(was_training)
        return [samples[index] for index in range(len(prompts))]

    @torch.no_grad()
    def _sample(self, prompts: list[list[int]]) -> list[Sample]:
        length = max(map(len, prompts))
        ids = torch.tensor([[self._pad] * (length - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (length - len(p)) + [1] * len(p) for p in prompts])
        device = self._model.device
        output = self._model.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            max_new_tokens=self._max_tokens,
            do_sample=True,
            temperature=self._temperature,
            top_k=0,
            top_p=1.0,
            eos_token_id=self._end,
            pad_token_id=self._pad,
            suppress_tokens=self._suppressed,
            output_logits=True,
            return_dict_in_generate=True,
        )
        new = output.sequences[:, length:].cpu()
        logprobs = torch.stack(
            [self._logprobs(*pair) for pair in zip(output.logits, new.T, strict=True)], 1
        )
        return [
            self._until_end(*pair) for pair in zip(new.tolist(), logprobs.tolist(), strict=True)
        ]

    def _logprobs(self, logits: Tensor, tokens: Tensor) -> Tensor:
        """Log-probability of one token of each reply, [batch]."""
        distribution = (logits.float() / self._temperature).log_softmax(-1).cpu()
        return distribution.gather(1, tokens[:, None])[:, 0]

    def _until_end(self, tokens: list[int], logprobs: list[float]) -> Sample:
        count = tokens.index(self._end) + 1 if self._end in tokens else len(tokens)
        return Sample(tokens[:count], logprobs[:count])
