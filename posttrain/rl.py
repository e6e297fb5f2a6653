"""Reinforcement learning with outcome rewards, from an exported model to an exported model.

One policy is trained on several tasks of text and of images together: domains are abilities, not
modalities (arXiv 2602.02276, section 4.4).
"""

import json
import math
import random
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from datasets import Dataset, Features, Image, List, Value

from posttrain import agentic, evaluate, model, modes, tasks
from posttrain.config import Config, RlTaskConfig
from posttrain.data import Picture, open_images, open_pretraining_data, pictures
from posttrain.environment.core import Task
from posttrain.environment.episode import Episode
from posttrain.modes import Mode
from posttrain.prompts import PromptSampler
from posttrain.rewards.text import edit_distance_reward
from posttrain.run import Run, locked
from posttrain.shared_images import encode_once
from posttrain.toggle import Toggle
from posttrain.trainer import Asked, RlTrainer, arguments
from pretrain.errors import PretrainError
from pretrain.runtime.progress import Progress, counted

_BUDGETS = "budgets.json"


@dataclass
class Practice:
    """A task of the training.

    Attributes:
        name: of the task, a key of ``rl.tasks``.
        options: its settings.
        mode: in which the model is asked.
        problems: in a fixed order.
        toggle: its budgets; None without.
    """

    name: str
    options: RlTaskConfig
    mode: Mode
    problems: list[Task]
    toggle: Toggle | None = None


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
        practices = [_practice(run, name) for name in config.rl.tasks]
        _require_enough(config, practices)
        _set_budgets(run, practices)
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


def _require_enough(config: Config, practices: Sequence[Practice]) -> None:
    """
    Raises:
        PretrainError: a task has fewer problems than prompts in a batch.
    """
    shares = [practice.options.share for practice in practices]
    most = [math.ceil(config.rl.prompts * share / math.fsum(shares)) for share in shares]
    for practice, needed in zip(practices, most, strict=True):
        if len(practice.problems) < needed:
            where = f"{config.pretraining} has" if practice.name == "read" else "there are"
            raise PretrainError(
                f"{where} {len(practice.problems)} problems of {practice.name} for training, fewer "
                f"than its {needed} prompts of a batch: lower rl.prompts, or add problems"
            )


# ---------------------------------------------------------------------- tasks


def _practice(run: Run, name: str) -> Practice:
    """A task with its problems.

    Raises:
        PretrainError: the model lacks tokens that the task needs, or images.
    """
    config, exported = run.config, run.exported
    options = config.rl.tasks[name]
    mode = modes.find(exported, "document" if name == "read" else "thinking")
    if name in ("read", *tasks.OF_IMAGES) and not exported.has_images:
        raise PretrainError(
            f"rl.tasks.{name} needs a model with images, and {config.model} has none: export it "
            "without --text-only"
        )
    if name == "read":
        found = [
            Task(str(number), "knowledge", "", one.text, edit_distance_reward, image=one.image)
            for number, one in enumerate(_pictures(run, options))
        ]
    else:
        seeds = range(options.problems)
        generated = (tasks.generated_task(name, config.sums, seed) for seed in seeds)
        found = list({task.problem: task for task in generated}.values())
    return Practice(name, options, mode, found)


def _pictures(run: Run, options: RlTaskConfig) -> list[Picture]:
    """The training images, most of them not solved yet."""
    config, exported, data = run.config, run.exported, run.images or run.data
    count, share = options.problems, options.solved_share
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


# ---------------------------------------------------------------------- rewards


def _verified(run: Run, task: Task, tokens: Sequence[int]) -> float:
    """The reward of a response.

    Raises:
        PretrainError: it is not finite, or outside [0, 1].
    """
    answer = modes.final_answer(run.exported, tokens)
    reward = task.reward(answer, task.truth)
    if not (math.isfinite(reward) and 0 <= reward <= 1):
        raise PretrainError(f"the reward of {answer!r:.60} is {reward}: rewards must be in [0, 1]")
    return reward


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
            verified = [
                _verified(self.run, problem, tokens) if played is None else played
                for tokens, played in zip(group, episode_reward[start:], strict=False)
            ]
            given, phase = verified, {}
            if toggle := practice.toggle:
                lengths = [len(tokens) for tokens in group]
                given = toggle.rewards(iteration, problem.problem, verified, lengths)
                phase = {"has_budget": float(toggle.has_budget(iteration))}
            rewards += given
            responses.setdefault(practice.name, []).extend(
                {
                    "reward": reward,
                    "accuracy": float(before == 1),
                    "response_tokens": float(len(tokens)),
                    "cut_off": float(tokens[-1] not in practice.mode.ends),
                    **phase,
                }
                for reward, before, tokens in zip(given, verified, group, strict=True)
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


def _set_budgets(run: Run, practices: Sequence[Practice]) -> None:
    """Estimate the budgets of each task with Toggle, with the model before training, or read them
    if the run resumes."""
    file = run.folder / _BUDGETS
    state = {}
    if run.newest_checkpoint() and file.is_file():
        state = json.loads(file.read_text())
    for practice in practices:
        options = practice.options.toggle
        if options.mode == "off":
            continue
        practice.toggle = Toggle(
            practice.options.max_tokens,
            options.mode,
            options.period,
            options.accuracy,
            options.percentile,
        )
        if practice.name in state:
            practice.toggle.load_state_dict(state[practice.name])
        else:
            _estimate(run, practice, practice.toggle)
            state[practice.name] = practice.toggle.state_dict()
    if state:
        file.write_text(json.dumps(state))


def _estimate(run: Run, practice: Practice, toggle: Toggle) -> None:
    rl, exported, problems = run.config.rl, run.exported, practice.problems
    exported.model.eval()
    batches = [
        problems[start : start + rl.prompts] for start in range(0, len(problems), rl.prompts)
    ]
    for batch in counted(batches, f"estimating budgets of {practice.name}", "batches"):
        repeated = [task for task in batch for _ in range(rl.group_size)]
        replies = modes.answer_tasks(
            exported, practice.mode, repeated, practice.options.max_tokens, rl.temperature
        )
        for start, task in zip(range(0, len(replies), rl.group_size), batch, strict=True):
            group = replies[start : start + rl.group_size]
            correct = [_verified(run, task, tokens) == 1 for tokens in group]
            toggle.estimate(task.problem, [len(tokens) for tokens in group], correct)
    exported.model.train()
