"""MuonClip compared with torch's Muon and AdamW, and its behaviour as a torch optimizer."""

import copy
import io
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import muonclip.muon
from muonclip import MatrixLayout, MuonClip, param_groups


def make(*shapes: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float32) -> list[Any]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in shapes]


def give_grads(params: list[Any], step: int) -> None:
    generator = torch.Generator().manual_seed(1000 + step)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def train(optimizer: torch.optim.Optimizer, params: list[Any], steps: range) -> None:
    for step in steps:
        give_grads(params, step)
        optimizer.step()


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.up = nn.Linear(8, 16)
        self.down = nn.Linear(16, 8)
        self.experts = nn.Parameter(torch.randn(3, 8, 8) * 0.1)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 11, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        x = x + self.down(torch.relu(self.up(x)))
        x = x + torch.einsum("bsd,end->bsn", x, self.experts)
        return self.head(self.norm(x))


def train_model(model: Model, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        tokens = torch.randint(11, (4, 6), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        logits = model(tokens[:, :-1])
        nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
        optimizer.step()


class TestAgainstTorch:
    @pytest.mark.parametrize("nesterov", [True, False])
    @pytest.mark.parametrize("adjust_lr", ["match_rms_adamw", "original"])
    def test_muon(self, nesterov: bool, adjust_lr: str) -> None:
        """Twenty steps; five shapes, so that some are batched and some are alone."""
        shapes = [(16, 32), (16, 32), (32, 16), (24, 24), (16, 32)]
        ours, theirs = make(*shapes), make(*shapes)
        common = {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.95, "nesterov": nesterov}
        train(MuonClip(ours, adjust_lr=adjust_lr, **common), ours, range(20))  # type: ignore[arg-type]
        train(torch.optim.Muon(theirs, adjust_lr_fn=adjust_lr, **common), theirs, range(20))
        start = make(*shapes)
        for a, b, s in zip(ours, theirs, start, strict=True):
            # bfloat16 carries 8 bits: relative to how far training went, agree to about as much.
            assert (a - b).norm() < 0.01 * (b - s).norm()

    def test_muon_in_torchs_precision(self) -> None:
        """Newton-Schulz in bfloat16 as torch.optim.Muon's: no rounding more than there."""
        ours, theirs = make((48, 48), (32, 96)), make((48, 48), (32, 96))
        start = make((48, 48), (32, 96))
        common = {"lr": 0.02, "weight_decay": 0.1}
        optimizer = torch.optim.Muon(theirs, adjust_lr_fn="match_rms_adamw", **common)  # type: ignore[arg-type]
        train(MuonClip(ours, ns_dtype=torch.bfloat16, **common), ours, range(20))  # type: ignore[arg-type]
        train(optimizer, theirs, range(20))
        for a, b, s in zip(ours, theirs, start, strict=True):
            assert (a - b).norm() < 0.002 * (b - s).norm()

    def test_muon_momentum_is_torchs(self) -> None:
        ours, theirs = make((6, 8)), make((6, 8))
        a, b = MuonClip(ours), torch.optim.Muon(theirs)
        train(a, ours, range(5))
        train(b, theirs, range(5))
        buffer = a.state[ours[0]]["momentum_buffer"]
        assert torch.equal(buffer, b.state[theirs[0]]["momentum_buffer"])

    @pytest.mark.parametrize("maximize", [True, False])
    def test_adamw(self, maximize: bool) -> None:
        shapes = [(7,), (3, 3, 2, 2), ()]
        ours, theirs = make(*shapes), make(*shapes)
        options = {"lr": 0.01, "weight_decay": 0.1, "maximize": maximize}
        train(MuonClip(ours, adamw_betas=(0.8, 0.9), **options), ours, range(20))  # type: ignore[arg-type]
        train(torch.optim.AdamW(theirs, betas=(0.8, 0.9), **options), theirs, range(20))
        for a, b in zip(ours, theirs, strict=True):
            assert torch.allclose(a, b, atol=1e-6, rtol=0)

    def test_muon_maximize_is_minimizing_the_negative(self) -> None:
        up, down = make((4, 6)), make((4, 6))
        for step in range(3):
            give_grads(up, step)
            give_grads(down, step)
            down[0].grad.neg_()
            if step == 0:
                ascend, descend = MuonClip(up, maximize=True), MuonClip(down)
            ascend.step()
            descend.step()
        assert torch.equal(up[0], down[0])


class TestMatricesOfTheModel:
    """A matrix is a matrix of the model, not of its storage."""

    exact: ClassVar[dict[str, Any]] = {"ns_dtype": torch.float64, "lr": 0.1}

    def test_batched_equals_one_by_one(self, monkeypatch: pytest.MonkeyPatch) -> None:
        shapes = [(4, 6)] * 5 + [(6, 4), (3, 4, 6)]
        together, apart = make(*shapes), make(*shapes)
        train(MuonClip(together, **self.exact), together, range(3))
        monkeypatch.setitem(muonclip.muon._BATCH_ELEMENTS, "cpu", 1)
        train(MuonClip(apart, **self.exact), apart, range(3))
        for a, b in zip(together, apart, strict=True):
            assert torch.allclose(a, b, atol=1e-6)

    def test_stack_equals_its_slices(self) -> None:
        """maxtext#4798: the expert axis is not a matrix axis."""
        stacked = make((5, 4, 6), dtype=torch.float64)
        slices = [nn.Parameter(one.clone()) for one in stacked[0].detach()]
        a, b = MuonClip(stacked, **self.exact), MuonClip(slices, **self.exact)
        for step in range(3):
            give_grads(stacked, step)
            for one, grad in zip(slices, stacked[0].grad, strict=True):
                one.grad = grad.clone()
            a.step()
            b.step()
        assert torch.allclose(stacked[0], torch.stack(slices), atol=1e-12)

    @pytest.mark.parametrize("shape", [(10, 4), (3, 10, 4)])
    def test_fused_rows_equal_separate_parameters(self, shape: tuple[int, ...]) -> None:
        """MLM#7077, torchtitan#4532: gate and up fused went through one Newton-Schulz."""
        splits = (2, 5, 3)
        fused = make(shape, dtype=torch.float64)
        parts = [nn.Parameter(part.clone()) for part in fused[0].detach().split(splits, -2)]
        a = MuonClip([{"params": fused, "layout": MatrixLayout(splits)}], **self.exact)
        b = MuonClip(parts, **self.exact)
        for step in range(3):
            give_grads(fused, step)
            for part, grad in zip(parts, fused[0].grad.split(splits, -2), strict=True):
                part.grad = grad.clone()
            a.step()
            b.step()
        assert torch.allclose(fused[0], torch.cat(parts, -2), atol=1e-12)

    def test_storage_read_as_another_shape_is_not_cut(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The first dimension does not count slices of a stack."""
        layout = MatrixLayout(transposed=True, view=(24, 24))
        stored, plain = make((24, 4, 6), dtype=torch.float64), make((24, 24), dtype=torch.float64)
        plain[0].data.copy_(stored[0].detach().view(24, 24).T)
        monkeypatch.setitem(muonclip.muon._BATCH_ELEMENTS, "cpu", 8)
        for params, group in ((stored, {"layout": layout}), (plain, {})):
            give_grads(stored, 0)
            plain[0].grad = stored[0].grad.view(24, 24).T.contiguous()
            MuonClip([{"params": params, **group}], **self.exact).step()
        assert torch.allclose(stored[0].view(24, 24).T, plain[0], atol=1e-12)

    def test_low_precision_parameters_are_rounded_once(self) -> None:
        low, high = make((8, 8), dtype=torch.bfloat16), make((8, 8))
        high[0].data.copy_(low[0])
        give_grads(low, 0)
        high[0].grad = low[0].grad.float()
        MuonClip(low, momentum=0.0, lr=0.01).step()
        MuonClip(high, momentum=0.0, lr=0.01).step()
        assert torch.equal(low[0], high[0].bfloat16())


class TestGroups:
    def test_a_mixed_group_becomes_two(self) -> None:
        """Schedulers act on groups, so each group has one algorithm."""
        matrix, stack, vector, kernel = make((4, 4), (2, 4, 4), (4,), (2, 2, 3, 3))
        optimizer = MuonClip([vector, matrix, kernel, stack], lr=0.1, adamw_lr=0.01)
        found = {g["algorithm"]: (g["params"], g["lr"]) for g in optimizer.param_groups}
        assert found["muon"][0] == [matrix, stack] and found["muon"][1] == 0.1
        assert found["adamw"][0] == [vector, kernel] and found["adamw"][1] == 0.01

    def test_given_names_choose_the_algorithm(self) -> None:
        optimizer = MuonClip(Model().named_parameters())
        names = {g["algorithm"]: g["param_names"] for g in optimizer.param_groups}
        assert names["muon"] == ["experts", "up.weight", "down.weight"]
        assert {"embed.weight", "head.weight", "norm.weight", "up.bias"} <= set(names["adamw"])

    def test_options_of_a_group_override_the_constructor(self) -> None:
        matrix, vector, other = make((4, 4), (4,), (4,))
        optimizer = MuonClip(
            [
                {"params": [matrix, vector], "lr": 0.5, "weight_decay": 0.0},
                {"params": [other], "algorithm": "adamw", "adamw_lr": 0.25},
            ],
            lr=0.1,
            adamw_lr=0.01,
            adamw_weight_decay=0.2,
        )
        options = [(g["lr"], g["weight_decay"]) for g in optimizer.param_groups]
        assert options == [(0.5, 0.0), (0.5, 0.0), (0.25, 0.2)]

    def test_a_matrix_can_be_assigned_to_adamw(self) -> None:
        ours, theirs = make((4, 4)), make((4, 4))
        train(MuonClip([{"params": ours, "algorithm": "adamw"}], lr=0.1), ours, range(3))
        adamw = torch.optim.AdamW(theirs, lr=0.1, betas=(0.9, 0.95), weight_decay=0.1)
        train(adamw, theirs, range(3))
        assert torch.allclose(ours[0], theirs[0], atol=1e-6)

    def test_the_callers_group_is_not_changed(self) -> None:
        """DeepSpeed#8440: user groups must arrive as given."""
        params = make((4, 4), (4,))
        group = {"params": params, "lr": 0.3, "tag": "mine"}
        optimizer = MuonClip([group])
        assert group == {"params": params, "lr": 0.3, "tag": "mine"}
        assert [g["tag"] for g in optimizer.param_groups] == ["mine", "mine"]

    def test_add_param_group(self) -> None:
        first, second = make((4, 4)), make((4, 4), (3,), seed=1)
        optimizer = MuonClip(first)
        optimizer.add_param_group({"params": second})
        assert [g["algorithm"] for g in optimizer.param_groups] == ["muon", "muon", "adamw"]
        before = second[0].clone()
        give_grads(second, 0)
        optimizer.step()
        assert not torch.equal(second[0], before)

    def test_groups_of_another_optimizer_can_be_used(self) -> None:
        """Their names come apart from their tensors."""
        first = MuonClip(Model().named_parameters())
        second = MuonClip(first.param_groups)
        assert [g["param_names"] for g in second.param_groups] == [
            g["param_names"] for g in first.param_groups
        ]

    def test_an_empty_group_is_kept(self) -> None:
        optimizer = MuonClip([{"params": []}, {"params": make((2, 2))}])
        give_grads(optimizer.param_groups[1]["params"], 0)
        optimizer.step()
        assert optimizer.param_groups[0]["params"] == []


class TestAsATorchOptimizer:
    @pytest.mark.parametrize("saved_after", [0, 3])
    def test_resuming_is_bit_exact(self, saved_after: int) -> None:
        """To the bit, through torch.save with its safe loader; DeepSpeed#7748."""
        torch.manual_seed(0)
        straight = Model()
        resumed = copy.deepcopy(straight)
        options = {"lr": 0.02, "adamw_lr": 0.005}
        optimizer = MuonClip(straight.named_parameters(), **options)  # type: ignore[arg-type]
        train_model(straight, optimizer, range(6))

        first = MuonClip(resumed.named_parameters(), **options)  # type: ignore[arg-type]
        train_model(resumed, first, range(saved_after))
        file = io.BytesIO()
        torch.save({"optimizer": first.state_dict(), "model": resumed.state_dict()}, file)
        file.seek(0)
        saved = torch.load(file)
        again = Model()
        again.load_state_dict(saved["model"])
        second = MuonClip(again.named_parameters(), lr=1.0)
        second.load_state_dict(saved["optimizer"])
        train_model(again, second, range(saved_after, 6))
        for a, b in zip(straight.parameters(), again.parameters(), strict=True):
            assert torch.equal(a, b)

    def test_parameters_without_gradient_are_left_alone(self) -> None:
        """KJ#54: no decay, no state."""
        params = make((4, 4), (4, 4), (4,), (4,))
        before = [p.detach().clone() for p in params]
        optimizer = MuonClip(params, lr=0.1, weight_decay=0.5)
        params[0].grad = torch.ones(4, 4)
        params[2].grad = torch.ones(4)
        optimizer.step()
        assert [torch.equal(p, b) for p, b in zip(params, before, strict=True)] == [
            False,
            True,
            False,
            True,
        ]
        assert set(optimizer.state) == {params[0], params[2]}

    def test_schedulers_move_each_group_from_its_own_start(self) -> None:
        params = make((4, 4), (4,))
        optimizer = MuonClip(params, lr=0.1, adamw_lr=0.01)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
        give_grads(params, 0)
        optimizer.step()
        schedule.step()
        assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([0.05, 0.005])

    @pytest.mark.parametrize(
        "make_scheduler",
        [
            lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 10),
            lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=10),
        ],
    )
    def test_common_schedulers_accept_it(self, make_scheduler: Callable[[Any], Any]) -> None:
        params = make((4, 4), (4,))
        optimizer = MuonClip(params)
        scheduler = make_scheduler(optimizer)
        for step in range(5):
            give_grads(params, step)
            optimizer.step()
            scheduler.step()
        assert all(p.isfinite().all() for p in params)

    def test_closure(self) -> None:
        params = make((4, 4))
        optimizer = MuonClip(params)
        calls = []

        def closure() -> Any:
            optimizer.zero_grad()
            loss = params[0].square().sum()
            loss.backward()
            calls.append(loss.item())
            return loss

        loss = optimizer.step(closure)
        assert loss is not None and [loss.item()] == calls  # type: ignore[attr-defined]
        assert optimizer.step() is None

    def test_grad_scaler(self) -> None:
        params = make((4, 4), (4,))
        optimizer = MuonClip(params)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        before = [p.detach().clone() for p in params]
        scaler.scale(sum(p.square().sum() for p in params)).backward()
        scaler.step(optimizer)
        scaler.update()
        assert not any(torch.equal(p, b) for p, b in zip(params, before, strict=True))
        after = [p.detach().clone() for p in params]
        optimizer.zero_grad()
        scaler.scale(sum(p.sum() * float("inf") for p in params)).backward()
        scaler.step(optimizer)  # skipped
        assert all(torch.equal(p, a) for p, a in zip(params, after, strict=True))

    def test_deepcopy_and_hooks(self) -> None:
        params = make((4, 4))
        optimizer = MuonClip(params)
        calls: list[str] = []
        optimizer.register_step_post_hook(lambda *_: calls.append("after"))
        train(optimizer, params, range(2))
        assert calls == ["after", "after"]
        twin = copy.deepcopy(optimizer)
        assert twin.param_groups[0]["algorithm"] == "muon"

    def test_it_learns(self) -> None:
        torch.manual_seed(0)
        model = Model()
        optimizer = MuonClip(model.named_parameters(), lr=0.02, weight_decay=0.0)
        tokens = (torch.arange(8)[:, None] + torch.arange(6)) % 11  # each token sets the next
        losses = []
        for _ in range(30):
            optimizer.zero_grad()
            logits = model(tokens[:, :-1])
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.5 * losses[0]


class TestErrors:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"lr": -1.0}, "lr must be at least 0"),
            ({"lr": float("nan")}, "lr must be at least 0"),
            ({"update_rms": 0.0}, "update_rms=0 would leave every matrix as it is"),
            ({"lr": torch.tensor([0.1, 0.2])}, "lr must be a number or a floating-point tensor"),
            ({"lr": torch.tensor(1)}, "lr must be a number or a floating-point tensor"),
            ({"lr": torch.tensor(-1.0)}, "lr must be at least 0"),
            ({"weight_decay": -0.1}, "weight_decay must be"),
            ({"momentum": 1.0}, "momentum must be in"),
            ({"eps": -1.0}, "eps must be"),
            ({"ns_steps": 0}, "ns_steps must be"),
            ({"ns_coefficients": "nope"}, "ns_coefficients must be one of"),
            ({"ns_dtype": torch.int8}, "ns_dtype must be one of"),
            ({"adjust_lr": "nope"}, "adjust_lr must be one of"),
            ({"adamw_lr": -1.0}, "adamw_lr must be"),
            ({"adamw_betas": (0.9, 1.0)}, r"adamw_betas\[1\] must be in"),
            ({"adamw_betas": 0.9}, "adamw_betas must be two numbers"),
            ({"adamw_eps": -1.0}, "adamw_eps must be"),
            ({"adamw_weight_decay": -1.0}, "adamw_weight_decay must be"),
        ],
    )
    def test_options(self, options: dict[str, Any], message: str) -> None:
        for build in (
            lambda: MuonClip(make((2, 2)), **options),
            lambda: MuonClip([{"params": make((2, 2)), **options}]),
        ):
            with pytest.raises((ValueError, TypeError), match=message):
                build()

    @pytest.mark.parametrize(
        ("group", "message"),
        [
            ({"params": [("w", torch.zeros(2, 2, dtype=torch.cfloat))]}, "'w' .* is torch.complex"),
            ({"params": [("w", torch.zeros(2, 2, dtype=torch.int64))]}, "'w' .* is torch.int64"),
            (
                {"params": [("w", torch.zeros(2, 2).to(torch.float8_e4m3fn))]},
                r"'w' .* is torch.float8.*: leave it out, as param_groups\(model\)",
            ),
            ({"params": [("w", torch.zeros(2, 2).to_sparse())]}, "'w' .* is sparse"),
            (
                {"params": [("w", torch.zeros(0, 2))], "algorithm": "muon"},
                "'w' .* has no elements",
            ),
            (
                {"params": [("w", torch.zeros(2))], "algorithm": "muon"},
                "'w' .* is neither a matrix",
            ),
            ({"params": [("w", torch.zeros(2, 2))], "algorithm": "sgd"}, "'sgd' for .* 'w'"),
            (
                {"params": [("w", torch.zeros(2, 2))], "layout": MatrixLayout((1, 2))},
                r"'w' .* cannot go to Muon as it is: 1 x \(1, 2\) add up to 3 rows, not 2",
            ),
            ({"params": [("w", torch.zeros(2, 2))], "layout": (1, 1)}, "must be a MatrixLayout"),
            ({"lr": 0.1}, "a dict with 'params'"),
            ({"params": [("w", "not a tensor")]}, "'w' must be a Tensor"),
            ({"params": [torch.zeros(2), None]}, "number 1 of group 0 must be a Tensor"),
            ({"params": {torch.zeros(2)}}, "params must be ordered"),
            ({"params": [torch.zeros(2), ("w", torch.zeros(2))]}, "all parameters have names"),
            ({"params": [make((2, 2))[0] * 2]}, "number 0 .* leaf"),
        ],
    )
    def test_parameters_are_named(self, group: dict[str, Any], message: str) -> None:
        with pytest.raises((ValueError, TypeError), match=message):
            MuonClip([group])

    def test_duplicate_parameters_are_refused(self) -> None:
        p = make((2, 2))[0]
        with pytest.raises(ValueError, match=r"'b' .* given twice"):
            MuonClip([("a", p), ("b", p)])
        with pytest.raises(ValueError, match=r"number 0 of group 1 .* given twice"):
            MuonClip([{"params": [p]}, {"params": [p]}])

    def test_a_refused_group_adds_nothing(self) -> None:
        """Also where the bad parameter belongs to the second of the two groups it would become."""
        first, good = make((2, 2), (2, 2))
        optimizer = MuonClip([first])
        with pytest.raises(ValueError, match="number 1"):
            optimizer.add_param_group({"params": [good, torch.zeros(2, dtype=torch.cfloat)]})
        with pytest.raises(ValueError, match="names"):
            optimizer.add_param_group({"params": [("named", good)]})
        assert len(optimizer.param_groups) == 1

    def test_sparse_gradients_are_refused_before_any_update(self) -> None:
        matrix, vector = make((4, 4), (4,))
        optimizer = MuonClip([("matrix", matrix), ("vector", vector)])
        before = matrix.detach().clone()
        matrix.grad = torch.ones(4, 4)
        vector.grad = torch.ones(4).to_sparse()
        with pytest.raises(RuntimeError, match="'vector' has a sparse gradient"):
            optimizer.step()
        assert torch.equal(matrix, before)
        assert not optimizer.state


class TestLoadingAnotherModelsState:
    def saved(self, *shapes: tuple[int, ...], **options: Any) -> dict[str, Any]:
        params = [(f"q{i}", p) for i, p in enumerate(make(*shapes))]
        optimizer = MuonClip([{"params": params, **options}])
        train(optimizer, [p for _, p in params], range(1))
        return optimizer.state_dict()

    @pytest.mark.parametrize(
        ("state", "message"),
        [
            (lambda s: s((4, 4), (2, 3), (3,)), r"'q1' has shape \(3, 2\).*\(2, 3\)"),
            (lambda s: s((4, 4), (3,)), "saved state has nothing for parameter 'q2'"),
            (lambda s: s((4, 4), (3, 2), (5, 5), (3,)), "optimizer has nothing for .* 'q3'"),
            (lambda s: s((4, 4), (3, 2)), "saved state has nothing for parameter 'q2'"),
            (
                lambda s: s((4, 4), (3, 2), (3,), algorithm="adamw"),
                "'q0' is trained by muon, but its saved state is of adamw",
            ),
            (lambda s: {"state": {}}, "must have the keys"),
        ],
    )
    def test_state_that_does_not_fit_is_refused_and_nothing_is_loaded(
        self, state: Callable[[Any], dict[str, Any]], message: str
    ) -> None:
        params = make((4, 4), (3, 2), (3,), seed=5)
        optimizer = MuonClip([(f"q{i}", p) for i, p in enumerate(params)], lr=0.123)
        train(optimizer, params, range(1))
        before = copy.deepcopy(optimizer.state_dict())
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict(state(self.saved))
        after = optimizer.state_dict()
        assert after["param_groups"] == before["param_groups"]
        for key, value in before["state"].items():
            assert all(torch.equal(v, after["state"][key][name]) for name, v in value.items())

    def test_state_of_another_optimizer_is_refused(self) -> None:
        params = make((4, 4))
        adamw = torch.optim.AdamW(params)
        train(adamw, params, range(1))
        with pytest.raises(ValueError, match=r"number 0 of the muon group .* weights alone"):
            MuonClip(params).load_state_dict(adamw.state_dict())

    def test_pre_hooks_may_adapt_the_state(self) -> None:
        """The check sees what the user's hook returns, as torch documents."""
        optimizer = MuonClip([("q0", make((4, 4))[0])])
        saved = self.saved((4, 4))
        broken = {"state": saved["state"], "param_groups": []}
        optimizer.register_load_state_dict_pre_hook(
            lambda _, state: {**state, "param_groups": saved["param_groups"]}
        )
        optimizer.load_state_dict(broken)
        assert len(optimizer.state) == 1


@pytest.mark.parametrize("nonfinite", ["raise", "skip"])
@pytest.mark.parametrize("master_weights", [False, True])
def test_a_step_that_only_estimates_memory(nonfinite: Any, master_weights: bool) -> None:
    """Its tensors have no values: nothing can be read."""
    with FakeTensorMode():
        model = nn.Linear(4, 8, dtype=torch.bfloat16)
        optimizer = MuonClip(
            param_groups(model), nonfinite=nonfinite, master_weights=master_weights
        )
        for _ in range(2):
            model(torch.ones(2, 4, dtype=torch.bfloat16)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert optimizer.state[model.weight]["momentum_buffer"].shape == (8, 4)
