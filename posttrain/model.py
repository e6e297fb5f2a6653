"""Exported models: loading one with its processor, and writing the trained one as an export."""

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

from pretrain.data.tokenizer import Tokenizer
from pretrain.errors import PretrainError, one_line
from pretrain.export.hf_folder import HfFolder, published_name
from pretrain.export.kimi_k25_processor import KimiImageProcessor, KimiProcessor

TRAINED = "hf"
"""Folder of the trained model in the folder of a run."""
_WEIGHTS = re.compile(r"^model.*\.safetensors(\.index\.json)?$")
_CHAT_TEMPLATE = "chat_template.jinja"
_PROCESSOR = "preprocessor_config.json"
_MAX_FILE_SIZE = "5GB"
# Otherwise transformers may ask on the terminal whether to run code from the folder.
_TRUST_NOTHING = {"trust_remote_code": False, "local_files_only": True}


@dataclass
class Exported:
    """An exported model.

    Attributes:
        folder: its files.
        model: in training mode, on the CPU.
        processor: the tokenizer of a text model, the processor of a model with images.
        tokenizer: the same tokenizer as in pretraining.
    """

    folder: Path
    model: Any
    processor: Any
    tokenizer: Tokenizer

    @property
    def has_images(self) -> bool:
        return isinstance(self.processor, KimiProcessor)

    @property
    def hf_tokenizer(self) -> Any:
        return self.processor.tokenizer if self.has_images else self.processor

    @property
    def max_length(self) -> int:
        """Limit of prompt and response, in tokens."""
        return int(self.model.config.get_text_config().max_position_embeddings)


def load(folder: Path) -> Exported:
    """Load a folder that ``python -m pretrain export`` or a post-training run wrote.

    The model is on this process's GPU if there is one. No code in the folder is run: its processor
    is the one of this project.

    Raises:
        PretrainError: the folder is not such an export, or is damaged.
    """
    files = HfFolder(folder)
    config = files.required_json("config.json")
    with_images = config.get("vision_config") is not None
    if with_images and config.get("model_type") != "kimi_k25":
        raise PretrainError(
            f"{folder} is a {config.get('model_type')!r} model with images: give a folder that "
            "`python -m pretrain export` wrote"
        )
    kind = AutoModelForImageTextToText if with_images else AutoModelForCausalLM
    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    try:
        model, loaded = kind.from_pretrained(
            folder,
            dtype=torch.float32,
            use_safetensors=True,
            output_loading_info=True,
            **_TRUST_NOTHING,
        )
        processor = AutoTokenizer.from_pretrained(folder, padding_side="left", **_TRUST_NOTHING)
    except Exception as error:  # transformers raises any for files that are not valid
        raise PretrainError(f"{folder} cannot be loaded: {one_line(str(error))[:300]}") from error
    # Otherwise transformers initializes weights at random, and sampling has no end and no padding.
    missing = [f"the weight {name}" for name in sorted(loaded["missing_keys"])]
    missing += [name for name in ("eos_token", "pad_token") if getattr(processor, name) is None]
    if missing:
        raise PretrainError(
            f"{folder} lacks {', '.join(missing[:3])}{', …' if missing[3:] else ''}: its files are "
            "incomplete or do not belong together; export the model again"
        )
    if with_images:
        processor = KimiProcessor(_image_processor(files), processor, processor.chat_template)
    require_finite_weights(model, f"in {folder}", "choose another model")
    model.train().to(_device())
    return Exported(folder, model, processor, tokenizer)


def _image_processor(files: HfFolder) -> KimiImageProcessor:
    """
    Raises:
        PretrainError: its settings are missing or invalid.
    """
    settings = files.required_json(_PROCESSOR)
    try:
        return KimiImageProcessor(settings["media_proc_cfg"])
    except (KeyError, TypeError, ValueError) as error:
        raise PretrainError(
            f"{files.path / _PROCESSOR} has no valid media_proc_cfg: "
            f"{type(error).__name__}: {one_line(str(error))[:200]}"
        ) from error


def require_finite_weights(model: nn.Module, where: str, remedy: str) -> None:
    """
    Raises:
        PretrainError: a weight is not finite; the message begins with ``where`` and ends with
            ``remedy``.
    """
    for name, tensor in model.state_dict().items():
        if not tensor.isfinite().all():
            raise PretrainError(f"{where}, {name} is not finite: {remedy}")


def _device() -> torch.device:
    """This process's GPU, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cpu")


def save(exported: Exported, model: nn.Module, out: Path, template: str | None = None) -> Path:
    """Write a model as an export: the files of the folder it was loaded from, and its weights.

    A folder under the same name is replaced.

    Args:
        model: the trained model.
        template: its chat template; None: unchanged.

    Returns:
        ``out``.
    """
    partial = out.with_name(f"{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    with writing(f"the model {out}"):
        model.save_pretrained(partial, max_shard_size=_MAX_FILE_SIZE)  # type: ignore[operator]
        if exported.has_images:
            _publish_names(partial)
        for file in exported.folder.iterdir():
            if file.is_file() and not _WEIGHTS.match(file.name):
                shutil.copyfile(file, partial / file.name)
        if template is not None:
            _write_template(partial, template)
        shutil.rmtree(out, ignore_errors=True)
        partial.rename(out)
    return out


@contextmanager
def writing(what: str) -> Iterator[None]:
    """Context in which a file or a folder of a run is written.

    Raises:
        PretrainError: it cannot be written.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:  # torch raises a RuntimeError
        reason = error.strerror if isinstance(error, OSError) else None
        raise PretrainError(
            f"cannot write {what}: {one_line(reason or str(error))[:200]}; earlier checkpoints are "
            "unchanged"
        ) from error


def _publish_names(folder: Path) -> None:
    """Rename the weights as in published checkpoints: transformers writes some otherwise."""
    for file in folder.glob("*.safetensors"):
        weights = {published_name(name): tensor for name, tensor in load_file(file).items()}
        save_file(weights, file, metadata={"format": "pt"})
    for index in folder.glob("*.index.json"):
        content = json.loads(index.read_text())
        names = content["weight_map"].items()
        content["weight_map"] = {published_name(name): file for name, file in names}
        index.write_text(json.dumps(content, indent=2))


def _write_template(folder: Path, template: str) -> None:
    (folder / _CHAT_TEMPLATE).write_text(template)
    config = folder / "tokenizer_config.json"
    content = {**json.loads(config.read_text()), "chat_template": template}
    config.write_text(json.dumps(content, indent=2))
