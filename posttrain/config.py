"""The settings of a post-training run, with their meaning, defaults and allowed values."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from pretrain.config.rules import In, Settings, require
from pretrain.config.schema import PathName, Positive, Share, Size, SizeOrZero, Steps, StepsOrZero
from pretrain.errors import PretrainError


@dataclass(frozen=True)
class OptimizerConfig(Settings):
    """The optimizer and its schedule."""

    name: Literal["muonclip", "adamw"] = "muonclip"
    """muonclip: Muon for matrices, AdamW for everything else, and QK-Clip. adamw: AdamW alone."""
    lr: Positive = 3e-4
    """Learning rate. Reinforcement learning needs a tenth to a hundredth of pretraining's."""
    weight_decay: Annotated[float, In("[0, 1000]")] = 0.0
    qk_clip_threshold: Positive = 100.0
    """QK-Clip's tau: the limit of each head's max logit."""
    clip_grad_norm: Positive = 1.0
    frozen: tuple[str, ...] = ()
    """Patterns (fnmatch) of parameters that are not trained, by their names in transformers. With
    ["model.language_model.*", "lm_head.*"], visual RL leaves the model of text as it is."""
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """Learning rate after a linear warm-up: constant, or falling to 0 at the end of the run."""
    warmup_steps: StepsOrZero = 10

    def _check(self) -> None:
        if self.name == "adamw":
            self._refuse_without_effect("name=adamw", ["qk_clip_threshold"])


@dataclass(frozen=True)
class StartOptimizerConfig(OptimizerConfig):
    """The optimizer of a swarm's supervised start."""

    lr: Positive = 1e-2
    """Learning rate."""


@dataclass(frozen=True)
class SumsConfig(Settings):
    """Sums of several numbers, with a working: a task of reasoning that a small model learns."""

    min_operands: Annotated[int, In("[2, 64]")] = 2
    max_operands: Annotated[int, In("[2, 64]")] = 4
    largest: Annotated[int, In("[1, 1000000]")] = 9
    """Largest operand."""
    redundant_share: Share = 0.5
    """Share of the demonstrations whose working repeats each of its steps."""
    skipping_share: Share = 0.0
    """Share of the demonstrations whose working is one step with all numbers: short, but harder."""

    def _check(self) -> None:
        require(
            self.redundant_share + self.skipping_share <= 1,
            f"redundant_share={self.redundant_share} and skipping_share={self.skipping_share} must "
            "not exceed 1 in sum",
        )
        require(
            self.min_operands <= self.max_operands,
            f"max_operands={self.max_operands} must be >= min_operands={self.min_operands}",
        )


SHARES_OF_DEMONSTRATIONS = ("redundant_share", "skipping_share")
"""The settings of sums that only supervised finetuning has a use for."""


@dataclass(frozen=True)
class SftConfig(Settings):
    """Supervised finetuning on text alone, which teaches the modes of the chat template."""

    batch_size: Size = 32
    """Rows of a step: conversations, and documents of pretraining."""
    instant_share: Share = 0.25
    """Share of conversations whose reply begins without reasoning."""
    agent_share: Share = 0.25
    """Share of conversations with tool calls. The others have reasoning."""
    replay_share: Share = 0.5
    """Share of rows that are documents of pretraining, against forgetting."""

    def _check(self) -> None:
        require(
            self.instant_share + self.agent_share <= 1,
            f"agent_share={self.agent_share} and instant_share={self.instant_share} must not "
            "exceed 1 in sum",
        )


@dataclass(frozen=True)
class ToggleConfig(Settings):
    """Toggle: phases with and without a token budget (section 4.4.3).

    The report publishes none of these values: the defaults are this project's choice.
    """

    mode: Literal["off", "toggle", "permanent"] = "off"
    """permanent: the budget applies in every iteration, for comparison."""
    period: Size = 10
    """m: batches of rollouts of a phase."""
    accuracy: Share = 0.6
    """lambda: mean reward of a group from which its budget applies."""
    percentile: Annotated[float, In("[0, 100]")] = 50.0
    """rho: the budget is this percentile of the lengths of correct responses before training."""

    def _check(self) -> None:
        if self.mode == "off":
            self._refuse_without_effect("mode=off", ["period", "accuracy", "percentile"])


TASK_NAMES = (
    *("read", "sums"),
    *("look_up", "transcribe", "add", "sort", "reverse", "count_shapes", "follow"),
)
"""The tasks of reinforcement learning. read: images of the pretraining data, in the form of its
documents. The others are in the chat format, with reasoning: the sums of the section ``sums``, and
tasks of :mod:`posttrain.environment.abilities`."""


@dataclass(frozen=True)
class RlTaskConfig(Settings):
    """A task of reinforcement learning.

    The report publishes none of these values: the defaults are this project's choice.
    """

    share: Positive = 1.0
    """Share of the prompts of a batch, relative to the other tasks."""
    problems: Size = 2000
    """Problems that are drawn; equal ones count once. Of the task read: different images."""
    max_tokens: Size = 16
    """Limit of a response, in tokens; for the task follow, the results of its tool calls count."""
    images: tuple[str, ...] = ()
    """Changes of `pretraining` for the images of the task read. They are evaluated in addition to
    those of pretraining. With ["data.images.max_font_size=30"], letters are larger. Empty: no
    changes."""
    solved_share: Annotated[float, In("[0, 1)")] | None = 0.2
    """Share of the images of the task read that the model reads correctly at the start, by greedy
    decoding: there is little to learn from them. null: images as they come."""
    toggle: ToggleConfig = field(default_factory=ToggleConfig)


@dataclass(frozen=True)
class RlConfig(Settings):
    """Reinforcement learning: rollouts, and the objective of Kimi K2.5 (eq. 1, section 4.4.2).

    The report publishes none of these values: the defaults are this project's choice.
    """

    tasks: dict[str, RlTaskConfig] = field(default_factory=lambda: {"read": RlTaskConfig()})
    """The tasks that the policy is trained on together: read, sums, look_up, transcribe, add, sort,
    reverse, count_shapes or follow, each with its settings."""
    prompts: Size = 8
    """Prompts of a batch of rollouts."""
    group_size: Annotated[int, In("[2, 1048576]")] = 8
    """K: responses to each prompt."""
    updates: Size = 2
    """Steps of the optimizer for each batch of rollouts, each with its part of the responses. With
    1, every ratio is 1: then ratio_low, ratio_high and log_ratio_penalty have no effect."""
    temperature: Annotated[float, In("(0, 100]")] = 1.0
    ratio_low: Annotated[float, In("(0, 1)")] = 0.8
    """alpha: tokens whose probability has fallen below this multiple of the rollout's give no
    policy gradient."""
    ratio_high: Annotated[float, In("(1, 1000]")] = 1.25
    """beta: tokens whose probability has risen above this multiple give no policy gradient."""
    log_ratio_penalty: Annotated[float, In("[0, 1000]")] = 0.1
    """tau: weight of the squared log-ratio."""

    def _check(self) -> None:
        require(
            self.prompts * self.group_size % self.updates == 0,
            f"updates={self.updates} must divide prompts x group_size="
            f"{self.prompts * self.group_size}",
        )
        require(bool(self.tasks), "tasks must contain a task")
        for name, task in self.tasks.items():
            known = ", ".join(TASK_NAMES)
            require(name in TASK_NAMES, f"tasks.{name} is no task: the tasks are {known}")
            require(
                name != "follow" or task.toggle.mode == "off",
                "tasks.follow.toggle has no effect: budgets are of single replies",
            )
            if name != "read":
                task._refuse_without_effect(
                    f"the task {name}", ("images", "solved_share"), f"tasks.{name}."
                )


@dataclass(frozen=True)
class EvaluationConfig(Settings):
    """Evaluation of the model before and after training, and in between."""

    every: StepsOrZero = 0
    """Steps between evaluations; 0: only before and after training."""
    images: SizeOrZero = 200
    """Held-out images to transcribe by greedy decoding."""
    text_sequences: SizeOrZero = 64
    """Held-out sequences for the loss of text."""
    problems: SizeOrZero = 100
    """Held-out sums, for each mode of the chat format that the model knows, and problems of each
    other task of `rl.tasks`."""
    max_tokens: Size = 64
    """Limit of a reply to a sum, in tokens."""
    batch_size: Size = 50


@dataclass(frozen=True)
class SwarmConfig(Settings):
    """The agent swarm: its tasks, limits, supervised start and rewards (PARL).

    The report publishes none of these values: the defaults are this project's choice.
    """

    records: Size = 8
    """n: records of a wide task."""
    depth: Size = 1
    """h: calls for each record. An orchestrator without sub-agents needs n x h steps and one."""
    deep: Annotated[int, In("[2, 1048576]")] = 6
    """Most calls for the single record of a deep task, which has two or more of them; sub-agents
    are of no use there."""
    deep_share: Share = 0.3
    """Share of deep tasks."""
    critical_steps: Size = 10
    """Limit of the critical steps of an episode."""
    sub_steps: Size = 5
    """Limit of the replies of a sub-agent, too few for the deepest tasks."""
    context: Size = 320
    """Limit of an orchestrator's trajectory, in tokens."""
    sub_context: Size = 144
    """Limit of a sub-agent's trajectory, in tokens."""
    reply_tokens: Size = 96
    """Limit of a reply, in tokens."""
    parallel_weight: Annotated[float, In("[0, 1000]")] = 3.0
    """lambda1 at the start: weight of the reward of assigning tasks to sub-agents."""
    finish_weight: Annotated[float, In("[0, 1000]")] = 0.3
    """lambda2 at the start: weight of the share of sub-agents that answer."""
    anneal_until: Annotated[float, In("[0, 1]")] = 0.5
    """Share of the steps after which both weights are 0; 0: they stay constant."""
    wanted: Size = 8
    """Assigned tasks from which the first of these rewards is complete."""
    parallel_share: Share = 0.25
    """Share of the orchestrators' other demonstrations with sub-agents."""
    assign_more: Share = 0.75
    """Probability that such a demonstration assigns one more record; it leaves out the others. At
    the start, orchestrators with sub-agents thus find fewer records than those that work alone."""
    answer_share: Share = 0.4
    """Share of the orchestrators' demonstrations that assign all records and from which only the
    answer is learned: how results are combined, but not the decision to assign."""
    sub_agent_share: Share = 0.4
    """Share of the demonstrations of sub-agents."""
    start_steps: StepsOrZero = 500
    """Steps of the supervised start; 0: the model already has the tokens of the tools."""
    start_batch: Size = 16
    """Demonstrations of a step."""
    start_replay: SizeOrZero = 2
    """Documents of the pretraining's text in a step, against forgetting it."""
    start: StartOptimizerConfig = field(default_factory=StartOptimizerConfig)
    """Optimizer of the supervised start."""
    evaluation_tasks: SizeOrZero = 32
    """Held-out tasks of an evaluation."""

    def _check(self) -> None:
        if self.start_steps == 0:
            names = ["start_batch", "start_replay", "start", "parallel_share"]
            names += ["assign_more", "answer_share", "sub_agent_share"]
            self._refuse_without_effect("start_steps=0", names)


@dataclass(frozen=True)
class Config(Settings):
    """A post-training run: from an exported model to an exported model."""

    model: PathName = "runs/laptop/hf"
    """Folder of the exported model to start from: that of `python -m pretrain export`."""
    pretraining: PathName = "configs/laptop.yaml"
    """Configuration of the pretraining, which defines the data: images, text, and what of it is
    held out."""
    run_dir: PathName = "runs/posttrain"
    """Folder of the run; its `hf` is the trained model."""
    steps: Steps = 200
    """Steps of the optimizer."""
    seed: Annotated[int, In("[0, 2147483647]")] = 0
    log_every: Size = 10
    save_every: Size = 50
    """Steps between checkpoints, from which an interrupted run resumes."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    sums: SumsConfig = field(default_factory=SumsConfig)
    sft: SftConfig = field(default_factory=SftConfig)
    rl: RlConfig = field(default_factory=RlConfig)
    swarm: SwarmConfig = field(default_factory=SwarmConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    @property
    def changed_images(self) -> tuple[str, ...]:
        """Changes of ``pretraining`` for the images of the task read."""
        return self.rl.tasks["read"].images if "read" in self.rl.tasks else ()

    def require_fit(self, command: str) -> None:
        """
        Raises:
            PretrainError: settings of other commands are not at their defaults, or steps do not
                fit the batches of rollouts.
        """
        used = {"swarm": ("rl", "swarm")}.get(command, (command,))
        for name, section in (("sft", self.sft), ("rl", self.rl), ("swarm", self.swarm)):
            if name not in used and section != type(section)():
                raise PretrainError(
                    f"the section {name} has no effect in `posttrain {command}`: remove it"
                )
        if command != "sft":
            try:
                self.sums._refuse_without_effect(
                    f"`posttrain {command}`", SHARES_OF_DEMONSTRATIONS, "sums."
                )
            except ValueError as error:
                raise PretrainError(str(error)) from error
        if command == "swarm" and self.rl.tasks != RlConfig().tasks:
            raise PretrainError("rl.tasks has no effect in `posttrain swarm`: remove it")
        for name in ("steps", "save_every") if "rl" in used else ():
            if getattr(self, name) % self.rl.updates:
                raise PretrainError(
                    f"{name}={getattr(self, name)} must be a multiple of "
                    f"rl.updates={self.rl.updates}"
                )

    def _check(self) -> None:
        model, run_dir = Path(self.model).resolve(), Path(self.run_dir).resolve()
        require(
            run_dir not in (model, *model.parents),
            f"run_dir={self.run_dir} must differ from model, and must not contain it",
        )
