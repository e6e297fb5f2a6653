"""Loading and writing exported models."""

import shutil
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from posttrain import model
from pretrain.errors import PretrainError
from tests.test_no_code_from_files import HF_FOLDERS, hf_folder


def test_a_saved_model_is_the_loaded_one(image_export: Path, tmp_path: Path) -> None:
    exported = model.load(image_export)
    template = "{{ bos_token }}"
    out = model.save(exported, exported.model, tmp_path / "out", template)
    before, after = (load_file(f / "model.safetensors") for f in (image_export, out))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    again = model.load(out)
    assert again.has_images and again.max_length == 64
    assert again.hf_tokenizer.chat_template == template
    model.save(again, again.model, out)  # over the folder it was loaded from


@pytest.mark.parametrize("name", HF_FOLDERS)
def test_no_code_of_a_folder_is_run(tmp_path: Path, name: str) -> None:
    hf_folder(tmp_path / "hf")
    HF_FOLDERS[name](tmp_path / "hf", tmp_path / "marker")
    with suppress(PretrainError):
        model.load(tmp_path / "hf")
    assert not (tmp_path / "marker").exists()


def test_other_folders_are_one_line(text_export: Path, tmp_path: Path) -> None:
    with pytest.raises(PretrainError, match="nothing"):
        model.load(tmp_path / "nothing")
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for file in text_export.iterdir():
        (damaged / file.name).write_bytes(file.read_bytes())
    (damaged / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(PretrainError, match="cannot be loaded") as error:
        model.load(damaged)
    assert "\n" not in str(error.value)


def test_an_incomplete_folder_is_one_line(text_export: Path, tmp_path: Path) -> None:
    """transformers would initialize missing weights at random, and know no special tokens."""
    folder = shutil.copytree(text_export, tmp_path / "weights")
    weights = load_file(folder / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(PretrainError, match=r"lacks the weight model\.norm\.weight"):
        model.load(folder)
    folder = shutil.copytree(text_export, tmp_path / "tokens")
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(PretrainError, match="lacks eos_token") as error:
        model.load(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "content", ["{}", '{"media_proc_cfg": {}}', '{"media_proc_cfg": {"patch_size": "x"}}', "[]"]
)
def test_settings_of_images_that_cannot_be_read_are_one_line(
    image_export: Path, tmp_path: Path, content: str
) -> None:
    folder = shutil.copytree(image_export, tmp_path / "hf")
    (folder / "preprocessor_config.json").write_text(content)
    with pytest.raises(PretrainError, match=r"preprocessor_config\.json") as error:
        model.load(folder)
    assert "\n" not in str(error.value)


def test_weights_that_are_not_finite_are_refused(text_export: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(text_export, tmp_path / "hf")
    file = folder / "model.safetensors"
    weights = load_file(file)
    weights["model.norm.weight"][3] = float("nan")
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(PretrainError, match=r"model\.norm\.weight is not finite"):
        model.load(folder)
