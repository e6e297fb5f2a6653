"""What a checkpoint of a run holds, and how a run takes it up again."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pretrain.build import Run
from pretrain.config import to_dict
from pretrain.errors import PretrainError
from pretrain.runtime import checkpoint
from pretrain.runtime.processes import agree

# What the model and its data are. All else (where, how fast, for how long) may change on the way.
_FIXED = ("seed", "global_batch_size", "precision", "language", "vision", "data")
# What earlier versions put behind a name where tensor parallelism had cut the tensor.
_EARLIER_PART = re.compile(r"\[\d+/\d+\]")


def folder(run: Run) -> Path:
    return Path(run.config.run_dir) / "checkpoints"


def _tensors(run: Run, states: Mapping[Tensor, Mapping[str, Tensor]]) -> checkpoint.Tensors:
    """Model and optimizer state by name in the whole model, with what this rank has of each."""
    found: dict[str, Tensor | checkpoint.Part] = {}
    for name, tensor in run.named.items():
        cut = run.cuts.get(name)
        kept = {f"model.{name}": tensor.detach()}
        kept |= {f"optimizer.{name}.{key}": value for key, value in states.get(tensor, {}).items()}
        for key, value in kept.items():
            # A step count is no part of anything; momentum and moments are cut as the parameter is.
            if cut is not None and value.shape == tensor.shape:
                found[key] = checkpoint.Part(cut.whole(value.shape), cut.pieces(value))
            else:
                found[key] = value
    return found


def save(run: Run, step: int) -> None:
    """Write a checkpoint after update ``step``."""
    tensors = _tensors(run, run.optimizer.state)
    checkpoint.save(
        folder(run), step, tensors, {"config": to_dict(run.config)}, run.config.checkpoint.keep
    )


def restore(run: Run) -> int:
    """Take up the run's newest checkpoint; 0, and nothing changed, where there is none.

    Data, schedule and initial weights are functions of the seed and the step, so the weights,
    the optimizer's state and the step are all there is to restore.

    Raises:
        PretrainError: the checkpoint is damaged, or of another run or model.
    """
    failure: Exception | None = None
    step = 0
    try:
        step = _restore(run)
    except Exception as error:
        failure = error
    agree(failure)
    return step


def _restore(run: Run) -> int:
    steps = checkpoint.steps(folder(run))
    if not steps:
        return 0
    path = checkpoint.path_of(folder(run), steps[-1])
    manifest = checkpoint.read_manifest(path)
    _check_same_run(path, manifest["facts"].get("config", {}), to_dict(run.config))
    stored = checkpoint.shapes(path)
    if any(_EARLIER_PART.search(name) for name in stored):
        raise PretrainError(
            f"the checkpoint {path} keeps the parts of tensor parallelism apart, as earlier "
            "versions did, and cannot be read: go on with the version that wrote it, or choose "
            "another run_dir to start anew"
        )
    states: dict[Tensor, dict[str, Tensor]] = {}
    for name, parameter in run.parameters():
        prefix = f"optimizer.{name}."
        cut = run.cuts.get(name)
        whole = torch.Size(cut.whole(parameter.shape) if cut else parameter.shape)
        states[parameter] = {
            key.removeprefix(prefix): torch.empty(
                parameter.shape if shape == whole else shape,
                dtype=dtype,
                device=_device(key, parameter),
            )
            for key, (shape, dtype) in stored.items()
            if key.startswith(prefix)
        }
    checkpoint.load(path, _tensors(run, states))
    run.optimizer.state.update(states)
    for _, parameter in run.parameters():
        if "master" in states[parameter]:  # QK-Clip scales it too
            setattr(parameter, "main_param", states[parameter]["master"])  # noqa: B010 (for mypy)
    return int(manifest["step"])


def _device(key: str, parameter: Tensor) -> torch.device:
    # The optimizer moves a step count to where it reads it.
    return torch.device("cpu") if key.endswith(".step") else parameter.device


def _check_same_run(path: Path, then: dict[str, Any], now: dict[str, Any]) -> None:
    then = {"precision": "float32", **then}  # which checkpoints without the setting had
    for key in _FIXED:
        old, new = then.get(key), json.loads(json.dumps(now[key]))
        if old == new:
            continue
        if isinstance(old, dict) and isinstance(new, dict):
            sub = next(name for name in {**old, **new} if old.get(name) != new.get(name))
            key, old, new = f"{key}.{sub}", old.get(sub), new.get(sub)
        raise PretrainError(
            f"the checkpoint {path} was made with {key}={old}, not {new}: "
            "set it back to go on, or choose another run_dir to start anew"
        )
