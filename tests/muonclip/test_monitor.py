"""The monitor records the logits of all steps in bounded memory, and marks bounds."""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from muonclip import AttentionLayout, QKClip
from muonclip.monitor import MaxLogitMonitor

HEADS = {"model.layers.0.attn": 2, "model.layers.1.attn": 3}


def make_clip(heads: dict[str, int] = HEADS) -> QKClip:
    return QKClip(
        {
            name: AttentionLayout.separate(torch.ones(n, 2), torch.ones(n, 2), num_heads=n)
            for name, n in heads.items()
        },
        threshold=100.0,
    )


def step(clip: QKClip, logits: Tensor) -> None:
    """A step with these largest logits, [all heads]."""
    for name, part in zip(HEADS, logits.split([*HEADS.values()]), strict=True):
        clip.observe(name, part)
    clip.step()


def test_a_head_with_only_its_bias_above_the_threshold_is_not_clipped() -> None:
    """Its logit is shown nevertheless."""
    clip = make_clip()
    monitor = MaxLogitMonitor(clip)
    name, heads = next(iter(HEADS.items()))
    query = torch.ones(1, heads, 1, 4)
    clip.observe_attention(name, query, query, bias=torch.tensor([150.0]))
    clip.step()
    assert monitor.latest[name].tolist() == [152.0] * heads
    assert monitor.clipped[name].tolist() == [0] * heads


@settings(max_examples=30, deadline=None)
@given(
    steps=st.integers(1, 40),
    capacity=st.integers(2, 9),
    fetch_every=st.integers(1, 7),
    seed=st.integers(0, 2**16),
)
def test_history(steps: int, capacity: int, fetch_every: int, seed: int) -> None:
    """At any capacity, entries are consecutive and contain the maxima of their steps."""
    logits = torch.rand(steps, 5, generator=torch.Generator().manual_seed(seed)) * 150
    clip = make_clip()
    monitor = MaxLogitMonitor(clip, capacity=capacity, fetch_every=fetch_every)
    for row in logits:
        step(clip, row)
    last_steps, by_layer = monitor.history()
    entries = torch.cat([*by_layer.values()], 1)
    assert monitor.steps == steps and len(entries) <= capacity
    starts = [0, *last_steps.tolist()]
    assert starts == sorted(set(starts)) and starts[-1] == steps
    for entry, start, stop in zip(entries, starts[:-1], starts[1:], strict=True):
        assert torch.equal(entry, logits[start:stop].amax(0))
    assert torch.equal(torch.cat([*monitor.latest.values()]), logits[-1])
    assert torch.equal(torch.cat([*monitor.clipped.values()]), (logits > 100).sum(0))
    assert all(exact.all() for exact in monitor.exact.values())


def test_results_stay_on_the_device_until_they_are_fetched() -> None:
    """Most steps transfer nothing and so do not wait."""
    clip = make_clip()
    monitor = MaxLogitMonitor(clip, fetch_every=3)
    for count in (1, 2, 0, 1):
        step(clip, torch.ones(5))
        assert len(monitor._waiting) == count


def test_bounds_are_marked() -> None:
    clip = make_clip({"layer": 2})
    monitor = MaxLogitMonitor(clip)
    query, key = torch.zeros(1, 2, 1, 1), torch.ones(1, 2, 1, 1)
    query[0, :, 0, 0] = torch.tensor([40.0, 120.0])
    clip.observe_attention("layer", query, key)
    clip.step()
    assert monitor.latest["layer"].tolist() == [40.0, 120.0]
    assert monitor.exact["layer"].tolist() == [False, True]
    assert monitor.report().splitlines() == [
        "largest logits after 1 steps; threshold 100; 1 of 2 heads above it in the last step",
        "layer  head  latest   peak  at step  clipped",
        "layer     1   120.0  120.0        1        1",
        "layer     0   ≤40.0  ≤40.0        1        0",
    ]


def test_report_lists_the_heads_with_the_largest_logits() -> None:
    clip = make_clip()
    monitor = MaxLogitMonitor(clip)
    assert "after 0 steps" in monitor.report()
    step(clip, torch.tensor([500.0, 1.0, 2.0, 3.0, 4.0]))
    step(clip, torch.tensor([5.0, 1.0, 7.0, -3.0, 6.0]))
    lines = monitor.report(limit=2).splitlines()
    assert [line.split() for line in lines[2:4]] == [
        ["model.layers.1.attn", "0", "7.0", "7.0", "2", "0"],
        ["model.layers.1.attn", "2", "6.0", "6.0", "2", "0"],
    ]
    assert lines[4] == "and 3 heads with smaller logits"
    clip.step()  # nothing observed
    assert [line.split()[2:] for line in monitor.report(limit=1).splitlines()[2:3]] == [
        ["-", "500.0", "1", "1"]
    ]


def test_resuming_is_exact(tmp_path: Path) -> None:
    logits = torch.rand(23, 5) * 150
    whole, first, second = make_clip(), make_clip(), make_clip()
    monitor = MaxLogitMonitor(whole, capacity=4)
    before = MaxLogitMonitor(first, capacity=4)
    for row in logits:
        step(whole, row)
    for row in logits[:10]:
        step(first, row)
    torch.save(before.state_dict(), tmp_path / "monitor")
    after = MaxLogitMonitor(second, capacity=4)
    step(second, torch.full((5,), 1e3))  # forgotten when the state is loaded
    after.load_state_dict(torch.load(tmp_path / "monitor"))
    for row in logits[10:]:
        step(second, row)
    assert after.report() == monitor.report()
    for actual, expected in zip(
        after.state_dict().values(), monitor.state_dict().values(), strict=True
    ):
        assert torch.equal(actual, expected) if isinstance(actual, Tensor) else actual == expected


def test_a_history_with_other_layers_is_refused() -> None:
    monitor = MaxLogitMonitor(make_clip())
    state = MaxLogitMonitor(make_clip({"other": 2})).state_dict()
    with pytest.raises(ValueError, match="has 1 layers with 2 heads, this clip 2 layers with 5"):
        monitor.load_state_dict(state)
    assert monitor.steps == 0


def test_close() -> None:
    clip = make_clip()
    monitor = MaxLogitMonitor(clip)
    step(clip, torch.ones(5))
    monitor.close()
    step(clip, torch.ones(5))
    assert monitor.steps == 1


@pytest.mark.parametrize("names", [HEADS, {"only": 5}])
def test_plot(tmp_path: Path, names: dict[str, int]) -> None:
    """With bounds, negative logits, and unobserved heads and layers."""
    pytest.importorskip("matplotlib")
    clip = make_clip(names)
    monitor = MaxLogitMonitor(clip)
    with pytest.raises(ValueError, match="nothing to plot"):
        monitor.plot(tmp_path / "empty.png")
    clip.step()
    monitor.plot(tmp_path / "unobserved.png")
    name, heads = next(iter(names.items()))
    clip.observe(name, torch.linspace(-50, 300, heads))
    clip.step()
    query = torch.linspace(1, 120, heads).view(1, heads, 1, 1)
    clip.observe_attention(name, query, torch.ones(1, heads, 1, 1))
    clip.step()
    monitor.plot(tmp_path / "seen.png")
    assert (tmp_path / "seen.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "seen.png").stat().st_size > 10_000


@pytest.mark.parametrize(("capacity", "fetch_every"), [(1, 1), (2, 0)])
def test_errors(capacity: int, fetch_every: int) -> None:
    with pytest.raises(ValueError, match="must be at least"):
        MaxLogitMonitor(make_clip(), capacity=capacity, fetch_every=fetch_every)


def test_an_unobserved_step_gives_minus_infinity() -> None:
    clip = make_clip()
    monitor = MaxLogitMonitor(clip)
    clip.step()
    assert all((layer == -math.inf).all() for layer in monitor.latest.values())
