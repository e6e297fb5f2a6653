"""Contents of a run's checkpoints: saving a run, resuming it, and starting from another run."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from muonclip.distributed import ShardedState
from muonclip.variants import neuron_state
from pretrain.build import Run
from pretrain.checkpoint import storage
from pretrain.checkpoint.imported import ImportedSettings
from pretrain.checkpoint.local_tier import LocalTier
from pretrain.checkpoint.saver import Saver
from pretrain.checkpoint.storage import Checkpoint, Copy
from pretrain.config import Config, drop_without_effect, from_dict, merge, to_dict
from pretrain.data.sources import SOURCES
from pretrain.data.tokenizer import Tokenizer
from pretrain.errors import PretrainError
from pretrain.model.weights import Weight
from pretrain.parallel import call_on_all_ranks
from pretrain.runtime import atomic
from pretrain.runtime.faults import Guard, RollBack

# Settings that determine the model and its data, and may not change when a run is resumed.
_MODEL = ("language", "vision")
_FIXED = ("seed", "global_batch_size", "precision", *_MODEL, "data")
# Limits, and what decides only how fast the same data is read.
_FIXED_EXCEPT = (
    "data.cache_dir",
    "data.decode_workers",
    "data.max_corrupt",
    "data.max_untokenized_mb",
)
# Settings that may differ from the run in start_from: those of learning and of positions.
_MODEL_EXCEPT = (
    "language.init_std",
    "language.expert_bias_update_rate",
    "language.load_balancing_loss",
    "language.rope_base",
    "language.rope_scaling",
)


def find(run_dir: Path, step: int | None = None) -> tuple[Checkpoint, Config]:
    """Open and verify a checkpoint of a run, in a single process.

    Args:
        step: default: the newest checkpoint.

    Returns:
        The checkpoint, and the configuration that it was made with.

    Raises:
        PretrainError: there is no such checkpoint, or it is damaged.
    """
    checkpoint = _open(run_dir, step)
    checkpoint.verify()
    return checkpoint, from_dict(_config_values(checkpoint))


def newest_step(run_dir: Path) -> int:
    """The step of a run's newest checkpoint, in a single process.

    Raises:
        PretrainError: there is no checkpoint, or its manifest cannot be read.
    """
    return _open(run_dir).step


def _open(run_dir: Path, step: int | None = None) -> Checkpoint:
    """Open a checkpoint of a run, the newest one by default."""
    if not run_dir.is_dir():
        raise PretrainError(f"{run_dir} is not a folder: give the run_dir of a run")
    steps = storage.steps(run_dir / "checkpoints")
    if not steps:
        raise PretrainError(f"{run_dir} has no checkpoint: train first, or give a run's run_dir")
    if step is not None and step not in steps:
        raise PretrainError(
            f"{run_dir} has no checkpoint of step {step}: it has {', '.join(map(str, steps))}"
        )
    return _opened(run_dir / "checkpoints", steps[-1] if step is None else step)


def _opened(folder: Path, step: int) -> Checkpoint:
    """Open the checkpoint of a step, and check the parts of its manifest that this module reads.

    Raises:
        PretrainError: it is not a checkpoint, of another step, or a fact has another type.
    """
    checkpoint = Checkpoint.open(storage.path_of(folder, step))
    wrong = next((f"facts.{n}" for n, v in checkpoint.facts.items() if not _is_fact(n, v)), None)
    if checkpoint.step != step:
        wrong = f"step={checkpoint.step}"
    if wrong:
        raise PretrainError(
            f"{checkpoint.path} is damaged: its manifest.json has a wrong {wrong}: remove that "
            "folder to resume from the checkpoint before it, or start a new run_dir"
        )
    return checkpoint


def _is_fact(name: str, value: Any) -> bool:
    """Whether a fact has the type that :func:`save` writes."""
    if name == "updates":
        return _is_count(value)
    if name == "source_tokens":
        return isinstance(value, list) and all(map(_is_count, value))
    if name == "data":
        return isinstance(value, list) and all(isinstance(state, dict) for state in value)
    if name == "faults":
        return isinstance(value, dict) and all(
            isinstance(entry, list) and all(type(loss) in (int, float) for loss in entry)
            if key == "losses"
            else _is_count(entry)
            for key, entry in value.items()
        )
    return name != "weights_only" or isinstance(value, bool)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def _config_values(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """The configuration that a checkpoint was made with, unchecked, without settings that have no
    effect: they were not always refused.

    Raises:
        PretrainError: the manifest has none.
    """
    values = checkpoint.facts.get("config")
    if not isinstance(values, dict):
        raise PretrainError(
            f"the checkpoint {checkpoint.path} has no configuration in its manifest.json"
        )
    return drop_without_effect(values)


def folder(run: Run) -> Path:
    """The folder of the run's checkpoints."""
    return Path(run.config.run_dir) / "checkpoints"


def saver(run: Run) -> Saver:
    """A writer of the run's checkpoints; all ranks create it together, and each closes its own."""
    options = run.config.checkpoint
    # The run's start is done with that group, and the training steps do not use it.
    group = run.context.patient_group
    return Saver(folder(run), options.keep, options.asynchronous, group, _local_tier(run))


def _local_tier(run: Run) -> LocalTier | None:
    options = run.config.checkpoint
    if options.local_dir is None:
        return None
    group = run.context.patient_group
    return LocalTier(Path(options.local_dir), folder(run), options.keep, group)


def save(run: Run, saver: Saver, guard: Guard, step: int) -> None:
    """Write a checkpoint after update ``step``, or start to write it in the background.

    Raises:
        PretrainError: this or the previous checkpoint could not be written.
    """
    facts = {
        "config": to_dict(run.config),
        "data": _data_states(run, step + guard.skipped_batches),
        "faults": guard.state_dict(),
        "source_tokens": run.step_metrics.source_tokens.tolist(),
        # Every update is one of all groups, so they have the same count.
        "updates": run.optimizer.param_groups[0]["updates"],
    }
    state = run.optimizer.named_state(run.parameters())
    for name, entries in state.items():
        if run.weights[name].layer is None and not run.context.first_stage:
            # The ranks of each stage have the whole state of the encoder, divided in another way.
            state[name] = {k: v for k, v in entries.items() if not isinstance(v, ShardedState)}
    saver.save(step, tensors_of(run, state), facts)


def _data_states(run: Run, step: int) -> list[dict[str, Any]]:
    """The position in the data of each data-parallel rank; a single one if all are the same."""
    state = run.data.state_dict(step)
    digest = hashlib.sha256(json.dumps(state, sort_keys=True).encode()).digest()
    number = int.from_bytes(digest[:7], "big")
    extremes = torch.tensor([number, -number], device=run.context.device)
    dist.all_reduce(extremes, dist.ReduceOp.MAX)
    if extremes.sum() == 0:
        return [state]
    # Only with data whose ranks read different files: energon's.
    states: list[Any] = [None] * run.context.world_size
    dist.all_gather_object(states, (run.context.data_rank, state))
    by_rank = dict(states)
    return [by_rank[rank] for rank in range(run.context.data_size)]


def tensors_of(
    run: Run, state: Mapping[str, Mapping[str, Tensor]]
) -> dict[str, storage.LocalShard]:
    """The model's and the optimizer's tensors on this rank, by their names in a checkpoint.

    Args:
        state: the optimizer's state of each parameter by name.
    """
    tensors = {}
    for name, tensor in run.named_tensors.items():
        tensors[f"model.{name}"] = local_shard(run, name, tensor.detach())
        for key, value in state.get(name, {}).items():
            tensors[f"optimizer.{name}.{key}"] = _state_shard(run, name, key, value)
    return tensors


def _state_shard(run: Run, name: str, key: str, value: Tensor) -> storage.LocalShard:
    """The entry ``key`` of the state of the parameter ``name`` on this rank."""
    weight = run.weights[name]
    if key in neuron_state():
        weight = weight.of_neurons
    if isinstance(value, ShardedState):
        parts = value.state_layout.group.size()
        return storage.LocalShard(weight.shape, list(_pieces(run, weight, value)), parts=parts)
    if key == "step":
        return _whole(run, name, value)
    return _local_shard(run, weight, value)


def _pieces(
    run: Run, weight: Weight, state: ShardedState
) -> Iterator[tuple[tuple[int, ...], Tensor]]:
    """(offsets in the whole tensor, values) of the parts of a state that this rank has.

    Where tensor parallelism splits each of several stacked matrices, the optimizer knows the
    tensors of the ranks one after another, each of which is a stack of parts.
    """
    spans = []  # first row of each block for the optimizer, its first row, and its rows
    first = 0
    parallel = run.config.parallel
    if weight.split is not None and weight.split.stacked > 1:
        for rank in range(weight.shards(parallel)):
            for block in weight.blocks(parallel, rank):
                spans.append((first, block.offsets[0], block.sizes[0]))
                first += block.sizes[0]
    for (offsets, sizes), values in state.pieces():
        if not spans:
            yield offsets, values
        for first, target, rows in spans:
            start, stop = max(first, offsets[0]), min(first + rows, offsets[0] + sizes[0])
            if start < stop:
                part = values[start - offsets[0] : stop - offsets[0]]
                yield (target + start - first, *offsets[1:]), part


def _whole(run: Run, name: str, value: Tensor) -> storage.LocalShard:
    """A scalar that every rank has which has a shard of the parameter ``name``."""
    unsplit = run.weights[name]._replace(split=None)
    return storage.LocalShard((), [((), value)], _copy(run, unsplit))


def local_shard(run: Run, name: str, local: Tensor) -> storage.LocalShard:
    """This rank's tensor with its position in the whole one, split like the parameter ``name``."""
    return _local_shard(run, run.weights[name], local)


def _local_shard(run: Run, weight: Weight, local: Tensor) -> storage.LocalShard:
    blocks = weight.blocks(run.config.parallel, run.context.tensor_rank)
    offsets = [block.offsets for block in blocks]
    views = local.chunk(len(blocks))
    return storage.LocalShard(
        weight.shape, list(zip(offsets, views, strict=True)), _copy(run, weight)
    )


def _copy(run: Run, weight: Weight) -> Copy:
    """Position of this rank among those with the same shard of a weight."""
    context, parallel = run.context, run.config.parallel
    count = weight.copies(parallel, context.world_size)
    if weight.layer is None:
        return Copy("all ranks", context.rank, count)
    if weight.expert is None:
        kind, ranks = "shards", parallel.tensor
        replica = context.data_rank * context.context_size + context.context_rank
    else:
        kind, ranks = "shards of experts", parallel.expert_tensor
        replica = context.expert_data_rank
    if weight.shards(parallel) == ranks:
        return Copy(kind, replica, count)
    return Copy(f"whole {kind}", replica * ranks + context.tensor_rank, count)


def tokenizer_file(run_dir: Path) -> Path:
    """The tokenizer.json that a run's model was trained with.

    Raises:
        PretrainError: the run has none.
    """
    path = run_dir / "tokenizer.json"
    if not path.is_file():
        raise PretrainError(
            f"{run_dir} has no tokenizer.json: start its training once more, which writes it"
        )
    return path


def write_tokenizer(tokenizer: Tokenizer, run_dir: Path) -> None:
    """Write a run's tokenizer.json unless it exists; for a single process.

    Raises:
        PretrainError: there is a different one, or the file cannot be written.
    """
    path = run_dir / "tokenizer.json"
    if path.exists():
        _require_same_tokenizer(tokenizer, path)
        return
    with atomic.written(path) as partial:
        tokenizer.save(partial)


def _require_same_tokenizer(tokenizer: Tokenizer, path: Path) -> None:
    if Tokenizer.load(path).digest != tokenizer.digest:
        raise PretrainError(
            f"{path} differs from the data's tokenizer, which is another one if the data have "
            "changed: restore the data that the run was started with, or start a new run with "
            "another run_dir, from these weights and with this tokenizer with start_from"
        )


def keep_tokenizer(run: Run) -> None:
    """Store the tokenizer next to the checkpoints, so that the model can be used without the data.

    A run that starts from an imported model also stores the settings that ``export`` needs, such
    as the chat template.

    Raises:
        PretrainError: the run was started with a different tokenizer.
    """

    def write() -> None:
        run_dir, start_from = Path(run.config.run_dir), run.config.start_from
        write_tokenizer(run.data.tokenizer, run_dir)
        if start_from is not None and not storage.steps(folder(run)):
            imported = ImportedSettings.read(Path(start_from))
            if imported != ImportedSettings():
                imported.write(run_dir)

    call_on_all_ranks(lambda: write() if run.context.is_main else None)


def flush_local_tier(run: Run) -> None:
    """Copy a checkpoint to ``run_dir`` that a run could not copy from ``checkpoint.local_dir``.

    Raises:
        PretrainError: it is damaged, or cannot be copied.
    """
    if local_tier := _local_tier(run):
        local_tier.flush(_newest_step(run), run.context.patient_group)


def restore(run: Run, guard: Guard | None = None) -> int:
    """Load the run's newest checkpoint, or else the weights that it starts from.

    Learning rates and initial weights are functions of the step and the seed. Everything else is
    restored: the weights, the optimizer's state, the step, the position in the data, and the
    guard's state.

    Args:
        guard: default: the state of the guard is not needed.

    Returns:
        The step; 0 without a checkpoint, and the run is then unchanged unless it has a
        ``start_from``.

    Raises:
        PretrainError: the checkpoint is damaged, or of another run or model.
    """
    newest = _newest_step(run)
    if newest is not None or run.config.start_from is not None:
        run.optimizer.create_state()
    step, facts = _load(run, newest)
    if guard is not None:
        guard.load_state_dict(facts.get("faults", {}))
    if data_states := facts.get("data"):
        call_on_all_ranks(lambda: run.data.load_state_dict(data_states))
    return step


def roll_back(run: Run, saver: Saver, guard: Guard, step: int, why: RollBack) -> int:
    """Load the newest checkpoint without its position in the data, which continues after ``step``.

    Returns:
        The checkpoint's step.

    Raises:
        PretrainError: there is no checkpoint, or the run has been rolled back to it too often.
    """
    saver.wait()
    newest = _newest_step(run)
    if newest is None:
        raise PretrainError(
            f"step {step} must be rolled back ({why}), but there is no checkpoint yet: start again "
            "with a smaller checkpoint.every, or lower optimizer.lr"
        )
    checkpoint_step, facts = _load(run, newest)
    guard.roll_back(step, checkpoint_step, facts.get("faults", {}))
    return checkpoint_step


def _newest_step(run: Run) -> int | None:
    """The step of the newest checkpoint, as rank 0 sees it; None if there is none."""
    steps = call_on_all_ranks(lambda: storage.steps(folder(run)) if run.context.is_main else [])
    newest = torch.tensor(steps[-1] if steps else -1, device=run.context.device)
    dist.broadcast(newest, src=0)
    return None if newest < 0 else int(newest)


def _load(run: Run, step: int | None) -> tuple[int, dict[str, Any]]:
    """Load the tensors of a checkpoint; without one, those of ``start_from``.

    All ranks call it together. Any of them may find a damaged file: only once all have read,
    the optimizer receives its state, which is a collective call.

    Returns:
        The checkpoint's step and facts; 0 and nothing without a checkpoint.
    """
    step, facts, state = call_on_all_ranks(lambda: _read(run, step))
    if state is not None:
        call_on_all_ranks(lambda: run.optimizer.load_named_state(state, run.parameters()))
    if counts := facts.get("source_tokens"):
        run.step_metrics.source_tokens = torch.tensor(counts, dtype=torch.int64)
    if "updates" in facts and not facts.get("weights_only", False):
        for group in run.optimizer.param_groups:
            group["updates"] = facts["updates"]
    return step, facts


_State = dict[str, dict[str, Tensor]]


def _read(run: Run, step: int | None) -> tuple[int, dict[str, Any], _State | None]:
    """Read what :func:`_load` loads: weights in place; without other ranks.

    Returns:
        The checkpoint's step and facts, and the optimizer's state; None: it is not replaced.
    """
    if step is None:
        start_from = run.config.start_from
        return 0, {}, None if start_from is None else _start_from(run, Path(start_from))
    checkpoint = _opened(folder(run), step)
    _verify(run, checkpoint)
    weights_only = checkpoint.facts.get("weights_only", False)
    _check_settings(
        f"the checkpoint {checkpoint.path} was made with",
        _config_values(checkpoint),
        run.config,
        sections=_MODEL if weights_only else _FIXED,
        ignored=_MODEL_EXCEPT if weights_only else _FIXED_EXCEPT,
        remedy="set it back to continue, or choose another run_dir to start a new run",
    )
    own_tokenizer = Path(run.config.run_dir, "tokenizer.json")
    if own_tokenizer.exists():  # before its number of tokens makes this another model
        _require_same_tokenizer(run.data.tokenizer, own_tokenizer)
    if weights_only:
        state = _load_weights(run, checkpoint)
    else:
        state = _state_to_fill(run, checkpoint)
        checkpoint.load(tensors_of(run, state))
    return checkpoint.step, checkpoint.facts, state


def _verify(run: Run, checkpoint: Checkpoint) -> None:
    """Verify this rank's share of the files, unless ``checkpoint.verify`` is false."""
    if run.config.checkpoint.verify:
        checkpoint.verify(run.context.rank, run.context.world_size)


def _state_to_fill(run: Run, checkpoint: Checkpoint) -> _State:
    """The tensors of each parameter's optimizer state that a checkpoint has, by name.

    They are overwritten, so that a roll-back needs no memory for a second state.
    """
    return {
        name: {
            key: value
            for key, value in entries.items()
            if f"optimizer.{name}.{key}" in checkpoint.tensors
        }
        for name, entries in run.optimizer.named_state(run.parameters()).items()
    }


def _start_from(run: Run, other: Path) -> _State:
    """Load the weights of another run's newest checkpoint, and nothing else.

    Returns:
        The master copies, as :func:`_load_weights`.
    """
    saved = _open(other)
    _verify(run, saved)
    if Tokenizer.load(tokenizer_file(other)).digest != run.data.tokenizer.digest:
        raise PretrainError(
            f"the data's tokenizer is not {other / 'tokenizer.json'}, whose ids the model of "
            "start_from knows: leave data.tokenizer out, or choose another run_dir"
        )
    _check_settings(
        f"the model of start_from={other} has",
        _config_values(saved),
        run.config,
        sections=_MODEL,
        ignored=_MODEL_EXCEPT,
        remedy="set it to that, or start from another run",
    )
    return _load_weights(run, saved)


def _load_weights(run: Run, checkpoint: Checkpoint) -> _State:
    """Load a checkpoint's weights, for an optimizer without other state.

    Of a run in bfloat16, the float32 master weights are loaded. For a run in bfloat16, float32
    weights become the master weights.

    Returns:
        The master copies, by parameter.
    """
    stored = checkpoint.tensors
    sources = {name: f"optimizer.{name}.master" for name in run.named_tensors}
    sources |= {n: f"model.{n}" for n, source in sources.items() if source not in stored}
    checkpoint.load(
        {sources[n]: local_shard(run, n, x.detach()) for n, x in run.named_tensors.items()}
    )
    masters = {
        name: {"master": entries["master"]}
        for name, entries in run.optimizer.named_state(run.parameters()).items()
        if "master" in entries and stored[sources[name]].dtype == torch.float32
    }
    checkpoint.load(
        {sources[n]: _state_shard(run, n, "master", x["master"]) for n, x in masters.items()}
    )
    return masters


def _check_settings(
    origin: str,
    before: Mapping[str, Any],
    config: Config,
    *,
    sections: Sequence[str],
    ignored: Sequence[str],
    remedy: str,
) -> None:
    """Compare the settings of a checkpoint with a configuration.

    Args:
        origin: beginning of the message, such as "the checkpoint X was made with".
        before: the checkpoint's configuration, as JSON returns it.
        sections: the settings and sections to compare.
        ignored: dotted names of settings in them that may differ.

    Raises:
        PretrainError: names the first setting that differs, and the remedy.
    """
    defaults, now = json.loads(json.dumps([to_dict(Config()), to_dict(config)]))
    # A checkpoint that is older than a setting was made with its default.
    old = dict(_settings(merge(defaults, before), sections))
    new = dict(_settings(now, sections))
    for key in old | new:
        if key not in ignored and old.get(key) != new.get(key):
            raise PretrainError(f"{origin} {key}={old.get(key)}, not {new.get(key)}: {remedy}")


def _settings(values: Mapping[str, Any], sections: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of the settings in some sections, without the paths of sources and the
    fields that they do not read, which were not always refused.

    Each setting of each source has an entry.

    The files of the data may have moved; that they are the same files is checked when the position
    in them is restored.
    """
    for section in sections:
        if not isinstance(values[section], dict):
            yield section, values[section]
            continue
        for name, value in values[section].items():
            key = f"{section}.{name}"
            if name != "sources":
                yield key, value
                continue
            yield key, f"a list of {len(value)}"
            for index, source in enumerate(value):
                source_type = SOURCES.get(str(source.get("type")))
                unread = source_type is not None and not source_type.reads_field
                ignored = ("path", "field") if unread else ("path",)
                for k, v in source.items():
                    if k not in ignored:
                        yield f"{key}[{index}].{k}", v
