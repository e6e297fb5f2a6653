"""``python -m posttrain swarm``: PARL, from an exported model to an exported model.

The model first learns the syntax of the tools from demonstrations (:mod:`posttrain.swarm.start`).
That checkpoint, frozen, is the model of all sub-agents; the orchestrator is trained.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from posttrain import model
from posttrain.config import Config, SwarmConfig
from posttrain.data import open_pretraining_data
from posttrain.environment.chat import KimiChat
from posttrain.environment.markup import TOKENS
from posttrain.environment.rollouts import Generate
from posttrain.environment.trajectory import for_trl
from posttrain.model import Exported
from posttrain.run import Run, locked
from posttrain.sampling import Sampler
from posttrain.swarm import start
from posttrain.swarm.demonstrations import Demonstrations
from posttrain.swarm.orchestrator import Limits, SwarmEpisode, run_swarms
from posttrain.swarm.parl import Parl, critical_steps, finish_reward, parallelism
from posttrain.swarm.tasks import LookUps, tools
from posttrain.trainer import RlTrainer, arguments
from pretrain.data import Data
from pretrain.errors import PretrainError

_START = "start"
# Seeds of tasks: those of training begin with the run's seed, far from the demonstrations'.
_TRAINING_SEEDS = 1 << 32
_HELD_OUT_SEEDS = 1 << 48
_TASKS = 1 << 14  # different ones of a run


@dataclass
class Swarm:
    """Everything that a rollout needs but the trained model.

    Attributes:
        settings: of the swarm.
        temperature: of all samples.
        sub_agent: the frozen model.
    """

    settings: SwarmConfig
    temperature: float
    sub_agent: Exported

    def __post_init__(self) -> None:
        swarm = self.settings
        self.tasks = look_ups(swarm)
        self.parl = Parl(
            swarm.parallel_weight,
            swarm.finish_weight,
            swarm.anneal_until or math.inf,
            swarm.wanted,
        )
        self.limits = Limits(
            swarm.critical_steps,
            swarm.sub_steps,
            swarm.context,
            swarm.sub_context,
            assignments=swarm.records + 2,  # some more than a task needs
        )
        self.chat = KimiChat(self.sub_agent.tokenizer, declare_tools=False)
        self._sub_sampler = self._sampler(self.sub_agent.model)

    def run(self, trained: Any, seeds: Sequence[int]) -> list[SwarmEpisode]:
        """Run the tasks of seeds with a trained model as the orchestrator."""
        return run_swarms(
            *(self.tasks.task, tools, list(seeds)),
            orchestrator=self._sampler(trained),
            sub_agent=self._sub_sampler,
            chat=self.chat,
            limits=self.limits,
        )

    def _sampler(self, trained: Any) -> Generate:
        return Sampler.of_chat(
            trained,
            self.sub_agent.tokenizer,
            temperature=self.temperature,
            max_tokens=self.settings.reply_tokens,
        )

    def rollout(self, prompts: Sequence[Any], trainer: Any) -> dict[str, Any]:
        """The ``rollout_func`` of TRL: one orchestrator for each prompt."""
        episodes = self.run(trainer.model, [prompt[-1]["seed"] for prompt in prompts])
        progress = trainer.state.global_step / trainer.state.max_steps
        rewards = [self.parl.reward(e.episode.reward, e.stages, progress) for e in episodes]
        # TRL's own takes an episode whose last observation did not fit for a complete one.
        ends = [self.sub_agent.tokenizer.im_end]
        cut_off = sum(e.episode.is_cut_off(ends) for e in episodes) / len(episodes)
        for name, value in {"cut_off": cut_off, **summary(episodes)}.items():
            trainer.record(name, torch.tensor(value, device=trainer.accelerator.device))
        rollout = for_trl([e.episode.trajectory for e in episodes])
        # The trainer computes the log-probabilities: those of the sampler differ by rounding, from
        # which Muon makes a whole step if no group of a batch has different rewards.
        return {**rollout, "logprobs": None, "swarm_reward": rewards}


def look_ups(swarm: SwarmConfig) -> LookUps:
    """The tasks of a configuration.

    Raises:
        PretrainError: there are too few names for their records.
    """
    try:
        return LookUps(swarm.records, swarm.depth, swarm.deep, swarm.deep_share)
    except ValueError as error:
        raise PretrainError(str(error)) from error


def summary(episodes: Sequence[SwarmEpisode]) -> dict[str, float]:
    """Means over episodes, by name; a mean over no episode is left out."""
    wide = [e for e in episodes if len(e.task.truth) > 1]
    deep = [e for e in episodes if len(e.task.truth) == 1]
    alone, assigning = [e for e in wide if not e.assigned], [e for e in wide if e.assigned]
    values: dict[str, Sequence[float]] = {
        "performance": [e.episode.reward for e in episodes],
        "wide_performance": [e.episode.reward for e in wide],
        "deep_performance": [e.episode.reward for e in deep],
        "critical_steps": [critical_steps(e.stages) for e in wide],
        "parallelism": [parallelism(e.stages) for e in wide],
        "wide_sub_agents": [e.assigned for e in wide],
        "deep_sub_agents": [e.assigned for e in deep],
        "alone_performance": [e.episode.reward for e in alone],
        "assigning_performance": [e.episode.reward for e in assigning],
        "finished": [finish_reward(e.stages) for e in assigning],
    }
    return {name: sum(found) / len(found) for name, found in values.items() if found}


class SwarmRun(Run):
    """A run whose evaluations include the swarm's held-out tasks."""

    swarm: Swarm

    def evaluate(self, step: int) -> dict[str, Any]:
        record = super().evaluate(step)
        count = self.config.swarm.evaluation_tasks
        if count == 0:
            return record
        seeds = range(_HELD_OUT_SEEDS, _HELD_OUT_SEEDS + count)
        with torch.random.fork_rng():
            torch.manual_seed(0)  # every evaluation samples alike, and leaves the training's state
            found = summary(self.swarm.run(self.exported.model, seeds))
        held_out = {f"held_out_{name}": value for name, value in found.items()}
        self.write({"step": step, **held_out})
        self.say(", ".join(f"{name} {value:.3f}" for name, value in found.items()))
        return {**record, **held_out}


def train(config: Config) -> Path:
    """Train a model, or resume its training.

    Returns:
        The folder of the trained model.

    Raises:
        PretrainError: the model, the data or a setting is unusable.
    """
    config.require_fit("swarm")
    with locked(config, "swarm") as (lock, termination):
        _require_context(config.swarm)
        # The text of the pretraining has the tokens of the pretraining.
        data = open_pretraining_data(config.pretraining, Path(config.model))
        begun = _start(config, data)
        exported, frozen = model.load(begun), model.load(begun)
        frozen.model.requires_grad_(False)
        # By which TRL recognizes replies that are complete.
        exported.model.generation_config.eos_token_id = [exported.tokenizer.im_end]
        run = SwarmRun("swarm", config, exported, data, lock, termination)
        run.swarm = Swarm(config.swarm, config.rl.temperature, frozen)
        trainer = RlTrainer(
            rl=config.rl,
            optimizer_options=config.optimizer,
            model=exported.model,
            processing_class=exported.processor,
            reward_funcs=[_swarm_reward],
            args=arguments(config, run.checkpoints),
            train_dataset=_prompts(run.swarm.tasks, config.seed),
            rollout_func=run.swarm.rollout,
        )
        return run.train(trainer)


def _start(config: Config, data: Data) -> Path:
    """The folder of the model with which training starts; it is trained unless it exists."""
    out = Path(config.run_dir) / _START
    if config.swarm.start_steps == 0:
        out = Path(config.model)
    elif not out.is_dir():
        swarm = config.swarm
        demonstrations = Demonstrations(
            look_ups(swarm),
            swarm.parallel_share,
            swarm.assign_more,
            swarm.answer_share,
            swarm.sub_steps,
            swarm.sub_agent_share,
        )
        start.train(config, model.load(Path(config.model)), demonstrations, data, out)
    exported = model.load(out)
    missing = [name for name in TOKENS if exported.tokenizer.id_of(name) is None]
    if missing:
        raise PretrainError(
            f"{out} lacks tokens of tool calls ({', '.join(missing)}): set swarm.start_steps, for "
            "a supervised start that adds them"
        )
    for name in ("context", "sub_context"):
        if getattr(config.swarm, name) > exported.max_length:
            raise PretrainError(
                f"swarm.{name}={getattr(config.swarm, name)} exceeds the {exported.max_length} "
                f"tokens that {out} reads: lower it"
            )
    return out


def _require_context(swarm: SwarmConfig) -> None:
    """
    Raises:
        PretrainError: a prompt may not fit into the context.
    """
    for name in ("context", "sub_context"):
        if getattr(swarm, name) <= 2 * swarm.records + 32:
            raise PretrainError(
                f"swarm.{name}={getattr(swarm, name)}: too short for the prompt of "
                f"swarm.records={swarm.records} records and a reply"
            )


def _prompts(tasks: LookUps, seed: int) -> Dataset:
    seeds = range(_TRAINING_SEEDS * (1 + seed), _TRAINING_SEEDS * (1 + seed) + _TASKS)
    rows = [[{"role": "user", "content": tasks.task(s).question, "seed": s}] for s in seeds]
    return Dataset.from_dict({"prompt": rows})


def _swarm_reward(swarm_reward: Sequence[float], **_: Any) -> list[float]:
    """The reward of each episode, which the rollout computed."""
    return list(swarm_reward)
