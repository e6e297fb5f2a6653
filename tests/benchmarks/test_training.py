"""Parts of training comparisons: schedule, choice of a learning rate, unseen text."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import training
from benchmarks.convergence import reached
from benchmarks.training import Job, Size, further_rates

SMALL = Size(32, 1, 2, 64, 2, 400)


@pytest.fixture(autouse=True)
def leave_the_trainers_groups() -> Iterator[None]:
    yield
    training.leave()


def result(lr: float, final: float | None, seed: int = 0) -> dict[str, Any]:
    return {"lr": lr, "final": final, "seed": seed}


def test_learning_rate_warms_up_and_decays_to_a_tenth() -> None:
    rates = [training.rate(step, 50) for step in range(1, 51)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert sorted(rates[4:], reverse=True) == rates[4:]
    assert rates[-1] == pytest.approx(0.1)


def test_best_rate_has_the_lowest_mean_loss_without_diverged_seeds() -> None:
    results = [result(1, 3.0), result(1, 3.4), result(2, 2.0), result(2, None), result(4, 3.3)]
    assert training.best_rate(results) == 1
    with pytest.raises(RuntimeError, match="diverged"):
        training.best_rate([result(1, None)])


def test_rates_are_extended_if_the_best_is_the_lowest_or_highest() -> None:
    assert further_rates([result(1, 3.0), result(2, 3.1), result(4, 3.2)]) == [0.5]
    assert further_rates([result(1, 3.2), result(2, 3.1), result(4, 3.0)]) == [8]
    assert further_rates([result(1, 3.2), result(2, 3.0), result(4, 3.1)]) == []


def test_reaching_a_loss_is_interpolated_between_evaluations() -> None:
    assert reached([10, 20, 40], [5.0, 4.0, 3.0], 3.5) == pytest.approx(0.75)
    assert reached([10, 20, 40], [5.0, 4.0, 3.0], 6.0) == 0.25
    assert reached([10, 20, 40], [5.0, 4.0, 3.0], 2.0) is None


def test_held_out_text_hardly_occurs_in_the_training_text(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 0 < training.overlap(SMALL) < training.MAX_OVERLAP
    corpora = training.text(SMALL.vocabulary).corpora
    held_out = training._ngram_hashes(corpora["held_out"].tokens)
    # Different n-grams have different hashes.
    windows = np.lib.stride_tricks.sliding_window_view(corpora["held_out"].tokens[:20_000], 32)
    assert len(np.unique(windows, axis=0)) == len(np.unique(held_out[: len(windows)]))
    monkeypatch.setattr(training, "MAX_OVERLAP", 0.0)
    with pytest.raises(RuntimeError, match="memorization"):
        training.overlap(SMALL)


@pytest.mark.parametrize("kind", training.KINDS)
def test_all_optimizers_start_from_the_same_weights_and_batches(kind: training.Kind) -> None:
    jobs = [
        Job(kind, name, 1e-3, 2, size=SMALL if kind == "dense" else Size(32, 2, 2, 64, 2, 400))
        for name in ("AdamW (fused)", training.MUONCLIP)
    ]
    first, second = (training.train(job, torch.device("cpu")) for job in jobs)
    assert first["train"][0] == second["train"][0]
    assert first["train"][1] != second["train"][1]
    assert first["parameters"] == second["parameters"]


def test_without_a_threshold_logits_are_observed_but_not_clipped() -> None:
    job = Job("dense", training.MUONCLIP, 0.1, 3, size=SMALL, threshold=1e-6, watch=True)
    clipped = training.train(job, torch.device("cpu"))
    plain = training.train(
        Job("dense", training.MUONCLIP, 0.1, 3, size=SMALL, threshold=None, watch=True),
        torch.device("cpu"),
    )
    assert plain["max_logits"][0] == clipped["max_logits"][0]
    assert sum(clipped["clipped"]) > 0 == sum(plain["clipped"])
    assert max(clipped["after"]) < max(plain["after"])
