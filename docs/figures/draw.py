"""Draws the figures of docs/concepts: ``python docs/figures/draw.py`` (needs matplotlib)."""

from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, Rectangle

from muonclip import COEFFICIENTS, clip_factors

HERE = Path(__file__).parent
BLUE, ORANGE, GREEN, GREY = "#3949ab", "#ef6c00", "#2e7d32", "#9e9e9e"


def save(name: str) -> None:
    """Write the current figure with the same bytes each time."""
    plt.savefig(HERE / f"{name}.svg", bbox_inches="tight", metadata={"Date": None})
    plt.close()


def newton_schulz() -> None:
    """Singular values after 1, 3 and 5 steps."""
    figure, axes = plt.subplots(1, 2, figsize=(7, 2.6), sharey=True)
    x = np.logspace(-4, 0, 2001)
    for axis, name in zip(axes, ("quintic", "polar_express"), strict=True):
        y = x
        steps = COEFFICIENTS[name]
        for step in range(5):
            a, b, c = steps[min(step, len(steps) - 1)]
            y = a * y + b * y**3 + c * y**5
            if step in (0, 2, 4):
                axis.plot(x, y, label=f"{step + 1} step{'s' if step else ''}")
        axis.axhline(1, color=GREY, linewidth=0.8, linestyle=":")
        axis.set(title=name, xlabel="singular value of the normalized matrix", xscale="log")
    axes[0].set_ylabel("singular value of the update")
    axes[0].legend(loc="upper left", fontsize=8)
    figure.tight_layout()
    save("newton_schulz")


def gqa_clip() -> None:
    """Logits of four heads with one key, before and after, and the factors."""
    import torch

    threshold, before = 100.0, torch.tensor([50.0, 80.0, 120.0, 400.0])
    factors = clip_factors(before, threshold, num_kv_groups=1)
    after = factors.query * factors.key * before
    figure, axis = plt.subplots(figsize=(7, 2.6))
    heads = np.arange(4)
    axis.bar(heads - 0.2, before, 0.38, color=GREY, label="before")
    axis.bar(heads + 0.2, after, 0.38, color=BLUE, label="after")
    axis.axhline(threshold, color=ORANGE, linewidth=1)
    axis.text(-0.45, threshold + 8, "τ", color=ORANGE)
    key = factors.key.item()
    labels = [f"head {i}\nquery {q:.2f}, key {key:.2f}" for i, q in enumerate(factors.query)]
    axis.set_xticks(heads, labels, fontsize=8)
    axis.set_ylabel("largest logit")
    axis.legend(loc="upper left")
    figure.tight_layout()
    save("gqa_clip")


def _box(axis: Axes, x: float, y: float, width: float, color: str, text: str = "") -> None:
    axis.add_patch(Rectangle((x, y), width, 0.7, facecolor=color, edgecolor="white"))
    axis.text(x + width / 2, y + 0.35, text, ha="center", va="center", color="white", fontsize=8)


def _stages(axis: Axes, title: str) -> None:
    axis.set_title(title, loc="left", fontsize=9)
    axis.set(xlim=(0, 12.2), ylim=(-0.2, 4.1))
    axis.set_yticks([3.35, 2.35, 1.35, 0.35], [f"stage {i}" for i in range(4)], fontsize=8)
    axis.set_xticks([])
    for side in axis.spines.values():
        side.set_visible(False)
    axis.tick_params(length=0)
    axis.annotate("", (12.1, -0.1), (0, -0.1), arrowprops={"arrowstyle": "->", "color": GREY})
    axis.text(12.2, -0.1, "time", va="center", fontsize=8, color=GREY)


def dep() -> None:
    """A step of four pipeline stages: the encoder on the first one, and on all."""
    figure, (first, spread) = plt.subplots(2, 1, figsize=(7, 4.2))
    _stages(first, "Encoder on the first stage: the others wait")
    _box(first, 0, 3, 2.4, ORANGE, "encode")
    for stage in range(4):
        _box(first, 2.4 + 0.6 * stage, 3 - stage, 6.2 - 1.2 * stage, BLUE, "language model")
    _box(first, 8.6, 3, 3.2, GREEN, "encoder's gradients")
    _stages(spread, "DEP: every stage encodes an equal share")
    for stage in range(4):
        _box(spread, 0, 3 - stage, 0.7, ORANGE)
        _box(spread, 0.8 + 0.6 * stage, 3 - stage, 6.2 - 1.2 * stage, BLUE, "language model")
        _box(spread, 7.1, 3 - stage, 0.9, GREEN)
    spread.add_patch(
        FancyArrowPatch((8.1, 0.2), (11.8, 0.2), arrowstyle="<->", color=GREY, mutation_scale=10)
    )
    spread.text(9.95, 0.35, "saved", ha="center", fontsize=8, color=GREY)
    figure.tight_layout()
    save("dep")


if __name__ == "__main__":
    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "muonclip"
    for figure in (newton_schulz, gqa_clip, dep):
        figure()
