"""The optimizers that are compared: MuonClip, torch's, and every peer that can be imported.

All Muons do the same work: momentum 0.95 with Nesterov's look-ahead, five Newton-Schulz steps of a
quintic polynomial (Keller Jordan's coefficients, or the peer's own where they are fixed), decoupled
weight decay. What is no matrix goes to torch's fused AdamW in all of them, so that it decides
nothing.
"""

import argparse
import importlib
import importlib.metadata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import nn
from torch.optim.optimizer import Optimizer, ParamsT

from muonclip import MuonClip
from muonclip.orthogonalize import CoefficientName

LR, WEIGHT_DECAY, MOMENTUM = 1e-3, 0.1, 0.95
QUINTIC = (3.4445, -4.7750, 2.0315)
BASELINE = "torch.optim.Muon"

Params = Sequence[nn.Parameter]
# (matrices, others, lr, weight decay) -> optimizers, stepped one after the other
Build = Callable[[Params, Params, float, float], list[Optimizer]]


@dataclass(frozen=True)
class Candidate:
    """An optimizer to compare.

    Attributes:
        name: for tables.
        build: makes it.
        arithmetic: dtype of Newton-Schulz on a CPU; "" where there is none.
        cuda_arithmetic: the same on a GPU, if it is another.
        coefficients: those it uses, all for five steps; None: it is no Muon.
        stacks: takes stacked experts [E, n, m] as E matrices; else it is given each apart.
        module: what must be importable, and an attribute that tells it from a namesake.
        distribution: its name for ``importlib.metadata``.
        devices: where it runs, or is worth running.
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
        """Why it cannot run here, or None."""
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
        return None if hasattr(module, attribute) else f"another package is called {name!r} here"

    def arithmetic_on(self, device: torch.device) -> str:
        return (device.type == "cuda" and self.cuda_arithmetic) or self.arithmetic

    def version(self) -> str | None:
        """Of the peer; "source" where it was imported without being installed."""
        if self.distribution is None:
            return None
        try:
            return importlib.metadata.version(self.distribution)
        except importlib.metadata.PackageNotFoundError:
            return "source"


class PlainMuon(Optimizer):
    """Muon as in a textbook, in the parameters' own precision: what a precision alone is worth."""

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
    """All, or those whose name contains one of ``names``, but for those of just the names in
    ``without``; the baseline is always among them.

    Raises:
        ValueError: for a name that none has, and for a baseline to be left out.
    """
    everything = [*_OWN, *_PEERS]
    known = ", ".join(candidate.name for candidate in everything)
    left_out = list(without or ())
    for name in (baseline, *left_out):
        if name not in [candidate.name for candidate in everything]:
            raise ValueError(f"no optimizer is called {name!r}; there are {known}")
    if baseline in left_out:
        raise ValueError(f"{baseline} is what all are compared with: it cannot be left out")
    for name in names or ():
        if not any(name.lower() in candidate.name.lower() for candidate in everything):
            raise ValueError(f"no optimizer has {name!r} in its name; there are {known}")
    return [
        candidate
        for candidate in everything
        if candidate.name == baseline
        or (
            candidate.name not in left_out
            and (names is None or any(name.lower() in candidate.name.lower() for name in names))
        )
    ]


def add_selection(parser: argparse.ArgumentParser) -> None:
    """Which optimizers are compared; for :func:`selected`."""
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", help="optimizers with this in the name"
    )
    parser.add_argument("--without", nargs="+", metavar="NAME", help="optimizers of just this name")


def selected(options: argparse.Namespace, baseline: str) -> list[Candidate]:
    """:func:`candidates` by the command line; a name that none has ends the program."""
    try:
        return candidates(options.only, baseline, options.without)
    except ValueError as error:
        raise SystemExit(f"--only, --without, --baseline: {error}") from error


# ---------------------------------------------------------------------- MuonClip and torch


def _muon_clip(**options: Any) -> Build:
    def build(matrices: Params, others: Params, lr: float, decay: float) -> list[Optimizer]:
        groups = [{"params": list(matrices), "algorithm": "muon"}]
        if others:
            groups.append({"params": list(others), "algorithm": "adamw"})
        return [MuonClip(groups, lr=lr, weight_decay=decay, momentum=MOMENTUM, **options)]

    return build


def _adamw(**options: Any) -> Build:
    def build(matrices: Params, others: Params, lr: float, decay: float) -> list[Optimizer]:
        params = [*matrices, *others]
        return [torch.optim.AdamW(params, lr=lr, weight_decay=decay, betas=(0.9, 0.95), **options)]

    return build


def _with_adamw(
    build: Callable[[list[nn.Parameter], float, float], Optimizer],
) -> Build:
    """A Muon for matrices alone, with AdamW beside it."""

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


_CLIP = Candidate("MuonClip", _muon_clip(), "float32", "bfloat16", stacks=True)
_OWN = [
    Candidate(BASELINE, _torch_muon),
    _CLIP,
    replace(_CLIP, name="MuonClip, bfloat16", arithmetic="bfloat16", devices=("cpu",),
            build=_muon_clip(ns_dtype=torch.bfloat16)),
    replace(_CLIP, name="MuonClip, bfloat16 momentum",
            build=_muon_clip(momentum_dtype=torch.bfloat16)),
    Candidate("textbook loop, float32", _plain, "float32", stacks=True),
    Candidate("AdamW (fused)", _adamw(fused=True), "", coefficients=None, stacks=True),
    Candidate("AdamW", _adamw(), "", coefficients=None, stacks=True),
    # What torch takes by itself on a GPU: all parameters in one call, and as much memory for it.
    Candidate("AdamW (foreach)", _adamw(foreach=True), "", coefficients=None, stacks=True),
]  # fmt: skip


# ---------------------------------------------------------------------- peers


def _peer(module: str, name: str) -> Callable[..., Optimizer]:
    """A peer's class, imported when it is wanted: it may not be there."""
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

    if not dist.is_initialized():  # it gathers even where there is one process
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
    # On a CPU its products in bfloat16 fall into ATen's plain loop: minutes a step.
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
