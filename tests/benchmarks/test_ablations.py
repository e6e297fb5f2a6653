"""Variants differ from the base in what they say, and differences are told from noise."""

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


def told(losses: list[float | None], base: list[float | None]) -> Result:
    return ablations._told(Variant("group", "name", {}), "loss", runs(losses), runs(base), None)


def test_differences_are_taken_seed_by_seed() -> None:
    """Seeds that lie far apart do not hide a difference that all of them have."""
    found = told([3.11, 4.09, 2.10], [3.0, 4.0, 2.0])
    assert found["mean"] == pytest.approx(0.1)
    assert found["differences"] == pytest.approx([0.11, 0.09, 0.10])
    # Student's t of two degrees of freedom, times 0.01 / sqrt(3).
    assert found["half_interval"] == pytest.approx(4.303 * 0.01 / math.sqrt(3))
    assert ablations.clear(found)


def test_noise_is_not_called_clear() -> None:
    assert not ablations.clear(told([3.1, 3.9, 2.1], [3.0, 4.0, 2.0]))


def test_a_variant_that_diverged_has_no_difference() -> None:
    found = told([3.1, None, 2.1], [3.0, 4.0, 2.0])
    assert found["differences"] is None and not ablations.clear(found)


def test_the_training_losses_of_the_same_model_are_compared_step_by_step() -> None:
    variant = Variant(ablations.DEP, "off", {})
    found = ablations._told(variant, "loss", runs([3.0] * 2, 1.5), runs([3.0] * 2, 1.0), None)
    assert found["step_differences"] == {"first": 0.5, "largest": 0.5}


def test_a_rate_of_the_matrices_leaves_the_other_parameters_and_the_decay_alone() -> None:
    job = Job("dense", MUONCLIP, 8e-3, 1, weight_decay=0.1, options=(("nesterov", False),))
    other = ablations._with_rate(job, 32e-3)
    assert other.lr == 32e-3
    assert other.lr * other.weight_decay == pytest.approx(job.lr * job.weight_decay)
    assert dict(other.options) == {"nesterov": False, "adamw_lr": 8e-3, "adamw_weight_decay": 0.1}
    assert ablations._with_rate(job, job.lr) == job


def test_every_variant_is_another_job_than_its_base() -> None:
    names = [(variant.group, variant.name) for variant in VARIANTS]
    assert len(set(names)) == len(names)
    for variant in VARIANTS:
        base = Job(variant.kind, MUONCLIP, 8e-3, 1)
        changed = ablations._job(base, variant)
        assert {name: getattr(changed, name) for name in variant.changes} == variant.changes
        assert all(getattr(base, name) != value for name, value in variant.changes.items())


def test_groups_are_chosen_by_parts_of_their_names() -> None:
    assert {v.group for v in ablations.chosen(["decay", "DEP"])} == {
        "weight decay (decoupled 0.1)",
        "DEP (on)",
    }
    assert ablations.chosen([]) == VARIANTS
    with pytest.raises(ValueError, match="no group has 'nosuch' in its name"):
        ablations.chosen(["nosuch"])
