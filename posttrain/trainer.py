"""TRL's trainer with this project's objective and optimizer."""

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Trainer
from transformers.utils import SAFE_WEIGHTS_NAME
from trl import GRPOConfig, GRPOTrainer

import muonclip
from muonclip import MuonClip
from posttrain import model as model_files
from posttrain import objective
from posttrain.config import Config, OptimizerConfig, RlConfig
from posttrain.environment.episode import Episode
from posttrain.modes import Mode
from posttrain.prompts import PromptSampler
from posttrain.sampling import finite_logits
from pretrain.errors import PretrainError, one_line

_FORWARDED = (
    *("pixel_values", "image_grid_thw", "num_images", "pixel_attention_mask", "spatial_shapes"),
    *("num_tiles", "image_sizes", "token_type_ids", "mm_token_type_ids", "image_position_ids"),
)


def make_optimizer(model: nn.Module, options: OptimizerConfig) -> torch.optim.Optimizer:
    """MuonClip with QK-Clip, or AdamW, of all parameters of a model that are not frozen."""
    if options.name == "adamw":
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return torch.optim.AdamW(
            trained, lr=options.lr, weight_decay=options.weight_decay, betas=(0.9, 0.95)
        )
    return muonclip.for_model(
        model,
        lr=options.lr,
        weight_decay=options.weight_decay,
        qk_clip_threshold=options.qk_clip_threshold,
        report=None,
    )


def require_finite(norm: Tensor | float, where: str, setting: str) -> None:
    """
    Args:
        norm: of the gradient.
        setting: the learning rate's.

    Raises:
        PretrainError: the norm is not finite.
    """
    if not math.isfinite(norm):
        raise PretrainError(
            f"the gradient of {where} is not finite: start again with a lower {setting}, in "
            "another run_dir"
        )


def schedule_name(options: OptimizerConfig) -> str:
    """The name of the learning rate's schedule in transformers."""
    return {"constant": "constant_with_warmup"}.get(options.schedule, options.schedule)


def freeze(model: nn.Module, patterns: Sequence[str], setting: str = "optimizer.frozen") -> None:
    """Freeze the parameters whose names match one of the patterns (``fnmatch``).

    Raises:
        PretrainError: a pattern matches no parameter, or nothing is left to train.
    """
    for pattern in patterns:
        matching = [p for name, p in model.named_parameters() if fnmatchcase(name, pattern)]
        if not matching:
            raise PretrainError(f"{setting}: no parameter matches {pattern!r}")
        for parameter in matching:
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise PretrainError(f"{setting} leaves no parameter to train: remove a pattern")


def common_arguments(config: Config, checkpoints: Path) -> dict[str, Any]:
    """Arguments of transformers' trainer that all commands have.

    Args:
        checkpoints: folder of the checkpoints.
    """
    optimizer, gpu = config.optimizer, torch.cuda.is_available()
    return {
        "output_dir": str(checkpoints),
        "max_steps": config.steps,
        "seed": config.seed,
        "learning_rate": optimizer.lr,
        "lr_scheduler_type": schedule_name(optimizer),
        "warmup_steps": optimizer.warmup_steps,
        "max_grad_norm": optimizer.clip_grad_norm,
        "logging_steps": 1,
        "save_steps": config.save_every,
        "save_total_limit": 2,
        "report_to": "none",
        "disable_tqdm": True,
        "activation_checkpointing": False,
        "bf16": False,
        "use_cpu": not gpu,
        "dataloader_pin_memory": gpu,
    }


def arguments(config: Config, checkpoints: Path) -> GRPOConfig:
    """Arguments of TRL's trainer."""
    rl = config.rl
    return GRPOConfig(
        **common_arguments(config, checkpoints),
        per_device_train_batch_size=rl.prompts * rl.group_size // rl.updates,
        steps_per_generation=rl.updates,
        gradient_accumulation_steps=1,
        num_generations=rl.group_size,
        max_completion_length=max(task.max_tokens for task in rl.tasks.values()),
        temperature=rl.temperature,
        loss_type="dapo",
        scale_rewards="none",
        beta=0.0,
        # The ratio to another engine's log-probabilities is a part of the objective.
        vllm_importance_sampling_correction=False,
    )


class OwnTrainer(Trainer):  # type: ignore[misc]
    """``Trainer`` with this project's optimizer, and checkpoints from which it resumes exactly.

    transformers renames some weights of Kimi-K2.5 when it saves them, and does not load those from
    a checkpoint: here their names stay.

    Attributes:
        optimizer_options: the optimizer.
        steps_per_rollout: a checkpoint is only possible after a multiple of these steps.
    """

    optimizer_options: OptimizerConfig
    steps_per_rollout = 1

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            self.optimizer: Any = make_optimizer(model or self.model, self.optimizer_options)
        return self.optimizer

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if self.is_fsdp_enabled:
            super()._save(output_dir, state_dict)
        elif self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            where = f"after step {self.state.global_step}"
            remedy = "start again with a lower optimizer.lr, in another run_dir"
            model_files.require_finite_weights(self.model, where, remedy)
            # Clones: transformers makes some weights views of fused ones, or ties them.
            weights = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
            save_file(weights, folder / SAFE_WEIGHTS_NAME)

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        norm = super()._clip_grad_norm(model)
        require_finite(norm, f"step {self.state.global_step + 1}", "optimizer.lr")
        return norm

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        with model_files.writing(f"the checkpoint of step {self.state.global_step}"):
            super()._save_checkpoint(model, trial)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        with _readable(resume_from_checkpoint):
            if self.is_fsdp_enabled:
                super()._load_from_checkpoint(resume_from_checkpoint, model)
            else:
                weights = load_file(Path(resume_from_checkpoint) / SAFE_WEIGHTS_NAME)
                self.model.load_state_dict(weights)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with _readable(checkpoint):
            # If one of them is missing, transformers starts with new ones.
            if checkpoint is not None and not self.is_fsdp_enabled:
                _require_files(checkpoint, "optimizer.pt", "scheduler.pt")
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with _readable(checkpoint):
            if checkpoint is not None:
                rank = f"_{self.args.process_index}" if self.args.world_size > 1 else ""
                _require_files(checkpoint, f"rng_state{rank}.pth")
            super()._load_rng_state(checkpoint)


@contextmanager
def _readable(checkpoint: str | None) -> Iterator[None]:
    """Context in which a checkpoint is read.

    Raises:
        PretrainError: it is damaged, or cannot be read now.
    """
    try:
        yield
    except (PretrainError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # safetensors, torch and pickle raise any
        reason = f"{checkpoint} cannot be read: {one_line(str(error))[:200]}"
        if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
            raise PretrainError(reason) from error
        raise PretrainError(
            f"{reason}; if it is damaged, remove it: the run resumes from an earlier one, if any"
        ) from error


def _require_files(checkpoint: str, *names: str) -> None:
    for name in names:
        if not Path(checkpoint, name).is_file():
            raise FileNotFoundError(f"{name} is missing")


class Asked(NamedTuple):
    """The way in which responses to the prompts of a task are generated.

    Attributes:
        mode: chat template, and the tokens that end a response.
        max_tokens: limit of a response.
        play: for an agentic task, runs an episode for each of the given numbers of its problems
            with a model; None: one reply answers a prompt.
    """

    mode: Mode
    max_tokens: int
    play: Callable[[Any, Sequence[int]], list[Episode]] | None = None


class _Response(NamedTuple):
    """A response as TRL's trainer needs it.

    Attributes:
        prompt_ids, completion_ids: [prompt], [n].
        mask: 1 for tokens of the model, 0 for observations, [n].
        text: a conversation, for TRL's logs.
        logprobs: as another engine recorded them, [n]; None: to be computed.
        episode_reward: of an agentic task; None: of its answer.
        cut_off: whether the limit of tokens ended it.
    """

    prompt_ids: list[int]
    completion_ids: list[int]
    mask: list[int]
    text: Any
    logprobs: list[float] | None
    episode_reward: float | None
    cut_off: bool


def _responses(generated: tuple[Any, ...], ends: Collection[int]) -> list[_Response]:
    """The responses that TRL's method returned; ``ends`` are the tokens that end one."""
    prompt_ids, completion_ids, _, texts, logprobs, *_ = generated
    return [
        _Response(
            *(prompt, tokens, [1] * len(tokens), text),
            logprobs=recorded,
            episode_reward=None,
            cut_off=tokens[-1] not in ends,
        )
        for prompt, tokens, text, recorded in zip(
            prompt_ids, completion_ids, texts, logprobs or [None] * len(texts), strict=True
        )
    ]


def _of_episode(episode: Episode, ends: Collection[int]) -> _Response:
    played = episode.trajectory
    text = [{"role": "assistant", "content": episode.answer or ""}]
    # The trainer computes the log-probabilities of all tasks, as those of one reply.
    return _Response(
        *(played.prompt, played.completion, played.mask, text),
        logprobs=None,
        episode_reward=episode.reward,
        cut_off=episode.is_cut_off(ends),
    )


class RlTrainer(OwnTrainer, GRPOTrainer):  # type: ignore[misc]
    """``GRPOTrainer`` with the objective of :mod:`posttrain.objective`.

    Rollouts, rewards, their groups and checkpoints are TRL's. The log-probabilities of the rollout
    are those that another engine recorded, if it did, or those of the policy at the time.

    Args:
        rl: constants of the objective.
        optimizer_options: the optimizer.
        asked: for each name in the column ``task`` of the dataset, the way to generate responses;
            empty: all as TRL does.
        prompts: the rows of each batch; None: all rows in a random order.
        arguments: of ``GRPOTrainer``.
    """

    def __init__(
        self,
        *,
        rl: RlConfig,
        optimizer_options: OptimizerConfig,
        asked: Mapping[str, Asked] | None = None,
        prompts: PromptSampler | None = None,
        **arguments: Any,
    ) -> None:
        self._rl, self.optimizer_options = rl, optimizer_options
        self._asked, self._prompts = asked or {}, prompts
        self._rows: list[dict[str, Any]] = []  # of the prompts of a batch
        self.steps_per_rollout = rl.updates  # a checkpoint between them would lose the rollouts
        freeze(arguments["model"], optimizer_options.frozen)
        super().__init__(**arguments)

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        return super()._get_train_sampler(dataset) if self._prompts is None else self._prompts

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        self._rows = inputs
        scored: dict[str, Any] = super()._generate_and_score_completions(inputs)
        groups = scored["advantages"].view(-1, self._rl.group_size)
        self.record("reward_spread", groups.std(1).mean())  # TRL's is that of the whole batch
        return scored

    def _generate(self, prompts: list[Any]) -> tuple[Any, ...]:
        """Generate the responses of each task in its mode; returns what TRL's method returns."""
        if not self._asked:
            return super()._generate(prompts)  # type: ignore[no-any-return]
        found: list[Any] = [None] * len(prompts)
        for name in dict.fromkeys(row["task"] for row in self._rows):
            places = [place for place, row in enumerate(self._rows) if row["task"] == name]
            asked = self._asked[name]
            if asked.play is None:
                self._ask(asked)
                with finite_logits(self.model):
                    generated = super()._generate([prompts[place] for place in places])
                responses = _responses(generated, asked.mode.ends)
            else:
                numbers = [self._rows[place]["number"] for place in places]
                episodes = asked.play(self.model, numbers)
                responses = [_of_episode(episode, asked.mode.ends) for episode in episodes]
            for place, response in zip(places, responses, strict=True):
                found[place] = response
        columns = map(list, zip(*found, strict=True))
        prompt_ids, completion_ids, masks, texts, logprobs, rewards, cut_off = columns
        recorded = None if None in logprobs else logprobs
        extra = {"episode_reward": rewards, "cut_off": cut_off}
        return prompt_ids, completion_ids, masks, texts, recorded, extra, None, []

    def _ask(self, asked: Asked) -> None:
        """Let TRL generate in the mode of a task."""
        self.chat_template, self.chat_template_kwargs = asked.mode.template, asked.mode.options
        self.eos_token_ids = asked.mode.ends
        if not self.use_vllm:  # there, the largest limit applies to all tasks
            self.generation_config.eos_token_id = asked.mode.ends
            self.generation_config.max_new_tokens = asked.max_tokens

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if (bound := self.logit_bound()) is not None:
            logs["logit_bound"] = bound
        super().log(logs, start_time)

    def _compute_loss(self, model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
        completion, mask = inputs["completion_ids"], inputs["completion_mask"]
        logprobs, entropies, _ = self._get_per_token_logps_and_entropies(
            model,
            torch.cat([inputs["prompt_ids"], completion], 1),
            torch.cat([inputs["prompt_mask"], mask], 1),
            completion.shape[1],
            compute_entropy=True,
            **{name: inputs.get(name) for name in _FORWARDED},
        )
        mask = mask * inputs.get("tool_mask", 1)
        rollout = inputs.get("sampling_per_token_logps", inputs.get("old_per_token_logps"))
        rollout = logprobs.detach() if rollout is None else rollout
        limits = {"ratio_low": self._rl.ratio_low, "ratio_high": self._rl.ratio_high}
        terms = objective.token_objective(
            logprobs,
            rollout,
            inputs["advantages"],
            log_ratio_penalty=self._rl.log_ratio_penalty,
            **limits,
        )
        self.record("entropy", objective.mean_over_tokens(entropies, mask))
        outside = objective.share_out_of_range(logprobs, rollout, mask, **limits)
        self.record("out_of_range", outside)
        # Summed over micro-batches and averaged over ranks, the mean over all tokens of the batch.
        parts = self.args.steps_per_generation / self.current_gradient_accumulation_steps
        tokens = inputs["num_items_in_batch"] / parts / self.accelerator.num_processes
        return -objective.mean_over_tokens(terms, mask, tokens)

    def record(self, name: str, value: Tensor) -> None:
        """Record a metric of this step: its mean over ranks."""
        mode = "train" if self.model.training else "eval"
        self._metrics[mode][name].append(self.accelerator.gather(value).mean().item())

    def logit_bound(self) -> float | None:
        """The largest attention logit of the last step before QK-Clip, or an upper bound below the
        threshold, where no logit was computed; None with AdamW."""
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        if not isinstance(optimizer, MuonClip) or optimizer.qk_clip is None:
            return None
        result = optimizer.qk_clip.result
        if result is None:
            return None
        return max(float(bounds.max()) for bounds in result.upper_bounds.values())
