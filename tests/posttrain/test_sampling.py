"""Samples have the log-probabilities that the model gives them."""

from pathlib import Path

import pytest
import torch

from posttrain import model, modes
from posttrain.modes import Mode
from posttrain.sampling import Sampler
from pretrain.errors import PretrainError

PROMPTS = [[1, 40, 41], [1, 50], [1, 60, 61, 62, 63]]


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_log_probabilities_are_those_of_the_model(text_export: Path, temperature: float) -> None:
    exported = model.load(text_export)
    exported.model.double()
    tokenizer = exported.tokenizer
    suppressed = list(range(20))
    sampler = Sampler(
        exported.model,
        end=100,
        pad=tokenizer.pad,
        suppressed=suppressed,
        temperature=temperature,
        max_tokens=40,
        batch_size=2,
    )
    torch.manual_seed(0)
    prompts = PROMPTS * 8
    samples = sampler(prompts)
    assert exported.model.training
    for prompt, (tokens, logprobs) in zip(prompts, samples, strict=True):
        assert 1 <= len(tokens) <= 40
        assert 100 not in tokens[:-1]
        assert not {*tokens} & {*suppressed}
        with torch.no_grad():
            ids = torch.tensor([prompt + tokens], device=exported.model.device)
            logits = exported.model(input_ids=ids).logits[0].cpu()
        expected = (logits.float() / temperature).log_softmax(-1)[len(prompt) - 1 : -1]
        chosen = expected.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(logprobs), chosen, rtol=0, atol=1e-5)
    # Replies that ended, and replies at the limit.
    assert {tokens[-1] == 100 for tokens, _ in samples} == {True, False}
    assert {len(tokens) for tokens, _ in samples} > {40}


def test_probabilities_that_are_not_finite_are_one_line(text_export: Path) -> None:
    """In samples of this class, and in those of transformers."""
    exported = model.load(text_export)
    with torch.no_grad():
        exported.model.lm_head.weight[0] = float("inf")
    sampler = Sampler(exported.model, end=100, pad=exported.tokenizer.pad)
    mode = Mode("plain", "{{ messages[0].content }}", {}, [100])
    asked: list[modes.Messages] = [[{"role": "user", "content": "some text"}]]
    message = r"not finite: .*lower optimizer\.lr"
    with pytest.raises(PretrainError, match=message):
        sampler(PROMPTS)
    with pytest.raises(PretrainError, match=message):
        modes.answer(exported, mode, asked, [[]], 4, temperature=1.0)
    assert exported.model.training
