"""Variants change what their names say, and differences are distinguished from noise."""

import math

import pytest

from benchmarks import ablations
from benchmarks.ablations import VARIANTS, Variant
from benchmarks.runner import Result
from benchmarks.training import MUONCLIP, Job


def runs(losses: list[float | None], train: float = 1.0) -> list[Result]:
    return [
        {
            "final": loss,
            "evaluations": {"loss": [9.0, loss]},
            "train": [train, train],
        }
        for loss in losses
    ]


def comparison(losses: list[float | None], base: list[float | None]) -> Result:
    return ablations._comparison(
        Variant("group", "name", {}), "loss", runs(losses), runs(base), None
    )


def test_differences_are_computed_by_seed() -> None:
    """Differences between seeds do not hide a difference that all of them have."""
    result = comparison([3.11, 4.09, 2.10], [3.0, 4.0, 2.0])
    assert result["mean"] == pytest.approx(0.1)
    assert result["differences"] == pytest.approx([0.11, 0.09, 0.10])
    # Student's t of two degrees of freedom, times 0.01 / sqrt(3).
    assert result["half_interval"] == pytest.approx(4.303 * 0.01 / math.sqrt(3))
    assert ablations.is_clear(result)


def test_noise_is_not_clear() -> None:
    assert not ablations.is_clear(comparison([3.1, 3.9, 2.1], [3.0, 4.0, 2.0]))


def test_diverged_variants_have_no_difference() -> None:
    result = comparison([3.1, None, 2.1], [3.0, 4.0, 2.0])
    assert result["differences"] is None and not ablations.is_clear(result)


def test_training_losses_of_control_variants_are_compared_by_step() -> None:
    variant = Variant(ablations.DEP, "off", {})
    result = ablations._comparison(
        variant, "loss", runs([3.0] * 2, 1.5), runs([3.0] * 2, 1.0), None
    )
    assert result["step_differences"] == {"first": 0.5, "largest": 0.5}


def test_tuned_rates_change_neither_other_parameters_nor_the_weight_decay() -> None:
    job = Job("dense", MUONCLIP, 8e-3, 1, weight_decay=0.1, options=(("nesterov", False),))
    tuned = ablations._with_rate(job, 32e-3)
    assert tuned.lr == 32e-3
    assert tuned.lr * tuned.weight_decay == pytest.approx(job.lr * job.weight_decay)
    assert dict(tuned.options) == {"nesterov": False, "adamw_lr": 8e-3, "adamw_weight_decay": 0.1}
    assert ablations._with_rate(job, job.lr) == job


def test_every_variant_differs_from_its_base() -> None:
    names = [(variant.group, variant.name) for variant in VARIANTS]
    assert len(set(names)) == len(names)
    for variant in VARIANTS:
        base = Job(variant.kind, MUONCLIP, 8e-3, 1)
        changed = ablations._job(base, variant)
        assert {name: getattr(changed, name) for name in variant.changes} == variant.changes
        assert all(getattr(base, name) != value for name, value in variant.changes.items())


def test_groups_are_selected_by_parts_of_their_names() -> None:
    assert {v.group for v in ablations.select(["decay", "DEP"])} == {
        "weight decay (decoupled 0.1)",
        "DEP (on)",
    }
    assert ablations.select([]) == VARIANTS
    with pytest.raises(ValueError, match="no group has 'nosuch' in its name"):
        ablations.select(["nosuch"])
