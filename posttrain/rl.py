"""Reinforcement learning with outcome rewards, from an exported model to an exported model.

One policy is trained on several tasks of text and of images together: domains are abilities, not
modalities (arXiv 2602.02276, section 4.4).
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from datasets import Dataset, Features, Image, List, Value

from posttrain import agentic, model, tasks
from posttrain.config import Config
from posttrain.data import open_images, open_pretraining_data
from posttrain.environment.episode import Episode
from posttrain.practice import Practice, prepare, require_enough, set_budgets, verified
from posttrain.prompts import PromptSampler
from posttrain.run import Run, locked
from posttrain.shared_images import encode_once
from posttrain.trainer import Asked, RlTrainer, arguments


def train(config: Config) -> Path:
    """Train a model, or resume its training; returns the folder of the trained model.

    Raises:
        PretrainError: the model, the data or a setting is unusable.
    """
    config.require_fit("rl")
    with locked(config, "rl") as (lock, termination):
        torch.manual_seed(config.seed)  # of the responses that budgets are estimated from
        exported = model.load(Path(config.model))
        data = open_pretraining_data(config.pretraining, exported.folder)
        images = open_images(config, exported.folder)
        run = Run("rl", config, exported, data, lock, termination, images)
        practices = [prepare(run, name) for name in config.rl.tasks]
        require_enough(config, practices)
        set_budgets(run, practices)
        exported.hf_tokenizer.chat_template = practices[0].mode.template
        exported.processor.chat_template = practices[0].mode.template
        exported.model.generation_config.eos_token_id = sorted(
            {end for practice in practices for end in practice.mode.ends}
        )
        if exported.has_images:
            encode_once(exported.model)
        rl = config.rl
        trainer = RlTrainer(
            rl=rl,
            optimizer_options=config.optimizer,
            asked={practice.name: _asked(run, practice) for practice in practices},
            prompts=PromptSampler(
                [len(practice.problems) for practice in practices],
                [practice.options.share for practice in practices],
                prompts=rl.prompts,
                group_size=rl.group_size,
                updates=rl.updates,
                batches=config.steps // rl.updates,
                seed=config.seed,
            ),
            model=exported.model,
            processing_class=exported.processor,
            reward_funcs=[_Reward(run, {practice.name: practice for practice in practices})],
            args=arguments(config, run.checkpoints),
            train_dataset=_dataset(practices),
        )
        return run.train(trainer)


def _asked(run: Run, practice: Practice) -> Asked:
    def play(trained: Any, numbers: Sequence[int]) -> list[Episode]:
        return agentic.play(
            run.exported,
            trained,
            [practice.problems[number] for number in numbers],
            max_tokens=practice.options.max_tokens,
            temperature=run.config.rl.temperature,
        )

    has_tools = practice.name in tasks.AGENTIC
    return Asked(practice.mode, practice.options.max_tokens, play if has_tools else None)


def _dataset(practices: Sequence[Practice]) -> Dataset:
    """A row for each problem; ``number`` is its place among those of its task."""
    problems = [task for practice in practices for task in practice.problems]
    columns: dict[str, list[Any]] = {
        "prompt": [[{"role": "user", "content": task.question}] for task in problems],
        "task": [practice.name for practice in practices for _ in practice.problems],
        "number": [number for practice in practices for number in range(len(practice.problems))],
    }
    message = {"role": Value("string"), "content": Value("string")}
    features = {"prompt": List(message), "task": Value("string"), "number": Value("int64")}
    if any(task.image is not None for task in problems):
        columns["images"] = [[] if task.image is None else [task.image] for task in problems]
        features["images"] = List(Image())
    return Dataset.from_dict(columns, features=Features(features))


@dataclass
class _Reward:
    """The rewards of responses, as TRL calls a reward function."""

    run: Run
    practices: Mapping[str, Practice]
    __name__: str = "reward"

    def __call__(
        self,
        completion_ids: Sequence[Sequence[int]],
        task: Sequence[str],
        number: Sequence[int],
        episode_reward: Sequence[float | None],
        cut_off: Sequence[bool],
        trainer_state: Any,
        log_metric: Callable[[str, float], None],
        **_: Any,
    ) -> list[float]:
        rl = self.run.config.rl
        iteration = trainer_state.global_step // rl.updates
        rewards: list[float] = []
        responses: dict[str, list[dict[str, float]]] = {}  # their metrics, by task
        for start in range(0, len(task), rl.group_size):
            practice = self.practices[task[start]]
            problem = practice.problems[number[start]]
            group = completion_ids[start : start + rl.group_size]
            earned = [
                verified(self.run, practice.mode, problem, tokens) if played is None else played
                for tokens, played in zip(group, episode_reward[start:], strict=False)
            ]
            given, phase = earned, {}
            if toggle := practice.toggle:
                lengths = [len(tokens) for tokens in group]
                given = toggle.rewards(iteration, problem.problem, earned, lengths)
                phase = {"has_budget": float(toggle.has_budget(iteration))}
            rewards += given
            responses.setdefault(practice.name, []).extend(
                {
                    "reward": reward,
                    "accuracy": float(before == 1),
                    "response_tokens": float(len(tokens)),
                    "cut_off": float(was_cut),
                    **phase,
                }
                for reward, before, tokens, was_cut in zip(
                    given, earned, group, cut_off[start : start + rl.group_size], strict=True
                )
            )
        _log(log_metric, "", [one for some in responses.values() for one in some])
        if len(self.practices) > 1:
            for name, some in responses.items():
                _log(log_metric, f"{name}_", some)
        return rewards


def _log(
    log_metric: Callable[[str, float], None], prefix: str, responses: Sequence[dict[str, float]]
) -> None:
    """Log the mean of each metric over the responses that have it."""
    values = defaultdict(list)
    for response in responses:
        for name, value in response.items():
            values[name].append(value)
    for name, found in values.items():
        if prefix or name != "reward":  # TRL logs the mean over all tasks
            log_metric(f"{prefix}{name}", mean(found))
