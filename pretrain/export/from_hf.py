"""Import of a published checkpoint: a run with its weights, which ``train`` continues."""

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
from pretrain.data.sources import source_types
from pretrain.data.tokenizer import Tokenizer
from pretrain.errors import PretrainError
from pretrain.export.conversion import Conversion, conversions
from pretrain.export.hf_config import HfModel, from_hf_config
from pretrain.export.hf_folder import HfFolder, HfWeights
from pretrain.model.geometry import MAX_FRAMES, MERGE, PATCHES_PER_TOKEN
from pretrain.model.initialize import initialize
from pretrain.model.names import named_tensors
from pretrain.model.projector import VisionTower
from pretrain.model.weights import vision_weights
from pretrain.runtime import atomic
from pretrain.runtime.progress import counted
from pretrain.runtime.run_lock import RunLock

# Settings of training, which may differ from those of the checkpoint.
_CHANGEABLE = ("init_std", "expert_bias_update_rate")
_MAX_SEQ_LENGTH = 4096
# The vision encoder that a text model gets: 0.3 MB without the projector. One of the full size
# would have 1.7 GB.
_NEW_VISION = {
    "num_layers": 2,
    "hidden_size": 64,
    "num_heads": 4,
    "ffn_hidden_size": 256,
    "position_grid": 16,
}


class Imported(NamedTuple):
    """A run made by :func:`import_hf`.

    Attributes:
        notes: lines for the user about weights that differ from the checkpoint's.
    """

    config: Config
    notes: list[str]


def import_hf(source: Path, run_dir: Path, overrides: Sequence[str] = ()) -> Imported:
    """Make a run from a checkpoint of Kimi-K2.5 (text and images) or of a language model.

    The architectures of language models are those of :mod:`pretrain.export.text_config`.

    The run's folder gets a checkpoint of step 0 with the weights in their dtypes, the tokenizer,
    ``config.yaml`` for training, and ``imported.json`` with the chat template, the generation
    settings and the context length, which ``export`` writes again. A text model gets a small new
    vision encoder. Import runs in one process, which holds the weights in memory. It runs no code
    from the source folder, which may be untrusted.

    Args:
        source: folder with config.json, safetensors and a tokenizer, as published or as written by
            ``save_pretrained`` of transformers.
        overrides: ``key.sub=value`` for config.yaml, such as the shape of a new vision encoder.

    Raises:
        PretrainError: the folder is incomplete or damaged, the architecture is not supported (the
            message names the first unsupported key of config.json or tensor), or the run exists.
    """
    if parallel.world_size() > 1:
        raise PretrainError("import runs in one process: start it with python, not torchrun")
    if storage.steps(run_dir / "checkpoints") or (run_dir / "config.yaml").exists():
        raise PretrainError(f"{run_dir} has checkpoints or a config.yaml: choose a new folder")
    folder = HfFolder(source)
    hf_config = folder.required_json("config.json")
    try:
        model = from_hf_config(hf_config)
        context_length = _context_length(hf_config)
    except PretrainError as error:
        raise PretrainError(f"cannot import {source}: {error}") from error
    tokenizer = _tokenizer(folder)
    if tokenizer.vocab_size > model.vocab_size:
        raise PretrainError(
            f"cannot import {source}: its tokenizer has {tokenizer.vocab_size} tokens and its "
            f"embedding {model.vocab_size} rows (vocab_size in config.json)"
        )
    values = {
        "run_dir": configuration.escape_path(str(run_dir)),
        "language": model.language | {"vocab_size": model.vocab_size},
        "vision": dict(model.vision or _NEW_VISION),
        "data": {
            "tokenizer": configuration.escape_path(str(run_dir / "tokenizer.json")),
            "seq_length": min(context_length, _MAX_SEQ_LENGTH),
            # The built-in data has images, and its text alone needs no tokens for them.
            **({} if tokenizer.media_pad >= 0 else {"sources": [{"type": "standard_library"}]}),
            **(_image_settings(folder, model.vision) if model.vision else {}),
        },
    }
    values = configuration.with_overrides(values, overrides)
    config = configuration.from_dict(values)
    source_types(config.data)  # raises if a source is misconfigured
    rows = config.language.vocab_rows(tokenizer.vocab_size)
    _check_overrides(config, model, rows)
    imported = _imported_settings(folder, context_length, model.vocab_size)
    weights = HfWeights(folder, vision=model.vision is not None, fp8_block=model.fp8_block)
    tensors, notes = _tensors(weights, config, model, rows)
    if model.unknown_keys:
        notes.append(
            "ignored keys of config.json that this trainer does not know; check that they do not "
            f"change the model: {', '.join(map(json.dumps, model.unknown_keys))}"
        )
    if tokenizer.media_pad < 0:
        notes.append("the tokenizer has no tokens for images, so that the data is text alone")
    name = json.dumps(source.resolve().name)  # on one line, whatever characters it has
    with RunLock(run_dir):
        parallel.join()  # checkpoints are written by a process group, here of one process
        checkpoint.write_tokenizer(tokenizer, run_dir)
        storage.save(
            run_dir / "checkpoints",
            0,
            {f"model.{name}": tensor for name, tensor in tensors.items()},
            {"config": configuration.to_dict(config), "weights_only": True},
            keep=1,
        )
        imported.write(run_dir)
        text = f"# Made of {name}.\n{yaml_core.dump(values)}"
        atomic.write_text(run_dir / "config.yaml", text)
    return Imported(config, notes)


def _tensors(
    weights: HfWeights, config: Config, model: HfModel, vocab_size: int
) -> tuple[dict[str, Tensor], list[str]]:
    """All tensors of a run, including those of a new vision encoder, and notes for the user."""
    vision = None if model.vision is None else config.vision
    prefix = "" if vision is None else "language_model."
    notes = []
    if dropped := weights.drop_layers(model.mtp_layers):
        notes.append(
            f"dropped the layers for multi-token prediction ({'*, '.join(dropped)}*), which this "
            "trainer's models lack"
        )
    output, embedding = f"{prefix}lm_head.weight", f"{prefix}model.embed_tokens.weight"
    tied = {output: embedding} if model.language["tie_embeddings"] else {}
    tensors = _read(
        weights, conversions(config.language, vision, vocab_size, model.vocab_size), tied
    )
    if weights.has_fp8:
        notes.append("the weights in fp8 were converted to bfloat16")
    if tied and not config.language.tie_embeddings:
        notes.append(
            "the output layer is a copy of the embedding (tie_word_embeddings), and is trained "
            "separately"
        )
    if vocab_size > model.vocab_size:
        notes.append(
            f"added {vocab_size - model.vocab_size} rows of zeros to the {model.vocab_size} of the "
            "vocabulary; export leaves them out"
        )
    if vision is None:
        new_vision = _new_vision(config)
        tensors |= new_vision
        notes.append(
            "the model has no vision encoder: made a new, untrained one of "
            f"{sum(tensor.numel() for tensor in new_vision.values()):,} parameters; choose another "
            "size with vision.num_layers=…, vision.hidden_size=… and so on"
        )
    return tensors, notes


def _context_length(hf_config: Mapping[str, Any]) -> int:
    text = hf_config.get("text_config") or hf_config
    length = text.get("max_position_embeddings", _MAX_SEQ_LENGTH)
    if type(length) is not int or not 64 <= length <= 1 << 30:
        raise PretrainError(
            f"config.json has max_position_embeddings={length!r:.80}: it must be a whole number "
            "of at least 64"
        )
    return length


def _imported_settings(
    folder: HfFolder, max_position_embeddings: int, vocab_size: int
) -> ImportedSettings:
    template = folder.text("chat_template.jinja")
    if template is None:
        template = (folder.json("tokenizer_config.json") or {}).get("chat_template")
        if isinstance(template, list):  # several templates, each with a name
            named = [entry for entry in template if isinstance(entry, dict)]
            default = (entry.get("template") for entry in named if entry.get("name") == "default")
            template = next(default, None)
    generation = folder.json("generation_config.json")
    if generation is not None:
        generation.pop("transformers_version", None)
    template = template if isinstance(template, str) else None
    return ImportedSettings(max_position_embeddings, template, generation, vocab_size)


def _image_settings(folder: HfFolder, vision: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of the data with which images are processed as by the checkpoint's processor.

    Raises:
        PretrainError: the processor's patches or normalization are not supported.
    """
    name = "preprocessor_config.json"
    values = folder.json(name)
    if values is None:  # save_pretrained of transformers' processors
        name = "processor_config.json"
        values = (folder.json(name) or {}).get("image_processor")
        values = values if isinstance(values, dict) else {}
    server = values.get("media_proc_cfg")
    server = server if isinstance(server, dict) else {}
    for settings in (values, server):
        _check_processor(folder.path / name, settings, vision["patch_size"])

    found: dict[str, Any] = {}
    limit = server.get("in_patch_limit", values.get("max_patches"))
    if limit is not None:
        if type(limit) is not int or not 1 <= limit <= 1 << 24:
            raise PretrainError(
                f"cannot import {folder.path}: {name} limits images to {limit!r:.80} patches "
                "(in_patch_limit or max_patches): it must be a whole number above 0"
            )
        found["max_image_tokens"] = -(-limit // PATCHES_PER_TOKEN)
    fps = server.get("sample_fps")
    if fps is not None:
        if type(fps) not in (int, float) or not 0 < fps <= 1000:
            raise PretrainError(
                f"cannot import {folder.path}: {name} has sample_fps={fps!r:.80}: it must be a "
                "number above 0"
            )
        found["video_fps"] = float(fps)
    return found


def _check_processor(file: Path, settings: Mapping[str, Any], patch_size: int) -> None:
    supported = {
        "patch_size": patch_size,
        "merge_size": MERGE,
        "merge_kernel_size": MERGE,
        "temporal_merge_kernel_size": MAX_FRAMES,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "fixed_output_tokens": None,
        "in_patch_limit_video": None,
    }
    for key, expected in supported.items():
        value = settings.get(key, expected)
        # The size of a kernel is one number or two.
        equivalent = [expected] * 2 if key == "merge_kernel_size" else expected
        if value not in (expected, equivalent):
            raise PretrainError(
                f"cannot import {file.parent}: {file.name} has {key}={value!r:.80}, but this "
                f"trainer's models have {expected!r}"
            )


def _check_overrides(config: Config, model: HfModel, rows: int) -> None:
    """Refuse overrides that contradict the checkpoint.

    A tied output layer can be trained separately, and a vocabulary can be padded.

    Args:
        rows: of the vocabulary.
    """
    language = dict(model.language)
    if not config.language.tie_embeddings:
        del language["tie_embeddings"]
    if rows < model.vocab_size:
        language["vocab_size"] = model.vocab_size
    for section, fixed in (("language", language), ("vision", model.vision or {})):
        requested = asdict(getattr(config, section))
        for name, value in fixed.items():
            if requested[name] != value and name not in _CHANGEABLE:
                raise PretrainError(
                    f"{section}.{name}={requested[name]} contradicts the checkpoint, which has "
                    f"{value}: leave it out"
                )


def _tokenizer(folder: HfFolder) -> Tokenizer:
    folder.file("tokenizer_config.json")  # Tokenizer.load reads it along with a tiktoken file
    for name in ("tokenizer.json", "tiktoken.model"):
        file = folder.file(name)
        if file is not None:
            return Tokenizer.load(file)
    raise PretrainError(
        f"{folder.path} has no tokenizer: neither tokenizer.json nor tiktoken.model"
    )


def _read(
    weights: HfWeights, conversions: Iterable[Conversion], tied: Mapping[str, str]
) -> dict[str, Tensor]:
    """Read all tensors, by our names, after checking the names and shapes of all of them.

    Args:
        tied: names of tensors that may be missing, and of the tensors that they are equal to.

    Raises:
        PretrainError: a tensor is missing, unknown, of another shape or dtype, or not finite.
    """
    checked, names = [], {}
    for conversion in conversions:
        for name, shape in conversion.published.items():
            names[name] = tied.get(name, name) if name not in weights else name
            weights.check(names[name], shape)
        checked.append(conversion)
    weights.check_no_others([*names, *tied])
    for copy, original in tied.items():
        if copy in weights and not weights.read(copy).equal(weights.read(original)):
            raise PretrainError(
                f"cannot import {weights.folder}: config.json has tie_word_embeddings=true, but "
                f"{copy} differs from {original}"
            )
    tensors: dict[str, Tensor] = {}
    for conversion in counted(checked, "reading weights", "weights"):
        published = {name: weights.read(names[name]) for name in conversion.published}
        tensors |= conversion.to_ours(published)
    return tensors


def _new_vision(config: Config) -> dict[str, Tensor]:
    """Initial weights of a vision encoder, as :func:`pretrain.build.build` gives them."""
    tower = VisionTower(config.vision, config.language.hidden_size)
    named = {name: tensor.detach() for name, tensor in named_tensors([], tower).items()}
    weights = vision_weights(config.vision, config.language.hidden_size)
    initialize(named, {weight.name: weight for weight in weights}, config, tensor_rank=0)
    return named
