"""The fit of the scaling law finds what it was made from."""

import math
from typing import Any

import numpy as np
import pytest

from benchmarks import scaling, training
from benchmarks.scaling import BASELINE
from benchmarks.training import MUONCLIP, Job, Size

COMPUTE = np.geomspace(1e10, 1e12, 4)


def sizes(base: tuple[float, float], other: tuple[float, float], noise: float) -> list[Any]:
    """Losses of three seeds by two power laws a·C^-b."""
    rng = np.random.default_rng(1)

    def losses(law: tuple[float, float], compute: float) -> list[float]:
        return [law[0] * compute ** -law[1] * math.exp(noise * rng.normal()) for _ in range(3)]

    return [
        {
            "compute": compute,
            "optimizers": {
                BASELINE: {"losses": losses(base, compute)},
                MUONCLIP: {"losses": losses(other, compute)},
            },
        }
        for compute in COMPUTE
    ]


def test_laws_without_noise_are_found() -> None:
    """Half the compute at any loss: a is 2^-b times the other's."""
    told = scaling.fits(sizes((40.0, 0.1), (40.0 * 0.5**0.1, 0.1), 0.0), seed=0)
    for name, a in ((BASELINE, 40.0), (MUONCLIP, 40.0 * 0.5**0.1)):
        assert told["fits"][name]["a"] == pytest.approx(a)
        assert told["fits"][name]["b"] == pytest.approx(0.1)
        assert told["fits"][name]["largest_residual"] < 1e-9
    assert told["share"] == pytest.approx([0.5] * len(told["points"]))
    assert told["share_band"][0] == pytest.approx(told["share_band"][1])


def test_the_share_depends_on_where_it_is_asked_when_exponents_differ() -> None:
    told = scaling.fits(sizes((40.0, 0.10), (40.0, 0.11), 0.0), seed=0)
    # 40 (sC)^-0.11 = 40 C^-0.10, hence s = C^(0.10 / 0.11 - 1).
    for place in (0, -1):
        assert told["share"][place] == pytest.approx(told["points"][place] ** (0.10 / 0.11 - 1))


def test_the_interval_widens_with_noise_and_has_the_estimate_in_it() -> None:
    widths = []
    for noise in (0.002, 0.01):
        told = scaling.fits(sizes((40.0, 0.1), (40.0 * 0.5**0.1, 0.1), noise), seed=0)
        low, high = (np.array(band) for band in told["share_band"])
        assert (low < told["share"]).all() and (told["share"] < high).all()
        widths.append(float((high - low).mean()))
    assert widths[1] > 3 * widths[0]


def test_the_share_is_also_read_between_sizes_without_a_fit() -> None:
    made = sizes((40.0, 0.1), (40.0 * 0.5**0.1, 0.1), 0.0)
    scaling.fits(made, seed=0)
    # On a power law straight lines between the sizes' logarithms are the law itself.
    assert [size["share"] for size in made[1:]] == pytest.approx([0.5] * 3)
    assert "share" not in made[0]
    found = scaling.between(
        np.array([[3.0, 2.0, 1.0], [3.0, 3.5, 1.0]]),
        np.array([2.5, 2.5]),
        np.array([1.0, 2.0, 4.0]),
    )
    assert found[0] == 1.5 and np.isnan(found[1])
    assert np.isnan(scaling.between(np.array([[3.0, 2.0]]), np.array([4.0]), np.array([1.0, 2.0])))


def test_a_loss_that_does_not_fall_has_no_share_of_compute() -> None:
    told = scaling.fits(sizes((40.0, 0.1), (2.0, -0.01), 0.0), seed=0)
    assert told["share"] is None and told["share_band"] is None


def test_parameters_count_without_the_embedding_and_with_the_head() -> None:
    size = Size(32, 2, 2, 64, 2, 400)
    vocabulary = training.text(size.vocabulary).tokenizer.vocab_size
    layer = 4 * 32 * 32 + 3 * 32 * 96 + 2 * 32  # attention, feed-forward, two norms
    assert scaling.counted(Job("dense", MUONCLIP, 0.0, 1, size=size)) == (
        2 * layer + 32 + vocabulary * 32
    )
