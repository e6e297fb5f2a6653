"""Singular-value map of each coefficient set, and accuracy of each precision and form."""

import argparse
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from benchmarks.runner import Result, markdown
from muonclip import COEFFICIENTS, orthogonalize, reference
from muonclip.orthogonalize import CoefficientName, Form, coefficient_steps

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Number of steps of sets that do not use five.
STEPS: dict[str, int] = {"deepseek_v4": 10}
LOWEST, TABLE_FROM = 1e-4, 1e-3
SHAPES = {"full": (1024, 4096), "quick": (256, 1024), "tiny": (24, 64)}
ARITHMETIC: list[tuple[torch.dtype, Form]] = [
    (torch.float32, "direct"),
    (torch.float32, "gram"),
    (torch.float16, "direct"),
    (torch.float16, "gram"),
    (torch.bfloat16, "direct"),
]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """No further options."""


def run(options: argparse.Namespace) -> Result:
    points = 33 if options.form == "tiny" else 2001
    s = torch.logspace(torch.tensor(LOWEST).log10().item(), 0, points, dtype=torch.float64)
    maps = {}
    for name in COEFFICIENTS:
        steps = STEPS.get(name, 5)
        values = singular_value_map(s, name, steps)
        inside = values[s >= TABLE_FROM * (1 - 1e-9)]
        maps[name] = {
            "steps": steps,
            "triples": coefficient_steps(name, steps),
            "products": sum(3 if c else 2 for _, _, c in coefficient_steps(name, steps)),
            "least": inside.min().item(),
            "largest": inside.max().item(),
            "slope_at_zero": singular_value_map(s.new_tensor([1e-12]), name, steps).item() / 1e-12,
            "values": [float(f"{value:.5g}") for value in values.tolist()],
        }
    n, m = SHAPES[options.form]
    return {
        "s": [float(f"{value:.5g}") for value in s.tolist()],
        "maps": maps,
        "shape": [n, m],
        "errors": {
            kind: _errors(matrix.to(options.device))
            for kind, matrix in spectra(n, m, options.seed).items()
        },
    }


def singular_value_map(s: Tensor, name: CoefficientName, steps: int) -> Tensor:
    """Apply the polynomial of all steps to normalized singular values."""
    for a, b, c in coefficient_steps(name, steps):
        s = a * s + b * s**3 + c * s**5
    return s


def spectra(n: int, m: int, seed: int) -> dict[str, Tensor]:
    """Matrices similar to gradients: float64 [n, m], n <= m."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    left, right = torch.linalg.qr(normal(n, n)).Q, torch.linalg.qr(normal(m, n)).Q
    rank = n // 8
    decaying = torch.logspace(0, -6, n, dtype=torch.float64)
    return {
        "random": normal(n, m),
        "low rank (1/8)": normal(n, rank) @ normal(rank, m),
        "low rank and noise": normal(n, rank) @ normal(rank, m) + 1e-2 * normal(n, m),
        "condition 1e6": left @ decaying.diag() @ right.mT,
    }


def _errors(matrix: Tensor) -> dict[str, dict[str, float]]:
    """Relative Frobenius distance from the float64 polynomial, by set, then by dtype and form."""
    errors: dict[str, dict[str, float]] = {}
    for name in COEFFICIENTS:
        steps = STEPS.get(name, 5)
        exact = reference.orthogonalize(matrix, coefficients=name, steps=steps)
        results = {
            f"{str(dtype).removeprefix('torch.')}, {form}": orthogonalize(
                matrix.float(), coefficients=name, steps=steps, dtype=dtype, form=form
            )
            for dtype, form in ARITHMETIC
        }
        # Lower bound for bfloat16: the steep map magnifies the rounding of the input.
        results["bfloat16 input, then exact"] = reference.orthogonalize(
            matrix.bfloat16(), coefficients=name, steps=steps
        )
        errors[name] = {
            how: ((result.double() - exact).norm() / exact.norm()).item()
            for how, result in results.items()
        }
    return errors


def plot(result: Result, figure: "Figure") -> None:
    figure.set_size_inches(14, 4.8)
    left, right = figure.subplots(1, 2)
    for name, row in result["maps"].items():
        left.plot(result["s"], row["values"], label=f"{name}, {row['steps']} steps", linewidth=1.2)
    left.set_xscale("log")
    left.axhline(1, color="black", linewidth=0.5)
    left.set(xlabel="singular value before, over the Frobenius norm", ylabel="after")
    left.set_title("Singular-value map")
    left.legend(fontsize=8)

    for how in next(iter(result["errors"].values()))["quintic"]:
        errors = [by_set["quintic"][how] for by_set in result["errors"].values()]
        right.plot(errors, list(result["errors"]), "o", label=how)
    right.set_xscale("log")
    right.invert_yaxis()
    right.set_xlabel("relative error of quintic")
    right.set_title("Distance from the polynomial in float64, {} x {}".format(*result["shape"]))
    right.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))


def table(result: Result) -> str:
    maps = [
        [
            f"`{name}`",
            row["steps"],
            row["products"],
            f"{row['slope_at_zero']:,.0f}",
            f"{row['least']:.3f}",
            f"{row['largest']:.3f}",
        ]
        for name, row in result["maps"].items()
    ]
    blocks = [
        f"Singular values in [{TABLE_FROM:g}, 1] after all steps:",
        markdown(["set", "steps", "products", "slope at 0", "least", "largest"], maps),
        "Relative Frobenius distance from the polynomial in float64, {} x {}:".format(
            *result["shape"]
        ),
    ]
    for kind, errors in result["errors"].items():
        header = [kind, *next(iter(errors.values()))]
        blocks.append(
            markdown(
                header,
                [[f"`{s}`", *(f"{e:.0e}" for e in row.values())] for s, row in errors.items()],
            )
        )
    return "\n\n".join(blocks)
