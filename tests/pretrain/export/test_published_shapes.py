"""Checkpoints in the shapes of published models are imported, trained and exported.

The checkpoints are tiny and random, and made with transformers only.
"""

import json
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from pretrain import batches, generate, parallel
from pretrain.data import Document
from pretrain.data.packing import pack
from pretrain.export.from_hf import import_hf
from pretrain.export.to_hf import export
from pretrain.metrics import read
from pretrain.model import multimodal
from tests.distributed import training
from tests.distributed.launch import launch
from tests.pretrain.export.published import SHAPES, Published, publish, transformers_logits

pytest.importorskip("transformers", minversion="5.23")

VISION = ("vision.num_layers=1", "vision.hidden_size=16", "vision.num_heads=2")
TRAINED = (
    *("steps=1", "global_batch_size=2", "micro_batch_size=1", "data.max_corpus_mb=1.0"),
    *("data.images.max_chars=10", "optimizer.warmup_steps=0", "optimizer.decay_steps=0"),
    *("optimizer.lr=1e-3", "peak_tflops=1.0", "evaluation.sequences=2", "evaluation.captions=2"),
    "evaluation.transcriptions=1",
)


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
        notes = import_hf(Path(folder, name), run_dir, VISION).notes
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
    torch.testing.assert_close(imported[name].logits, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", SHAPES)
def test_an_imported_model_is_exported_in_the_same_layout(
    published: dict[str, Published], imported: dict[str, Imported], tmp_path: Path, name: str
) -> None:
    before = published[name]
    run_dir = before.folder.with_name(f"{name}-run")
    folder = export(run_dir, tmp_path / "out", step=0, text_only=True)
    after = load_file(folder / "model.safetensors")
    assert after.keys() == before.weights.keys()
    for key, tensor in before.weights.items():
        assert tensor.dtype == after[key].dtype, key
        assert torch.equal(tensor, after[key]), key
    old, new = (json.loads((path / "config.json").read_text()) for path in (before.folder, folder))
    # Kimi K2 is DeepSeek-V3 by another name, which only its files of code give to transformers.
    assert new["model_type"] == old["model_type"].replace("kimi_k2", "deepseek_v3")
    for key in ("architectures", "vocab_size", "max_position_embeddings"):
        assert new[key] == old[key], key
    assert transformers_logits(folder, before.tokens).equal(before.logits)


@pytest.mark.parametrize("name", SHAPES)
def test_an_imported_model_is_trained_by_two_processes(
    root: Path, imported: dict[str, Imported], name: str
) -> None:
    config = root / f"{name}-run" / "config.yaml"
    settings = *TRAINED, *SHAPES[name].parallel, f"data.cache_dir={root}/cache"
    assert launch(training.command, 2, "train", str(config), *settings) == [(0, "")] * 2
    before, after = read(config.with_name("metrics.jsonl"))
    assert before["step"] == 0 and after["step"] == 1
    assert 1 < before["held_out_text_loss"] < 50 and 1 < after["loss"] < 50


def test_notes_say_what_differs_from_the_checkpoint(imported: dict[str, Imported]) -> None:
    (dropped, converted, _) = imported["deepseek_v3"].notes
    assert dropped == (
        "dropped the layers for multi-token prediction (model.layers.3.*), which this trainer's "
        "models lack"
    )
    assert converted == "the weights in fp8 were converted to bfloat16"
