"""Checkpoints in the shapes of published models are imported, trained and exported.

The checkpoints are tiny and random, and made with transformers only.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pretrain import batches, config, generate, parallel
from pretrain.data import Document
from pretrain.data.packing import pack
from pretrain.errors import PretrainError
from pretrain.export.from_hf import import_hf
from pretrain.export.to_hf import export
from pretrain.metrics import read
from pretrain.model import multimodal
from pretrain.plan.parameters import count_parameters
from tests.distributed import training
from tests.distributed.launch import launch
from tests.pretrain.export.published import SHAPES, TOKENS, Published, publish, transformers_logits

pytest.importorskip("transformers", minversion="5.23")

VISION = ("vision.num_layers=1", "vision.hidden_size=16", "vision.num_heads=2")
TRAINED = (
    *("steps=1", "global_batch_size=2", "micro_batch_size=1", "data.max_corpus_mb=1.0"),
    *("data.images.max_chars=10", "optimizer.warmup_steps=0", "optimizer.decay_steps=0"),
    *("optimizer.lr=1e-3", "peak_tflops=1.0", "evaluation.sequences=2", "evaluation.captions=2"),
    "evaluation.transcriptions=1",
)

ADDED = {"llama": 3}
"""Rows that an import adds to the vocabulary."""


class Imported(NamedTuple):
    """A run made from a checkpoint.

    Attributes:
        logits: [s, vocabulary], the logits of the trainer's model.
    """

    notes: list[str]
    logits: Tensor


@torch.no_grad()
def import_all(folder: str, texts: dict[str, Tensor]) -> dict[str, Imported]:
    """Import every checkpoint, and compute the logits of a text."""
    found = {}
    for name, tokens in texts.items():
        run_dir = Path(folder, f"{name}-run")
        notes = import_hf(Path(folder, name), run_dir, [*VISION, *SHAPES[name].overrides]).notes
        model = generate.load(run_dir)
        document = Document(model.tokenizer).add_tokens(tokens[0, 1:].tolist())
        (sample,) = pack([document], len(document), model.config.vision.patch_size, 0)
        batch = batches.collate([sample], model.device)
        assert batch.tokens.equal(tokens)
        features = model.tower(batch.patches, batch.grids)
        placeholder = model.tokenizer.media_pad
        logits = multimodal.forward(model.language, batch, features, placeholder, logits=True)
        found[name] = Imported(notes, logits[0])
        parallel.stop()
    return found


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("published")


@pytest.fixture(scope="module")
def published(root: Path) -> dict[str, Published]:
    return {name: publish(shape, root / name) for name, shape in SHAPES.items()}


@pytest.fixture(scope="module")
def imported(root: Path, published: dict[str, Published]) -> dict[str, Imported]:
    (found,) = launch(import_all, 1, str(root), {n: model.tokens for n, model in published.items()})
    return found  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", SHAPES)
def test_an_imported_model_has_the_logits_of_transformers(
    published: dict[str, Published], imported: dict[str, Imported], name: str
) -> None:
    expected = published[name].logits
    assert expected.std() > 0.5
    found, added = imported[name].logits.split([expected.shape[1], ADDED.get(name, 0)], dim=1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert not added.any()


@pytest.mark.parametrize("name", SHAPES)
def test_the_plan_of_an_imported_run_counts_the_weights_of_the_checkpoint(
    root: Path, published: dict[str, Published], imported: dict[str, Imported], name: str
) -> None:
    loaded = config.load(root / f"{name}-run" / "config.yaml")
    weights = published[name].weights
    added = ADDED.get(name, 0) * 2 * loaded.language.hidden_size
    trained = [weight for key, weight in weights.items() if not key.endswith("correction_bias")]
    assert count_parameters(loaded)["language"] == added + sum(map(torch.numel, trained))


def exported(run_dir: Path, out: Path, step: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the configuration of an export of the language model."""
    folder = export(run_dir, out, step=step, text_only=True)
    return load_file(folder / "model.safetensors"), read_config(folder)


def read_config(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


@pytest.mark.parametrize("name", SHAPES)
def test_an_imported_model_is_exported_in_the_same_layout(
    root: Path, published: dict[str, Published], imported: dict[str, Imported], name: str
) -> None:
    before = published[name]
    after, config = exported(root / f"{name}-run", root / f"{name}-out", 0)
    assert after.keys() == before.weights.keys()
    for key, tensor in before.weights.items():
        assert tensor.dtype == after[key].dtype, key
        assert torch.equal(tensor, after[key]), key
    assert transformers_logits(root / f"{name}-out", before.tokens).equal(before.logits)
    original = read_config(before.folder)
    # Kimi K2 is DeepSeek-V3 by another name, which only its files of code give to transformers.
    assert config["model_type"] == original["model_type"].replace("kimi_k2", "deepseek_v3")
    for key in ("architectures", "vocab_size", "max_position_embeddings", "tie_word_embeddings"):
        assert config[key] == original[key], key


@pytest.mark.parametrize("name", SHAPES)
def test_an_imported_model_is_trained_by_two_processes(
    root: Path, published: dict[str, Published], imported: dict[str, Imported], name: str
) -> None:
    file = root / f"{name}-run" / "config.yaml"
    settings = *TRAINED, *SHAPES[name].parallel, f"data.cache_dir={root}/cache"
    assert launch(training.command, 2, "train", str(file), *settings) == [(0, "")] * 2
    record = read(file.with_name("metrics.jsonl"))[-1]
    assert record["step"] == 1 and 1 < record["loss"] < 50
    trained, _ = exported(file.parent, root / f"{name}-trained", 1)
    for key, tensor in published[name].weights.items():
        assert trained[key].shape == tensor.shape
        assert not torch.equal(trained[key], tensor), key
    assert transformers_logits(root / f"{name}-trained", published[name].tokens).isfinite().all()


def test_notes_say_what_differs_from_the_checkpoint(imported: dict[str, Imported]) -> None:
    (dropped, converted, _, text) = imported["deepseek_v3"].notes
    assert text == "the tokenizer has no tokens for images, so that the data is text alone"
    assert dropped == (
        "dropped the layers for multi-token prediction (model.layers.3.*), which this trainer's "
        "models lack"
    )
    assert converted == "the weights in fp8 were converted to bfloat16"
    assert not any("does not know" in note for model in imported.values() for note in model.notes)
    assert imported["llama"].notes[0] == (
        "added 3 rows of zeros to the 301 of the vocabulary; export leaves them out"
    )


FP8 = "model.layers.1.self_attn.kv_b_proj.weight"


def change_tensor(name: str, change: Callable[[Tensor], Tensor] | None) -> Callable[[Path], None]:
    """Change a tensor of a checkpoint, or remove it."""

    def apply(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        tensor = tensors.pop(name)
        if change is not None:
            tensors[name] = change(tensor)
        save_file(tensors, folder / "model.safetensors")

    return apply


def change_config(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: (
        (folder / "config.json").write_text(json.dumps(read_config(folder) | changes)) and None
    )


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (change_tensor(f"{FP8}_scale_inv", None), f"has no tensor {FP8}_scale_inv, which its con"),
        (change_tensor(f"{FP8}_scale_inv", lambda scales: scales[:1]), "requires (4, 2)"),
        (
            change_tensor(f"{FP8}_scale_inv", lambda scales: scales / 0),
            f"{FP8}_scale_inv in ",
        ),
        (change_tensor(f"{FP8}_scale_inv", Tensor.int), f"{FP8}_scale_inv in "),
        (change_tensor(FP8, Tensor.float), f"has a tensor {FP8}_scale_inv, which its config.json"),
        (change_config(quantization_config=None), "has dtype F8_E4M3: only checkpoints in float32"),
        (change_config(num_nextn_predict_layers=0), "has a tensor model.layers.3."),
        (
            change_config(vocab_size=TOKENS - 1),
            "its tokenizer has 300 tokens and its embedd",
        ),
    ],
)
def test_damaged_checkpoints_are_errors(
    published: dict[str, Published], tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(published["deepseek_v3"].folder, copy)
    damage(copy)
    with pytest.raises(PretrainError) as error:
        import_hf(copy, tmp_path / "run")
    assert message in str(error.value) and "\n" not in str(error.value)


def test_overrides_that_contradict_the_checkpoint_are_errors(
    published: dict[str, Published], tmp_path: Path
) -> None:
    for name, override, message in (
        (
            "deepseek_v3",
            f"language.vocab_size={TOKENS}",
            "the checkpoint, which has 304",
        ),
        (
            "deepseek_v3",
            "language.vocab_size=null",
            "the checkpoint, which has 304",
        ),
        (
            "deepseek_v3",
            "language.tie_embeddings=true",
            "the checkpoint, which has False",
        ),
        ("moonlight", "language.q_lora_rank=16", "the checkpoint, which has None"),
    ):
        with pytest.raises(PretrainError, match=message):
            import_hf(published[name].folder, tmp_path / "run", [override])
