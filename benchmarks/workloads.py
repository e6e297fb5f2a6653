"""Shapes of the matrices of real models, as workloads of optimizers."""

from collections.abc import Sequence
from dataclasses import dataclass

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Workload:
    """The parameters of a model.

    Attributes:
        name: short name.
        title: description with sizes.
        matrices: shapes of Muon's parameters: [n, m], or [E, n, m] of stacked experts.
        others: shapes of AdamW's parameters: embedding, norms, router.
    """

    name: str
    title: str
    matrices: Sequence[Shape]
    others: Sequence[Shape]

    @property
    def stacked(self) -> bool:
        return any(len(shape) == 3 for shape in self.matrices)

    def flops(self, steps: int = 5) -> int:
        """FLOPs of Newton-Schulz with a quintic polynomial in its published (direct) form."""
        total = 0
        for *stack, rows, columns in self.matrices:
            n, m = sorted((rows, columns))
            total += (stack[0] if stack else 1) * steps * (4 * n * n * m + 2 * n**3)
        return total

    def __str__(self) -> str:
        count = sum(shape[0] if len(shape) == 3 else 1 for shape in self.matrices)
        return f"{self.title} ({count} matrices)"


def dense(layers: int, hidden: int, feed_forward: int, vocabulary: int, name: str) -> Workload:
    """A transformer with separate q, k, v, o projections and a gated feed-forward layer."""
    layer = [(hidden, hidden)] * 4 + [(feed_forward, hidden)] * 2 + [(hidden, feed_forward)]
    return Workload(
        name,
        f"Dense transformer, {layers} x hidden {hidden}",
        layer * layers,
        [(vocabulary, hidden), *[(hidden,)] * (2 * layers + 1)],
    )


def mixture(
    layers: int, hidden: int, expert: int, experts: int, vocabulary: int, *, stacked: bool
) -> Workload:
    """A transformer with many small experts, as separate parameters or stacked in one."""
    attention = [(hidden, hidden)] * 4
    up, down = (expert, hidden), (hidden, expert)
    if stacked:
        experts_of_layer: list[Shape] = [(experts, *up), (experts, *up), (experts, *down)]
    else:
        experts_of_layer = [up, up, down] * experts
    layout = "stacked" if stacked else "separate"
    return Workload(
        "moe_stacked" if stacked else "moe",
        f"MoE, {layers} x {experts} {layout} experts of {expert}, hidden {hidden}",
        (attention + experts_of_layer) * layers,
        [(vocabulary, hidden), *[(experts, hidden), (hidden,), (hidden,)] * layers],
    )


def kimi_k2(moe_layers: int, experts: int, scale: int, vocabulary: int) -> Workload:
    """Kimi K2 (arXiv 2507.20534, table 2) with every width divided by ``scale``.

    One dense layer, then ``moe_layers`` layers with ``experts`` experts of width 2048 (K2 has 384)
    and a shared one; hidden size 7168, 64 heads, MLA ranks 1536 and 512. Head dimensions (128 + 64
    and 128) are not divided.
    """
    hidden, heads, q_rank, kv_rank = 7168 // scale, 64 // scale, 1536 // scale, 512 // scale
    expert, feed_forward = 2048 // scale, 18432 // scale
    attention = [
        (q_rank, hidden),
        (heads * (128 + 64), q_rank),
        (kv_rank + 64, hidden),
        (heads * (128 + 128), kv_rank),
        (hidden, heads * 128),
    ]
    dense_layer = [*attention, (feed_forward, hidden), (feed_forward, hidden)]
    dense_layer.append((hidden, feed_forward))
    one_expert = [(expert, hidden), (expert, hidden), (hidden, expert)]
    moe_layer = attention + one_expert * (experts + 1)
    layers = 1 + moe_layers
    return Workload(
        "k2",
        f"Kimi K2 at 1/{scale}: 1 dense and {moe_layers} MoE layers, {experts} experts of {expert}",
        dense_layer + moe_layer * moe_layers,
        [(vocabulary, hidden), *[(experts, hidden)] * moe_layers, *[(hidden,)] * (2 * layers)],
    )


def workloads(form: str) -> list[Workload]:
    """Workloads of a form: ``"full"`` for a GPU, ``"quick"`` for two CPU cores, or ``"tiny"``."""
    if form == "full":
        return [
            dense(12, 768, 2048, 32768, "dense"),
            dense(8, 2048, 5632, 32768, "dense_2048"),
            mixture(4, 1024, 512, 64, 32768, stacked=False),
            mixture(4, 1024, 512, 64, 32768, stacked=True),
            kimi_k2(4, 48, 8, 20480),
        ]
    if form == "quick":
        return [
            dense(1, 768, 2048, 2048, "dense"),
            mixture(1, 512, 256, 64, 2048, stacked=False),
            mixture(1, 512, 256, 64, 2048, stacked=True),
            kimi_k2(1, 24, 8, 2048),
            dense(4, 48, 128, 256, "small"),
        ]
    return [
        dense(1, 32, 64, 64, "dense"),
        mixture(1, 32, 16, 4, 64, stacked=False),
        mixture(1, 32, 16, 4, 64, stacked=True),
    ]
