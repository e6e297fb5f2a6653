"""An imported checkpoint is a run with the same weights, which can be trained further."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from pretrain import generate, parallel
from pretrain.checkpoint import storage
from pretrain.errors import PretrainError
from pretrain.export.from_hf import import_hf
from pretrain.export.hf_folder import INDEX
from pretrain.export.to_hf import export
from pretrain.metrics import read
from tests.distributed import training
from tests.distributed.launch import launch
from tests.pretrain.saved_run import STEP, Made

# Changes of the configuration of runs that are exported, imported and exported again.
ROUND_TRIPS: dict[str, dict[str, Any]] = {
    "documents": {},
    "chat": {"sources": [{"type": "chat", "path": "chats.jsonl"}]},
    "small-images": {"max_image_tokens": 7, "video_fps": 0.5},
    "images-above-the-context": {"max_image_tokens": 5000},
    "long-context": {"seq_length": 8192},
}


class Imported(NamedTuple):
    """Results of :func:`import_exports`.

    Attributes:
        status: exit code and error line of training.
        rounded: parameters of the bfloat16 export, imported.
        notes: of the import of a text model.
        text_bytes: size of its run.
    """

    status: tuple[int, str]
    rounded: dict[str, Tensor]
    notes: list[str]
    text_bytes: int


def import_exports(folder: str) -> Imported:
    """Import all exports, and train from one of them."""
    root = Path(folder)
    for name in ("", "-scaled", "-bf16", "-tied", *saved_folders(root)):
        import_hf(root / f"hf{name}", root / f"imported{name}")
    for name in ROUND_TRIPS:
        for kind in ("", "-text"):
            import_hf(root / "trips" / f"{name}{kind}", root / "trips" / f"{name}{kind}-run")
    vision = ["vision.num_layers=1", "vision.hidden_size=16", "vision.num_heads=2"]
    import_hf(root / "hf-text", root / "imported-text", vision)
    _, notes = import_hf(root / "hf-text", root / "imported-new")
    size = sum(f.stat().st_size for f in root.glob("imported-new/**/*") if f.is_file())
    import_hf(root / "hf-tied", root / "imported-untied", ["language.tie_embeddings=false"])
    model = generate.load(root / "imported-bf16")
    rounded = {name: tensor.clone() for name, tensor in model.language.named_parameters()}
    parallel.stop()
    status = training.command(
        "train",
        str(root / "imported" / "config.yaml"),
        *(f"data.cache_dir={root}/cache", "data.max_corpus_mb=1.0", "data.images.max_chars=10"),
        *("data.vision_share=0.2", "steps=2", "global_batch_size=2", "micro_batch_size=2"),
        *("optimizer.warmup_steps=0", "optimizer.decay_steps=0", "seed=0"),
        *("evaluation.every=2", "evaluation.sequences=4", "evaluation.captions=6"),
        "evaluation.transcriptions=1",
    )
    return Imported(status, rounded, notes, size)


def saved_folders(root: Path) -> list[str]:
    """Names of the folders that transformers saved, without the prefix ``hf``."""
    return sorted(path.name.removeprefix("hf") for path in root.glob("hf-saved*"))


def with_data(run: Path, copy: Path, **data: Any) -> Path:
    """Copy a run, and change the data settings of its configuration."""
    shutil.copytree(run, copy)
    manifest = storage.path_of(copy / "checkpoints", STEP) / "manifest.json"
    content = json.loads(manifest.read_text())
    content["facts"]["config"]["data"] |= data
    manifest.write_text(json.dumps(content))
    return copy


def save_with_transformers(root: Path) -> None:
    """Load and save the exported models with transformers, in one file, in several, in bfloat16."""
    transformers = pytest.importorskip("transformers", minversion="5.23")
    for kind, name in (("AutoModelForImageTextToText", "hf"), ("AutoModelForCausalLM", "hf-text")):
        for how, dtype, size in (
            ("one", torch.float32, "1GB"),
            ("shards", torch.float32, "60KB"),
            ("bf16", torch.bfloat16, "1GB"),
        ):
            model = getattr(transformers, kind).from_pretrained(root / name, dtype=dtype)
            out = root / f"hf-saved{name.removeprefix('hf')}-{how}"
            model.save_pretrained(out, max_shard_size=size)
            transformers.AutoTokenizer.from_pretrained(root / name).save_pretrained(out)


@pytest.fixture(scope="module")
def hf(made: Made, run_folder: Path) -> Path:
    run = run_folder / "run"
    export(run, run_folder / "hf-bf16", dtype="bfloat16")
    export(run, run_folder / "hf-text", text_only=True)
    export(run_folder / "scaled", run_folder / "hf-scaled")
    for name, data in ROUND_TRIPS.items():
        changed = with_data(run, run_folder / "trips" / f"{name}-before", **data)
        export(changed, run_folder / "trips" / name)
        export(changed, run_folder / "trips" / f"{name}-text", text_only=True)
    tie(export(run, run_folder / "hf-tied"))
    whole = export(run, run_folder / "hf", max_file_bytes=200_000)
    save_with_transformers(run_folder)
    return whole


def tie(folder: Path) -> None:
    """Remove the output layer, as in a model that shares it with the embedding."""
    change_config(tie_word_embeddings=True)(folder)
    change_weights(**{"language_model.lm_head.weight": None})(folder)


@pytest.fixture(scope="module")
def imported(hf: Path, run_folder: Path) -> Imported:
    (imported,) = launch(import_exports, 1, str(run_folder))
    return imported  # type: ignore[no-any-return]


def weights(folder: Path) -> dict[str, Tensor]:
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


@pytest.mark.parametrize("name", ["", "-bf16", "-scaled"])
def test_exporting_an_import_is_the_identity(
    imported: Imported, run_folder: Path, tmp_path: Path, name: str
) -> None:
    again = export(run_folder / f"imported{name}", tmp_path / "again", step=0)
    assert_same_weights(weights(run_folder / f"hf{name}"), weights(again))


def assert_same_weights(before: dict[str, Tensor], after: dict[str, Tensor]) -> None:
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert tensor.dtype == after[key].dtype
        assert torch.equal(tensor.view(torch.uint8), after[key].view(torch.uint8)), key


@pytest.mark.parametrize("kind", ["", "-text"])
@pytest.mark.parametrize("name", ROUND_TRIPS)
def test_import_and_export_preserve_every_file(
    imported: Imported, run_folder: Path, tmp_path: Path, name: str, kind: str
) -> None:
    before = run_folder / "trips" / f"{name}{kind}"
    after = export(
        run_folder / "trips" / f"{name}{kind}-run", tmp_path / "out", text_only=bool(kind)
    )
    assert sorted(f.name for f in before.iterdir()) == sorted(f.name for f in after.iterdir())
    for file in before.iterdir():
        assert file.read_bytes() == (after / file.name).read_bytes(), file.name


def test_an_export_has_the_chat_template_and_the_end_tokens_of_replies(
    hf: Path, run_folder: Path
) -> None:
    chat = run_folder / "trips" / "chat"
    assert "<|im_middle|>" in (chat / "chat_template.jinja").read_text()
    assert len(json.loads((chat / "generation_config.json").read_text())["eos_token_id"]) == 2


@pytest.mark.parametrize("how", ["one", "shards", "bf16"])
@pytest.mark.parametrize("kind", ["", "-text"])
def test_models_saved_by_transformers_can_be_imported(
    imported: Imported, run_folder: Path, tmp_path: Path, kind: str, how: str
) -> None:
    name = f"-saved{kind}-{how}"
    assert name in saved_folders(run_folder)
    sharded = (run_folder / f"hf{name}" / INDEX).exists()
    assert sharded == (how == "shards")
    again = export(run_folder / f"imported{name}", tmp_path / "again", text_only=bool(kind))
    before = weights(run_folder / f"hf{kind}")
    after = weights(again)
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        # transformers keeps routers in float32.
        assert torch.equal(after[key], tensor.to(after[key].dtype)), key
        if "embed_tokens" in key or "q_a_proj" in key:
            assert after[key].dtype == (torch.bfloat16 if how == "bf16" else torch.float32)


def test_a_tied_output_layer_stays_tied_or_becomes_a_copy_of_the_embedding(
    imported: Imported, run_folder: Path, tmp_path: Path
) -> None:
    tied = export(run_folder / "imported-tied", tmp_path / "tied")
    assert_same_weights(weights(run_folder / "hf-tied"), weights(tied))
    assert json.loads((tied / "config.json").read_text())["tie_word_embeddings"] is True
    found = weights(export(run_folder / "imported-untied", tmp_path / "untied"))
    embedding = found["language_model.model.embed_tokens.weight"]
    assert torch.equal(found["language_model.lm_head.weight"], embedding)


def test_training_continues_from_imported_weights(
    imported: Imported, made: Made, run_folder: Path
) -> None:
    assert imported.status == (0, "")
    records = read(run_folder / "imported" / "metrics.jsonl")
    assert [record["step"] for record in records] == [0, 1, 2]
    for name, value in made.held_out.items():
        assert records[0][name] == pytest.approx(value, abs=1e-6), name
    # Two steps change the loss, up or down.
    assert 0 < abs(records[2]["held_out_text_loss"] - records[0]["held_out_text_loss"]) < 0.1


def test_bfloat16_weights_are_loaded_as_float32(imported: Imported, made: Made) -> None:
    for name, tensor in imported.rounded.items():
        whole = made.tensors[f"language.{name}"]
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, whole.bfloat16().float()), name


def test_a_text_model_gets_a_new_vision_encoder(
    imported: Imported, made: Made, run_folder: Path, tmp_path: Path
) -> None:
    found = weights(export(run_folder / "imported-text", tmp_path / "out"))
    text = {f"language_model.{name}": t for name, t in weights(run_folder / "hf-text").items()}
    assert all(torch.equal(found[name], tensor) for name, tensor in text.items())
    new = {name: tensor for name, tensor in found.items() if name not in text}
    assert new["vision_tower.encoder.blocks.0.wqkv.weight"].std() > 0
    assert new["mm_projector.pre_norm.weight"].tolist() == [1.0] * 16


def test_the_new_vision_encoder_is_small_and_reported(imported: Imported) -> None:
    (note,) = imported.notes
    assert "no vision encoder: made a new, untrained one of" in note and "vision.num_layers" in note
    assert imported.text_bytes < 3_000_000


@pytest.fixture
def copy(hf: Path, run_folder: Path, tmp_path: Path) -> Path:
    """Copy of an exported text model, to be damaged."""
    folder = tmp_path / "copy"
    folder.mkdir()
    for file in (run_folder / "hf-text").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def import_error(source: Path, *overrides: str) -> str:
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


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def indexed(**placed: str) -> Callable[[Path], None]:
    """Write an index with other files for some tensors; ``""`` removes a tensor from it."""

    def change(folder: Path) -> None:
        names = dict.fromkeys(load_file(folder / "model.safetensors"), "model.safetensors") | placed
        names = {name: file for name, file in names.items() if file}
        (folder / INDEX).write_text(json.dumps({"weight_map": names}))

    return change


def twice(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({NORM: tensors[NORM]}, folder / "other.safetensors")
    indexed(**{"other": "other.safetensors"})(folder)


def change_file(name: str, content: str | bytes) -> Callable[[Path], None]:
    return lambda folder: (
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
        and None
    )


def link(name: str, target: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        outside = folder.parent / target
        outside.write_bytes((folder / name).read_bytes())
        (folder / name).unlink()
        (folder / name).symlink_to(outside)

    return change


NORM = "model.layers.1.self_attn.q_a_layernorm.weight"
HEAD = "lm_head.weight"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "cannot read"),
        (change_file("config.json", "{"), "config.json is not valid JSON"),
        (change_file("config.json", b"\xff{}"), "config.json is not valid JSON"),
        (change_file("config.json", "[" * 100_000), "config.json is not valid JSON"),
        (change_file("config.json", "[1]"), "config.json must be a JSON object"),
        (change_config(model_type="gpt2"), 'copy: config.json has model_type="gpt2"'),
        (
            change_config(kv_lora_rank=8),
            "shape (24, 32), but its config.json requires (16, 32)",
        ),
        (change_config(num_hidden_layers=9999), "no tensor model.layers.3.input_layernorm.weight"),
        (change_config(n_routed_experts=1 << 20), "but its config.json requires (1048576, 32)"),
        (change_config(vocab_size=399), "its tokenizer has 400 tokens and its embedding 399 rows"),
        (change_config(max_position_embeddings=-1), "max_position_embeddings=-1: it must be"),
        (change_config(tie_word_embeddings=True), f"but {HEAD} differs from model.embed_tokens"),
        (change_weights(**{NORM: None}), f"copy has no tensor {NORM}, which its config.json req"),
        (change_weights(**{NORM: torch.ones(3)}), f"{NORM} in "),
        (change_weights(**{NORM: torch.ones(16).int()}), "has dtype I32: only checkpoints in"),
        (change_weights(extra=torch.ones(1)), "has a tensor extra, which its config.json does not"),
        (change_weights(**{NORM: torch.full((16,), torch.nan)}), f"{NORM} in "),
        (change_weights(**{NORM: torch.full((16,), torch.inf)}), "has NaN or infinite values"),
        (change_weights(**{HEAD: None}), f"copy has no tensor {HEAD}"),
        (
            change_weights(**{"model.layers.1.mlp.experts.gate_up_proj": torch.ones(1)}),
            "save_pretrained(..., save_original_format=True)",
        ),
        (cut_off, "model.safetensors is damaged: "),
        (change_file("model.safetensors", b""), "model.safetensors is damaged: "),
        (change_file("model.safetensors", b"\xff" * 100), "model.safetensors is damaged: "),
        (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors is missing"),
        (pickled, "pytorch_model.bin, a pickle, which can run code"),
        (indexed(**{NORM: "lost.safetensors"}), "copy is incomplete: lost.safetensors is missing"),
        (indexed(**{NORM: "../run/x.safetensors"}), "a file outside the folder: '../run/x.safe"),
        (indexed(**{NORM: "/etc/passwd"}), "a file outside the folder: '/etc/passwd'"),
        (indexed(**{NORM: "tokenizer.json"}), "names tokenizer.json: only safetensors files are"),
        (indexed(**{NORM: ""}), f"has a tensor {NORM}, which {INDEX} lists in no file"),
        (indexed(more="model.safetensors"), f"lacks the tensor more, which {INDEX} lists"),
        (twice, f"other.safetensors has a tensor {NORM}, which {INDEX} lists in model.safe"),
        (change_file(INDEX, "{}"), "has no weight_map of names to files"),
        (change_file(INDEX, '{"weight_map": {"a": 1}}'), "has no weight_map of names to files"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "copy has no tokenizer: neither"),
        (change_file("tokenizer.json", "{}"), "is neither a tokenizer.json nor a tiktoken file"),
        (change_file("generation_config.json", "{"), "generation_config.json is not valid JSON"),
        (link("model.safetensors", "w"), "model.safetensors is a link out of the folder"),
        (link("tokenizer.json", "t"), "tokenizer.json is a link out of the folder"),
        (link("chat_template.jinja", "c"), "chat_template.jinja is a link out of the folder"),
    ],
)
def test_import_errors_name_the_cause(
    copy: Path, damage: Callable[[Path], None], message: str
) -> None:
    damage(copy)
    assert message in import_error(copy)


def test_links_of_the_hugging_face_cache_are_followed(copy: Path, tmp_path: Path) -> None:
    """snapshots/REVISION has links to ../../blobs. Only the tokenizer is missing here."""
    snapshot, blobs = tmp_path / "snapshots" / "1", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(copy.iterdir()):
        if file.name != "tokenizer.json":
            file.rename(blobs / str(number))
            (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    assert "has no tokenizer" in import_error(snapshot)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_mean": [0.48, 0.46, 0.41]}, "preprocessor_config.json has image_mean=[0.48"),
        ({"patch_size": 16}, "has patch_size=16, but this trainer's models have 14"),
        ({"media_proc_cfg": {"in_patch_limit": "many"}}, "limits images to 'many' patches"),
        ({"media_proc_cfg": {"sample_fps": -1}}, "has sample_fps=-1: it must be a number"),
    ],
)
def test_an_unsupported_image_processor_is_an_error(
    hf: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(hf, folder)
    file = folder / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    assert message in import_error(folder)


def damage_at_random(folder: str, out: str) -> None:
    """Damage files of an export, and import them."""
    source, number = Path(folder), 0

    @settings(deadline=None, max_examples=60)
    @given(
        st.sampled_from(sorted(file.name for file in source.iterdir())),
        st.sampled_from(["cut", "flip", "fill", "remove"]),
        st.floats(0, 1, exclude_max=True),
        st.integers(1, 255),
    )
    def survive(name: str, how: str, place: float, value: int) -> None:
        nonlocal number
        number += 1
        copy = Path(out) / str(number)
        shutil.copytree(source, copy / "hf")
        file = copy / "hf" / name
        content = bytearray(file.read_bytes())
        at = int(place * len(content))
        if how == "cut":
            file.write_bytes(content[:at])
        elif how == "flip":
            content[at] ^= value
            file.write_bytes(content)
        elif how == "fill":
            file.write_bytes(bytes([value]) * len(content))
        else:
            file.unlink()
        try:
            import_hf(copy / "hf", copy / "run")
        except PretrainError as error:
            assert "\n" not in str(error)
        finally:
            shutil.rmtree(copy)

    survive()


def test_damaged_files_are_imported_or_give_a_one_line_error(
    hf: Path, run_folder: Path, tmp_path: Path
) -> None:
    launch(damage_at_random, 1, str(run_folder / "hf-text"), str(tmp_path))


def test_the_folder_of_a_run_is_named(tmp_path: Path) -> None:
    """A run of posttrain has its settings in config.json."""
    exported = tmp_path / "trained" / "hf"
    exported.mkdir(parents=True)
    for folder in (exported, exported.parent):
        (folder / "config.json").write_text("{}")
    with pytest.raises(PretrainError, match=f"a run's folder: give its exported model, {exported}"):
        import_hf(exported.parent, tmp_path / "run")


def test_contradicting_overrides_and_used_folders_are_errors(copy: Path, run_folder: Path) -> None:
    line = import_error(copy, "language.num_layers=4")
    assert line == "language.num_layers=4 contradicts the checkpoint, which has 3: leave it out"
    scaled = ("factor=2", "original_max_position_embeddings=4096")
    line = import_error(copy, *(f"language.rope_scaling.{setting}" for setting in scaled))
    assert "language.rope_scaling={'factor': 2.0" in line
    assert "unknown configuration key 'language.layers'" in import_error(copy, "language.layers=4")
    assert "data.sources[0].type must be" in import_error(copy, "data.sources=[{type: foo}]")
    nowhere = import_error(copy.parent / "nowhere")
    assert "cannot read" in nowhere and "as `python -m pretrain export RUN --to hf`" in nowhere
    with pytest.raises(PretrainError, match="run has checkpoints or a config"):
        import_hf(copy, run_folder / "run")
    used = copy.parent / "used"
    used.mkdir()
    (used / "config.yaml").write_text("steps: 3")
    with pytest.raises(PretrainError, match="used has checkpoints or a config"):
        import_hf(copy, used)
    assert (used / "config.yaml").read_text() == "steps: 3"
