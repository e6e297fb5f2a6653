"""QK-Clip and an optimizer: which steps clip, which observations count, and what is reported."""

import copy
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from muonclip import AttentionLayout, MaxLogitMonitor, MuonClip, QKClip, max_logits, param_groups
from tests.muonclip.test_qk_clip import HIDDEN

X = torch.randn(2, 5, HIDDEN, generator=torch.Generator().manual_seed(0))


class Model(nn.Module):
    """One attention whose logits a clip observes in training."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(HIDDEN, 8), nn.Linear(HIDDEN, 8)
        self.observe: Callable[..., None] | None = None

    def query_key(self, x: Tensor) -> list[Tensor]:
        return [f(x).unflatten(-1, (2, 4)).transpose(1, 2) for f in (self.q, self.k)]

    def forward(self, x: Tensor) -> Tensor:
        query, key = self.query_key(x)
        if self.training and self.observe is not None:
            self.observe(query, key)
        return (query @ key.mT).square().mean()

    def largest(self, x: Tensor = X) -> Tensor:
        with torch.no_grad():
            return max_logits(*self.query_key(x))


def watched(threshold: float = 100.0) -> tuple[Model, QKClip]:
    torch.manual_seed(0)
    model = Model()
    layout = AttentionLayout.separate(model.q, model.k, num_heads=2)
    clip = QKClip({"layer": layout}, threshold=threshold, exact=True)
    model.observe = partial(clip.observe_attention, "layer")
    return model, clip


def seen(clip: QKClip) -> Tensor:
    assert clip.result is not None
    return clip.result.max_logits["layer"]


@contextmanager
def no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def poison(model: nn.Module) -> None:
    for parameter in model.parameters():
        assert parameter.grad is not None
        parameter.grad.fill_(math.nan)


def test_a_skipped_step_changes_nothing_and_its_logits_do_not_count() -> None:
    model, clip = watched(threshold=1e-6)
    optimizer = MuonClip(param_groups(model), lr=0.0, nonfinite="skip")
    clip.attach(optimizer)
    model(100 * X).backward()
    poison(model)
    before = copy.deepcopy(model.state_dict())
    optimizer.step()
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    assert clip.result is not None and clip.result.num_clipped == 0
    assert torch.allclose(seen(clip), model.largest(100 * X))
    optimizer.zero_grad()
    model(X).backward()
    expected = model.largest()
    optimizer.step()
    assert torch.equal(seen(clip), expected) and clip.result.num_clipped > 0


def test_logits_of_a_step_that_raised_do_not_count() -> None:
    model, clip = watched()
    optimizer = MuonClip(param_groups(model), lr=0.0)
    clip.attach(optimizer)
    model(100 * X).backward()
    poison(model)
    with pytest.raises(RuntimeError, match="not finite"):
        optimizer.step()
    optimizer.zero_grad()
    model(X).backward()
    optimizer.step()
    assert torch.equal(seen(clip), model.largest())


def make_adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.0)


def make_fused_adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)


def make_muon(model: nn.Module) -> torch.optim.Optimizer:
    return MuonClip(param_groups(model), lr=0.0)


ORDERS = ["zero, forward, backward", "forward, zero, backward", "forward, backward, zero"]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("make", [make_adamw, make_fused_adamw, make_muon])
def test_logits_of_a_step_that_grad_scaler_skips_do_not_count(
    make: Callable[[nn.Module], torch.optim.Optimizer], order: str
) -> None:
    """They are discarded with the gradients, wherever the loop calls ``zero_grad``."""
    model, clip = watched(threshold=1e9)
    optimizer = make(model)
    clip.attach(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)

    def step(micro_batches: list[Tensor], bad: bool = False) -> None:
        if order.startswith("zero"):
            optimizer.zero_grad()
        for index, x in enumerate(micro_batches):
            loss = scaler.scale(model(x))
            if order.startswith("forward, zero") and index == 0:
                optimizer.zero_grad()
            loss.backward()
        if bad:
            poison(model)
        scaler.step(optimizer)
        scaler.update()
        if order.endswith("zero"):
            optimizer.zero_grad()

    step([X, 3 * X])
    assert torch.equal(seen(clip), torch.maximum(model.largest(), model.largest(3 * X)))
    for _ in range(2):
        step([100 * X, 200 * X], bad=True)
    step([2 * X, X])
    assert torch.equal(seen(clip), torch.maximum(model.largest(), model.largest(2 * X)))
    step([X])
    assert torch.equal(seen(clip), model.largest())


def test_the_last_evaluation_of_a_closure_counts() -> None:
    model, clip = watched(threshold=1e9)
    optimizer = torch.optim.LBFGS(model.parameters(), lr=1e-3, max_iter=3)
    clip.attach(optimizer)
    largest = []

    def closure() -> float:
        optimizer.zero_grad()
        largest.append(model.largest())
        loss = model(X)
        loss.backward()
        return float(loss)

    optimizer.step(closure)  # type: ignore[arg-type]
    assert len(largest) > 1
    assert torch.equal(seen(clip), largest[-1])


def test_a_clip_is_attached_to_one_optimizer_and_a_newer_clip_replaces_it() -> None:
    """Running a notebook cell twice: no step clips twice, and the older clip warns."""
    model, clip = watched(threshold=1e-3)
    first, second = make_muon(model), make_muon(model)
    clip.attach(first)
    clip.attach(second)
    results: list[Any] = []
    clip.register_step_post_hook(results.append)
    model(X).backward()
    first.step()
    assert not results
    second.step()
    assert len(results) == 1

    layout = clip.layouts["layer"]
    newer = QKClip({"layer": layout}, threshold=1e-3)
    newer.attach(second)
    with pytest.warns(UserWarning, match="does nothing: a newer QKClip of these weights"):
        assert clip.step().num_clipped == 0
    other = Model()
    unrelated = QKClip({"layer": AttentionLayout.separate(other.q, other.k, num_heads=2)})
    unrelated.attach(second)  # other weights: both stay
    newer.observe("layer", torch.tensor([9.0, 9.0]))
    second.step()
    assert newer.result is not None and newer.result.num_clipped == 2
    assert unrelated.result is not None


def test_remove_undoes_attach_which_can_be_repeated() -> None:
    model, clip = watched(threshold=1e-3)
    optimizer = make_muon(model)
    before = dict(optimizer.__dict__)
    hooks = [dict(before[name]) for name in before if name.endswith("hooks")]
    clip.attach(optimizer)
    clip.remove()
    assert optimizer.__dict__.keys() == before.keys()
    assert [optimizer.__dict__[name] for name in before if name.endswith("hooks")] == hooks
    model(X).backward()
    optimizer.step()
    assert clip.result is None
    with pytest.warns(UserWarning, match="does nothing: it was removed"):
        clip.step()
    clip.attach(optimizer)
    model(X).backward()
    optimizer.step()
    assert clip.result is not None and clip.result.num_clipped == 2


def test_attach_refuses_objects_other_than_optimizers() -> None:
    model, clip = watched()
    schedule = torch.optim.lr_scheduler.ConstantLR(make_muon(model))
    with pytest.raises(TypeError, match=r"needs a torch.optim.Optimizer, got ConstantLR"):
        clip.attach(schedule)  # type: ignore[arg-type]


def test_wrapped_optimizers_are_unwrapped() -> None:
    accelerate = pytest.importorskip("accelerate")
    model, clip = watched(threshold=1e-3)
    wrapped = accelerate.Accelerator(cpu=True).prepare(make_muon(model))
    clip.attach(wrapped)
    model(X).backward()
    wrapped.step()
    assert clip.result is not None and clip.result.num_clipped == 2


# ---------------------------------------------------------------------- enabled, but ineffective


def trained(model: nn.Module, lr: float = 1e-4) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=lr)


def test_a_model_in_eval_mode_is_reported_once() -> None:
    model, clip = watched()
    optimizer = trained(model)
    clip.attach(optimizer)
    model.eval()(X).backward()
    with pytest.warns(UserWarning, match="did not observe layer before this step and cannot clip"):
        optimizer.step()
    with no_warnings():
        optimizer.step()


def test_layers_that_are_sometimes_skipped_are_not_reported() -> None:
    """Layer drop, accumulation, evaluation, steps without gradients or learning rate."""
    torch.manual_seed(0)
    models = [Model() for _ in range(3)]
    layouts = {
        str(i): AttentionLayout.separate(m.q, m.k, num_heads=2) for i, m in enumerate(models)
    }
    clip = QKClip(layouts)
    for i, model in enumerate(models):
        model.observe = partial(clip.observe_attention, str(i))
    parameters = nn.ModuleList(models)
    optimizer = trained(parameters)
    clip.attach(optimizer)
    with no_warnings():
        optimizer.step()  # as schedulers are silenced
        for parameter in parameters.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.param_groups[0]["lr"] = 0.0
        optimizer.step()  # as torch.distributed.checkpoint makes the state
        optimizer.param_groups[0]["lr"] = 1e-4
        for dropped in (0, 1, 2, 0, 1, 2):
            for _ in range(2):
                sum(m(X) for i, m in enumerate(models) if i != dropped).backward()  # type: ignore[union-attr]
            optimizer.step()
            optimizer.zero_grad()
            for model in models:  # evaluation
                model.eval()(X)
            parameters.train()


def test_layers_without_gradients_are_not_reported() -> None:
    """Batches without images before, between and after others; frequent layer drop."""
    torch.manual_seed(0)
    image, text = watched()[0], Model()
    clip = QKClip(
        {
            name: AttentionLayout.separate(m.q, m.k, num_heads=2)
            for name, m in (("image", image), ("text", text))
        }
    )
    image.observe = partial(clip.observe_attention, "image")
    text.observe = partial(clip.observe_attention, "text")
    alone = nn.Linear(HIDDEN, 1)
    models = nn.ModuleList([image, text, alone])
    optimizer = trained(models)
    clip.attach(optimizer)
    with no_warnings():
        for parts in ["", "text", "text", "text", "text", "image", "", "text"]:
            loss = alone(X).mean()
            for name, model in (("image", image), ("text", text)):
                loss = loss + model(X) if name == parts else loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            for model in (image, text):  # evaluation
                model.eval()(X)
            models.train()


def test_weights_outside_the_attached_optimizer_are_not_scaled() -> None:
    """Linear probing: an optimizer of the head of a model whose weights all require gradients."""
    model, clip = watched(threshold=1e-3)
    head = nn.Linear(HIDDEN, 1)
    optimizer = trained(head)
    clip.attach(optimizer)
    before = copy.deepcopy(model.state_dict())
    with pytest.warns(UserWarning, match="does not scale layer: the optimizer that this clip is"):
        for _ in range(2):
            (model(X) + head(X).sum()).backward()
            optimizer.step()
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    assert clip.result is not None and list(clip.result.skipped) == ["layer"]
    assert clip.result.num_clipped == 0 and (seen(clip) > 1e-3).all()

    optimizer.add_param_group({"params": [model.q.weight]})  # the biases are in another one
    model(X).backward()
    optimizer.step()
    assert clip.result is not None and clip.result.num_clipped == 2 and not clip.result.skipped


def test_a_layer_that_cannot_be_clipped_is_refused_before_the_step() -> None:
    model, clip = watched()
    optimizer = trained(model)
    clip.attach(optimizer)
    model(X).backward()
    before = copy.deepcopy(model.state_dict())
    for layer in (model.q, model.k):
        nn.utils.parametrizations.weight_norm(layer)
    with pytest.raises(ValueError, match="its weight is computed from other parameters"):
        optimizer.step()
    assert torch.equal(model.q.bias, before["q.bias"])
    assert torch.equal(model.k.bias, before["k.bias"])


@pytest.mark.parametrize("first", [True, False])
def test_forward_passes_in_inference_mode_do_not_count(first: bool) -> None:
    model, clip = watched()
    optimizer = trained(model, lr=0.0)
    clip.attach(optimizer)
    if not first:
        model(X).backward()
    with torch.inference_mode():
        model(100 * X)
        clip.observe("layer", torch.tensor([1e6, 1e6]))
    if first:
        model(X).backward()
    optimizer.step()
    assert torch.equal(seen(clip), model.largest())
    model(2 * X).backward()
    optimizer.step()
    assert torch.equal(seen(clip), model.largest(2 * X))


def test_a_layer_that_is_never_observed_is_reported() -> None:
    models = [Model() for _ in range(2)]
    layouts = {
        str(i): AttentionLayout.separate(m.q, m.k, num_heads=2) for i, m in enumerate(models)
    }
    clip = QKClip(layouts)
    models[0].observe = partial(clip.observe_attention, "0")
    optimizer = trained(nn.ModuleList(models))
    clip.attach(optimizer)
    with pytest.warns(UserWarning, match="did not observe 1 before this step") as said:
        for _ in range(6):
            (models[0](X) + models[1](X)).backward()
            optimizer.step()
    assert len(said) == 1


# ---------------------------------------------------------------------- default dtype and device


@contextmanager
def defaults(dtype: torch.dtype, device: str) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


@settings(max_examples=30, deadline=None)
@given(
    construct=st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.float64]),
    run=st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.float64]),
    device=st.sampled_from(["cpu", "meta"]),
    autocast=st.booleans(),
    target=st.sampled_from([100.05, 101.3, 1234.5]),
)
def test_maxima_do_not_depend_on_the_default_dtype_or_device(
    construct: torch.dtype, run: torch.dtype, device: str, autocast: bool, target: float
) -> None:
    """A bfloat16 maximum of 100.05 would not be above 100."""
    torch.manual_seed(0)
    model = Model()
    with defaults(construct, device):
        layout = AttentionLayout.separate(model.q, model.k, num_heads=2)
        clip = QKClip({"layer": layout}, threshold=100.0)
        monitor = MaxLogitMonitor(clip)
        optimizer = MuonClip(param_groups(model), lr=1e-9, weight_decay=0.0)
        clip.attach(optimizer)
    with torch.no_grad():
        model.q.bias.zero_()
        model.k.bias.zero_()
        model.q.weight.view(2, 4, -1).mul_((target / model.largest())[:, None, None])
    with defaults(run, "cpu"), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        clip.observe_attention("layer", *model.query_key(X.float()))
        clip.observe("layer", model.largest())
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        assert monitor.latest["layer"].dtype == torch.float32
        monitor.report()
    assert clip.result is not None and clip.result.num_clipped == 2
    for values in (*clip.result.max_logits.values(), *clip.result.upper_bounds.values()):
        assert values.dtype == torch.float32
    if not autocast:
        assert torch.allclose(model.largest(), torch.full((2,), 100.0), rtol=1e-5)


def test_a_model_materialized_after_the_clip_is_clipped() -> None:
    with torch.device("meta"):
        model = Model()
        clip = QKClip({"layer": AttentionLayout.separate(model.q, model.k, num_heads=2)})
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        nn.init.ones_(parameter)
    clip.observe("layer", torch.tensor([400.0, 400.0]))
    assert clip.step().num_clipped == 2
    assert torch.equal(model.q.weight, torch.full_like(model.q.weight, 0.5))


def test_a_compiled_step_does_not_trace_the_clip() -> None:
    """It reads logits on a CPU: a trace would break there, and be made again for other heads."""
    model, clip = watched(threshold=1e-6)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    clip.attach(optimizer)
    is_traced: list[bool] = []
    clip.register_step_post_hook(lambda _: is_traced.append(torch.compiler.is_compiling()))
    step = torch.compile(optimizer.step, backend="eager")
    model(X).backward()
    step()
    assert is_traced == [False] and clip.result is not None and clip.result.num_clipped == 2
