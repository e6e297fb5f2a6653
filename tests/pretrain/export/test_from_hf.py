"""A published checkpoint becomes a run with the same weights, which trains on from them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pretrain import sample
from pretrain.errors import PretrainError
from pretrain.export.from_hf import import_hf
from pretrain.export.to_hf import export
from pretrain.runtime import processes
from pretrain.runtime.metrics import read
from tests.distributed import training
from tests.distributed.launch import launch
from tests.pretrain.saved_run import Made


class Imported(NamedTuple):
    """What :func:`bring_back` found."""

    status: tuple[int, str]
    rounded: dict[str, Tensor]


def bring_back(folder: str) -> Imported:
    """Import what was exported: all of it, rounded to bfloat16, and the text alone; train once."""
    root = Path(folder)
    import_hf(root / "hf", root / "imported")
    import_hf(root / "hf-scaled", root / "imported-scaled")
    import_hf(root / "bf16", root / "imported-bf16")
    vision = ["vision.num_layers=1", "vision.hidden_size=16", "vision.num_heads=2"]
    import_hf(root / "hf-text", root / "imported-text", vision)
    model = sample.load(root / "imported-bf16")
    rounded = {name: tensor.clone() for name, tensor in model.language.named_parameters()}
    processes.stop()
    status = training.command(
        "train",
        str(root / "imported" / "config.yaml"),
        *(f"data.cache_dir={root}/cache", "data.max_corpus_mb=1.0", "data.images.max_chars=10"),
        *("data.vision_share=0.2", "steps=2", "global_batch_size=2", "micro_batch_size=2"),
        *("optimizer.warmup_steps=0", "optimizer.decay_steps=0", "seed=0"),
        *("evaluation.every=2", "evaluation.sequences=4", "evaluation.captions=6"),
        "evaluation.transcriptions=1",
    )
    return Imported(status, rounded)


@pytest.fixture(scope="module")
def hf(made: Made, run_folder: Path) -> Path:
    export(run_folder / "run", run_folder / "bf16", dtype="bfloat16")
    export(run_folder / "run", run_folder / "hf-text", text_only=True)
    export(run_folder / "scaled", run_folder / "hf-scaled")
    return export(run_folder / "run", run_folder / "hf", max_file_bytes=200_000)


@pytest.fixture(scope="module")
def imported(hf: Path, run_folder: Path) -> Imported:
    (imported,) = launch(bring_back, 1, str(run_folder))
    return imported  # type: ignore[no-any-return]


def weights(folder: Path) -> dict[str, Tensor]:
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


@pytest.mark.parametrize("name", ["hf", "bf16", "hf-scaled"])
def test_import_then_export_is_the_identity(
    imported: Imported, run_folder: Path, tmp_path: Path, name: str
) -> None:
    run = run_folder / f"imported{name.removeprefix('hf') if name != 'bf16' else '-bf16'}"
    again = export(run, tmp_path / "again", step=0)
    before, after = weights(run_folder / name), weights(again)
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert tensor.dtype == after[key].dtype
        assert torch.equal(tensor.view(torch.uint8), after[key].view(torch.uint8)), key
    for file in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        assert json.loads((again / file).read_text()) == json.loads(
            (run_folder / name / file).read_text()
        )


def test_training_goes_on_from_the_weights_with_a_fresh_optimizer(
    imported: Imported, made: Made, run_folder: Path
) -> None:
    assert imported.status == (0, "")
    records = read(run_folder / "imported" / "metrics.jsonl")
    assert [record["step"] for record in records] == [0, 1, 2]
    for name, value in made.held_out.items():
        assert records[0][name] == pytest.approx(value, abs=1e-6), name
    assert records[2]["held_out_text_loss"] < records[0]["held_out_text_loss"]


def test_bfloat16_weights_are_read_into_the_model_that_trains(
    imported: Imported, made: Made
) -> None:
    for name, tensor in imported.rounded.items():
        whole = made.tensors[f"language.{name}"]
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, whole.bfloat16().float()), name


def test_a_model_of_text_gets_a_new_vision_encoder(
    imported: Imported, made: Made, run_folder: Path, tmp_path: Path
) -> None:
    found = weights(export(run_folder / "imported-text", tmp_path / "out"))
    text = {f"language_model.{name}": t for name, t in weights(run_folder / "hf-text").items()}
    assert all(torch.equal(found[name], tensor) for name, tensor in text.items())
    new = {name: tensor for name, tensor in found.items() if name not in text}
    assert new["vision_tower.encoder.blocks.0.wqkv.weight"].std() > 0
    assert new["mm_projector.pre_norm.weight"].tolist() == [1.0] * 16


@pytest.fixture
def copy(hf: Path, run_folder: Path, tmp_path: Path) -> Path:
    """An exported model of text, to be damaged."""
    folder = tmp_path / "copy"
    folder.mkdir()
    for file in (run_folder / "hf-text").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def refusal(source: Path, *overrides: str) -> str:
    run_dir = source.parent / "run"
    with pytest.raises(PretrainError) as error:
        import_hf(source, run_dir, overrides)
    assert "\n" not in str(error.value)
    assert not run_dir.exists()
    return str(error.value)


def change_config(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))

    return change


def change_weights(**changes: Tensor | None) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors") | changes
        kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        save_file(kept, folder / "model.safetensors")

    return change


def cut_off(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


NORM = "model.layers.1.self_attn.q_a_layernorm.weight"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "cannot read"),
        (lambda folder: (folder / "config.json").write_text("{"), "is not valid JSON"),
        (change_config(model_type="llama"), "copy: config.json is of model_type 'llama'"),
        (change_config(kv_lora_rank=8), "of shape (24, 32), where its config.json means (16, 32)"),
        (change_config(vocab_size=401), "its tokenizer has 400 tokens and its embedding 401 rows"),
        (change_weights(**{NORM: None}), f"copy has no tensor {NORM}"),
        (change_weights(**{NORM: torch.ones(3)}), f"{NORM} in "),
        (change_weights(**{NORM: torch.ones(16).int()}), "is of type I32: only checkpoints of"),
        (change_weights(extra=torch.ones(1)), "has a tensor extra, which a model of ours has not"),
        (cut_off, "copy are damaged: "),
        (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors is missing"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "copy has no tokenizer: neither"),
    ],
)
def test_what_does_not_fit_is_named(
    copy: Path, damage: Callable[[Path], None], message: str
) -> None:
    damage(copy)
    assert message in refusal(copy)


def test_settings_that_contradict_the_checkpoint_and_folders_in_use_are_refused(
    copy: Path, run_folder: Path
) -> None:
    line = refusal(copy, "language.num_layers=4")
    assert line == "language.num_layers=4 was asked for, but the checkpoint has 3"
    scaled = ("factor=2", "original_max_position_embeddings=4096")
    line = refusal(copy, *(f"language.rope_scaling.{setting}" for setting in scaled))
    assert "language.rope_scaling={'factor': 2.0" in line
    assert "unknown configuration key 'language.layers'" in refusal(copy, "language.layers=4")
    assert "cannot read" in refusal(copy.parent / "nowhere")
    with pytest.raises(PretrainError, match="run has checkpoints already"):
        import_hf(copy, run_folder / "run")
    mine = copy.parent / "mine"
    mine.mkdir()
    (mine / "config.yaml").write_text("steps: 3")
    with pytest.raises(PretrainError, match=r"config\.yaml exists already"):
        import_hf(copy, mine)
    assert (mine / "config.yaml").read_text() == "steps: 3"
