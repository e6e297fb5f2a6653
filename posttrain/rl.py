"""Reinforcement learning with outcome rewards, from an exported model to an exported model."""

import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from posttrain import evaluate, model, modes
from posttrain.config import Config
from posttrain.data import Picture, open_images, open_pretraining_data, pictures
from posttrain.environment.core import Task
from posttrain.modes import Mode
from posttrain.rewards.text import edit_distance_reward
from posttrain.run import Run, locked
from posttrain.shared_images import encode_once
from posttrain.tasks import sum_task
from posttrain.toggle import Toggle
from posttrain.trainer import RlTrainer, arguments
from pretrain.errors import PretrainError
from pretrain.runtime.progress import Progress, counted

_BUDGETS = "budgets.json"


def train(config: Config) -> Path:
    """Train a model, or resume its training; returns the folder of the trained model.

    Raises:
        PretrainError: the model, the data or a setting is unusable.
    """
    config.require_effect("rl")
    with locked(config, "rl") as termination:
        torch.manual_seed(config.seed)  # of the responses that budgets are estimated from
        exported = model.load(Path(config.model))
        data = open_pretraining_data(config.pretraining, exported.folder)
        images = open_images(config, exported.folder)
        run = Run("rl", config, exported, data, termination, images)
        mode = modes.find(exported, "document" if config.rl.task == "read" else "thinking")
        problems = _problems(run, mode)
        if len(problems) < config.rl.prompts:
            raise PretrainError(
                f"{config.pretraining} has {len(problems)} problems for training, fewer than "
                f"rl.prompts={config.rl.prompts}: lower it, or add images"
            )
        exported.hf_tokenizer.chat_template = exported.processor.chat_template = mode.template
        exported.model.generation_config.eos_token_id = mode.ends
        if exported.has_images:
            encode_once(exported.model)
        trainer = RlTrainer(
            rl=config.rl,
            optimizer_options=config.optimizer,
            model=exported.model,
            processing_class=exported.processor,
            reward_funcs=[_Reward(run, mode, problems)],
            args=arguments(config, run.checkpoints, chat_template_kwargs=mode.options),
            train_dataset=_dataset(problems),
        )
        return run.train(trainer)


def _dataset(problems: Sequence[Task]) -> Dataset:
    """A row for each problem; ``number`` is its place among them."""
    columns: dict[str, list[Any]] = {
        "prompt": [[{"role": "user", "content": problem.question}] for problem in problems],
        "number": list(range(len(problems))),
    }
    if problems[0].image is not None:
        columns["images"] = [[problem.image] for problem in problems]
    return Dataset.from_dict(columns)


def _problems(run: Run, mode: Mode) -> list[Task]:
    """The problems of the training, in a fixed order."""
    config = run.config
    if config.rl.task == "sums":
        tasks = (sum_task(config.sums, seed) for seed in range(config.rl.problems))
        return list({task.problem: task for task in tasks}.values())
    if not run.exported.has_images:
        raise PretrainError(
            f"rl.task=read needs a model with images, and {config.model} has none: export it "
            "without --text-only"
        )
    return [
        Task(str(number), "knowledge", "", one.text, edit_distance_reward, image=one.image)
        for number, one in enumerate(_pictures(run))
    ]


def _pictures(run: Run) -> list[Picture]:
    """The training images, most of them not solved yet."""
    config, exported, data = run.config, run.exported, run.images or run.data
    count, share = config.rl.problems, config.rl.solved_share
    if share is None:
        return pictures(data, "train", count)
    solved: list[Picture] = []
    unsolved: list[Picture] = []
    wanted = round(count * (1 - share))
    exported.model.eval()
    with Progress("choosing images that are not solved yet", wanted, "images") as progress:
        asked = 0
        while len(unsolved) < wanted:
            found = pictures(data, "train", asked + count)
            new = found[asked:]
            readings = evaluate.transcribe(exported, new, config.evaluation)
            for reading, picture in zip(readings, new, strict=True):
                (solved if reading.is_exact else unsolved).append(picture)
            progress(len(unsolved))
            if len(found) < asked + count:
                break  # there are no more
            asked = len(found)
    exported.model.train()
    unsolved = unsolved[:wanted]
    others = round(len(unsolved) * share / (1 - share)) if share < 1 else count
    chosen = unsolved + solved[:others]
    random.Random(config.seed).shuffle(chosen)
    return chosen


@dataclass
class _Reward:
    """The rewards of responses, as TRL calls a reward function."""

    run: Run
    mode: Mode
    problems: Sequence[Task]
    __name__: str = "reward"

    def __post_init__(self) -> None:
        options = self.run.config.rl.toggle
        self._toggle: Toggle | None = None
        if options.mode != "off":
            self._toggle = Toggle(
                self.run.config.rl.max_tokens,
                options.mode,
                options.period,
                options.accuracy,
                options.percentile,
            )
            self._set_budgets(self._toggle)

    def __call__(
        self,
        completion_ids: Sequence[Sequence[int]],
        number: Sequence[int],
        trainer_state: Any,
        log_metric: Callable[[str, float], None],
        **_: Any,
    ) -> list[float]:
        tasks = [self.problems[index] for index in number]
        pairs = list(zip(tasks, completion_ids, strict=True))
        rewards = [self._verified(task, tokens) for task, tokens in pairs]
        log_metric("accuracy", sum(reward == 1 for reward in rewards) / len(rewards))
        if self._toggle is None:
            return rewards
        rl = self.run.config.rl
        iteration, k = trainer_state.global_step // rl.updates, rl.group_size
        log_metric("has_budget", float(self._toggle.has_budget(iteration)))
        return [
            reward
            for start in range(0, len(rewards), k)
            for reward in self._toggle.rewards(
                iteration,
                tasks[start].problem,
                rewards[start : start + k],
                [len(tokens) for tokens in completion_ids[start : start + k]],
            )
        ]

    def _verified(self, task: Task, tokens: Sequence[int]) -> float:
        """The reward of a response.

        Raises:
            PretrainError: it is not finite, or outside [0, 1].
        """
        answer = modes.final_answer(self.run.exported, tokens)
        reward = task.reward(answer, task.truth)
        if not (math.isfinite(reward) and 0 <= reward <= 1):
            raise PretrainError(
                f"the reward of {answer!r:.60} is {reward}: rewards must be in [0, 1]"
            )
        return reward

    def _set_budgets(self, toggle: Toggle) -> None:
        """Estimate the budget of each problem with the model before training, or read it."""
        file = self.run.folder / _BUDGETS
        if self.run.newest_checkpoint() and file.is_file():
            toggle.load_state_dict(json.loads(file.read_text()))
            return
        rl, exported = self.run.config.rl, self.run.exported
        exported.model.eval()
        batches = [
            self.problems[start : start + rl.prompts]
            for start in range(0, len(self.problems), rl.prompts)
        ]
        for tasks in counted(batches, "estimating budgets", "batches"):
            repeated = [task for task in tasks for _ in range(rl.group_size)]
            asked = [[{"role": "user", "content": task.question}] for task in repeated]
            replies = modes.answer(
                exported, self.mode, asked, [[]] * len(asked), rl.max_tokens, rl.temperature
            )
            for start, task in zip(range(0, len(replies), rl.group_size), tasks, strict=True):
                group = replies[start : start + rl.group_size]
                correct = [self._verified(task, tokens) == 1 for tokens in group]
                toggle.estimate(task.problem, [len(tokens) for tokens in group], correct)
        exported.model.train()
        file.write_text(json.dumps(toggle.state_dict()))
