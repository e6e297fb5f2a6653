"""A published checkpoint as a run that ``train`` goes on with: its weights, a fresh optimizer."""

import json
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from pretrain import config as configuration
from pretrain import state, yaml_core
from pretrain.config import Config
from pretrain.data.tokenizer import Tokenizer
from pretrain.errors import PretrainError
from pretrain.export.layout import Rows, our_settings, rows
from pretrain.model.names import initialize, kept_tensors
from pretrain.model.projector import VisionTower
from pretrain.runtime import checkpoint, processes

_TYPES = ("F32", "F16", "BF16")
# Settings of the model that say how it learns, and not what it is.
_FREE = ("init_std", "expert_bias_update_rate")
_LONGEST = 4096


def import_hf(source: Path, run_dir: Path, overrides: Sequence[str] = ()) -> Config:
    """Make a run of a checkpoint of Kimi-K2.5 (text and images) or DeepSeek-V3 (text).

    The run's folder gets a checkpoint of step 0 with the weights in the precision they have there,
    the tokenizer, and ``config.yaml`` to train it with. A model of text gets a vision encoder with
    its first weights. One process, which holds the weights in memory.

    Args:
        source: a folder with config.json, safetensors and a tokenizer.
        overrides: ``key.sub=value`` for config.yaml, such as the shape of a new vision encoder.

    Raises:
        PretrainError: the folder is incomplete or damaged, the model is of another architecture or
            shape (the first setting or tensor that does not fit is named), or the run exists.
    """
    if processes.world_size() > 1:
        raise PretrainError("this command is one process: start it with python, not torchrun")
    folder = run_dir / "checkpoints"
    if checkpoint.steps(folder):
        raise PretrainError(f"{run_dir} has checkpoints already: choose a new folder for the run")
    written = run_dir / "config.yaml"
    if written.exists():
        raise PretrainError(f"{written} exists already: choose a new folder for the run")
    described = _read_json(source / "config.json")
    try:
        language, vision, vocab_size = our_settings(described)
    except PretrainError as error:
        raise PretrainError(f"cannot import {source}: {error}") from error
    values = _values(described, run_dir, language, vision)
    config = configuration.from_dict(values, overrides)  # which leaves the overrides in values
    _check_overrides(config, language, vision or {})
    tokenizer = _tokenizer(source)
    if tokenizer.vocab_size != vocab_size:
        raise PretrainError(
            f"cannot import {source}: its tokenizer has {tokenizer.vocab_size} tokens and its "
            f"embedding {vocab_size} rows"
        )
    wanted = list(rows(config.language, config.vision if vision else None, vocab_size))
    tensors = _read(source, wanted)
    if vision is None:
        tensors |= _new_vision(config)

    processes.join()  # a group of one, in which checkpoints are written
    state.write_tokenizer(tokenizer, run_dir)
    checkpoint.save(
        folder,
        0,
        {f"model.{name}": tensor for name, tensor in tensors.items()},
        {"config": configuration.to_dict(config), "weights_only": True},
        keep=1,
    )
    try:
        origin = " ".join(source.name.split())  # a comment is one line
        written.write_text(f"# Imported from {origin}.\n{yaml_core.dump(values)}")
    except OSError as error:
        raise PretrainError(f"cannot write {written}: {error.strerror}") from error
    return config


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except OSError as error:
        raise PretrainError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise PretrainError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise PretrainError(f"{path} must hold settings by name")
    return value


def _values(
    described: Mapping[str, Any],
    run_dir: Path,
    language: Mapping[str, Any],
    vision: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """What config.yaml is to say."""
    longest = (described.get("text_config") or described).get("max_position_embeddings", _LONGEST)
    return {
        "run_dir": configuration.escape_path(str(run_dir)),
        "language": deepcopy(dict(language)),  # overrides are written into it
        **({"vision": dict(vision)} if vision else {}),
        "data": {
            "tokenizer": configuration.escape_path(str(run_dir / "tokenizer.json")),
            "seq_length": min(longest, _LONGEST),
        },
    }


def _check_overrides(
    config: Config, language: Mapping[str, Any], vision: Mapping[str, Any]
) -> None:
    for part, theirs in (("language", language), ("vision", vision)):
        ours = asdict(getattr(config, part))
        for name, value in theirs.items():
            if ours[name] != value and name not in _FREE:
                raise PretrainError(
                    f"{part}.{name}={ours[name]} was asked for, but the checkpoint has {value}"
                )


def _tokenizer(source: Path) -> Tokenizer:
    for name in ("tokenizer.json", "tiktoken.model"):
        if (source / name).is_file():
            return Tokenizer.load(source / name)
    raise PretrainError(f"{source} has no tokenizer: neither tokenizer.json nor tiktoken.model")


def _read(source: Path, wanted: Sequence[Rows]) -> dict[str, Tensor]:
    """Every tensor of ours by its name in the whole model, once all are known to fit."""
    files = _files(source)
    where: dict[str, Any] = {}
    try:
        for file in files:
            opened: Any = safe_open(file, "pt")
            where |= dict.fromkeys(opened.keys(), opened)
        missing: dict[str, tuple[int, ...]] = {}
        for item in wanted:
            for name, shape in item.theirs.items():
                if name not in where:
                    raise PretrainError(f"{source} has no tensor {name}")
                part = where[name].get_slice(name)
                if tuple(part.get_shape()) != shape:
                    raise PretrainError(
                        f"{name} in {source} is of shape {tuple(part.get_shape())}, where its "
                        f"config.json means {shape}"
                    )
                if part.get_dtype() not in _TYPES:
                    raise PretrainError(
                        f"{name} in {source} is of type {part.get_dtype()}: only checkpoints of "
                        "float32, float16 or bfloat16 can be imported"
                    )
                missing[name] = shape
        for name in where:
            if name not in missing and not name.endswith(".inv_freq"):
                raise PretrainError(f"{source} has a tensor {name}, which a model of ours has not")
        tensors: dict[str, Tensor] = {}
        for item in wanted:
            tensors |= item.to_ours({name: where[name].get_tensor(name) for name in item.theirs})
    except SafetensorError as error:
        raise PretrainError(f"the safetensors of {source} are damaged: {error}") from error
    return tensors


def _files(source: Path) -> list[Path]:
    index = source / "model.safetensors.index.json"
    if index.exists():
        placed = _read_json(index).get("weight_map")
        if not isinstance(placed, dict):
            raise PretrainError(f"{index} has no weight_map")
        files = [source / str(name) for name in sorted(set(placed.values()))]
    else:
        files = [source / "model.safetensors"]
    for file in files:
        if not file.is_file():
            raise PretrainError(f"{source} is incomplete: {file.name} is missing")
    return files


def _new_vision(config: Config) -> dict[str, Tensor]:
    """The first weights of a vision encoder, as :func:`pretrain.build.build` draws them."""
    tower = VisionTower(config.vision, config.language.hidden_size)
    named = {f"vision.{name}": tensor.detach() for name, tensor in kept_tensors(tower)}
    initialize(named, {}, config.seed, config.language.init_std, config.language.num_layers)
    return named
