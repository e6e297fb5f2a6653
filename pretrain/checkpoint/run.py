"""Contents of a run's checkpoints, and resuming from them."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from pretrain.build import Run
from pretrain.checkpoint import storage
from pretrain.checkpoint.imported import ImportedSettings
from pretrain.checkpoint.storage import Checkpoint
from pretrain.config import Config, from_dict, to_dict
from pretrain.data.tokenizer import Tokenizer
from pretrain.errors import PretrainError
from pretrain.parallel import raise_on_all_ranks
from pretrain.runtime.faults import Guard, RollBack

# What the model and its data are. All else (where, how fast, for how long) may change on the way.
_MODEL = ("language", "vision")
_FIXED = ("seed", "global_batch_size", "precision", *_MODEL, "data")
_FREE_OF_DATA = ("cache_dir", "max_corrupt")
# Of a model whose weights alone are taken up: how it learns, and what its positions are.
_FREE_OF_WEIGHTS = ("init_std", "expert_bias_update_rate", "rope_base", "rope_scaling")


def folder(run: Run) -> Path:
    return Path(run.config.run_dir) / "checkpoints"


class SavedRun(NamedTuple):
    """A run's checkpoint, and the configuration that it was made with."""

    checkpoint: Checkpoint
    config: Config


def find(run_dir: Path, step: int | None = None) -> SavedRun:
    """Open and verify a checkpoint of a run, in a single process.

    Args:
        step: default: the newest checkpoint.

    Raises:
        PretrainError: there is no such checkpoint, or it is damaged.
    """
    if not run_dir.is_dir():
        raise PretrainError(f"{run_dir} is not a folder: give the run_dir of a run")
    steps = storage.steps(run_dir / "checkpoints")
    if not steps:
        raise PretrainError(f"{run_dir} has no checkpoint: train first, or give a run's run_dir")
    if step is not None and step not in steps:
        raise PretrainError(
            f"{run_dir} has no checkpoint of step {step}: it has {', '.join(map(str, steps))}"
        )
    path = storage.path_of(run_dir / "checkpoints", steps[-1] if step is None else step)
    checkpoint = Checkpoint.open(path)
    checkpoint.verify()
    return SavedRun(checkpoint, _config_of(checkpoint))


def _config_of(checkpoint: Checkpoint) -> Config:
    """The configuration that a checkpoint was made with.

    Raises:
        PretrainError: there is none in the manifest, or it is invalid.
    """
    values = checkpoint.facts.get("config")
    if not isinstance(values, dict):
        raise PretrainError(
            f"the checkpoint {checkpoint.path} has no configuration in its manifest.json"
        )
    return from_dict(values)


def tokenizer_file(run_dir: Path) -> Path:
    """The tokenizer that a run's model was trained with.

    Raises:
        PretrainError: the run has none.
    """
    path = run_dir / "tokenizer.json"
    if not path.is_file():
        raise PretrainError(
            f"{run_dir} has no tokenizer.json: start its training once more, which writes it"
        )
    return path


def keep_tokenizer(run: Run) -> None:
    """Keep the tokenizer next to the checkpoints, to use the model without the data.

    A run that starts from an imported one also keeps what ``export`` writes again of that import:
    the chat template, for example.

    Raises:
        PretrainError: the run was started with another tokenizer, whose ids the model knows.
    """
    failure: Exception | None = None
    if run.context.is_main:
        try:
            run_dir, other = Path(run.config.run_dir), run.config.start_from
            write_tokenizer(run.data.tokenizer, run_dir)
            if other is not None and not storage.steps(folder(run)):
                imported = ImportedSettings.read(Path(other))
                if imported != ImportedSettings():
                    imported.write(run_dir)
        except PretrainError as error:
            failure = error
    raise_on_all_ranks(failure)


def write_tokenizer(tokenizer: Tokenizer, run_dir: Path) -> None:
    """Write the run's tokenizer.json, where there is none yet; for one process.

    Raises:
        PretrainError: there is another one, or the disk refused.
    """
    path = run_dir / "tokenizer.json"
    now = path.with_suffix(".partial")
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        tokenizer.save(now)
        if not path.exists():
            now.rename(path)
        elif Tokenizer.load(path).digest != tokenizer.digest:
            raise PretrainError(
                f"{path} is another tokenizer than the data's: train with the data that the run "
                "was begun with, or choose another run_dir"
            )
        now.unlink(missing_ok=True)
    except OSError as error:
        raise PretrainError(f"cannot write {path}: {error}") from error


def _tensors(run: Run, states: Mapping[Tensor, Mapping[str, Tensor]]) -> storage.Tensors:
    """Model and optimizer state by name in the whole model, with what this rank has of each."""
    found: dict[str, Tensor | storage.LocalShard] = {}
    for name, tensor in run.named_tensors.items():
        kept = {f"model.{name}": tensor.detach()}
        kept |= {f"optimizer.{name}.{key}": value for key, value in states.get(tensor, {}).items()}
        for key, value in kept.items():
            # A step count is no part of anything; momentum and moments are cut as the parameter is.
            found[key] = _part(run, name, value) if value.shape == tensor.shape else value
    return found


def _part(run: Run, name: str, value: Tensor) -> Tensor | storage.LocalShard:
    """A value of a parameter's local shape, with its place in the whole parameter's."""
    shard = run.shards.get(name)
    if shard is None:
        return value
    return storage.LocalShard(shard.whole_shape(value.shape), shard.blocks(value))


def saver(run: Run) -> storage.Saver:
    """The writer of the run's checkpoints; created by all ranks together, closed by each."""
    options = run.config.checkpoint
    return storage.Saver(folder(run), options.keep, options.asynchronous)


def _data_states(run: Run, step: int) -> list[dict[str, Any]]:
    """Where every data-parallel rank's reading stands; one for all where they are the same."""
    every: list[Any] = [None] * run.context.world_size
    dist.all_gather_object(every, (run.context.data_rank, run.data.state_dict(step)))
    by_rank = [dict(every)[rank] for rank in range(run.context.data_size)]
    return by_rank if any(state != by_rank[0] for state in by_rank) else by_rank[:1]


def save(run: Run, saver: storage.Saver, guard: Guard, step: int) -> None:
    """Write a checkpoint after update ``step``, or begin to.

    Raises:
        PretrainError: it, or the one before it, could not be written.
    """
    facts = {
        "config": to_dict(run.config),
        "data": _data_states(run, step + guard.skipped_batches),
        "faults": guard.state_dict(),
        # Groups count alike: each step is one of all.
        "updates": run.optimizer.param_groups[0]["updates"],
    }
    saver.save(step, _tensors(run, run.optimizer.state), facts)


def roll_back(run: Run, saver: storage.Saver, guard: Guard, step: int, why: RollBack) -> int:
    """Take up the newest checkpoint, but for the data's place: the data goes on after ``step``'s.

    Returns:
        The checkpoint's step.

    Raises:
        PretrainError: there is none, or the run went back to it too often.
    """
    saver.wait()
    if not storage.steps(folder(run)):
        raise PretrainError(
            f"step {step} is to be rolled back ({why}), and there is no checkpoint yet: start "
            "anew with a smaller checkpoint.every, or lower optimizer.lr"
        )
    to, facts = _restore_together(run)
    guard.roll_back(step, to, facts.get("faults", {}))
    return to


def restore(run: Run, guard: Guard | None = None) -> int:
    """Take up the run's newest checkpoint, or else the weights that it is to begin with.

    Without either, the step is 0 and nothing has changed.

    Schedule and initial weights are functions of the seed and the step, so the weights, the
    optimizer's state, the step, the data's place and what faults led to are all there is to
    restore.

    Args:
        guard: takes up what the checkpoint knows of faults; default: nobody asks.

    Raises:
        PretrainError: the checkpoint is damaged, or of another run or model.
    """
    step, facts = _restore_together(run)
    if guard is not None:
        guard.load_state_dict(facts.get("faults", {}))
    failure: Exception | None = None
    try:
        if facts.get("data"):
            run.data.load_state_dict(facts["data"])
    except Exception as error:
        failure = error
    raise_on_all_ranks(failure)
    return step


def _restore_together(run: Run) -> tuple[int, dict[str, Any]]:
    """:func:`_restore` on all ranks, or an error on all."""
    failure: Exception | None = None
    step, facts = 0, dict[str, Any]()
    try:
        step, facts = _restore(run)
    except Exception as error:
        failure = error
    raise_on_all_ranks(failure)
    return step, facts


def _restore(run: Run) -> tuple[int, dict[str, Any]]:
    """The newest checkpoint's tensors in their places; its step, and its facts."""
    steps = storage.steps(folder(run))
    if not steps:
        if run.config.start_from is not None:
            _begin_with(run, Path(run.config.start_from))
        return 0, {}
    checkpoint = Checkpoint.open(storage.path_of(folder(run), steps[-1]))
    checkpoint.verify(run.context.rank, run.context.world_size)
    weights_only = checkpoint.facts.get("weights_only", False)
    _check_same_run(
        f"the checkpoint {checkpoint.path} was made with",
        _config_of(checkpoint),
        run.config,
        _MODEL if weights_only else _FIXED,
        _FREE_OF_WEIGHTS if weights_only else (),
        "set it back to continue, or choose another run_dir to start a new run",
    )
    if weights_only:
        _take_weights(run, checkpoint)
        return checkpoint.step, checkpoint.facts
    states: dict[Tensor, dict[str, Tensor]] = {}
    for name, parameter in run.parameters():
        prefix = f"optimizer.{name}."
        states[parameter] = {
            key.removeprefix(prefix): torch.empty(
                parameter.shape if stored.shape else (),
                dtype=stored.dtype,
                device=_device(key, parameter),
            )
            for key, stored in checkpoint.tensors.items()
            if key.startswith(prefix)
        }
    checkpoint.load(_tensors(run, states))
    for trained, kept in states.items():
        if kept:
            run.optimizer.state[trained] = kept
        else:  # it has had no gradient yet
            run.optimizer.state.pop(trained, None)
    for group in run.optimizer.param_groups:
        group["updates"] = checkpoint.facts["updates"]
    for _, parameter in run.parameters():
        if "master" in states[parameter]:  # QK-Clip scales it too
            setattr(parameter, "main_param", states[parameter]["master"])  # noqa: B010 (for mypy)
    return checkpoint.step, checkpoint.facts


def _begin_with(run: Run, other: Path) -> None:
    """Take up the weights of another run's newest checkpoint, and nothing else."""
    saved = find(other)
    if Tokenizer.load(tokenizer_file(other)).digest != run.data.tokenizer.digest:
        raise PretrainError(
            f"the data's tokenizer is not {other / 'tokenizer.json'}, whose ids the model of "
            "start_from knows: leave data.tokenizer out, or choose another run_dir"
        )
    _check_same_run(
        f"the model of start_from={other} has",
        saved.config,
        run.config,
        _MODEL,
        _FREE_OF_WEIGHTS,
        "set it to that, or start from another run",
    )
    _take_weights(run, saved.checkpoint)


def _take_weights(run: Run, checkpoint: Checkpoint) -> None:
    """A checkpoint's weights in their places, without what an optimizer knows.

    Those of a run of lower precision are its masters; a run of lower precision has them as masters.
    """
    stored = checkpoint.tensors
    tensors: dict[str, Tensor | storage.LocalShard] = {}
    masters: dict[Tensor, Tensor] = {}
    for name, tensor in run.named_tensors.items():
        key = f"optimizer.{name}.master"
        if key not in stored:
            key = f"model.{name}"
        value = tensor.detach()
        if key in stored and stored[key].dtype == torch.float32 != tensor.dtype:
            value = masters[tensor] = torch.empty_like(value, dtype=torch.float32)
        tensors[key] = _part(run, name, value)
        run.optimizer.state.pop(tensor, None)
    checkpoint.load(tensors)
    for parameter, master in masters.items():
        parameter.detach().copy_(master)
        run.optimizer.state[parameter] = {"master": master}
        setattr(parameter, "main_param", master)  # noqa: B010 (for mypy)


def _device(key: str, parameter: Tensor) -> torch.device:
    # The optimizer moves a step count to where it reads it.
    return torch.device("cpu") if key.endswith(".step") else parameter.device


def _check_same_run(
    origin: str,
    before: Config,
    now: Config,
    sections: Sequence[str],
    ignored: Sequence[str],
    remedy: str,
) -> None:
    """Compare those settings of two configurations that determine the model and its data.

    Args:
        origin: beginning of the message, such as "the checkpoint X was made with".
        sections: the settings and sections to compare.
        ignored: names of settings within them that may differ.

    Raises:
        PretrainError: names the first setting that differs, and the remedy.
    """
    old, new = (dict(_settings(config, sections, ignored)) for config in (before, now))
    for key in new:
        if old[key] != new[key]:
            raise PretrainError(f"{origin} {key}={old[key]}, not {new[key]}: {remedy}")


def _settings(
    config: Config, sections: Sequence[str], ignored: Sequence[str]
) -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of the settings that :func:`_check_same_run` compares.

    The files of data may have moved: whether they are the same is checked when the position in
    them is restored.
    """
    values = to_dict(config)
    for source in values["data"]["sources"]:
        del source["path"]
    for section in sections:
        if not isinstance(values[section], dict):
            yield section, values[section]
            continue
        for name, value in values[section].items():
            if name not in (*ignored, *_FREE_OF_DATA):
                yield f"{section}.{name}", value
