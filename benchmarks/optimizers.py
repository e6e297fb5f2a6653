"""Optimizers to compare: MuonClip, torch's optimizers, and all others that can be imported.

All implementations of Muon do the same work: Nesterov momentum 0.95, five Newton-Schulz steps with
a quintic polynomial (Keller Jordan's coefficients unless they are fixed), and decoupled weight
decay. All of them use torch's fused AdamW for other parameters.
"""

import argparse
import importlib
import importlib.metadata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import nn
from torch.optim.optimizer import Optimizer, ParamsT

from muonclip import MuonClip
from muonclip.orthogonalize import CoefficientName, default_ns_dtype

LR, WEIGHT_DECAY, MOMENTUM = 1e-3, 0.1, 0.95
QUINTIC = (3.4445, -4.7750, 2.0315)
BASELINE = "torch.optim.Muon"

Params = Sequence[nn.Parameter]
# (matrices, other parameters, lr, weight decay) -> optimizers
Build = Callable[[Params, Params, float, float], list[Optimizer]]


@dataclass(frozen=True)
class Candidate:
    """An optimizer to compare.

    Attributes:
        name: name in tables.
        build: builds the optimizers.
        arithmetic: dtype of Newton-Schulz on a CPU; "" if it is not Muon, "auto" for MuonClip's
            choice for the device.
        cuda_arithmetic: dtype of Newton-Schulz on a GPU, if different.
        coefficients: coefficient set, for five steps; None if it is not Muon.
        stacks: whether it treats stacked experts [E, n, m] as E matrices; otherwise experts are
            passed as separate matrices.
        module: module to import, and an attribute that identifies it.
        distribution: name for ``importlib.metadata``.
        devices: devices to compare it on.
    """

    name: str
    build: Build
    arithmetic: str = "bfloat16"
    cuda_arithmetic: str | None = None
    coefficients: CoefficientName | None = "quintic"
    stacks: bool = False
    module: tuple[str, str] | None = None
    distribution: str | None = None
    devices: tuple[str, ...] = ("cpu", "cuda")

    def missing(self, device: torch.device) -> str | None:
        """The reason why the optimizer cannot run on this machine, or None."""
        if device.type not in self.devices:
            return f"compared on {', '.join(self.devices)} only"
        if self.module is None:
            return None
        name, attribute = self.module
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name == name.partition(".")[0]:
                return "not installed"
            return f"needs {error.name}, which is not installed"
        except ImportError as error:
            return f"cannot be imported: {error}"
        return (
            None
            if hasattr(module, attribute)
            else f"the installed package {name!r} is a different one"
        )

    def arithmetic_on(
        self, device: torch.device, shapes: Iterable[tuple[int, int, int]]
    ) -> list[str]:
        """Dtypes of Newton-Schulz for parameters [b, n, m]; none if it is not Muon."""
        if self.arithmetic == "auto":
            chosen = {default_ns_dtype(device, torch.float32, [shape]) for shape in shapes}
            return sorted(str(dtype).removeprefix("torch.") for dtype in chosen)
        name = (device.type == "cuda" and self.cuda_arithmetic) or self.arithmetic
        return [name] if name else []

    def version(self) -> str | None:
        """Version of the package; "source" if it is importable without being installed."""
        if self.distribution is None:
            return None
        try:
            return importlib.metadata.version(self.distribution)
        except importlib.metadata.PackageNotFoundError:
            return "source"


class PlainMuon(Optimizer):
    """A plain loop in the precision of the parameters, to isolate the effect of precision."""

    def __init__(self, params: ParamsT, lr: float, weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        a, b, c = QUINTIC
        for group in self.param_groups:
            for p in group["params"]:
                if "momentum_buffer" not in self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                buffer = self.state[p]["momentum_buffer"]
                buffer.lerp_(p.grad, 1 - MOMENTUM)
                x = p.grad.lerp(buffer, MOMENTUM)
                tall = x.size(-2) > x.size(-1)
                x = x.mT if tall else x
                x = x / x.norm(dim=(-2, -1), keepdim=True)
                for _ in range(5):
                    gram = x @ x.mT
                    x = a * x + (b * gram + c * gram @ gram) @ x
                x = x.mT if tall else x
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(x, alpha=-0.2 * max(p.shape[-2:]) ** 0.5 * group["lr"])


def candidates(
    names: Iterable[str] | None = None,
    baseline: str = BASELINE,
    without: Iterable[str] | None = None,
) -> list[Candidate]:
    """Select optimizers.

    Args:
        names: parts of the names to select; default: all.
        baseline: full name of an optimizer that is always selected.
        without: full names to exclude.

    Raises:
        ValueError: a name matches no optimizer, or the baseline is excluded.
    """
    available = [*_OWN, *_PEERS]
    known = ", ".join(candidate.name for candidate in available)
    excluded = list(without or ())
    for name in (baseline, *excluded):
        if name not in [candidate.name for candidate in available]:
            raise ValueError(f"no optimizer is called {name!r}; there are {known}")
    if baseline in excluded:
        raise ValueError(f"{baseline} is the baseline and cannot be excluded")
    for name in names or ():
        if not any(name.lower() in candidate.name.lower() for candidate in available):
            raise ValueError(f"no optimizer has {name!r} in its name; there are {known}")
    return [
        candidate
        for candidate in available
        if candidate.name == baseline
        or (
            candidate.name not in excluded
            and (names is None or any(name.lower() in candidate.name.lower() for name in names))
        )
    ]


def add_selection(parser: argparse.ArgumentParser) -> None:
    """Add the options of :func:`selected`."""
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", help="optimizers whose names contain this"
    )
    parser.add_argument(
        "--without", nargs="+", metavar="NAME", help="exclude optimizers by full name"
    )


def selected(options: argparse.Namespace, baseline: str) -> list[Candidate]:
    """:func:`candidates` by command-line options; an unknown name ends the program."""
    try:
        return candidates(options.only, baseline, options.without)
    except ValueError as error:
        raise SystemExit(f"--only, --without, --baseline: {error}") from error


def absence_note(verb: str, reasons: Mapping[str, str]) -> list[str]:
    """A line for a table about the optimizers that could not run; none if all could."""
    listed = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    return [f"Not {verb}: {listed}."] if reasons else []


# ---------------------------------------------------------------------- MuonClip and torch


@dataclass(frozen=True)
class MuonClipBuild:
    """Builds MuonClip with options."""

    options: dict[str, Any]

    def __call__(
        self, matrices: Params, others: Params, lr: float, decay: float
    ) -> list[Optimizer]:
        groups = [{"params": list(matrices), "algorithm": "muon"}]
        if others:
            groups.append({"params": list(others), "algorithm": "adamw"})
        return [MuonClip(groups, lr=lr, weight_decay=decay, momentum=MOMENTUM, **self.options)]


def _muon_clip(**options: Any) -> Build:
    return MuonClipBuild(options)


def _adamw(**options: Any) -> Build:
    def build(matrices: Params, others: Params, lr: float, decay: float) -> list[Optimizer]:
        params = [*matrices, *others]
        return [torch.optim.AdamW(params, lr=lr, weight_decay=decay, betas=(0.9, 0.95), **options)]

    return build


def _with_adamw(
    build: Callable[[list[nn.Parameter], float, float], Optimizer],
) -> Build:
    """Add AdamW for other parameters to a Muon for matrices only."""

    def both(matrices: Params, others: Params, lr: float, decay: float) -> list[Optimizer]:
        optimizers = [build(list(matrices), lr, decay)]
        if others:
            optimizers += _adamw(fused=True)([], others, lr, decay)
        return optimizers

    return both


@_with_adamw
def _torch_muon(params: list[nn.Parameter], lr: float, decay: float) -> Optimizer:
    return torch.optim.Muon(
        params, lr=lr, weight_decay=decay, momentum=MOMENTUM, nesterov=True, ns_steps=5,
        ns_coefficients=QUINTIC, adjust_lr_fn="match_rms_adamw",
    )  # fmt: skip


@_with_adamw
def _plain(params: list[nn.Parameter], lr: float, decay: float) -> Optimizer:
    return PlainMuon(params, lr, decay)


_CLIP = Candidate("MuonClip", _muon_clip(), "auto", stacks=True)
# For bfloat16 weights, whose masters are in float32.
WITH_MASTERS = [
    replace(_CLIP, name="MuonClip, bfloat16 weights, masters",
            build=_muon_clip(master_weights=True)),
    replace(_CLIP, name="MuonClip, bfloat16 weights, remainders",
            build=_muon_clip(master_weights="remainder")),
    replace(_CLIP, name="MuonClip, bfloat16 weights, remainders, int8 momentum",
            build=_muon_clip(master_weights="remainder", momentum_dtype=torch.int8)),
]  # fmt: skip
_OWN = [
    Candidate(BASELINE, _torch_muon),
    _CLIP,
    *(replace(_CLIP, name=f"MuonClip, {dtype}", arithmetic=dtype, devices=("cpu",),
              build=_muon_clip(ns_dtype=getattr(torch, dtype)))
      for dtype in ("float32", "bfloat16")),
    replace(_CLIP, name="MuonClip, bfloat16 momentum",
            build=_muon_clip(momentum_dtype=torch.bfloat16)),
    replace(_CLIP, name="MuonClip, NorMuon", build=_muon_clip(variant="normuon"),
            coefficients=None),
    replace(_CLIP, name="MuonClip, int8 momentum", build=_muon_clip(momentum_dtype=torch.int8)),
    Candidate("textbook loop, float32", _plain, "float32", stacks=True),
    Candidate("AdamW (fused)", _adamw(fused=True), "", coefficients=None, stacks=True),
    Candidate("AdamW", _adamw(), "", coefficients=None, stacks=True),
    # torch's default on a GPU: updates all parameters at once, which needs more memory.
    Candidate("AdamW (foreach)", _adamw(foreach=True), "", coefficients=None, stacks=True),
]  # fmt: skip


# ---------------------------------------------------------------------- other implementations


def _peer(module: str, name: str) -> Callable[..., Optimizer]:
    """A class of an optional package."""
    return cast(Callable[..., Optimizer], getattr(importlib.import_module(module), name))


@_with_adamw
def _keller_jordan(params: list[nn.Parameter], lr: float, decay: float) -> Optimizer:
    return _peer("muon", "SingleDeviceMuon")(params, lr=lr, weight_decay=decay, momentum=MOMENTUM)


@_with_adamw
def _dion(params: list[nn.Parameter], lr: float, decay: float) -> Optimizer:
    return _peer("dion", "Muon")(
        params, lr=lr, mu=MOMENTUM, weight_decay=decay, nesterov=True, adjust_lr="rms_norm",
        use_polar_express=False, use_triton=params[0].is_cuda,
    )  # fmt: skip


def _emerging(precision: str) -> Build:
    @_with_adamw
    def build(params: list[nn.Parameter], lr: float, decay: float) -> Optimizer:
        return _peer("emerging_optimizers.orthogonalized_optimizers", "Muon")(
            params, lr=lr, momentum=MOMENTUM, weight_decay=decay, nesterov=True,
            coefficient_type="simple", num_ns_steps=5, extra_scale_factor=0.2,
            fp32_matmul_prec=precision,
        )  # fmt: skip

    return build


def _pytorch_optimizer(method: str) -> Build:
    @_with_adamw
    def build(params: list[nn.Parameter], lr: float, decay: float) -> Optimizer:
        group = {"params": params, "use_muon": True}
        return _peer("pytorch_optimizer", "Muon")(
            [group], lr=lr, momentum=MOMENTUM, weight_decay=decay, nesterov=True, ns_steps=5,
            ns_coeffs=QUINTIC, ns_method=method, use_adjusted_lr=True,
        )  # fmt: skip

    return build


@_with_adamw
def _heavyball(params: list[nn.Parameter], lr: float, decay: float) -> Optimizer:
    return _peer("heavyball", "Muon")(
        params, lr=lr, betas=(MOMENTUM, 0.99), weight_decay=decay, nesterov=True,
        heavyball_momentum=True,
    )  # fmt: skip


@_with_adamw
def _optimuon(params: list[nn.Parameter], lr: float, decay: float) -> Optimizer:
    return _peer("optimuon", "Muon")(
        params, lr=lr, momentum=MOMENTUM, nesterov=True, weight_decay=decay, ns_steps=5,
        ns_coefficients=QUINTIC, ns_norm_scale=1.0, adjust_lr="match_rms_adamw",
        ns_dtype=torch.float16 if params[0].is_cuda else torch.float32,
        gram_ns=True, cautious_wd=False, normuon=False,
    )  # fmt: skip


@_with_adamw
def _muonium(params: list[nn.Parameter], lr: float, decay: float) -> Optimizer:
    return _peer("muonium", "Muon")(
        params, lr=lr, wd=decay, use_cautious_wd=False, momentum=MOMENTUM, nesterov=True,
        ns_steps=5, orthogonalization_strategy="newton_schulz",
    )  # fmt: skip


@_with_adamw
def _flash_muon(params: list[nn.Parameter], lr: float, decay: float) -> Optimizer:
    import torch.distributed as dist

    if not dist.is_initialized():  # it gathers even with a single process
        dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    return _peer("flash_muon", "Muon")(
        params, lr=lr, weight_decay=decay, momentum=MOMENTUM, nesterov=True, ns_steps=5, rank=0,
        world_size=1,
    )  # fmt: skip


_EMERGING = Candidate(
    "Emerging-Optimizers", _emerging("medium"), distribution="emerging-optimizers",
    module=("emerging_optimizers.orthogonalized_optimizers", "Muon"),
)  # fmt: skip
_PYTORCH_OPTIMIZER = Candidate(
    "pytorch-optimizer", _pytorch_optimizer("newton_schulz"), distribution="pytorch-optimizer",
    module=("pytorch_optimizer", "Muon"),
)  # fmt: skip
_PEERS = [
    Candidate("KellerJordan/Muon", _keller_jordan, stacks=True,
              module=("muon", "SingleDeviceMuon"), distribution="muon-optimizer"),
    Candidate("microsoft/dion", _dion, coefficients="you", stacks=True,
              module=("dion", "Muon"), distribution="dion"),
    _EMERGING,
    replace(_EMERGING, name="Emerging-Optimizers, float32", build=_emerging("highest"),
            arithmetic="float32"),
    _PYTORCH_OPTIMIZER,
    # Its bfloat16 products use a slow fallback on a CPU: minutes per step.
    replace(_PYTORCH_OPTIMIZER, name="pytorch-optimizer, Gram form", devices=("cuda",),
            build=_pytorch_optimizer("gram_newton_schulz")),
    Candidate("heavyball", _heavyball, coefficients="you",
              module=("heavyball", "Muon"), distribution="heavyball"),
    Candidate("optimuon", _optimuon, "float32", "float16",
              module=("optimuon", "Muon"), distribution="optimuon"),
    Candidate("muonium", _muonium, stacks=True, devices=("cuda",),
              module=("muonium", "Muon"), distribution="muonium"),
    Candidate("flash-muon", _flash_muon, devices=("cuda",),
              module=("flash_muon", "Muon"), distribution="flash-muon"),
]  # fmt: skip
