"""Names of other libraries: what they mean there, and which MuonClip accepts."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from muonclip import COEFFICIENTS, MuonClip, update_scale
from muonclip.other_names import ALIASES, from_emerging_optimizers, from_megatron

SHAPES = [(6, 4), (4, 6), (5, 5)]


@pytest.mark.parametrize(
    ("theirs", "scale"),
    [
        ("spectral", lambda n, m: math.sqrt(max(n, m))),
        ("shape_scaling", lambda n, m: math.sqrt(max(1, n / m))),
        ("unit_rms_norm", lambda n, m: math.sqrt(n / m)),
    ],
)
def test_scales_are_those_of_emerging_optimizers(theirs: str, scale: Any) -> None:
    options = from_emerging_optimizers(scale_mode=theirs)
    for shape in SHAPES:
        ours = update_scale(shape, options["adjust_lr"], options.get("update_rms", 1.0))
        assert ours == pytest.approx(scale(*shape), rel=1e-12)


# The first and last of their triples.
TRIPLES = {
    "simple": ((3.4445, -4.7750, 2.0315), (3.4445, -4.7750, 2.0315)),
    "quintic": ((4.0848, -6.8946, 2.9270), (2.8366, -3.0525, 1.2012)),
    "polar_express": ((8.2051, -22.9019, 16.4607), (1.8750, -1.2500, 0.3750)),
    "deepseekv4": ((3.4445, -4.7750, 2.0315), (2.0, -1.5, 0.5)),
    "cans": ((8.4703, -25.1081, 18.6293), (2.2737, -1.6447, 0.4162)),
    "cubic5": ((3.3656576, -3.3420992, 0.0), (2.2230472, -0.9630650, 0.0)),
}


@pytest.mark.parametrize("theirs", TRIPLES)
def test_coefficients_are_those_of_emerging_optimizers(theirs: str) -> None:
    """Up to the margin of 1 % in two of them."""
    ours = COEFFICIENTS[from_emerging_optimizers(coefficient_type=theirs)["ns_coefficients"]]
    margin = 0.05 if theirs in ("cans", "cubic5") else 1e-4
    for triple, expected in zip((ours[0], ours[-1]), TRIPLES[theirs], strict=True):
        assert triple == pytest.approx(expected, rel=margin)


def reference(weight: Tensor, gradients: list[Tensor]) -> Tensor:
    """Steps of Emerging-Optimizers with nesterov, by its formulas, in float64."""
    lr, decay, momentum, factor = 0.1, 0.3, 0.9, 0.2
    average = torch.zeros_like(weight)
    for gradient in gradients:
        weight = weight * (1 - lr * decay)
        average = average + (1 - momentum) * (gradient - average)
        x = gradient + momentum * (average - gradient)
        x = x / x.norm()
        for a, b, c in COEFFICIENTS["you"]:
            gram = x @ x.mT
            x = a * x + (b * gram + c * gram @ gram) @ x
        weight = weight - lr * factor * math.sqrt(max(weight.shape)) * x
    return weight


def test_translated_options_give_the_same_steps() -> None:
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(4, 6, dtype=torch.float64))
    gradients = [torch.randn(4, 6, dtype=torch.float64) for _ in range(3)]
    expected = reference(weight.detach(), gradients)
    options = from_megatron(
        lr=0.1, weight_decay=0.3, muon_momentum=0.9, muon_nesterov=True,
        muon_extra_scale_factor=0.2, muon_fp32_matmul_prec="highest",
    )  # fmt: skip
    assert options["ns_dtype"] == torch.float32
    optimizer = MuonClip([("weight", weight)], **{**options, "ns_dtype": torch.float64})
    for gradient in gradients:
        weight.grad = gradient
        optimizer.step()
    assert (weight - expected).abs().max() < 1e-12


def test_aliases_are_accepted_by_option_and_by_group() -> None:
    for option, aliases in ALIASES.items():
        for theirs, ours in aliases.items():
            weight = nn.Parameter(torch.zeros(2, 2))
            changed: dict[str, Any] = {option: theirs, "ns_steps": 10}  # for every coefficient
            optimizer = MuonClip([("weight", weight)], **changed)
            assert optimizer.param_groups[0][option] == ours
            optimizer = MuonClip([{"params": [("weight", weight)], **changed}])
            assert optimizer.param_groups[0][option] == ours


def test_what_has_no_equivalent_is_refused_with_the_reason() -> None:
    for options, message in (
        ({"coefficient_type": "aol"}, "another normalization"),
        ({"coefficient_type": "custom"}, "pass the triples"),
        ({"weight_decay_method": "palm"}, "rather than its square"),
        ({"scale_mode": "none"}, "known are spectral"),
        ({"scale_mode": "unit_rms_norm", "extra_scale_factor": 0.2}, "multiply lr by 0.2"),
        ({"num_ns_steps": 6}, "use 5 steps"),
        ({"use_syrk": True}, "chosen by device and shape"),
        ({"steps": 6}, "known are lr, momentum"),
        ({"coefficient_type": [1, 2, 3]}, "known are simple"),
    ):
        with pytest.raises(ValueError, match=message):
            from_emerging_optimizers(**options)
    with pytest.raises(ValueError, match="muon_split_qkv: matrix_layouts of"):
        from_megatron(muon_split_qkv=True)
    weight = nn.Parameter(torch.zeros(2, 2))
    with pytest.raises(ValueError, match="ns_coefficients='aol' of Emerging-Optimizers has no"):
        MuonClip([("weight", weight)], ns_coefficients="aol")  # type: ignore[arg-type]


def test_their_defaults_are_translated() -> None:
    options = from_emerging_optimizers()
    assert options["ns_coefficients"] == "you" and options["nesterov"] is False
    assert (options["adjust_lr"], options["update_rms"]) == ("match_rms_adamw", 1.0)
    assert from_megatron() == options
    MuonClip([("weight", nn.Parameter(torch.zeros(2, 2)))], **options)
