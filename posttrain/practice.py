"""The tasks of reinforcement learning: their problems, rewards and token budgets."""

import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from posttrain import evaluate, modes, tasks
from posttrain.config import Config, RlTaskConfig
from posttrain.data import Picture, pictures
from posttrain.environment.core import Task
from posttrain.environment.markup import TOKENS
from posttrain.modes import Mode
from posttrain.rewards.text import edit_distance_reward
from posttrain.run import Run
from posttrain.toggle import Toggle
from pretrain.errors import PretrainError
from pretrain.runtime import atomic
from pretrain.runtime.progress import Progress, counted

_BUDGETS = "budgets.json"
_SEARCHED = 16  # images that a model reads for each one asked for: it may solve nearly all


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


def require_enough(config: Config, practices: Sequence[Practice]) -> None:
    """
    Raises:
        PretrainError: a task has fewer problems than prompts in a batch.
    """
    shares = [practice.options.share for practice in practices]
    most = [math.ceil(config.rl.prompts * share / math.fsum(shares)) for share in shares]
    for practice, needed in zip(practices, most, strict=True):
        if len(practice.problems) < needed:
            name = f"rl.tasks.{practice.name}"
            where = f"{config.pretraining} has" if practice.name == "read" else "there are"
            more = f"raise {name}.problems"
            if practice.name == "read":
                more += f", set {name}.solved_share=null, or add images"
            raise PretrainError(
                f"{where} {len(practice.problems)} different problems of {practice.name} for "
                f"training, fewer than its {needed} prompts of a batch: lower rl.prompts, or {more}"
            )


def prepare(run: Run, name: str) -> Practice:
    """A task with its problems.

    Raises:
        PretrainError: the model lacks tokens that the task needs, or images, or reads fewer tokens.
    """
    config, exported = run.config, run.exported
    options = config.rl.tasks[name]
    mode = modes.find(exported, "document" if name == "read" else "thinking")
    if name in ("read", *tasks.OF_IMAGES) and not exported.has_images:
        raise PretrainError(
            f"rl.tasks.{name} needs a model with images, and {config.model} has none: export it "
            "without --text-only"
        )
    missing = [token for token in TOKENS if exported.tokenizer.id_of(token) is None]
    if name in tasks.AGENTIC and missing:
        raise PretrainError(
            f"rl.tasks.{name} needs tokens of tool calls, and {config.model} lacks "
            f"{', '.join(missing)}: run `python -m posttrain sft` first"
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
    room = exported.max_length - modes.longest_prompt(exported, mode, found)
    if options.max_tokens > room:
        raise PretrainError(
            f"rl.tasks.{name}.max_tokens={options.max_tokens}: {config.model} reads "
            f"{exported.max_length} tokens, which leave {max(0, room)} for the response to the "
            "longest prompt"
        )
    return Practice(name, options, mode, found)


def _pictures(run: Run, options: RlTaskConfig) -> list[Picture]:
    """The training images, most of them not solved yet."""
    config, exported, data = run.config, run.exported, run.images or run.data
    count, share = options.problems, options.solved_share
    if share is None:
        return pictures(data, "train", count)
    solved: list[Picture] = []
    unsolved: list[Picture] = []
    wanted = max(1, round(count * (1 - share)))
    exported.model.eval()
    with Progress("choosing images that are not solved yet", wanted, "images") as progress:
        asked = 0
        while len(unsolved) < wanted and asked < _SEARCHED * count:
            limit = max(count, 2 * asked)
            found = pictures(data, "train", limit)
            new = found[asked:]
            readings = evaluate.transcribe(exported, new, config.evaluation)
            for reading, picture in zip(readings, new, strict=True):
                (solved if reading.is_exact else unsolved).append(picture)
            progress(len(unsolved))
            if len(found) < limit:
                break  # there are no more
            asked = limit
    exported.model.train()
    unsolved = unsolved[:wanted]
    chosen = unsolved + solved[: round(len(unsolved) * share / (1 - share))]
    random.Random(config.seed).shuffle(chosen)
    return chosen


def verified(run: Run, mode: Mode, task: Task, tokens: Sequence[int]) -> float:
    """The reward of a response.

    Raises:
        PretrainError: it is not finite, or outside [0, 1].
    """
    answer = modes.final_answer(run.exported, mode, tokens)
    reward = task.reward(answer, task.truth)
    if not (math.isfinite(reward) and 0 <= reward <= 1):
        raise PretrainError(f"the reward of {answer!r:.60} is {reward}: rewards must be in [0, 1]")
    return reward


def set_budgets(run: Run, practices: Sequence[Practice]) -> None:
    """Estimate the budgets of each task with Toggle, with the model before training, or read them
    if the run resumes.

    Raises:
        PretrainError: the stored budgets cannot be used.
    """
    for practice in practices:
        options = practice.options.toggle
        if options.mode != "off":
            practice.toggle = Toggle(
                practice.options.max_tokens,
                options.mode,
                options.period,
                options.accuracy,
                options.percentile,
            )
    file = run.folder / _BUDGETS
    resumes = bool(run.newest_checkpoint()) and file.is_file()
    state = read_budgets(file, practices) if resumes else {}
    for practice in practices:
        if practice.toggle is not None and practice.name not in state:
            _estimate(run, practice, practice.toggle)
            state[practice.name] = practice.toggle.state_dict()
            atomic.write_text(file, json.dumps(state))


def read_budgets(file: Path, practices: Sequence[Practice]) -> dict[str, dict[str, float]]:
    """Read stored budgets into the tasks with Toggle that have some.

    Returns:
        The budget of each problem, by the task's name.

    Raises:
        PretrainError: the file cannot be used.
    """
    try:
        state: dict[str, dict[str, float]] = json.loads(file.read_text())
        if not isinstance(state, dict):
            raise ValueError("it must have the budgets of each task by its name")
        for practice in practices:
            if practice.toggle is not None and practice.name in state:
                practice.toggle.load_state_dict(state[practice.name])
    except ValueError as error:
        raise PretrainError(
            f"{file} cannot be used ({error}): remove it, and budgets are estimated again, with "
            "the model before training"
        ) from error
    return state


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
            correct = [verified(run, practice.mode, task, tokens) == 1 for tokens in group]
            toggle.estimate(task.problem, [len(tokens) for tokens in group], correct)
    exported.model.train()
