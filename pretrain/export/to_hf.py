"""Export of a run's checkpoint as a folder for transformers, vLLM and SGLang.

It takes one process and the memory of one file of weights. The model is not built: checkpoints
contain whole tensors, whatever the parallel layout of the run.
"""

import json
import math
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from pretrain import checkpoint
from pretrain.checkpoint.imported import ImportedSettings
from pretrain.checkpoint.storage import Checkpoint
from pretrain.config import Config, VisionConfig
from pretrain.data import chat
from pretrain.data.media import pixels
from pretrain.data.media.fit import Limits, limits
from pretrain.data.sources import source_types
from pretrain.data.tokenizer import Tokenizer
from pretrain.errors import PretrainError
from pretrain.export import chat_templates
from pretrain.export.conversion import Conversion, conversions
from pretrain.export.hf_config import to_hf_config
from pretrain.model.geometry import MAX_FRAMES, MERGE
from pretrain.model.vision import split_items
from pretrain.runtime.progress import counted

MAX_FILE_BYTES = 5 * 10**9
_PROCESSOR = Path(__file__).with_name("kimi_k25_processor.py")
_PIXELS = Path(pixels.__file__)
Dtype = Literal["float32", "bfloat16"]


def export(
    run_dir: Path,
    out: Path | None = None,
    *,
    step: int | None = None,
    text_only: bool = False,
    dtype: Dtype | None = None,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> Path:
    """Write a run's model for transformers: Kimi-K2.5, or a language model without images.

    The language model has the architecture of its settings (:mod:`pretrain.export.text_config`),
    which is that of an imported model, and the rows of its vocabulary, without those added for the
    run.

    The chat template is that of the run's conversations, or else of the model from which the run
    was imported.

    Args:
        out: folder to create. Default: ``hf`` or ``hf-text`` in the run's folder. After an error it
            does not exist.
        step: of the checkpoint. Default: the newest.
        text_only: leave the vision encoder out.
        dtype: of the weights. Default: as in the checkpoint. The router's bias stays float32. In
            float32, a bfloat16 run exports its master weights.
        max_file_bytes: size of a file of weights.

    Returns:
        ``out``.

    Raises:
        PretrainError: the checkpoint does not exist or is damaged, the published architectures do
            not support the model's shape, or a file cannot be written.
    """
    saved, config = checkpoint.find(run_dir, step)
    tokenizer_file = checkpoint.tokenizer_file(run_dir)
    tokenizer = Tokenizer.load(tokenizer_file)
    out = out or run_dir / ("hf-text" if text_only else "hf")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise PretrainError(f"{out} exists: remove it, or choose another folder with --out")
    vision = None if text_only else config.vision
    if vision and tokenizer.media_pad < 0:
        raise PretrainError(
            f"{tokenizer.name} has no tokens for images, so this run has none: add --text-only"
        )
    special_ids = {
        "bos_token_id": tokenizer.bos,
        "eos_token_id": tokenizer.eos,
        "pad_token_id": tokenizer.pad,
    }
    imported = ImportedSettings.read(run_dir)
    max_length = max(config.data.seq_length, imported.max_position_embeddings)
    rows = config.language.vocab_rows(tokenizer.vocab_size)
    vocab_size = min(rows, imported.vocab_size or rows)
    hf_config = to_hf_config(
        config.language, vision, vocab_size, max_length, special_ids, tokenizer.media_pad
    )
    weights = _Weights(saved, list(conversions(config.language, vision, rows, vocab_size)), dtype)
    with _new_folder(out, weights.nbytes) as folder:
        weights.write(folder, max_file_bytes)
        hf_config["dtype"] = str(next(iter(weights.dtypes.values()))).removeprefix("torch.")
        _write_json(folder / "config.json", hf_config)
        generation, template = _conversation(config, tokenizer, special_ids, imported, vision)
        _write_json(folder / "generation_config.json", generation)
        _write_tokenizer(folder, tokenizer_file, tokenizer, max_length, template)
        if vision is not None:
            max_image_tokens = config.data.max_image_tokens or max(1, config.data.seq_length // 4)
            image_limits = limits(max_length, max_image_tokens)
            _write_processor(folder, vision.patch_size, image_limits, config.data.video_fps)
    return out


@contextmanager
def _new_folder(out: Path, nbytes: int) -> Iterator[Path]:
    """Create a folder under a temporary name, and rename it to ``out`` unless there is an error.

    Args:
        nbytes: disk space that it will need.
    """
    partial = out.with_name(f"{out.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        free = shutil.disk_usage(partial).free
        if free < nbytes:
            raise PretrainError(
                f"{out} needs {nbytes / 1e9:.1f} GB and the disk has {free / 1e9:.1f} GB left: "
                "choose another folder with --out"
            )
        yield partial
        if out.exists():
            out.rmdir()
        partial.rename(out)
    except (OSError, SafetensorError) as error:
        raise PretrainError(f"cannot write {out}: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


class _Weights:
    """Weights of a checkpoint in the layout of published checkpoints.

    Attributes:
        dtypes: dtype of each exported weight, by our names.
        nbytes: size of all weights.

    Raises:
        PretrainError: the checkpoint lacks a weight, or has it in another shape.
    """

    def __init__(
        self, saved: Checkpoint, conversions: Sequence[Conversion], dtype: Dtype | None
    ) -> None:
        self._saved, self._conversions = saved, conversions
        self.dtypes: dict[str, torch.dtype] = {}
        for conversion in conversions:
            for name, shape in conversion.ours.items():
                saved.check(f"model.{name}", shape)
                self.dtypes[name] = saved.tensors[f"model.{name}"].dtype
                # The router's bias is updated in steps that are too small for bfloat16.
                if dtype is not None and not name.endswith(".expert_bias"):
                    self.dtypes[name] = getattr(torch, dtype)
        self.nbytes = sum(map(self._nbytes_of, conversions))

    def write(self, folder: Path, max_file_bytes: int) -> None:
        """Write safetensors files, and an index if there are several."""
        sizes = [self._nbytes_of(conversion) for conversion in self._conversions]
        files = [self._conversions[items] for items in split_items(sizes, max_file_bytes)]
        weight_map, total = {}, 0
        for number, file in enumerate(counted(files, "writing weights", "files"), start=1):
            name = "model.safetensors"
            if len(files) > 1:
                name = f"model-{number:05}-of-{len(files):05}.safetensors"
            published = self._read(file)
            save_file(published, folder / name, metadata={"format": "pt"})
            weight_map.update(dict.fromkeys(published, name))
            total += sum(tensor.nbytes for tensor in published.values())
        if len(files) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            _write_json(folder / "model.safetensors.index.json", index)

    def _nbytes_of(self, conversion: Conversion) -> int:
        sizes = conversion.ours.items()
        return sum(math.prod(shape) * self.dtypes[name].itemsize for name, shape in sizes)

    def _read(self, conversions: Sequence[Conversion]) -> dict[str, torch.Tensor]:
        """Read and convert the published tensors of a file."""
        shapes = {name: s for conversion in conversions for name, s in conversion.ours.items()}
        ours = {name: torch.empty(s, dtype=self.dtypes[name]) for name, s in shapes.items()}
        self._saved.load({self._stored_name(name): tensor for name, tensor in ours.items()})
        return {
            name: tensor
            for conversion in conversions
            for name, tensor in conversion.to_published(ours).items()
        }

    def _stored_name(self, name: str) -> str:
        """Name in the checkpoint: of the float32 master weight if a 16-bit weight is widened."""
        weight, master = f"model.{name}", f"optimizer.{name}.master"
        widened = self.dtypes[name].itemsize > self._saved.tensors[weight].dtype.itemsize
        return master if widened and master in self._saved.tensors else weight


def _conversation(
    config: Config,
    tokenizer: Tokenizer,
    special_ids: dict[str, int],
    imported: ImportedSettings,
    vision: VisionConfig | None,
) -> tuple[dict[str, Any], str]:
    """Content of generation_config.json, and the chat template."""
    generation = imported.generation or special_ids
    is_chat = any(source.is_chat for source in source_types(config.data))
    content = chat_templates.content(tokenizer if vision else None, is_chat=is_chat)
    if is_chat:
        ends = {"eos_token_id": [tokenizer.im_end, tokenizer.eos]}
        return {**generation, **special_ids, **ends}, chat.template(tokenizer, content)
    if imported.chat_template is not None:
        return generation, imported.chat_template
    return generation, chat_templates.document(tokenizer if vision else None)


def _write_tokenizer(
    folder: Path, file: Path, tokenizer: Tokenizer, max_length: int, template: str
) -> None:
    """Write the run's tokenizer, which puts BOS before a text, as training does."""
    backend = json.loads(file.read_text())
    name = tokenizer.name_of
    bos = name(tokenizer.bos)
    begin = {"SpecialToken": {"id": bos, "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    backend["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [begin, first],
        "pair": [begin, first, second],
        "special_tokens": {bos: {"id": bos, "ids": [tokenizer.bos], "tokens": [bos]}},
    }
    media = [
        name(number)
        for number in (tokenizer.media_begin, tokenizer.media_pad, tokenizer.media_end)
        if number >= 0
    ]
    _write_json(folder / "tokenizer.json", backend)
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": bos,
            "eos_token": name(tokenizer.eos),
            "pad_token": name(tokenizer.pad),
            "additional_special_tokens": media,
            "model_max_length": max_length,
            # Otherwise transformers 4 adds token_type_ids, which the model rejects.
            "model_input_names": ["input_ids", "attention_mask"],
            "clean_up_tokenization_spaces": False,
            "chat_template": template,
        },
    )
    (folder / "chat_template.jinja").write_text(template)


def _write_processor(folder: Path, patch_size: int, largest: Limits, video_fps: float) -> None:
    """Write the processing of :mod:`pretrain.data.media.fit` for transformers and for servers.

    ``auto_map`` names our processor, which is copied into the folder for SGLang and for
    transformers without torchvision. Servers read ``media_proc_cfg``.
    """
    half = [0.5, 0.5, 0.5]
    common = {
        "processor_class": "Kimi_K25Processor",
        "patch_size": patch_size,
        "merge_size": MERGE,
        "size": {"max_height": largest.side, "max_width": largest.side},
        "do_resize": True,
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": half,
        "image_std": half,
        "do_convert_rgb": True,
    }
    image = {
        **common,
        "image_processor_type": "Kimi_K25ImageProcessor",
        "auto_map": {
            "AutoProcessor": f"{_PROCESSOR.stem}.KimiProcessor",
            "AutoImageProcessor": f"{_PROCESSOR.stem}.KimiImageProcessor",
        },
        "max_patches": largest.image,
        "media_proc_cfg": {
            "patch_size": patch_size,
            "merge_kernel_size": MERGE,
            "temporal_merge_kernel_size": MAX_FRAMES,
            "in_patch_limit": largest.image,
            "in_patch_limit_each_frame": largest.frame,
            "in_patch_limit_video": None,
            "patch_limit_on_one_side": largest.side,
            "fixed_output_tokens": None,
            "image_mean": half,
            "image_std": half,
            "sample_fps": video_fps,
            "max_num_frames_each_video": None,
            "timestamp_mode": "hh:mm:ss.fff",
        },
    }
    video = {
        **common,
        "video_processor_type": "Kimi_K25VideoProcessor",
        "max_patches": largest.frame,
        "temporal_patch_size": MAX_FRAMES,
        "fps": video_fps,
    }
    shutil.copyfile(_PIXELS, folder / _PIXELS.name)
    # transformers copies the modules that a file imports relatively.
    source = _PROCESSOR.read_text().replace(f"from {pixels.__name__} import", "from .pixels import")
    (folder / _PROCESSOR.name).write_text(source)
    _write_json(folder / "preprocessor_config.json", image)
    _write_json(folder / "video_preprocessor_config.json", video)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
