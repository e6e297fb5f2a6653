"""A run's checkpoint as a folder that transformers loads, and vLLM and SGLang serve.

Runs in one process without a launcher, which holds one file of weights at a time. The parallel
model is not built: the tensors of a checkpoint have their names in the whole model.
"""

import json
import shutil
from collections.abc import Iterator, Sequence
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
from pretrain.export.conversion import Conversion, conversions
from pretrain.export.hf_config import VIDEO_PLACEHOLDER, to_hf_config
from pretrain.model.geometry import MAX_FRAMES, MERGE

MAX_FILE_BYTES = 5 * 10**9
_PREFIX = "model."
_PROCESSOR = Path(__file__).with_name("kimi_k25_processor.py")
_PIXELS = Path(pixels.__file__)
_EMBEDDING = f"{_PREFIX}language.embedding.word_embeddings.weight"
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
    """Write a run's model for transformers: Kimi-K2.5, or DeepSeek-V3 without images.

    The chat template is that of the conversations the run learned from, or else of the model that
    it was imported from.

    Args:
        out: the folder to make; ``hf`` or ``hf-text`` in the run's folder by default. It does not
            exist after an error.
        step: the checkpoint's step; default: the newest.
        text_only: leave the vision encoder out.
        dtype: of the weights; default: as in the checkpoint. The router's bias stays float32, and
            a run of bfloat16 has float32 master weights to export.
        max_file_bytes: size of one file of weights.

    Returns:
        The folder.

    Raises:
        PretrainError: there is no such checkpoint, it is damaged, the model has a shape that
            the published models cannot have, or a file cannot be written.
    """
    saved, config = checkpoint.find(run_dir, step)
    tokenizer_file = checkpoint.tokenizer_file(run_dir)
    tokenizer = Tokenizer.load(tokenizer_file)
    out = out or run_dir / ("hf-text" if text_only else "hf")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise PretrainError(f"{out} exists: remove it, or choose another folder with --out")
    if _EMBEDDING not in saved.tensors:
        raise PretrainError(_lacks(saved.path, _EMBEDDING))
    vocab_size = saved.tensors[_EMBEDDING].shape[0]
    vision = None if text_only else config.vision
    if vision and tokenizer.media_pad < 0:
        raise PretrainError(
            f"{tokenizer.name} has no tokens for images, so this run has none: add --text-only"
        )
    special = {
        "bos_token_id": tokenizer.bos,
        "eos_token_id": tokenizer.eos,
        "pad_token_id": tokenizer.pad,
    }
    imported = ImportedSettings.read(run_dir)
    longest = max(config.data.seq_length, imported.max_position_embeddings)
    described = to_hf_config(
        config.language, vision, vocab_size, longest, special, tokenizer.media_pad
    )
    wanted = list(conversions(config.language, vision, vocab_size))
    _check(saved, wanted)
    types = {name: _type(name, saved, dtype) for item in wanted for name in item.ours}
    described["dtype"] = str(next(iter(types.values()))).removeprefix("torch.")
    files = list(_in_files(wanted, types, max_file_bytes))
    partial = out.with_name(f"{out.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        needed = sum(_bytes(item, types) for item in wanted)
        free = shutil.disk_usage(partial).free
        if free < needed:
            raise PretrainError(
                f"{out} needs {needed / 1e9:.1f} GB and the disk has {free / 1e9:.1f} GB left: "
                "choose another folder with --out"
            )
        _write_weights(saved, partial, files, types)
        _write_json(partial / "config.json", described)
        generation, template = _conversation(config, tokenizer, special, imported, vision)
        _write_json(partial / "generation_config.json", generation)
        _write_tokenizer(partial, tokenizer_file, tokenizer, longest, template)
        if vision is not None:
            largest = config.data.max_image_tokens or max(1, config.data.seq_length // 4)
            _write_processor(
                partial, vision.patch_size, limits(longest, largest), config.data.video_fps
            )
        if out.exists():
            out.rmdir()
        partial.rename(out)
    except (OSError, SafetensorError) as error:
        raise PretrainError(f"cannot write {out}: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return out


def _lacks(path: Path, name: str) -> str:
    return f"the checkpoint {path} has no {name}: it is of another version of this program"


def _check(saved: Checkpoint, wanted: Sequence[Conversion]) -> None:
    for item in wanted:
        for name, shape in item.ours.items():
            if _PREFIX + name not in saved.tensors:
                raise PretrainError(_lacks(saved.path, _PREFIX + name))
            if (found := tuple(saved.tensors[_PREFIX + name].shape)) != shape:
                raise PretrainError(
                    f"the checkpoint {saved.path} has {_PREFIX}{name} of shape {found}, "
                    f"where its configuration means {shape}"
                )


def _type(name: str, saved: Checkpoint, dtype: Dtype | None) -> torch.dtype:
    own = saved.tensors[_PREFIX + name].dtype
    # Theirs is float32 too: its steps are too small for bfloat16.
    return own if dtype is None or name.endswith(".expert_bias") else getattr(torch, dtype)


def _bytes(item: Conversion, types: dict[str, torch.dtype]) -> int:
    return sum(
        torch.Size(shape).numel() * types[name].itemsize for name, shape in item.ours.items()
    )


def _in_files(
    wanted: Sequence[Conversion], types: dict[str, torch.dtype], max_bytes: int
) -> Iterator[list[Conversion]]:
    """Yield the conversions of each file: in order, as many as fit."""
    file: list[Conversion] = []
    filled = 0
    for item in wanted:
        size = _bytes(item, types)
        if file and filled + size > max_bytes:
            yield file
            file, filled = [], 0
        file.append(item)
        filled += size
    yield file


def _source(name: str, saved: Checkpoint, types: dict[str, torch.dtype]) -> str:
    """Where a weight is read: of one kept in 16 bits there is a float32 master to be had."""
    master = f"optimizer.{name}.master"
    wider = types[name].itemsize > saved.tensors[_PREFIX + name].dtype.itemsize
    return master if wider and master in saved.tensors else _PREFIX + name


def _write_weights(
    saved: Checkpoint,
    folder: Path,
    files: Sequence[Sequence[Conversion]],
    types: dict[str, torch.dtype],
) -> None:
    where, total = {}, 0
    for number, file in enumerate(files, start=1):
        name = "model.safetensors"
        if len(files) > 1:
            name = f"model-{number:05}-of-{len(files):05}.safetensors"
        shapes = {weight: shape for item in file for weight, shape in item.ours.items()}
        ours = {weight: torch.empty(shape, dtype=types[weight]) for weight, shape in shapes.items()}
        saved.load({_source(name, saved, types): x for name, x in ours.items()})
        theirs = {weight: t for item in file for weight, t in item.to_published(ours).items()}
        save_file(theirs, folder / name, metadata={"format": "pt"})
        where.update(dict.fromkeys(theirs, name))
        total += sum(tensor.nbytes for tensor in theirs.values())
    if len(files) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": where}
        _write_json(folder / "model.safetensors.index.json", index)


def _conversation(
    config: Config,
    tokenizer: Tokenizer,
    special: dict[str, int],
    imported: ImportedSettings,
    vision: VisionConfig | None,
) -> tuple[dict[str, Any], str]:
    """generation_config.json, and the chat template."""
    generation = imported.generation or special
    content = _content(tokenizer if vision else None)
    if any(source.is_chat for source in source_types(config.data)):
        ends = {"eos_token_id": [tokenizer.im_end, tokenizer.eos]}
        return {**generation, **special, **ends}, chat.template(content)
    if imported.chat_template is not None:
        return generation, imported.chat_template
    # A model that has learned from documents alone knows no roles: the messages' contents follow
    # one another as text and images do in a document.
    return generation, f"{{{{ bos_token }}}}{{% for message in messages %}}{content}{{% endfor %}}"


def _content(tokenizer: Tokenizer | None) -> str:
    """A message's content in Jinja.

    Args:
        tokenizer: of a model with images; None for a model of text.
    """
    readable, shown = "text", ""
    if tokenizer is not None:
        media = (tokenizer.media_begin, tokenizer.media_pad, tokenizer.media_end)
        image = "".join(tokenizer.name_of(number) for number in media)
        readable = "text, images and videos"
        shown = (
            f"{{% elif part.type in ('image', 'image_url') %}}{image}"
            f"{{% elif part.type in ('video', 'video_url') %}}{VIDEO_PLACEHOLDER}"
        )
    return (
        "{% if message.content is string %}{{ message.content }}{% else %}"
        "{% for part in message.content %}"
        f"{{% if part.type == 'text' %}}{{{{ part.text }}}}{shown}{{% else %}}"
        f"{{{{ raise_exception('this model reads {readable}, not ' ~ part.type) }}}}"
        "{% endif %}{% endfor %}{% endif %}"
    )


def _write_tokenizer(
    folder: Path, file: Path, tokenizer: Tokenizer, max_length: int, template: str
) -> None:
    """Write the run's tokenizer, by which a text begins with BOS, as every document does."""
    backend = json.loads(file.read_text())
    name = tokenizer.name_of
    bos = name(tokenizer.bos)
    begin, text, second = (
        {"SpecialToken": {"id": bos, "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
        {"Sequence": {"id": "B", "type_id": 0}},
    )
    backend["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [begin, text],
        "pair": [begin, text, second],
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
            # Without it, transformers 4 makes token_type_ids, which the model refuses.
            "model_input_names": ["input_ids", "attention_mask"],
            "clean_up_tokenization_spaces": False,
            "chat_template": template,
        },
    )
    (folder / "chat_template.jinja").write_text(template)


def _write_processor(folder: Path, patch_size: int, largest: Limits, video_fps: float) -> None:
    """Write what :mod:`pretrain.data.media.fit` does to images, for transformers and for servers.

    ``auto_map`` names the processor that is copied beside it: SGLang needs it, and transformers
    without torchvision. Servers read ``media_proc_cfg``.
    """
    middle = [0.5, 0.5, 0.5]
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
        "image_mean": middle,
        "image_std": middle,
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
            "image_mean": middle,
            "image_std": middle,
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
    # Transformers takes along the modules that a file imports from its own folder.
    source = _PROCESSOR.read_text().replace(f"from {pixels.__name__} import", "from .pixels import")
    (folder / _PROCESSOR.name).write_text(source)
    _write_json(folder / "preprocessor_config.json", image)
    _write_json(folder / "video_preprocessor_config.json", video)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
