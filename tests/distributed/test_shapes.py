"""The shapes of published models train alike on every layout of processes."""

from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain import batches, generate, step
from pretrain.build import build
from pretrain.data import Document
from pretrain.data.packing import pack
from pretrain.model import multimodal
from pretrain.startup import set_up
from tests.distributed import training
from tests.distributed.launch import launch
from tests.distributed.test_training import _merged

Gradients = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, Gradients]:
    shapes = list(training.SHAPES.values())
    (outcomes,) = launch(training.gradients_of_each, 1, str(folder), shapes, training.EXACT)
    return {name: _merged([o]) for name, o in zip(training.SHAPES, outcomes, strict=True)}


@pytest.mark.parametrize(
    ("setting", "without"),
    [
        ("parallel.tensor=2", ()),
        ("parallel.expert=2", ("dense",)),
        ("parallel.pipeline=2", ("dense",)),  # its embedding is tied to the output head
        ("micro_batch_size=1", ()),  # data parallel
        ("recompute.granularity=full", ()),
    ],
)
def test_every_layout_gives_the_gradients_of_one_process(
    folder: Path, alone: dict[str, Gradients], setting: str, without: tuple[str, ...]
) -> None:
    shapes = {name: shape for name, shape in training.SHAPES.items() if name not in without}
    ranks = launch(
        training.gradients_of_each, 2, str(folder), list(shapes.values()), setting, training.EXACT
    )
    for name, outcomes in zip(shapes, zip(*ranks, strict=True), strict=True):
        together = _merged(outcomes)
        assert together.keys() == alone[name].keys()
        for weight, expected in alone[name].items():
            difference = (together[weight] - expected).norm()
            assert difference <= 1e-10 * expected.norm(), (name, weight)


def generations(folder: str) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Logits of the next token after each token of a text, at once and token by token."""
    here, data = set_up(training.tiny(folder, training.EXACT, "language.init_std=0.3"))
    logits = {}
    for name, shape in training.SHAPES.items():
        settings = training.tiny(folder, training.EXACT, "language.init_std=0.3", *shape)
        run = build(settings, here, data)
        run.train(False)
        (language,) = (chunk.module for chunk in run.language)
        model = generate.Model(settings, data.tokenizer, language, run.tower, here.device)
        with torch.inference_mode():
            text = Document(data.tokenizer).add_tokens(data.tokenizer.encode("def f(x): return x"))
            start = Document(data.tokenizer).add_tokens(text.tokens[1:4])
            forward = generate.CachedForward(model, start, 96)
            cached = [forward.logits]
            for token in text.tokens[4:]:
                forward.add(token)
                cached.append(forward.logits)
            batch = batches.collate(pack([text], len(text), 14, 0), here.device)
            features = run.tower(batch.patches, batch.grids)
            whole = multimodal.forward(language, batch, features, -1, logits=True)
        logits[name] = whole[0, 3:], torch.stack(cached)
    return logits


def test_generation_equals_the_whole_model_and_its_tokenizer(folder: Path) -> None:
    """Rows of the head beyond the tokenizer are never sampled."""
    (logits,) = launch(generations, 1, str(folder))
    for name, (whole, cached) in logits.items():
        assert cached.shape[1] == 400, name
        assert whole.shape[1] == (412 if name == "queries without LoRA" else 400)
        # Routers' scores are float32.
        torch.testing.assert_close(cached, whole[:, :400], rtol=1e-5, atol=1e-5)
        assert cached.std() > 0.1


def first_steps(folder: str, *overrides: str) -> dict[str, dict[str, Any]]:
    """Metrics of a first step of each shape."""
    here, data = set_up(training.tiny(folder, *overrides))
    metrics = {}
    for name, shape in training.SHAPES.items():
        settings = training.tiny(folder, *overrides, *shape)
        run = build(settings, here, data)
        metrics[name] = step.train_step(run, batches.for_step(settings, here, data, 1), 1)
    return metrics


@pytest.fixture(scope="module")
def steps(folder: Path) -> dict[str, dict[str, Any]]:
    return launch(first_steps, 2, str(folder), "optimizer.qk_clip_threshold=1e-3")[0]


def test_routers_have_metrics_where_there_are_experts(steps: dict[str, dict[str, Any]]) -> None:
    for name, metrics in steps.items():
        if name == "dense":
            assert not metrics.keys() & {"expert_load", "expert_loads", "dropped_tokens"}
        else:
            assert len(metrics["expert_loads"]) == 1
            assert metrics["dropped_tokens"] == 0
            assert 1 <= metrics["expert_load"] <= 4


def test_the_load_balancing_loss_is_reported_where_it_is_used(
    steps: dict[str, dict[str, Any]],
) -> None:
    reported = {name for name, metrics in steps.items() if "load_balancing_loss" in metrics}
    assert reported == {"softmax router"}
    assert 0.9 < steps["softmax router"]["load_balancing_loss"] < 4


def test_heads_are_clipped_unless_their_queries_and_keys_are_normalized(
    steps: dict[str, dict[str, Any]],
) -> None:
    vision_heads = 2
    for name, metrics in steps.items():
        assert all(logit is not None for logit in metrics["language_max_logits"]), name
        if "language.qk_norm=true" in training.SHAPES[name]:
            assert metrics["heads_clipped"] <= vision_heads
        else:
            assert metrics["heads_clipped"] > vision_heads, name
