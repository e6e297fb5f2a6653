"""The scaling-law fit recovers the laws that generated the data."""

import math
from typing import Any

import numpy as np
import pytest

from benchmarks import scaling, training
from benchmarks.training import BASELINE, MUONCLIP, Job, Size

COMPUTE = np.geomspace(1e10, 1e12, 4)


def sizes(base: tuple[float, float], other: tuple[float, float], noise: float) -> list[Any]:
    """Losses of three seeds that follow two power laws a·C^-b."""
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


def test_laws_without_noise_are_recovered() -> None:
    """Half of the compute at any loss: a is smaller by a factor of 2^-b."""
    result = scaling.fits(sizes((40.0, 0.1), (40.0 * 0.5**0.1, 0.1), 0.0), seed=0)
    for name, a in ((BASELINE, 40.0), (MUONCLIP, 40.0 * 0.5**0.1)):
        assert result["fits"][name]["a"] == pytest.approx(a)
        assert result["fits"][name]["b"] == pytest.approx(0.1)
        assert result["fits"][name]["largest_residual"] < 1e-9
    assert result["share"] == pytest.approx([0.5] * len(result["points"]))
    assert result["share_band"][0] == pytest.approx(result["share_band"][1])


def test_share_depends_on_the_compute_if_exponents_differ() -> None:
    result = scaling.fits(sizes((40.0, 0.10), (40.0, 0.11), 0.0), seed=0)
    # 40 (sC)^-0.11 = 40 C^-0.10, hence s = C^(0.10 / 0.11 - 1).
    for point in (0, -1):
        assert result["share"][point] == pytest.approx(result["points"][point] ** (0.10 / 0.11 - 1))


def test_interval_contains_the_estimate_and_widens_with_noise() -> None:
    widths = []
    for noise in (0.002, 0.01):
        result = scaling.fits(sizes((40.0, 0.1), (40.0 * 0.5**0.1, 0.1), noise), seed=0)
        low, high = (np.array(band) for band in result["share_band"])
        assert (low < result["share"]).all() and (result["share"] < high).all()
        widths.append(float((high - low).mean()))
    assert widths[1] > 3 * widths[0]


def test_share_is_also_interpolated_between_sizes() -> None:
    laws = sizes((40.0, 0.1), (40.0 * 0.5**0.1, 0.1), 0.0)
    scaling.fits(laws, seed=0)
    # Linear interpolation of logarithms is exact for a power law.
    assert [size["share"] for size in laws[1:]] == pytest.approx([0.5] * 3)
    assert "share" not in laws[0]
    interpolated = scaling.interpolate(
        np.array([[3.0, 2.0, 1.0], [3.0, 3.5, 1.0]]),
        np.array([2.5, 2.5]),
        np.array([1.0, 2.0, 4.0]),
    )
    assert interpolated[0] == 1.5 and np.isnan(interpolated[1])
    assert np.isnan(
        scaling.interpolate(np.array([[3.0, 2.0]]), np.array([4.0]), np.array([1.0, 2.0]))
    )


def test_share_is_undefined_if_the_loss_does_not_decrease() -> None:
    result = scaling.fits(sizes((40.0, 0.1), (2.0, -0.01), 0.0), seed=0)
    assert result["share"] is None and result["share_band"] is None


def test_parameters_exclude_the_embedding_and_include_the_head() -> None:
    size = Size(32, 2, 2, 64, 2, 400)
    vocabulary = training.text(size.vocabulary).tokenizer.vocab_size
    layer = 4 * 32 * 32 + 3 * 32 * 96 + 2 * 32  # attention, feed-forward, two norms
    assert scaling.num_parameters(Job("dense", MUONCLIP, 0.0, 1, size=size)) == (
        2 * layer + 32 + vocabulary * 32
    )
