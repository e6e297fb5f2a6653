"""Overhead of QK-Clip in a training step: with bounds only, with exact logits, and with clipping.

A transformer like Llama (RMSNorm, rotary embedding, grouped-query attention, SwiGLU) is trained
with MuonClip; each variant has a copy of the model, and their steps are interleaved. Overhead is
reported as the ratio of step times, which is noisy, and as the time within QK-Clip's calls relative
to the step and to its forward and backward passes, which dominate steps with many more tokens.
"""

import argparse
import copy
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import runner
from muonclip import AttentionLayout, MuonClip, QKClip, param_groups

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Size: hidden, layers, heads, key heads, feed-forward, vocabulary. Tokens are per step.
FORMS: dict[str, dict[str, Any]] = {
    "tiny": {"size": (64, 1, 4, 2, 128, 64), "tokens": 64, "lengths": [32], "rounds": 2},
    "quick": {
        "size": (768, 2, 12, 4, 2048, 4096), "tokens": 4096, "lengths": [512, 1024, 2048],
        "rounds": 5,
    },
    "full": {
        "size": (2048, 8, 16, 4, 5632, 32768), "tokens": 16384, "lengths": [2048, 4096, 8192],
        "rounds": 21,
    },
}  # fmt: skip
# Title and options of QK-Clip by name. Logits at initialization are far below 100.
VARIANTS: dict[str, tuple[str, dict[str, Any] | None]] = {
    "none": ("no QK-Clip", None),
    "bound": ("bounds: no head near τ", {"threshold": 100.0}),
    "exact": ("exact logits of every head", {"threshold": 100.0, "exact": True}),
    "clip": ("every head over τ and clipped", {"threshold": 1e-3}),
}
TARGETS = {"bound": 0.01, "exact": 0.03}


class Attention(nn.Module):
    """Causal grouped-query attention; calls ``observe``, if set, with queries and keys."""

    def __init__(self, hidden: int, heads: int, groups: int) -> None:
        super().__init__()
        self.heads, self.groups, dim = heads, groups, hidden // heads
        self.q, self.o = (
            nn.Linear(hidden, hidden, bias=False),
            nn.Linear(hidden, hidden, bias=False),
        )
        self.k, self.v = (nn.Linear(hidden, groups * dim, bias=False) for _ in range(2))
        self.observe: Callable[[Tensor, Tensor], None] | None = None

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        q, k, v = (
            f(x).unflatten(-1, (n, -1)).transpose(1, 2)
            for f, n in ((self.q, self.heads), (self.k, self.groups), (self.v, self.groups))
        )
        q, k = apply_rotary(q, *rotation), apply_rotary(k, *rotation)
        if self.observe is not None:
            self.observe(q, k)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        out: Tensor = self.o(y.transpose(1, 2).flatten(2))
        return out


def apply_rotary(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat([a * cosine - b * sine, b * cosine + a * sine], -1)


class Layer(nn.Module):
    def __init__(self, hidden: int, heads: int, groups: int, feed_forward: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(hidden), nn.RMSNorm(hidden)
        self.attention = Attention(hidden, heads, groups)
        self.gate, self.up = (nn.Linear(hidden, feed_forward, bias=False) for _ in range(2))
        self.down = nn.Linear(feed_forward, hidden, bias=False)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        x = x + self.attention(self.norm1(x), rotation)
        y = self.norm2(x)
        out: Tensor = x + self.down(F.silu(self.gate(y)) * self.up(y))
        return out


class Transformer(nn.Module):
    def __init__(
        self, hidden: int, layers: int, heads: int, groups: int, feed_forward: int, vocabulary: int
    ) -> None:
        super().__init__()
        self.head_dim = hidden // heads
        self.embed = nn.Embedding(vocabulary, hidden)
        self.layers = nn.ModuleList(
            Layer(hidden, heads, groups, feed_forward) for _ in range(layers)
        )
        self.norm, self.head = nn.RMSNorm(hidden), nn.Linear(hidden, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        frequencies = 1e4 ** -(torch.arange(0, self.head_dim, 2, device=x.device) / self.head_dim)
        angles = torch.arange(tokens.size(1), device=x.device)[:, None] * frequencies
        rotation = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        for layer in self.layers:
            x = layer(x, rotation)
        out: Tensor = self.head(self.norm(x))
        return out


class Training:
    """A copy of the model in training, with QK-Clip if ``options`` is given."""

    def __init__(self, model: Transformer, tokens: Tensor, options: dict[str, Any] | None) -> None:
        self.model, self.tokens = copy.deepcopy(model), tokens
        self.optimizer = MuonClip(param_groups(self.model), lr=1e-3)
        self.clip_timer, self.optimizer_timer = Timer(tokens.device), Timer(tokens.device)
        self.clip: QKClip | None = None
        if options is not None:
            layers = {
                name: module
                for name, module in self.model.named_modules()
                if isinstance(module, Attention)
            }
            clip = self.clip = QKClip(
                {
                    name: AttentionLayout.separate(
                        layer.q, layer.k, num_heads=layer.heads, num_kv_groups=layer.groups
                    )
                    for name, layer in layers.items()
                },
                **options,
            )
            for name, layer in layers.items():
                layer.observe = self.clip_timer.timed(
                    lambda q, k, name=name: clip.observe_attention(name, q, k, causal=True)
                )

    def step(self) -> None:
        self.clip_timer.reset()
        self.optimizer_timer.reset()
        logits = self.model(self.tokens[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1).float(), self.tokens[:, 1:].flatten())
        torch.autograd.backward(loss)
        self.optimizer_timer.timed(self.optimizer.step)()
        if self.clip is not None:
            self.clip_timer.timed(self.clip.step)()
        self.optimizer.zero_grad()


class Timer:
    """Total time of some calls since the last reset; on a GPU measured by events."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds = 0.0
        self.events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def reset(self) -> None:
        self.seconds, self.events = 0.0, []

    def timed(self, call: Callable[..., object]) -> Callable[..., None]:
        def timed(*arguments: Any) -> None:
            if self.device.type == "cuda":
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
                begin.record()
                call(*arguments)
                end.record()
                self.events.append((begin, end))
            else:
                start = time.perf_counter()
                call(*arguments)
                self.seconds += time.perf_counter() - start

        return timed

    def read(self) -> float:
        """Seconds since the last reset."""
        if self.events:
            torch.cuda.synchronize(self.device)
        return self.seconds + sum(float(b.elapsed_time(e)) for b, e in self.events) / 1e3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--lengths", type=runner.positive_int, nargs="+", help="sequence lengths")
    parser.add_argument("--rounds", type=runner.positive_int, help="timed steps of each variant")


def run(options: argparse.Namespace) -> runner.Result:
    form = FORMS[options.form]
    vocabulary = form["size"][-1]
    dtype = torch.bfloat16 if options.device.type == "cuda" else torch.float32
    model = Transformer(*form["size"]).to(options.device, dtype)
    lengths = {}
    for length in options.lengths or form["lengths"]:
        batch = max(1, form["tokens"] // length)
        tokens = torch.randint(vocabulary, (batch, length + 1), device=options.device)
        lengths[str(length)] = {"batch": batch, **measure(model, tokens, options, form)}
    return {
        "model": dict(
            zip(("hidden", "layers", "heads", "key heads", "feed-forward", "vocabulary"),
                form["size"], strict=True)
        ),
        "dtype": str(dtype).removeprefix("torch."),
        "parameters": sum(p.numel() for p in model.parameters()),
        "lengths": lengths,
    }  # fmt: skip


def measure(
    model: Transformer, tokens: Tensor, options: argparse.Namespace, form: dict[str, Any]
) -> runner.Result:
    trainings = {
        name: Training(model, tokens, clip_options) for name, (_, clip_options) in VARIANTS.items()
    }
    clip_s: dict[str, list[float]] = {name: [] for name in trainings}
    optimizer_s: dict[str, list[float]] = {name: [] for name in trainings}

    def step(name: str) -> Callable[[], None]:
        def step() -> None:
            trainings[name].step()
            clip_s[name].append(trainings[name].clip_timer.read())
            optimizer_s[name].append(trainings[name].optimizer_timer.read())

        return step

    warmup = 1 if options.form != "full" else 5
    seconds = runner.interleave(
        {name: step(name) for name in trainings},
        rounds=options.rounds or form["rounds"],
        warmup=warmup,
        device=options.device,
    )
    for times in (*clip_s.values(), *optimizer_s.values()):
        del times[:warmup]
    check(trainings)
    result = runner.summarize(seconds, "none")
    for name, summary in result.items():
        rounds = list(zip(clip_s[name], optimizer_s[name], seconds[name], strict=True))
        summary["overhead"] = 1 / summary["speedup"] - 1
        for key, shares in (
            ("share", [clip / step for clip, _, step in rounds]),
            ("share_of_passes", [clip / (step - clip - update) for clip, update, step in rounds]),
            ("optimizer_share", [update / step for _, update, step in rounds]),
        ):
            low, summary[key], high = runner.quartiles(shares)
            summary[f"{key}_quartiles"] = [low, high]
    return {"variants": result}


def check(trainings: dict[str, Training]) -> None:
    """Check that each variant did what its name says."""
    for name, training in trainings.items():
        if training.clip is None:
            continue
        result = training.clip.result
        assert result is not None
        largest = torch.cat([*result.max_logits.values()])
        bounds = torch.cat([*result.upper_bounds.values()])
        assert bounds.isfinite().all()
        assert largest.isfinite().all() == (name != "bound"), name
        assert (int(result.num_clipped) > 0) == (name == "clip"), name


def table(result: runner.Result) -> str:
    rows = []
    for length, measured in result["lengths"].items():
        for name, (title, _) in VARIANTS.items():
            summary = measured["variants"][name]
            low, high = summary["share_quartiles"]
            rows.append(
                (
                    f"{measured['batch']} x {length}",
                    title,
                    f"{summary['median_s'] * 1e3:.1f}",
                    f"{summary['overhead']:+.1%}" if name != "none" else "",
                    f"{summary['share']:.2%} ({low:.2%} to {high:.2%})" if name != "none" else "",
                    f"{summary['share_of_passes']:.2%}" if name != "none" else "",
                    f"≤ {TARGETS[name]:.0%}" if name in TARGETS else "",
                )
            )
    header = (
        "sequences", "variant", "step, ms", "step time vs. none", "time within QK-Clip / step",
        "/ its two passes", "target / step",
    )  # fmt: skip
    model = ", ".join(f"{name} {value}" for name, value in result["model"].items())
    return f"{model}; {result['dtype']}\n\n{runner.markdown(header, rows)}"


def plot(result: runner.Result, figure: "Figure") -> None:
    axes = figure.subplots()
    lengths = list(result["lengths"])
    names = [name for name in VARIANTS if name != "none"]
    colors = dict(zip(names, ("tab:green", "tab:blue", "tab:red"), strict=True))
    width = 0.8 / len(names)
    for index, name in enumerate(names):
        summaries = [result["lengths"][length]["variants"][name] for length in lengths]
        shares = [100 * summary["share"] for summary in summaries]
        quartiles = [[100 * q for q in summary["share_quartiles"]] for summary in summaries]
        errors = [
            [share - low for share, (low, _) in zip(shares, quartiles, strict=True)],
            [high - share for share, (_, high) in zip(shares, quartiles, strict=True)],
        ]
        positions = [i + (index - (len(names) - 1) / 2) * width for i in range(len(lengths))]
        bars = axes.bar(
            positions, shares, width * 0.95, yerr=errors, capsize=3, color=colors[name],
            label=VARIANTS[name][0],
        )  # fmt: skip
        axes.bar_label(bars, [f"{share:.2f}%" for share in shares], padding=3, fontsize=8)
        if name in TARGETS:
            axes.axhline(100 * TARGETS[name], color=colors[name], ls="--", lw=1)
    axes.set_xticks(range(len(lengths)), lengths)
    axes.set_xlabel("sequence length")
    axes.set_ylabel("share of a training step, %")
    axes.set_title("QK-Clip's share of a training step (dashed: target)")
    axes.margins(y=0.15)
    axes.legend()
