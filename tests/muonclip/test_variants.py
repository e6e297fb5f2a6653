"""Variants of Muon: NorMuon follows its definition, and another one needs a function and a name."""

import copy
import math
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from muonclip import MatrixLayout, MuonClip, orthogonalize, reference, update_scale
from muonclip.variants import VARIANTS, Variant

LAYOUTS: list[tuple[tuple[int, ...], MatrixLayout | None]] = [
    ((6, 4), None),
    ((4, 6), None),
    ((1, 5), None),
    ((5, 1), None),
    ((3, 4, 5), None),
    ((10, 6), MatrixLayout((4, 6))),
    ((3, 10, 6), MatrixLayout((4, 6))),
    ((12, 6), MatrixLayout((2, 1, 1), repeats=3)),
    ((12, 6), MatrixLayout.per_head(12, 3)),
    ((6, 12), MatrixLayout((4,), 3, separate=True, transposed=True)),
    ((3, 6, 4), MatrixLayout(transposed=True)),
    ((8, 3, 2, 2), MatrixLayout(flatten=True)),
    ((6, 3, 4), MatrixLayout(view=(6, 12), transposed=True)),
    ((3, 4, 6), MatrixLayout(view=(12, 6))),
    ((2, 3, 4, 6), MatrixLayout(view=(2, 12, 6))),
]


def make(
    shape: tuple[int, ...],
    layout: MatrixLayout | None = None,
    dtype: torch.dtype = torch.float64,
    **options: Any,
) -> tuple[nn.Parameter, MuonClip]:
    param = nn.Parameter(torch.randn(shape, dtype=dtype))
    group = {"params": [("w", param)], "algorithm": "muon", "layout": layout}
    return param, MuonClip([group], **{"ns_dtype": torch.float64, "variant": "normuon", **options})


def expected_update(direction: Tensor, averages: list[Tensor], layout: MatrixLayout) -> Tensor:
    """NorMuon's update of a parameter by the reference, matrix by matrix; updates ``averages``."""
    blocks, index = [], 0
    for block in layout.split(direction):
        matrices = []
        for matrix in block:
            exact = reference.orthogonalize(matrix)
            exact[~matrix.any(1)] = 0  # which the SVD returns as rounding errors
            if len(averages) == index:
                averages.append(torch.zeros(len(matrix), dtype=torch.float64))
            exact, averages[index] = reference.normuon_step(exact, averages[index], beta2=0.9)
            matrices.append(exact * update_scale(exact.shape))
            index += 1
        blocks.append(torch.stack(matrices))
    return layout.join(blocks, direction.shape)


@settings(max_examples=60, deadline=None)
@given(
    case=st.sampled_from(LAYOUTS),
    momentum=st.sampled_from([0.0, 0.9]),
    seed=st.integers(0, 2**16),
    dead=st.booleans(),
)
def test_normuon_equals_the_reference(
    case: tuple[tuple[int, ...], MatrixLayout | None], momentum: float, seed: int, dead: bool
) -> None:
    """Every matrix of a stack and of a fused parameter by itself, also with rows of zeros."""
    torch.manual_seed(seed)
    shape, layout = case
    param, optimizer = make(
        shape, layout, lr=0.1, weight_decay=0.0, momentum=momentum, nesterov=False,
        normuon_beta2=0.9,
    )  # fmt: skip
    averages: list[Tensor] = []
    buffer, weights = torch.zeros_like(param), param.detach().clone()
    for _ in range(3):
        param.grad = torch.randn_like(param)
        if dead:
            param.grad[:1] = 0
        buffer = momentum * buffer + (1 - momentum) * param.grad
        weights -= 0.1 * expected_update(buffer, averages, layout or MatrixLayout())
        optimizer.step()
        assert torch.allclose(param, weights, rtol=1e-9, atol=1e-9)
    state = optimizer.state[param]["neuron_square"]
    assert state.numel() == sum(average.numel() for average in averages)


def test_a_zero_gradient_and_a_zero_row_stay_zero() -> None:
    param, optimizer = make((4, 6), weight_decay=0.0)
    before = param.detach().clone()
    for rows in (0, 2):  # no row has a gradient, then two
        param.grad = torch.zeros_like(param)
        param.grad[:rows] = torch.randn(rows, 6)
        optimizer.step()
        assert torch.equal(param[rows:], before[rows:])
        assert param.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("ns_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_frobenius_norm_is_that_of_muon(dtype: torch.dtype, ns_dtype: torch.dtype) -> None:
    """In every precision, to the rounding of updates; the state is float32."""
    changes = []
    gradient = torch.randn(24, 16) * torch.logspace(-2, 2, 24)[:, None]
    for variant in ("muon", "normuon"):
        torch.manual_seed(0)
        param, optimizer = make(
            (24, 16), None, dtype, variant=variant, ns_dtype=ns_dtype, lr=1.0, weight_decay=0.0
        )
        param.data.zero_()
        param.grad = gradient.to(dtype)
        optimizer.step()
        changes.append(param.detach().float().norm().item())
    assert optimizer.state[param]["neuron_square"].dtype == torch.float32
    assert changes[1] == pytest.approx(changes[0], rel=0.02)


def test_rows_become_alike() -> None:
    """Rows of a first update have equal norms: each is divided by its own."""
    param, optimizer = make((24, 16), lr=1.0, weight_decay=0.0)
    param.data.zero_()
    param.grad = torch.randn_like(param)
    optimizer.step()
    norms = param.detach().norm(dim=1)
    assert torch.allclose(norms, norms.mean().expand(24), rtol=1e-6)


def test_the_default_is_muon_to_the_bit_and_has_no_other_state() -> None:
    found = []
    for options in ({}, {"variant": "muon"}):
        torch.manual_seed(0)
        param, optimizer = make((6, 4), **({"variant": "muon"} | options))
        param.grad = torch.randn_like(param)
        optimizer.step()
        assert optimizer.state[param].keys() == {"momentum_buffer"}
        exact = orthogonalize(param.grad, dtype=torch.float64) * update_scale((6, 4))
        found.append((param.detach().clone(), exact))
    assert torch.equal(found[0][0], found[1][0])


@pytest.mark.parametrize(
    ("shape", "layout"),
    [((24, 16), None), ((16, 16), None), ((16, 24), MatrixLayout(transposed=True))],
)
def test_equals_emerging_optimizers(shape: tuple[int, int], layout: MatrixLayout | None) -> None:
    """Its NorMuon takes columns of wide matrices for neurons; those are transposed here."""
    module = pytest.importorskip(
        "emerging_optimizers.orthogonalized_optimizers.adaptive_muon", exc_type=ImportError
    )
    torch.manual_seed(0)
    theirs = nn.Parameter(torch.randn(shape))
    other = module.AdaptiveMuon(
        [theirs], lr=0.1, momentum=0.9, weight_decay=0.1, nesterov=True, moment2_method="normuon",
        beta2=0.9, scale_mode="spectral", extra_scale_factor=0.2, fp32_matmul_prec="highest",
        coefficient_type="simple",
    )  # fmt: skip
    ours = nn.Parameter(theirs.detach().clone())
    optimizer = MuonClip(
        [{"params": [ours], "algorithm": "muon", "layout": layout}], lr=0.1, momentum=0.9,
        weight_decay=0.1, variant="normuon", normuon_beta2=0.9, ns_dtype=torch.float32,
    )  # fmt: skip
    for _ in range(5):
        ours.grad = torch.randn(shape)
        theirs.grad = ours.grad.clone()
        optimizer.step()
        other.step()
    assert (ours - theirs).norm() < 1e-5 * theirs.norm()
    state = optimizer.state[ours]["neuron_square"], other.state[theirs]["moment2_buffer"]
    assert state[0].shape == state[1].shape
    assert torch.allclose(*state, rtol=1e-4)


# ---------------------------------------------------------------------- a new variant


def double_rows(matrices: Tensor, state: dict[str, Tensor], options: Any) -> Any:
    """Twice the update of each row that was updated before."""
    count = state["row_count"] + (matrices != 0).any(-1, keepdim=True)
    return 1 + (count > 1).to(matrices.dtype), {"row_count": count}


def test_a_variant_is_a_function_and_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(VARIANTS, "double", Variant(double_rows, ("row_count",)))
    torch.manual_seed(0)
    param, optimizer = make((3, 4, 5), lr=1.0, weight_decay=0.0, momentum=0.0, variant="double")
    sizes = []
    for _ in range(2):
        param.data.zero_()
        param.grad = torch.ones_like(param)
        param.grad[0] = 0
        optimizer.step()
        sizes.append(param.detach().norm().item())
    assert sizes[1] == pytest.approx(2 * sizes[0])
    rows = optimizer.state[param]["row_count"]
    assert torch.equal(rows, torch.tensor([0.0, 2, 2]).view(3, 1, 1).expand(3, 4, 1))


# ---------------------------------------------------------------------- bad input


def matrix() -> nn.Parameter:
    return nn.Parameter(torch.randn(4, 6))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": "nor-muon"}, "variant must be one of"),
        ({"variant": "normuon", "normuon_beta2": 1.0}, r"normuon_beta2 must be in \[0, 1\)"),
        ({"normuon_beta2": 0.5}, "has no effect without variant='normuon'"),
        ({"adamw_weight_decay_mode": "l2"}, "adamw_weight_decay_mode must be one of"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MuonClip([("w", matrix())], **options)


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ({"algorithm": "adamw", "variant": "normuon"}, "whose algorithm is 'adamw'.*Leave it out"),
        ({"algorithm": "muon", "normuon_beta2": 0.5}, "without variant='normuon': set that"),
        (
            {"algorithm": "muon", "variant": "normuon", "layout": MatrixLayout(view=(8, 3))},
            "cannot have variant='normuon'.*Give its group variant='muon'",
        ),
    ],
)
def test_groups_that_cannot_have_a_variant_are_refused(group: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MuonClip([{"params": [matrix()], **group}])


def test_a_group_may_have_its_own_variant() -> None:
    params = [matrix(), matrix(), nn.Parameter(torch.ones(3))]
    groups = [
        {"params": params[:1], "algorithm": "muon", "variant": "normuon", "normuon_beta2": 0.5},
        {"params": params[1:2], "algorithm": "muon"},
        {"params": params[2:], "algorithm": "adamw"},
    ]
    optimizer = MuonClip(groups)
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer.step()
    has = ["neuron_square" in optimizer.state[p] for p in params]
    assert has == [True, False, False]
    again = MuonClip([dict(group) for group in optimizer.param_groups])  # as Accelerate does
    assert [g["variant"] for g in again.param_groups] == ["normuon", "muon", "muon"]


def test_groups_of_an_optimizer_with_options_of_a_variant_make_another() -> None:
    """AdamW's group has the constructor's options, which it does not read."""
    params = [("w", matrix()), ("b", nn.Parameter(torch.ones(3)))]
    optimizer = MuonClip(params, variant="normuon", normuon_beta2=0.5)
    again = MuonClip([dict(group) for group in optimizer.param_groups])
    assert [g["variant"] for g in again.param_groups] == ["normuon", "muon"]
    assert [g["normuon_beta2"] for g in again.param_groups] == [0.5, 0.5]


# ---------------------------------------------------------------------- saved state


def trained(variant: str, steps: int = 2) -> tuple[nn.Parameter, MuonClip]:
    torch.manual_seed(0)
    param, optimizer = make((6, 4), variant=variant)
    for _ in range(steps):
        param.grad = torch.randn_like(param)
        optimizer.step()
    return param, optimizer


def load(optimizer: MuonClip, param: Tensor, saved: MuonClip, source: Tensor, named: bool) -> None:
    if named:
        state = copy.deepcopy(saved.named_state([("w", source)]))
        optimizer.load_named_state(state, [("w", param)])
    else:
        optimizer.load_state_dict(saved.state_dict())


@pytest.mark.parametrize("named", [False, True])
def test_a_run_continues_as_if_it_had_not_stopped(named: bool) -> None:
    source, saved = trained("normuon")
    param, optimizer = make((6, 4))
    param.data.copy_(source)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(optimizer, param, saved, source, named)
    optimizer.param_groups[0]["updates"] = saved.param_groups[0]["updates"]
    for p, o in ((source, saved), (param, optimizer)):
        p.grad = torch.ones_like(p).tril()
        o.step()
    assert torch.equal(source, param)


@pytest.mark.parametrize("named", [False, True])
def test_state_of_muon_loads_into_normuon_and_the_reverse(named: bool) -> None:
    """The constructor's variant stays; a warning says what happened to the state."""
    for before, after, message in (
        ("muon", "normuon", "has no neuron_square, which variant='normuon' needs"),
        ("normuon", "muon", "has neuron_square, which variant='muon' does not use"),
    ):
        source, saved = trained(before)
        param, optimizer = make((6, 4), variant=after)
        with pytest.warns(UserWarning, match=message):
            load(optimizer, param, saved, source, named)
        assert optimizer.param_groups[0]["variant"] == after
        momentum = optimizer.state[param]["momentum_buffer"]
        assert torch.equal(momentum, saved.state[source]["momentum_buffer"])
        param.grad = torch.ones_like(param)
        optimizer.step()
        assert ("neuron_square" in optimizer.state[param]) == (after == "normuon")


def test_saved_averages_of_another_shape_are_refused() -> None:
    state = trained("normuon")[1].state_dict()
    state["state"][0] = {**state["state"][0], "neuron_square": torch.zeros(6, 4)}
    with pytest.raises(ValueError, match=r"saved neuron_square has \(6, 4\), not \(6, 1\)"):
        make((6, 4))[1].load_state_dict(state)


# ---------------------------------------------------------------------- AdamW's cautious decay


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    maximize=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_cautious_decay_of_adamw(seed: int, maximize: bool, dtype: torch.dtype) -> None:
    """Weights decay where AdamW's update, without decay, does not have the opposite sign."""
    torch.manual_seed(seed)
    start = torch.randn(12, dtype=dtype)
    start[:2] = 0
    gradients = [torch.randn(12, dtype=dtype) for _ in range(3)]
    lr, decay = 0.1, 0.5

    def make_adamw(**options: Any) -> tuple[nn.Parameter, MuonClip]:
        param = nn.Parameter(start.clone())
        group = {"params": [param], "algorithm": "adamw", "lr": lr, "maximize": maximize}
        return param, MuonClip([group], **options)

    cautious, optimizer = make_adamw(weight_decay=decay, adamw_weight_decay_mode="cautious")
    plain, other = make_adamw(weight_decay=0.0)
    for gradient in gradients:
        before = cautious.detach().clone()
        plain.data.copy_(before)
        plain.grad, cautious.grad = gradient.clone(), gradient.clone()
        optimizer.step()
        other.step()
        update = (before - plain.detach()) / lr
        mask = update * before >= 0
        expected = before - lr * (update + decay * torch.where(mask, before, 0))
        assert torch.allclose(cautious, expected, rtol=1e-5, atol=1e-6)


def test_adamws_decay_mode_is_its_own() -> None:
    """A cautious run of Muon keeps AdamW's decoupled decay, to the bit."""
    found = []
    for mode in ("decoupled", "cautious"):
        param = nn.Parameter(torch.linspace(-1, 1, 5))
        optimizer = MuonClip(
            [{"params": [param], "algorithm": "adamw"}], weight_decay=0.5, weight_decay_mode=mode
        )
        param.grad = torch.linspace(1, 2, 5)
        optimizer.step()
        found.append(param.detach().clone())
    assert torch.equal(*found)


def test_a_tensor_learning_rate() -> None:
    """Both options with the learning rate that a captured graph reads."""
    found = []
    for lr in (0.1, torch.tensor(0.1)):
        torch.manual_seed(0)
        params = [matrix(), nn.Parameter(torch.randn(5))]
        optimizer = MuonClip(
            [
                {"params": params[:1], "algorithm": "muon"},
                {"params": params[1:], "algorithm": "adamw"},
            ],
            lr=lr, variant="normuon", adamw_weight_decay_mode="cautious", nonfinite="skip",
            capturable=True,
        )  # fmt: skip
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer.step()
        found.append([p.detach() for p in params])
    for ours, theirs in zip(*found, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-6)
        assert math.isfinite(ours.sum())
