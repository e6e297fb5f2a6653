"""MuonClip's options, each compared with the few lines that define it."""

import copy
import io
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from muonclip import MatrixLayout, MuonClip, orthogonalize
from muonclip.muon import LocalMuon
from muonclip.precision import round_stochastically
from muonclip.update import decay_and_apply

EXACT: dict[str, Any] = {"ns_dtype": torch.float64, "momentum": 0.0, "lr": 0.1}


def make(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in shapes]


def give_grads(params: list[nn.Parameter], step: int = 0) -> None:
    generator = torch.Generator().manual_seed(1000 + step)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def direction(gradient: Tensor) -> Tensor:
    return orthogonalize(gradient, dtype=torch.float64)


class TestWeightDecay:
    def step(self, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Weight before, the scaled update, weight after."""
        (p,) = params = make((5, 8), dtype=torch.float64)
        give_grads(params)
        before = p.detach().clone()
        assert p.grad is not None
        update = direction(p.grad) * 0.2 * 8**0.5
        MuonClip(params, **{**EXACT, **options}).step()
        return before, update, p.detach()

    def test_decoupled(self) -> None:
        before, update, after = self.step(weight_decay=0.5)
        assert torch.allclose(after, before - 0.1 * (update + 0.5 * before))

    def test_cautious_decays_only_where_the_update_shrinks_too(self) -> None:
        before, update, after = self.step(weight_decay=0.5, weight_decay_mode="cautious")
        decay = torch.where(update * before > 0, 0.5 * before, 0.0)
        assert 0 < decay.count_nonzero() < decay.numel()
        assert torch.allclose(after, before - 0.1 * (update + decay))

    @pytest.mark.parametrize("tiny", [1.0, 1e-30])
    def test_cautious_decays_weights_whose_update_is_zero(self, tiny: float) -> None:
        """The published mask is u·w >= 0, by sign: a product of small numbers vanishes."""
        weight = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, 0.0]) * tiny
        update = torch.tensor([0.0, 0.0, 1.0, 1.0, -1.0, 1.0]) * tiny
        decays = torch.tensor([True, True, True, False, False, True])
        after = weight.clone()
        decay_and_apply([after], [update], lr=0.1, weight_decay=0.5, mode="cautious")
        expected = weight - 0.1 * update - 0.05 * weight * decays
        assert torch.allclose(after, expected, atol=0)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_decays_with_a_learning_rate_in_16_bits(self, dtype: torch.dtype) -> None:
        """In 16 bits, 1 - lr * weight_decay rounds to 1."""
        lr = 2.0**-9
        before, update, after = self.step(lr=torch.tensor(lr, dtype=dtype), weight_decay=0.125)
        assert torch.allclose(after, before - lr * (update + 0.125 * before), rtol=1e-6)

    def test_independent_of_the_learning_rate(self) -> None:
        before, update, after = self.step(weight_decay=0.01, weight_decay_mode="independent")
        assert torch.allclose(after, before - 0.1 * update - 0.01 * before)

    def test_l2_goes_through_the_gradient(self) -> None:
        (p,) = params = make((5, 8), dtype=torch.float64)
        give_grads(params)
        assert p.grad is not None
        before, given = p.detach().clone(), p.grad.clone()
        MuonClip(params, **EXACT, weight_decay=0.5, weight_decay_mode="l2").step()
        update = direction(given + 0.5 * before) * 0.2 * 8**0.5
        assert torch.allclose(p.detach(), before - 0.1 * update)
        assert torch.equal(p.grad, given)

    def test_a_rate_of_zero_on_the_device_moves_nothing(self) -> None:
        """A skipped step on an accelerator multiplies the rate by zero."""
        for mode in ("decoupled", "cautious", "independent", "l2"):
            (p,) = make((5, 8))
            before = p.detach().clone()
            with torch.no_grad():
                decay_and_apply(
                    [p], [torch.ones(5, 8)], lr=torch.tensor(0.0), weight_decay=0.5, mode=mode
                )
            assert torch.equal(p, before), mode


class TestScale:
    @pytest.mark.parametrize(
        ("mode", "factor"),
        [("original", (12 / 5) ** 0.5), ("spectral", (12 / 5) ** 0.5), ("none", 1.0)],
    )
    def test_modes(self, mode: str, factor: float) -> None:
        (p,) = params = make((12, 5), dtype=torch.float64)
        give_grads(params)
        assert p.grad is not None
        expected = p.detach() - 0.1 * factor * direction(p.grad)
        MuonClip(params, **EXACT, weight_decay=0.0, adjust_lr=mode).step()  # type: ignore[arg-type]
        assert torch.allclose(p.detach(), expected)

    def test_shape_of_the_matrix_not_of_its_storage(self) -> None:
        """Keller Jordan's convolutions scale by kernel sizes, torch's by shape[:2]."""
        (p,) = params = make((6, 2, 3, 3), dtype=torch.float64)
        give_grads(params)
        assert p.grad is not None
        update = direction(p.grad.flatten(1)).view_as(p) * 0.2 * 18**0.5
        expected = p.detach() - 0.1 * update
        group = {"params": params, "layout": MatrixLayout(flatten=True), "algorithm": "muon"}
        MuonClip([group], **EXACT, weight_decay=0.0).step()
        assert torch.allclose(p.detach(), expected)


def test_momentum_warms_up() -> None:
    """0.85 to 0.95 over four steps, and 0.95 from there."""
    (p,) = params = make((4, 6), dtype=torch.float64)
    optimizer = MuonClip(params, momentum_warmup_steps=4, ns_dtype=torch.float64)
    buffer = torch.zeros(4, 6, dtype=torch.float64)
    for step, momentum in enumerate([0.875, 0.9, 0.925, 0.95, 0.95]):
        give_grads(params, step)
        assert p.grad is not None
        buffer.lerp_(p.grad, 1 - momentum)
        optimizer.step()
        assert torch.allclose(optimizer.state[p]["momentum_buffer"], buffer)


class TestPrecision:
    def test_master_weights_equal_float32_training(self) -> None:
        low, high = make((8, 8), (8,), dtype=torch.bfloat16), make((8, 8), (8,))
        for a, b in zip(low, high, strict=True):
            b.data.copy_(a)
        options = {"lr": 1e-3, "momentum_dtype": torch.float32}
        first = MuonClip(low, master_weights=True, **options)  # type: ignore[arg-type]
        second = MuonClip(high, **options)  # type: ignore[arg-type]
        for step in range(20):
            give_grads(low, step)
            for a, b in zip(low, high, strict=True):
                assert a.grad is not None
                b.grad = a.grad.float()
            first.step()
            second.step()
        for a, b in zip(low, high, strict=True):
            assert torch.allclose(first.state[a]["master"], b, atol=1e-6)
            assert torch.equal(a, first.state[a]["master"].bfloat16())
            assert a.main_param is first.state[a]["master"]

    def test_without_a_master_small_updates_are_lost_and_stochastic_rounding_keeps_them(
        self,
    ) -> None:
        moved = {}
        for stochastic in (False, True):
            (p,) = params = make((64, 64), dtype=torch.bfloat16)
            p.data.fill_(1.0)
            options = {"stochastic_rounding": stochastic, "weight_decay": 0.0}
            optimizer = MuonClip(params, lr=2e-4, **options)  # type: ignore[arg-type]
            gradient = torch.ones(64, 64).bfloat16()
            for _ in range(100):
                p.grad = gradient.clone()
                optimizer.step()
            moved[stochastic] = 1 - p.float().mean().item()
        # Each entry of a rank-one update of 64 x 64 is 0.2 * 8 * s / 64, s being what one becomes.
        scale = orthogonalize(torch.ones(64, 64)).mean().item() * 0.2 * 8
        assert moved[False] == 0
        assert moved[True] == pytest.approx(100 * 2e-4 * scale, rel=0.2)

    @settings(max_examples=30, deadline=None)
    @given(value=st.floats(-(2.0**100), 2.0**100, width=32), seed=st.integers(0, 2**16))
    def test_stochastic_rounding_is_to_a_neighbour_and_right_on_average(
        self, value: float, seed: int
    ) -> None:
        source = torch.full((4096,), value)
        target = torch.empty(4096, dtype=torch.bfloat16)
        round_stochastically(source, target, (seed,))
        distinct = target.unique().double()
        assert len(distinct) <= 2
        unit = abs(value) * 2**-7 + 1e-38  # at least the distance of neighbours
        assert (distinct - value).abs().max() <= unit
        error = (target.double().mean() - value).abs().item()
        assert error <= 4 * unit / 4096**0.5

    def test_stochastic_rounding_leaves_infinities(self) -> None:
        source = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0])
        target = torch.empty(4, dtype=torch.bfloat16)
        round_stochastically(source, target, (0,))
        assert torch.allclose(target.float(), source, equal_nan=True)

    @pytest.mark.parametrize(
        "options",
        [
            {"master_weights": True},
            {"stochastic_rounding": True},
            {"momentum_dtype": torch.bfloat16},
            {"momentum_dtype": torch.float32},
            {"momentum_dtype": torch.int8},
            {"momentum_dtype": torch.int8, "master_weights": True},
        ],
    )
    def test_resuming_is_bit_exact(self, options: dict[str, Any]) -> None:
        """DeepSpeed#7748: torch casts loaded state to the parameter's dtype."""
        straight = make((8, 8), (8,), dtype=torch.bfloat16)
        stopped = [nn.Parameter(p.detach().clone()) for p in straight]
        optimizer = MuonClip(straight, lr=0.01, **options)
        for step in range(6):
            give_grads(straight, step)
            optimizer.step()
        first = MuonClip(stopped, lr=0.01, **options)
        for step in range(3):
            give_grads(stopped, step)
            first.step()
        file = io.BytesIO()
        torch.save(first.state_dict(), file)
        file.seek(0)
        second = MuonClip(stopped, lr=0.01, **options)
        second.load_state_dict(torch.load(file))
        for p in stopped:
            for name, value in first.state[p].items():
                assert second.state[p][name].dtype == value.dtype, name
        for step in range(3, 6):
            give_grads(stopped, step)
            second.step()
        for a, b in zip(straight, stopped, strict=True):
            assert torch.equal(a, b)

    def test_momentum_is_one_buffer_in_the_dtype_of_choice(self) -> None:
        params = make((8, 8))
        optimizer = MuonClip(params, momentum_dtype=torch.bfloat16)
        give_grads(params)
        optimizer.step()
        (state,) = optimizer.state.values()
        assert list(state) == ["momentum_buffer"]
        assert state["momentum_buffer"].dtype == torch.bfloat16

    def test_masters_may_be_turned_on_and_off_at_a_resume(self) -> None:
        params = make((8, 8), dtype=torch.bfloat16)
        plain, with_master = MuonClip(params), MuonClip(params, master_weights=True)
        give_grads(params)
        plain.step()
        saved = plain.state_dict()
        saved["param_groups"][0]["master_weights"] = True
        with_master.load_state_dict(saved)
        assert torch.equal(with_master.state[params[0]]["master"], params[0].float())
        saved = with_master.state_dict()
        saved["param_groups"][0]["master_weights"] = False
        plain.load_state_dict(saved)
        assert "master" not in plain.state[params[0]]


@pytest.mark.parametrize("master_weights", [False, True])
def test_the_local_tensor_itself_is_updated_unless_there_is_a_master(master_weights: bool) -> None:
    """Results are copied into a parameter unless both are the same tensor object."""
    params = make((3, 8, 8), dtype=torch.bfloat16)
    give_grads(params)
    optimizer = MuonClip(params, master_weights=master_weights)
    (param,) = optimizer._muon_params(optimizer._work())
    for part in (param, param.narrow(1, 2, 1)):
        assert (part.to_update is part.local) == (not master_weights)


class TestNonFinite:
    @pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
    @pytest.mark.parametrize("bad", [0, 1])
    @pytest.mark.parametrize("nonfinite", ["raise", "skip"])
    def test_nonfinite_gradients_change_nothing(
        self, value: float, bad: int, nonfinite: str
    ) -> None:
        params = make((4, 6), (6,))
        optimizer = MuonClip([("matrix", params[0]), ("vector", params[1])], nonfinite=nonfinite)  # type: ignore[arg-type]
        give_grads(params, 0)
        optimizer.step()
        before = copy.deepcopy(optimizer.state_dict()), [p.detach().clone() for p in params]
        give_grads(params, 1)
        grad = params[bad].grad
        assert grad is not None
        grad.view(-1)[3] = value
        if nonfinite == "raise":
            name = ("matrix", "vector")[bad]
            with pytest.raises(RuntimeError, match=f"'{name}' is not finite; nothing was updated"):
                optimizer.step()
        else:
            optimizer.step()
        assert optimizer.skipped_steps == 1
        after = optimizer.state_dict()
        assert after["param_groups"] == before[0]["param_groups"]
        for key, state in before[0]["state"].items():
            for name, saved in state.items():
                assert torch.equal(after["state"][key][name], saved)
        assert all(torch.equal(p, b) for p, b in zip(params, before[1], strict=True))
        give_grads(params, 2)
        optimizer.step()
        assert all(p.isfinite().all() for p in params)

    def test_a_large_gradient_is_finite(self) -> None:
        """A sum of squares would overflow, and so would Newton-Schulz's norm in float32."""
        (p,) = params = make((4, 6))
        give_grads(params)
        assert p.grad is not None
        expected = direction(p.grad.double())
        p.grad.mul_(1e30)
        before = p.detach().clone()
        MuonClip(params, lr=1.0, momentum=0.0, weight_decay=0.0, adjust_lr="none").step()
        assert torch.allclose((before - p.detach()).double(), expected, atol=1e-5)

    def test_ignored_nonfinite_gradients_reach_the_parameters(self) -> None:
        (p,) = params = make((4, 6))
        p.grad = torch.full((4, 6), torch.nan)
        MuonClip(params, nonfinite="ignore").step()
        assert p.isnan().all()


class TestOnAnAccelerator:
    """Fake CUDA tensors: whatever asks the device for a value raises here."""

    @pytest.mark.parametrize(
        "options",
        [
            {"nonfinite": "ignore"},
            {"nonfinite": "skip"},
            {"nonfinite": "skip", "weight_decay_mode": "cautious"},
            {"nonfinite": "skip", "master_weights": True},
            {"nonfinite": "skip", "ns_coefficients": "polar_express", "ns_dtype": torch.float16},
            {"nonfinite": "skip", "momentum_dtype": torch.bfloat16, "momentum_warmup_steps": 3},
        ],
    )
    def test_no_host_synchronisation_in_a_step(self, options: dict[str, Any]) -> None:
        with FakeTensorMode():
            shapes = [((8, 16), torch.float32), ((4, 8, 16), torch.bfloat16), ((8,), torch.float32)]
            params = [nn.Parameter(torch.randn(s, device="cuda", dtype=d)) for s, d in shapes]
            optimizer = MuonClip(params, **options)
            for _ in range(2):
                for p in params:
                    p.grad = torch.randn_like(p)
                optimizer.step()
            assert all(p.device.type == "cuda" for p in params)
            with pytest.raises(DataDependentOutputException):  # the test can fail
                params[0].detach().sum().item()

    def test_a_learning_rate_on_the_device(self) -> None:
        """A CUDA graph must read the rate at each replay, not keep that of its capture."""
        with FakeTensorMode():
            params = [nn.Parameter(torch.randn(8, 16, device="cuda"))]
            lr = torch.tensor(0.1, device="cuda")
            optimizer = MuonClip(params, lr=lr, capturable=True, nonfinite="skip")
            params[0].grad = torch.randn_like(params[0])
            optimizer.step()
            assert optimizer.param_groups[0]["lr"].device == lr.device

    def test_a_tensor_rate_equals_a_number(self) -> None:
        ours, theirs = make((4, 6), (6,)), make((4, 6), (6,))
        rate = torch.tensor(0.05)
        options = {"capturable": True, "nonfinite": "skip"}
        first = MuonClip(ours, lr=rate, **options)  # type: ignore[arg-type]
        second = MuonClip(theirs, lr=0.05)
        for step in range(3):
            for params, optimizer in ((ours, first), (theirs, second)):
                give_grads(params, step)
                optimizer.step()
        for a, b in zip(ours, theirs, strict=True):
            assert torch.allclose(a, b, atol=1e-6)

    @pytest.mark.parametrize(
        "options",
        [
            {"nonfinite": "raise"},
            {"nonfinite": "skip", "momentum_warmup_steps": 2},
            {"nonfinite": "skip", "stochastic_rounding": True},
        ],
    )
    def test_options_that_a_graph_cannot_replay_are_refused(self, options: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match="cannot be captured in a CUDA graph"):
            MuonClip(make((2, 2)), capturable=True, **options)

    def test_a_skipped_step_on_the_device_changes_nothing(self) -> None:
        """The path of accelerators, without branches, run on the CPU."""
        for flag in (1.0, 0.0):
            (p,) = params = make((4, 6))
            optimizer = MuonClip(params, lr=0.1)
            give_grads(params, 0)
            optimizer.step()
            buffer = optimizer.state[p]["momentum_buffer"]
            before = p.detach().clone(), buffer.clone()
            p.grad = torch.full((4, 6), torch.nan) if flag else torch.ones(4, 6)
            with torch.no_grad():
                muon_params = optimizer._muon_params(optimizer._work())
                LocalMuon().step(muon_params, found_inf=torch.tensor(flag))
            same = torch.equal(p, before[0]) and torch.equal(buffer, before[1])
            assert same == bool(flag)
            assert p.isfinite().all()


class TestCompiled:
    def test_a_compiled_step_equals_an_eager_step(self, caplog: pytest.LogCaptureFixture) -> None:
        ours, theirs = make((4, 6), (3, 4, 6), (6,)), make((4, 6), (3, 4, 6), (6,))
        first, second = MuonClip(ours, lr=0.05), MuonClip(theirs, lr=0.05)
        compiled = torch.compile(first.step, backend="aot_eager")
        for step in range(4):
            give_grads(ours, step)
            give_grads(theirs, step)
            compiled()
            second.step()
        for a, b in zip(ours, theirs, strict=True):
            assert torch.allclose(a, b, atol=1e-5)
        assert "Graph break" not in caplog.text

    def test_a_compiled_step_counts_steps_that_it_skips(self) -> None:
        params = make((4, 6), (6,))
        optimizer = MuonClip(params, nonfinite="skip")
        compiled = torch.compile(optimizer.step, backend="aot_eager")
        for number in range(4):
            give_grads(params, number)
            if number % 2:
                params[0].grad[0, 0] = torch.nan  # type: ignore[index]
            compiled()
        assert optimizer.skipped_steps == 2
        assert all(p.isfinite().all() for p in params)

    def test_newton_schulz_is_one_graph(self) -> None:
        compiled = torch.compile(orthogonalize, backend="aot_eager", fullgraph=True)
        x = torch.randn(2, 8, 24)
        for form in ("direct", "gram"):
            assert torch.allclose(compiled(x, form=form), orthogonalize(x, form=form), atol=1e-4)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
    def test_newton_schulz_is_one_graph_for_all_shapes(self, dtype: torch.dtype) -> None:
        torch._dynamo.reset()
        compiled = torch.compile(orthogonalize, backend="aot_eager", fullgraph=True, dynamic=True)
        for shape in ((70, 140), (70, 150), (141, 70), (2, 141, 70)):
            x = torch.randn(shape)
            expected = orthogonalize(x, dtype=dtype)
            assert torch.allclose(compiled(x, dtype=dtype), expected, atol=2e-2)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"state_device": "cpu"}, "state_device has no effect on a group"),
        ({"shard_state": True}, "shard_state has no effect on a group"),
        ({"betas": (0.8, 0.9), "algorithm": "adamw"}, "no option betas: give them adamw_betas"),
        ({"use_muon": False}, "no option use_muon: give them algorithm='muon' or"),
        ({"eps": 1e-6, "algorithm": "adamw"}, "eps=1e-06 has no effect .*: set adamw_eps"),
        ({"ns_steps": 6, "algorithm": "adamw"}, "ns_steps=6 has no effect .*: leave it out"),
        ({"adamw_lr": 0.1, "algorithm": "muon"}, "adamw_lr=0.1 has no effect .*: leave it out"),
        ({"adamw_eps": 0.1, "algorithm": "muon"}, "adamw_eps=0.1 has no effect"),
    ],
)
def test_options_without_effect_on_a_new_group_are_refused(
    given: dict[str, Any], message: str
) -> None:
    (p,) = make((4, 6))
    optimizer = MuonClip([("q", nn.Parameter(torch.ones(2, 3)))])
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [("w", p)], **given})
    with pytest.raises(ValueError, match=message):
        MuonClip([{"params": [("w", p)], **given}])
    # Options that other libraries keep in groups, and those of the constructor.
    group = {"params": [("w", p)], "name": "all", "lr_scale": 0.5, "algorithm": "adamw"}
    optimizer.add_param_group({**group, "ns_steps": 5})


def test_first_moments_of_float16_are_wide_enough_for_adamw() -> None:
    """The squares of ordinary gradients are below the range of float16."""
    results = []
    for dtype in (torch.float16, torch.float32):
        (p,) = make((4,), dtype=dtype)
        optimizer = MuonClip([{"params": [p], "algorithm": "adamw"}], lr=1e-2)
        before = p.detach().clone()
        for size in (3e-4, 3e-4, 1e-5):
            p.grad = torch.full((4,), size, dtype=dtype)
            optimizer.step()
        assert optimizer.state[p]["exp_avg_sq"].dtype == torch.float32
        results.append((p - before).float())
    assert torch.allclose(results[0], results[1], atol=5e-3)


def test_a_tensor_of_one_element_may_replace_the_learning_rate() -> None:
    ours, theirs = make((4, 6), (6,)), make((4, 6), (6,))
    first, second = MuonClip(ours, lr=0.1), MuonClip(theirs, lr=0.1)
    for group in first.param_groups:
        group["lr"] = torch.tensor([0.2])
    for group in second.param_groups:
        group["lr"] = 0.2
    for params, optimizer in ((ours, first), (theirs, second)):
        give_grads(params)
        optimizer.step()
    assert all(map(torch.allclose, ours, theirs))


def test_layouts_survive_torch_load_in_safe_mode() -> None:
    layout = MatrixLayout((2, 4), repeats=2, separate=True)
    params = make((12, 5))
    optimizer = MuonClip([{"params": params, "layout": layout}])
    give_grads(params)
    optimizer.step()
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    assert saved["param_groups"][0]["layout"] == str(layout)


@pytest.mark.parametrize("transposed", [False, True])
def test_state_is_rearranged_where_the_layout_has_other_rows(transposed: bool) -> None:
    """Each tensor-parallel rank has rows of gate and of up: their order depends on the number."""
    saved = MatrixLayout((2, 2), 3, transposed=transposed)
    own = MatrixLayout((6, 6), transposed=transposed)

    def arrange(tensor: Tensor) -> Tensor:
        return own.join(saved.split(tensor), tensor.shape)

    (old,) = make((5, 12) if transposed else (12, 5))
    first = MuonClip([{"params": [old], "layout": saved, "algorithm": "muon"}], **EXACT)
    give_grads([old])
    first.step()
    new = nn.Parameter(arrange(old.detach()))
    second = MuonClip([{"params": [new], "layout": own, "algorithm": "muon"}], **EXACT)
    with pytest.warns(UserWarning, match=r"was rearranged: from \(rows 2 \+ 2, 3 times, merged"):
        second.load_state_dict(first.state_dict())
    assert second.param_groups[0]["layout"] == own
    give_grads([old], 1)
    assert old.grad is not None
    new.grad = arrange(old.grad)
    first.step()
    second.step()
    assert torch.equal(new, arrange(old))
    assert torch.equal(
        second.state[new]["momentum_buffer"], arrange(first.state[old]["momentum_buffer"])
    )


def test_layouts_of_other_matrices_are_not_loaded_from_a_checkpoint() -> None:
    """They belong to the model, whose rows are where they were."""
    params = make((12, 5))
    old = MuonClip([{"params": params, "layout": MatrixLayout((6, 6))}])
    new = MuonClip([{"params": params, "layout": MatrixLayout.per_head(12, 3)}])
    give_grads(params)
    old.step()
    new.load_state_dict(old.state_dict())
    assert new.param_groups[0]["layout"] == MatrixLayout.per_head(12, 3)
    momenta = [optimizer.state[params[0]]["momentum_buffer"] for optimizer in (old, new)]
    assert torch.equal(*momenta)
