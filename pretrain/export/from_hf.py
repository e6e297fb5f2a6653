"""A published checkpoint as a run that ``train`` continues: its weights, and a fresh optimizer."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from pretrain import checkpoint, parallel
from pretrain import config as configuration
from pretrain.checkpoint import storage
from pretrain.checkpoint.imported import ImportedSettings
from pretrain.config import Config, yaml_core
from pretrain.data.tokenizer import Tokenizer
from pretrain.errors import PretrainError
from pretrain.export.conversion import Conversion, conversions
from pretrain.export.hf_config import from_hf_config, is_tied
from pretrain.export.hf_folder import HfFolder, HfWeights
from pretrain.model.geometry import MAX_FRAMES, MERGE
from pretrain.model.initialize import initialize
from pretrain.model.names import named_tensors
from pretrain.model.projector import VisionTower
from pretrain.runtime.run_lock import RunLock

# Settings of the model that say how it learns, and not what it is.
_FREE = ("init_std", "expert_bias_update_rate")
_LONGEST = 4096
# The encoder of a model that came without one: that of configs/laptop.yaml, of 0.3 MB beside its
# projector. The full size has 1.7 GB.
_NEW_VISION = {
    **{"num_layers": 2, "hidden_size": 64, "num_heads": 4, "ffn_hidden_size": 256},
    "position_grid": 16,
}


class Imported(NamedTuple):
    """A run made by :func:`import_hf`.

    Attributes:
        notes: lines for the user: what the run has that the checkpoint did not have.
    """

    config: Config
    notes: list[str]


def import_hf(source: Path, run_dir: Path, overrides: Sequence[str] = ()) -> Imported:
    """Make a run of a checkpoint of Kimi-K2.5 (text and images) or DeepSeek-V3 (text).

    The run's folder gets a checkpoint of step 0 with the weights in the precision they have there,
    the tokenizer, ``config.yaml`` to train it with, and in ``imported.json`` what ``export`` writes
    again: the chat template, the generation settings and the context length. A model of text gets
    a small new vision encoder. Runs in one process, which holds the weights in memory. Nothing in
    the folder is run: it may come from anyone.

    Args:
        source: a folder with config.json, safetensors and a tokenizer, as published or as
            transformers' ``save_pretrained`` writes it.
        overrides: ``key.sub=value`` for config.yaml, such as the shape of a new vision encoder.

    Raises:
        PretrainError: the folder is incomplete or damaged, the model is of another architecture or
            shape (the first key of config.json or tensor that does not fit is named), or the run
            exists.
    """
    if parallel.world_size() > 1:
        raise PretrainError("this command is one process: start it with python, not torchrun")
    folder = run_dir / "checkpoints"
    if storage.steps(folder):
        raise PretrainError(f"{run_dir} has checkpoints already: choose a new folder for the run")
    written = run_dir / "config.yaml"
    if written.exists():
        raise PretrainError(f"{written} exists already: choose a new folder for the run")
    files = HfFolder(source)
    described = files.required_json("config.json")
    try:
        language, vision, vocab_size = from_hf_config(described)
        longest = _context_length(described)
    except PretrainError as error:
        raise PretrainError(f"cannot import {source}: {error}") from error
    tokenizer_path = configuration.escape_path(str(run_dir / "tokenizer.json"))
    data = {"tokenizer": tokenizer_path, "seq_length": min(longest, _LONGEST)}
    if vision:
        data |= _image_settings(files, vision)
    values = {
        "run_dir": configuration.escape_path(str(run_dir)),
        "language": language,
        "vision": dict(vision or _NEW_VISION),
        "data": data,
    }
    values = configuration.with_overrides(values, overrides)
    config = configuration.from_dict(values)
    _check_overrides(config, language, vision or {})
    tokenizer = _tokenizer(files)
    if tokenizer.vocab_size != vocab_size:
        raise PretrainError(
            f"cannot import {source}: its tokenizer has {tokenizer.vocab_size} tokens and its "
            f"embedding {vocab_size} rows (vocab_size in config.json)"
        )
    kept = _imported_settings(files, longest)
    notes = []
    tensors = _read(
        files.weights(vision=vision is not None),
        conversions(config.language, config.vision if vision else None, vocab_size),
        _tied_names(described, vision is not None),
    )
    if is_tied(described):
        notes.append(
            "the output layer is a copy of the embedding (tie_word_embeddings), and is trained "
            "on its own"
        )
    if vision is None:
        new = _new_vision(config)
        tensors |= new
        notes.append(
            f"the model has no vision encoder: made a new, untrained one of "
            f"{sum(tensor.numel() for tensor in new.values()):,} parameters; choose another size "
            "with vision.num_layers=…, vision.hidden_size=… and so on"
        )

    with RunLock(run_dir):
        parallel.join()  # a group of one, in which checkpoints are written
        checkpoint.write_tokenizer(tokenizer, run_dir)
        storage.save(
            folder,
            0,
            {f"model.{name}": tensor for name, tensor in tensors.items()},
            {"config": configuration.to_dict(config), "weights_only": True},
            keep=1,
        )
        kept.write(run_dir)
        try:
            name = json.dumps(source.resolve().name)  # on one line, whatever it contains
            written.write_text(f"# Made of {name}.\n{yaml_core.dump(values)}")
        except OSError as error:
            raise PretrainError(f"cannot write {written}: {error.strerror}") from error
    return Imported(config, notes)


def _context_length(described: Mapping[str, Any]) -> int:
    text = described.get("text_config") or described
    longest = text.get("max_position_embeddings", _LONGEST)
    if type(longest) is not int or not 64 <= longest <= 1 << 30:
        raise PretrainError(
            f"config.json has max_position_embeddings={longest!r:.80}: it must be a whole number "
            "of at least 64"
        )
    return longest


def _imported_settings(files: HfFolder, max_position_embeddings: int) -> ImportedSettings:
    template = files.text("chat_template.jinja")
    if template is None:
        template = (files.json("tokenizer_config.json") or {}).get("chat_template")
        if isinstance(template, list):  # several templates, each with a name
            named = [one for one in template if isinstance(one, dict)]
            default = (one.get("template") for one in named if one.get("name") == "default")
            template = next(default, None)
    generation = files.json("generation_config.json")
    if generation is not None:
        generation.pop("transformers_version", None)
    template = template if isinstance(template, str) else None
    return ImportedSettings(max_position_embeddings, template, generation)


def _image_settings(files: HfFolder, vision: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of the data by which images are read as the checkpoint's processor reads them.

    Raises:
        PretrainError: its processor normalizes or cuts images in a way that is not supported.
    """
    name = "preprocessor_config.json"
    values = files.json(name)
    if values is None:  # save_pretrained of transformers' processors
        name = "processor_config.json"
        values = (files.json(name) or {}).get("image_processor")
        values = values if isinstance(values, dict) else {}
    server = values.get("media_proc_cfg")
    server = server if isinstance(server, dict) else {}
    fixed = {
        "patch_size": vision["patch_size"],
        "merge_size": MERGE,
        "merge_kernel_size": MERGE,
        "temporal_merge_kernel_size": MAX_FRAMES,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "fixed_output_tokens": None,
        "in_patch_limit_video": None,
    }
    for settings in (values, server):
        for key, expected in fixed.items():
            given = settings.get(key, expected)
            # Two of a kernel's sides, or one for both.
            sides = [expected] * 2 if key == "merge_kernel_size" else expected
            if given not in (expected, sides):
                raise PretrainError(
                    f"cannot import {files.path}: {name} has {key}={given!r:.80}, and this "
                    f"trainer's models have {expected!r}"
                )
    found: dict[str, Any] = {}
    limit = server.get("in_patch_limit", values.get("max_patches"))
    if limit is not None:
        if type(limit) is not int or not 1 <= limit <= 1 << 24:
            raise PretrainError(
                f"cannot import {files.path}: {name} has an image of at most {limit!r:.80} "
                "patches (in_patch_limit or max_patches): it must be a whole number above 0"
            )
        found["max_image_tokens"] = -(-limit // (MERGE * MERGE))
    fps = server.get("sample_fps")
    if fps is not None:
        if type(fps) not in (int, float) or not 0 < fps <= 1000:
            raise PretrainError(
                f"cannot import {files.path}: {name} has sample_fps={fps!r:.80}: it must be a "
                "number above 0"
            )
        found["video_fps"] = float(fps)
    return found


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


def _tokenizer(files: HfFolder) -> Tokenizer:
    files.file("tokenizer_config.json")  # which a tiktoken file's special tokens are read from
    for name in ("tokenizer.json", "tiktoken.model"):
        file = files.file(name)
        if file is not None:
            return Tokenizer.load(file)
    raise PretrainError(f"{files.path} has no tokenizer: neither tokenizer.json nor tiktoken.model")


def _tied_names(described: Mapping[str, Any], vision: bool) -> dict[str, str]:
    """The output layer, and the embedding that it shares its weight with."""
    prefix = "language_model." if vision else ""
    tied = {f"{prefix}lm_head.weight": f"{prefix}model.embed_tokens.weight"}
    return tied if is_tied(described) else {}


def _read(
    weights: HfWeights, wanted: Iterable[Conversion], tied: Mapping[str, str]
) -> dict[str, Tensor]:
    """Every tensor by our name in the whole model, after all are known to fit.

    Args:
        tied: names of tensors that may be left out, and of those they are copies of.

    Raises:
        PretrainError: a tensor is missing, unknown, of another shape or type, or not finite.
    """
    items, names = [], {}
    for item in wanted:
        for name, shape in item.published.items():
            names[name] = tied.get(name, name) if name not in weights else name
            weights.check(names[name], shape)
        items.append(item)
    weights.check_no_others(list(names))
    for copy, original in tied.items():
        if copy in weights and not weights.read(copy).equal(weights.read(original)):
            raise PretrainError(
                f"cannot import {weights.folder}: config.json has tie_word_embeddings=true, but "
                f"{copy} differs from {original}"
            )
    tensors: dict[str, Tensor] = {}
    for item in items:
        tensors |= item.to_ours({name: weights.read(names[name]) for name in item.published})
    return tensors


def _new_vision(config: Config) -> dict[str, Tensor]:
    """The first weights of a vision encoder, as :func:`pretrain.build.build` draws them."""
    tower = VisionTower(config.vision, config.language.hidden_size)
    named = {name: tensor.detach() for name, tensor in named_tensors([], tower).items()}
    initialize(named, {}, config.seed, config.language.init_std, config.language.num_layers)
    return named
