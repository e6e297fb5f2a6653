"""A model that transformers loads from an export computes the logits of the trained model."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from pretrain import cli
from pretrain.checkpoint import storage
from pretrain.data import Document
from pretrain.data.media.fit import fit
from pretrain.data.media.patches import VisionItem
from pretrain.data.tokenizer import Tokenizer
from pretrain.errors import PretrainError
from pretrain.export.conversion import conversions
from pretrain.export.to_hf import export
from tests.distributed import training
from tests.pretrain.saved_run import SHAPE, STEP, Made, Read

pytest.importorskip("transformers", minversion="5.23")
PATCH = 14


@pytest.fixture(scope="session")
def run_dir(made: Made, run_folder: Path) -> Path:
    return run_folder / "run"


@pytest.fixture(scope="session")
def hf(run_dir: Path) -> Path:
    return export(run_dir)


@pytest.fixture(scope="session")
def hf_text(run_dir: Path) -> Path:
    """In several files, like a large model."""
    return export(run_dir, text_only=True, max_file_bytes=100_000)


def load(kind: str, folder: Path) -> Any:
    """Load a model with transformers and check that no weight is missing or unexpected."""
    import transformers

    model, info = getattr(transformers, kind).from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    assert model.dtype == torch.float32
    return model.eval()


def check_logits(logits: Tensor, read: Read) -> None:
    assert read.logits.std() > 0.5
    torch.testing.assert_close(logits, read.logits, rtol=0, atol=1e-4)


def pixels_of(patches: Tensor) -> Tensor:
    return (patches / 127.5 - 1).view(-1, 3, PATCH, PATCH)


@torch.no_grad()
def test_deepseek_v3_has_the_logits_of_the_trained_model(hf_text: Path, made: Made) -> None:
    assert len(list(hf_text.glob("model-0000*-of-0000*.safetensors"))) > 2
    model = load("AutoModelForCausalLM", hf_text)
    assert type(model).__name__ == "DeepseekV3ForCausalLM"
    check_logits(model(made.reads["text"].tokens).logits[0], made.reads["text"])


@pytest.fixture(scope="session")
def kimi(hf: Path) -> Any:
    model = load("AutoModelForImageTextToText", hf)
    assert type(model).__name__ == "Kimi_K25ForConditionalGeneration"
    return model


@torch.no_grad()
@pytest.mark.parametrize("name", ["text", "image", "clip", "video"])
def test_kimi_k25_has_the_logits_of_the_trained_model(kimi: Any, made: Made, name: str) -> None:
    read = made.reads[name]
    images = {"pixel_values": pixels_of(read.patches), "image_grid_thw": read.grids}
    check_logits(kimi(read.tokens, **(images if len(read.grids) else {})).logits[0], read)


@torch.no_grad()
def test_yarn_has_the_same_logits_beyond_the_original_length(run_dir: Path, made: Made) -> None:
    scaled = run_dir.parent / "scaled"
    plain, long = made.reads["long"], made.scaled["long"]
    assert torch.equal(plain.tokens, long.tokens) and long.tokens.shape == (1, 96)
    text = load("AutoModelForCausalLM", export(scaled, text_only=True))
    check_logits(text(long.tokens).logits[0], long)
    assert (long.logits - plain.logits).abs().max() > 0.1, "scaling changes what is computed"
    kimi = load("AutoModelForImageTextToText", export(scaled))
    for read in (long, made.scaled["image"]):
        images = {"pixel_values": pixels_of(read.patches), "image_grid_thw": read.grids}
        check_logits(kimi(read.tokens, **(images if len(read.grids) else {})).logits[0], read)


@torch.no_grad()
def test_videos_have_separate_inputs_and_a_separate_placeholder(kimi: Any, made: Made) -> None:
    read = made.reads["video"]
    assert read.grids[:, 0].tolist() == [4, 4, 1]
    config = kimi.config
    tokens = read.tokens.masked_fill(read.tokens == config.image_token_id, config.video_token_id)
    pixels = pixels_of(read.patches)
    output = kimi(tokens, pixel_values_videos=pixels, video_grid_thw=read.grids)
    check_logits(output.logits[0], read)


def test_conversions_have_every_tensor_of_the_model(made: Made, run_folder: Path) -> None:
    config = training.tiny(str(run_folder), *SHAPE)
    vocab_size = made.tensors["language.output_layer.weight"].shape[0]
    named = {
        name: shape
        for item in conversions(config.language, config.vision, vocab_size)
        for name, shape in item.ours.items()
    }
    assert named == {name: tuple(tensor.shape) for name, tensor in made.tensors.items()}


def test_the_tokenizer_equals_that_of_the_run(hf: Path, run_dir: Path) -> None:
    from transformers import AutoTokenizer

    exported = AutoTokenizer.from_pretrained(hf)
    trained = Tokenizer.load(run_dir / "tokenizer.json")

    # In a text, transformers reads the names of special tokens as these, and the trainer as text.
    texts = st.text(max_size=80).filter(lambda text: "<|" not in text)

    @settings(deadline=None, max_examples=50)
    @given(texts)
    def agree(text: str) -> None:
        ids = exported(text, add_special_tokens=False).input_ids
        assert ids == trained.encode(text).tolist()
        assert exported.decode(ids) == trained.decode(ids)
        assert exported(text).input_ids == [trained.bos, *ids]

    agree()


def test_special_tokens_and_messages_with_images(hf: Path, run_dir: Path) -> None:
    from transformers import AutoTokenizer

    exported = AutoTokenizer.from_pretrained(hf)
    trained = Tokenizer.load(run_dir / "tokenizer.json")
    assert (exported.bos_token_id, exported.eos_token_id, exported.pad_token_id) == (
        *(trained.bos, trained.eos),
        trained.pad,
    )
    content = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    messages = [{"role": "user", "content": content}]
    ids = exported.apply_chat_template(messages, return_dict=True)["input_ids"]
    image = [trained.media_begin, trained.media_pad, trained.media_end]
    assert ids == [trained.bos, *image, *trained.encode("What is it?").tolist()]


def test_transformers_processor_equals_the_data_pipeline(hf: Path, run_dir: Path) -> None:
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError) as error:  # RuntimeError: it is of another build of torch
        pytest.skip(f"transformers' processor needs torchvision: {error}")
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(hf)
    tokenizer = Tokenizer.load(run_dir / "tokenizer.json")
    rng = np.random.default_rng(0)
    pixels = [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in ((50, 71), (28, 14))]
    document = Document(tokenizer).add_tokens(tokenizer.encode("See "))
    for image in pixels:
        document.add_image(VisionItem(fit(image[None], PATCH), ""), PATCH)
    document.add_tokens(tokenizer.encode(" them"))
    image = "<|media_begin|><|media_pad|><|media_end|>"
    made = processor(
        text=f"See {image}{image} them",
        images=[Image.fromarray(image) for image in pixels],
        return_tensors="pt",
    )
    assert made["input_ids"][0].tolist() == document.tokens
    assert made["image_grid_thw"].tolist() == [list(grid) for grid in document.grids]
    torch.testing.assert_close(
        made["pixel_values"], pixels_of(torch.cat(document.patches)), rtol=0, atol=1e-6
    )


def test_the_settings_that_servers_read_are_present(hf: Path) -> None:
    config = json.loads((hf / "config.json").read_text())
    assert config["architectures"] == ["KimiK25ForConditionalGeneration"]
    assert config["text_config"]["architectures"] == ["DeepseekV3ForCausalLM"]
    assert config["media_placeholder_token_id"] == config["image_token_id"] == 4
    vision = config["vision_config"]
    assert vision["vt_hidden_size"] == vision["hidden_size"] == 16
    assert vision["text_hidden_size"] == config["text_config"]["hidden_size"] == 32
    processing = json.loads((hf / "preprocessor_config.json").read_text())["media_proc_cfg"]
    assert (processing["patch_size"], processing["merge_kernel_size"]) == (PATCH, 2)
    films = json.loads((hf / "video_preprocessor_config.json").read_text())
    assert films["fps"] == processing["sample_fps"] == 2


def test_dtype_rounds_weights_but_not_the_routers_bias(run_dir: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    export(run_dir, tmp_path / "out", dtype="bfloat16")
    for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
        bias = name.endswith("e_score_correction_bias")
        assert tensor.dtype == (torch.float32 if bias else torch.bfloat16), name
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == "bfloat16"


def test_a_bfloat16_run_exports_weights_or_float32_masters(
    hf: Path, run_dir: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    in_float32 = load_file(hf / "model.safetensors")
    sixteen = run_dir.parent / "run16"
    masters = load_file(export(sixteen, tmp_path / "a", dtype="float32") / "model.safetensors")
    assert masters.keys() == in_float32.keys()
    assert all(torch.equal(masters[name], tensor) for name, tensor in in_float32.items())
    rounded = load_file(export(sixteen, tmp_path / "b") / "model.safetensors")
    for name, tensor in in_float32.items():
        bias = name.endswith("e_score_correction_bias")
        assert torch.equal(rounded[name], tensor if bias else tensor.bfloat16()), name


def error_of(*args: Any, **kwargs: Any) -> str:
    with pytest.raises(PretrainError) as error:
        export(*args, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_the_command_names_the_checkpoint(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run may have been continued since."""
    out = tmp_path / "hf"
    assert cli.main(["export", str(run_dir), "--to", "hf", "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"wrote {out} from the checkpoint of step {STEP}\n"


def test_export_errors_name_cause_and_remedy(run_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert "nowhere is not a folder" in error_of(tmp_path / "nowhere", out)
    assert "has no checkpoint: train first" in error_of(tmp_path, out)
    assert f"has no checkpoint of step 3: it has {STEP}" in error_of(run_dir, out, step=3)
    out.mkdir()
    (out / "notes.txt").touch()
    assert "out exists: remove it" in error_of(run_dir, out)
    (tmp_path / "file").touch()
    assert "cannot write" in error_of(run_dir, tmp_path / "file" / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "out"]


def test_a_damaged_checkpoint_is_an_error(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "copy"
    path = storage.path_of(copy / "checkpoints", STEP)
    path.parent.mkdir(parents=True)
    newest = storage.path_of(run_dir / "checkpoints", STEP)
    path.mkdir()
    for file in newest.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    assert "copy has no tokenizer.json" in error_of(copy)
    (copy / "tokenizer.json").write_bytes((run_dir / "tokenizer.json").read_bytes())

    saved = storage.Checkpoint.open(path)
    name = "model.language.decoder.layers.0.mlp.linear_fc2.weight"
    for change, message in (
        ({}, f"it has no {name}"),
        (
            {name: saved.tensors[name]._replace(shape=torch.Size([1, 2]))},
            f"{name} has shape (1, 2) in it",
        ),
    ):
        others = {key: value for key, value in saved.tensors.items() if key != name} | change
        changed = dataclasses.replace(saved, tensors=others)
        monkeypatch.setattr(storage.Checkpoint, "open", lambda _path, changed=changed: changed)
        assert message in error_of(copy)
    monkeypatch.undo()

    data = next(path.glob("*.safetensors"))
    data.write_bytes(data.read_bytes()[:-1])
    assert "is damaged" in error_of(copy)
    assert not (copy / "hf").exists()
