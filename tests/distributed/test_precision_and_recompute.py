"""Recomputing activations changes no gradient and shows QK-Clip every logit once; bfloat16 trains
as float32 does, from float32 master weights; stages may have different numbers of layers."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pretrain import batches, checkpoint, step
from pretrain.build import Run, build
from pretrain.runtime.faults import Guard
from pretrain.setup import set_up
from tests.distributed import training
from tests.distributed.launch import launch
from tests.distributed.test_training import _merged

FIVE_LAYERS = "language.num_layers=5"
FULL = ("recompute.granularity=full",)
BLOCK = (*FULL, "recompute.method=block", "recompute.num_layers=2")
SELECTIVE = "recompute.granularity=selective"


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, Tensor]:
    return _merged(launch(training.all_gradients, 1, str(folder), training.EXACT, FIVE_LAYERS))


def _layout(*settings: str) -> tuple[str, ...]:
    return tuple(f"parallel.{setting}" for setting in settings)


def gradients_and_observations(
    folder: str, every: Sequence[tuple[str, ...]], *overrides: str
) -> list[tuple[dict[str, Tensor], dict[str, list[Tensor]], dict[str, Tensor], int]]:
    """Of the first step, with each of some settings: gradients, what every attention layer showed
    its observer, the routers' biases, and elements that were kept from forward to backward."""
    outcomes = []
    here, data = set_up(training.tiny(folder, *overrides))
    for more in every:
        settings = training.tiny(folder, *overrides, *more)
        run = build(settings, here, data)
        seen: dict[str, list[Tensor]] = {}
        for number, chunk in enumerate(run.language):
            for name, module in chunk.named_modules():
                if hasattr(module, "core_attention"):
                    seen[f"{number}.{name}"] = []
                    module.core_attention.observer = seen[f"{number}.{name}"].append
        kept = 0

        def keep(tensor: Tensor) -> Tensor:
            nonlocal kept
            if torch._C._current_graph_task_id() == -1:  # not within a backward
                kept += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            step.forward_backward(run, batches.for_step(settings, here, data, 1))
        gradients = {name: p.grad.clone() for name, p in run.parameters() if p.grad is not None}
        bias = {
            name: t.clone() for name, t in run.named_tensors.items() if name.endswith("expert_bias")
        }
        outcomes.append((gradients, seen, bias, kept))
    return outcomes


@pytest.mark.parametrize(
    ("world_size", "layout"),
    [
        (1, ()),
        (2, _layout("tensor=2", "expert=2")),
        (4, _layout("pipeline=2", "interleave=2", "expert=2")),
    ],
)
def test_recomputing_changes_no_bit_and_shows_every_logit_once(
    folder: Path, world_size: int, layout: tuple[str, ...]
) -> None:
    """With DEP, uneven pipeline stages, and expert biases that count tokens in the forward."""
    every: list[tuple[str, ...]] = [(), FULL, (SELECTIVE,)]
    if world_size == 1:
        every += [BLOCK]
        every += [
            (SELECTIVE, f"recompute.modules=[{module}]")
            for module in ("mlp", "moe", "shared_experts")
        ]
    ranks = launch(gradients_and_observations, world_size, str(folder), every, FIVE_LAYERS, *layout)
    for outcomes in ranks:
        expected_gradients, expected_logits, expected_bias, all_kept = outcomes[0]
        for how, (gradients, seen, bias, kept) in zip(every[1:], outcomes[1:], strict=True):
            assert gradients.keys() == expected_gradients.keys()
            for name, gradient in gradients.items():
                assert torch.equal(gradient, expected_gradients[name]), (how, name)
            for layer, logits in seen.items():
                assert len(logits) == len(expected_logits[layer]) > 0, (how, layer)
                # Seen when a micro-batch's backward comes, which may be in another order.
                mine, theirs = torch.stack(logits), torch.stack(expected_logits[layer])
                assert torch.equal(mine.sort(0).values, theirs.sort(0).values), (how, layer)
            for name, value in bias.items():
                assert value.any() and torch.equal(value, expected_bias[name]), (how, name)
            assert kept < all_kept, how


@pytest.mark.parametrize(
    ("world_size", "layout"),
    [
        (3, _layout("pipeline=3")),
        (4, _layout("pipeline=2", "interleave=2", "expert=2")),
    ],
)
def test_stages_of_different_lengths_give_the_gradients_of_one_process(
    folder: Path, alone: dict[str, Tensor], world_size: int, layout: tuple[str, ...]
) -> None:
    settings = (str(folder), training.EXACT, FIVE_LAYERS, *layout)
    together = _merged(launch(training.all_gradients, world_size, *settings))
    assert together.keys() == alone.keys()
    for name, expected in alone.items():
        assert (together[name] - expected).norm() <= 1e-10 * expected.norm(), name


BFLOAT16 = "precision=bfloat16"


def first_steps(folder: str, *overrides: str) -> list[dict[str, Any]]:
    """The metrics of ten updates."""
    settings = training.tiny(folder, "optimizer.warmup_steps=2", *overrides)
    here, data = set_up(settings)
    run = build(settings, here, data)
    numbers = range(1, 11)
    return [step.train_step(run, batches.for_step(settings, here, data, n), n) for n in numbers]


def test_training_in_bfloat16_follows_the_curve_in_float32(folder: Path) -> None:
    """bfloat16's rounding (0.4 % of each weight and activation) averages out in a loss over some
    700 tokens; how much of it is left depends on the processor's bfloat16 instructions."""
    wide = launch(first_steps, 1, str(folder))[0]
    for world_size, layout in (
        (1, ()),
        (2, _layout("tensor=2", "expert=2")),
        (2, (*_layout("pipeline=2"), *FULL)),
    ):
        narrow = launch(first_steps, world_size, str(folder), BFLOAT16, *layout)[0]
        for mine, reference in zip(narrow, wide, strict=True):
            assert mine["loss"] == pytest.approx(reference["loss"], rel=5e-3), mine["step"]
            assert mine["grad_norm"] == pytest.approx(reference["grad_norm"], rel=5e-2)
            assert mine["heads"] == reference["heads"]
    assert wide[-1]["loss"] < wide[0]["loss"] - 0.5


def precision_of_a_run(folder: str, *overrides: str) -> dict[str, set[str]]:
    """Train some steps with QK-Clip at work; the dtypes of everything, and that masters rule."""
    settings = training.tiny(folder, *overrides)
    here, data = set_up(settings)
    run = build(settings, here, data)
    for number in (1, 2):
        metrics = step.train_step(run, batches.for_step(settings, here, data, number), number)
    assert metrics["heads_clipped"] > 0
    found: dict[str, set[str]] = {"parameters": set(), "state": set(), "buffers": set()}
    for _, parameter in run.parameters():
        found["parameters"].add(str(parameter.dtype))
        for key, value in run.optimizer.state[parameter].items():
            found["state"].add(f"{key} {value.dtype}")
        master = run.optimizer.state[parameter]["master"]
        assert torch.equal(parameter, master.to(parameter.dtype))
        # It knows more than its copy: else it would be no use.
        assert parameter.ndim < 2 or not torch.equal(parameter.float(), master)
    for name, tensor in run.named_tensors.items():
        if not tensor.requires_grad:
            found["buffers"].add(f"{name.rpartition('.')[2]} {tensor.dtype}")
    return found


def test_bfloat16_has_masters_and_moments_in_float32(folder: Path) -> None:
    clipping = "optimizer.qk_clip_threshold=0.002"
    found = launch(precision_of_a_run, 1, str(folder), BFLOAT16, clipping)[0]
    assert found["parameters"] == {"torch.bfloat16"}
    names = ("momentum_buffer", "exp_avg", "exp_avg_sq", "step", "master")
    assert found["state"] == {f"{name} torch.float32" for name in names}
    assert found["buffers"] == {"expert_bias torch.float32"}


def resumed(folder: str, *overrides: str) -> tuple[dict[str, Any], dict[str, Any], int]:
    """Four steps without a stop; and two, a checkpoint, a new process's build, and two more."""

    def go(run: Run, numbers: range) -> dict[str, Any]:
        for number in numbers:
            metrics = step.train_step(run, micro_batches(number), number)
        return metrics

    settings = training.tiny(folder, *overrides)
    here, data = set_up(settings)
    micro_batches = partial(batches.for_step, settings, here, data)
    straight = build(settings, here, data)
    go(straight, range(1, 3))
    saver, guard = checkpoint.saver(straight), Guard(settings.faults)
    checkpoint.save(straight, saver, guard, 2)
    saver.close()
    expected = go(straight, range(3, 5))
    anew = build(settings, here, data)
    assert checkpoint.restore(anew) == 2
    mine = go(anew, range(3, 5))
    differing = sum(
        not torch.equal(anew.optimizer.state[p][key], straight.optimizer.state[q][key])
        for (_, p), (_, q) in zip(anew.parameters(), straight.parameters(), strict=True)
        for key in straight.optimizer.state[q]
    )
    return mine, expected, differing


def test_a_checkpoint_in_bfloat16_goes_on_from_its_masters(folder: Path) -> None:
    """To the bit, with QK-Clip at work on the masters that were read."""
    overrides = (BFLOAT16, "optimizer.qk_clip_threshold=0.002", f"run_dir={folder}/resumed")
    mine, expected, differing = launch(resumed, 1, str(folder), *overrides)[0]
    assert expected["heads_clipped"] > 0
    assert mine | {"memory_gib": None} == expected | {"memory_gib": None}
    assert differing == 0
