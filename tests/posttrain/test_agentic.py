"""Episodes of agentic tasks, with a scripted model."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from posttrain import agentic
from posttrain.config import SumsConfig
from posttrain.environment.markup import render_calls
from posttrain.environment.rollouts import Sample
from posttrain.tasks import generated_task
from pretrain.data.tokenizer import Tokenizer

TOKENIZER = Tokenizer.train(["look up records"], 300)
EXPORTED: Any = SimpleNamespace(tokenizer=TOKENIZER, has_images=False, folder=Path("hf"))


class Scripted:
    """Follows the chain of records to its end; stands for ``Sampler``."""

    @classmethod
    def of_chat(cls, *_: Any, **__: Any) -> "Scripted":
        return cls()

    def __call__(self, prompts: list[list[int]]) -> list[Sample]:
        samples = []
        for prompt in prompts:
            text = TOKENIZER.decode(prompt, skip_special_tokens=False)
            found = re.findall(r"## Return of [^\n]*\n(.*?)<\|im_end\|>", text, re.S)
            key = found[-1] if found else re.findall(r"get:(\w)<", text)[0]
            reply = key if key.isdigit() else render_calls([("get", {"key": key})])
            tokens = [*map(int, TOKENIZER.encode(reply)), TOKENIZER.im_end]
            samples.append(Sample(tokens, [-1.0] * len(tokens)))
        return samples


@pytest.mark.parametrize(("limit", "reward"), [(2000, 1.0), (40, 0.0)])
def test_episodes(monkeypatch: pytest.MonkeyPatch, limit: int, reward: float) -> None:
    """Results of tools are no tokens of the model; a limit that is too short ends an episode."""
    monkeypatch.setattr(agentic, "Sampler", Scripted)
    tasks = [generated_task("follow", SumsConfig(), seed) for seed in range(5)]
    episodes = agentic.play(EXPORTED, None, tasks, max_tokens=limit, temperature=1.0)
    for task, episode in zip(tasks, episodes, strict=True):
        trajectory = episode.trajectory
        assert episode.reward == reward
        assert 0 < len(trajectory.completion) <= limit
        assert len(trajectory.completion) == len(trajectory.mask)
        of_model = [t for t, own in zip(trajectory.completion, trajectory.mask, strict=True) if own]
        assert "## Return of" not in TOKENIZER.decode(of_model)
        # At 40 tokens, the observation after the first call does not fit: that call has an end.
        assert episode.is_cut_off([TOKENIZER.im_end]) == (not reward)
        if reward:
            assert episode.answer == task.truth and episode.turns == 1 + len(task.data)
