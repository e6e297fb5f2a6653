"""Ranks on accelerators agree to skip and to plan again, without reading flags in ordinary steps.

gloo and the CPU stand in for NCCL and a GPU: the optimizer treats tensors on the CPU as if reading
them had to wait.
"""

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

from muonclip import MuonClip
from muonclip import optimizer as optimizer_module
from muonclip.distributed.sharded_state import local_values
from muonclip.distributed.sharding import local_tensor
from tests.distributed.launch import launch
from tests.distributed.optimizer_cases import (
    Case,
    Place,
    Spec,
    assert_equal,
    build,
    give_gradients,
    keep,
    outcome_of,
    random,
    train,
)
from tests.distributed.test_fsdp2 import placing

SHAPES = (Spec((8, 6)), Spec((5, 4, 6)), Spec((7,)), Spec((6, 6)), Spec((3, 5), None, "adamw"))
FSDP2 = tuple(Spec(s.shape, None, s.algorithm, ("S0",)) for s in SHAPES)
READS = {"_local_scalar_dense", "is_nonzero", "equal", "nonzero"}


@contextmanager
def reading_waits() -> Iterator[None]:
    """Let the optimizer treat the CPU as an accelerator."""
    names = ("muonclip.optimizer", "muonclip.update", "muonclip.precision")
    modules: list[Any] = [sys.modules[name] for name in names]
    original = optimizer_module.is_free_to_read
    for module in modules:
        module.is_free_to_read = lambda device: False
    try:
        yield
    finally:
        for module in modules:
            module.is_free_to_read = original


class Reads(TorchDispatchMode):
    """Names of the files of muonclip that read a tensor on the host.

    Newton-Schulz has a path for CPUs, which reads; flags of the step before have arrived.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in READS:
            self.add()
        return func(*args, **(kwargs or {}))

    def add(self) -> None:
        frame: Any = sys._getframe()
        while frame is not None and "muonclip" not in Path(frame.f_code.co_filename).parts[:-1]:
            frame = frame.f_back
        place = (Path(frame.f_code.co_filename).name, frame.f_code.co_name) if frame else ("", "")
        if place[0] != "orthogonalize.py" and place != ("optimizer.py", "read"):
            self.found.append(":".join(place))

    def __enter__(self) -> "Reads":
        self._tolist = Tensor.tolist

        def tolist(tensor: Tensor) -> Any:
            self.add()
            return self._tolist(tensor)

        Tensor.tolist = tolist  # type: ignore[method-assign, assignment]
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        Tensor.tolist = self._tolist  # type: ignore[method-assign]


def layouts() -> dict[str, tuple[Case, Place, dict[str, Any]]]:
    """The same parameters in several layouts: case, placement, and options of the optimizer."""
    world = {"process_group": dist.group.WORLD}
    low = Case(SHAPES, dtype=torch.bfloat16, options={"master_weights": True})
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    half = Case(FSDP2, (dist.get_world_size(),), {"ns_dtype": torch.float16})
    return {
        "DDP": (Case(SHAPES), keep, world),
        "sharded state": (Case(SHAPES), keep, {**world, "shard_state": True}),
        "sharded masters": (low, keep, {**world, "shard_state": True}),
        "FSDP2": (Case(FSDP2, (dist.get_world_size(),)), placing(mesh), {}),
        "FSDP2, scaled float16": (half, placing(mesh), {}),
    }


Disturb = Callable[[int, list[Any], MuonClip], None]  # in a step of the parameters


def no_disturbance(step: int, params: list[Any], optimizer: MuonClip) -> None:
    pass


def snapshot(params: list[Any], optimizer: MuonClip) -> list[Tensor]:
    state = [v for p in params for v in optimizer.state[p].values()]
    tensors = [*map(local_tensor, params), *(v for s in state for v in local_values(s))]
    return [tensor.detach().clone() for tensor in tensors]


def run(
    layout: tuple[Case, Place, dict[str, Any]],
    steps: tuple[int, ...],
    disturb: Disturb = no_disturbance,
    *,
    is_compiled: bool = False,
    **options: Any,
) -> tuple[list[Tensor], list[str], int]:
    """Train with a disturbance in step 2, in which nothing may change if it is deferred.

    Returns:
        The weights and state of this rank; what steps raised or warned; number of skipped steps.
    """
    case, place, others = layout
    params, optimizer = build(case, place, **others, **options)
    take_step: Callable[[], Any] = optimizer.step
    if is_compiled:
        torch._dynamo.reset()
        take_step = torch.compile(optimizer.step, backend="eager")
    found = []
    for step in steps:
        give_gradients(case, params, step, place)
        disturb(step, params, optimizer)
        before = snapshot(params, optimizer)
        skipped = int(optimizer.skipped_steps)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                take_step()
            except (RuntimeError, ValueError) as error:
                found.append(f"{step}: {error}")
        found += own_warnings(step, caught)
        if int(optimizer.skipped_steps) > skipped:
            assert all(map(torch.equal, snapshot(params, optimizer), before))
    return snapshot(params, optimizer), found, int(optimizer.skipped_steps)


def own_warnings(step: int, caught: list[warnings.WarningMessage]) -> list[str]:
    return [f"{step}: {w.message}" for w in caught if str(w.message).startswith("MuonClip")]


def last() -> bool:
    return dist.get_rank() == dist.get_world_size() - 1


def loses_one(step: int, params: list[Any], optimizer: MuonClip) -> None:
    if step == 2 and last():
        params[0].grad = params[4].grad = None


def loses_one_for_good(step: int, params: list[Any], optimizer: MuonClip) -> None:
    if step >= 2 and last():
        params[3].grad = None


def loses_all(step: int, params: list[Any], optimizer: MuonClip) -> None:
    if step == 2 and last():
        for param in params:
            param.grad = None


def is_frozen_on_all(step: int, params: list[Any], optimizer: MuonClip) -> None:
    if step >= 2:
        params[1].requires_grad_(False)
        params[1].grad = None


def gains_one(step: int, params: list[Any], optimizer: MuonClip) -> None:
    if step < 2 or (step == 2 and not last()):
        params[1].grad = None


def gains_one_later(step: int, params: list[Any], optimizer: MuonClip) -> None:
    if step < 2:
        params[1].grad = None


def raises(step: int, params: list[Any], optimizer: MuonClip) -> None:
    if step == 2 and last():
        optimizer.param_groups[0]["adamw_lr"] = 1.0
    else:
        optimizer.param_groups[0].pop("adamw_lr", None)


def raises_on_all(step: int, params: list[Any], optimizer: MuonClip) -> None:
    optimizer.param_groups[0].pop("adamw_lr", None)
    if step == 2:
        optimizer.param_groups[0]["adamw_lr"] = 1.0


def has_nan(step: int, params: list[Any], optimizer: MuonClip) -> None:
    gradient = local_tensor(params[0].grad)
    if step == 2 and dist.get_rank() == 0:
        gradient[0, 0] = torch.nan


def add_group(params: list[Any], optimizer: MuonClip) -> None:
    like = params[0]
    new: Any = random((4, 8), 50, dtype=like.dtype)
    gradient: Any = random((4, 8), 51, dtype=like.dtype)
    if hasattr(like, "device_mesh"):
        new, gradient = (
            distribute_tensor(t, like.device_mesh, [Shard(0)], src_data_rank=None)
            for t in (new, gradient)
        )
    param = nn.Parameter(new)
    param.grad = gradient
    optimizer.add_param_group({"params": [("new", param)], "algorithm": "muon"})


def adds_a_group(step: int, params: list[Any], optimizer: MuonClip) -> None:
    """The last rank a step before the others."""
    if step == (2 if last() else 3):
        add_group(params, optimizer)


def adds_a_group_for_good(step: int, params: list[Any], optimizer: MuonClip) -> None:
    if step == 2 and last():
        add_group(params, optimizer)


def all_add_a_group(step: int, params: list[Any], optimizer: MuonClip) -> None:
    if step == 3:
        add_group(params, optimizer)


SKIPPED = "3: MuonClip skipped the step before"
# Disturbance, steps and disturbance of an undisturbed run with the same result, options, messages
# of the last rank and of the others, number of skipped steps.
SCENARIOS: dict[str, tuple[Disturb, tuple[int, ...], Disturb, dict[str, Any], str, str, int]] = {
    "loses one": (loses_one, (0, 1, 3, 4), no_disturbance, {}, SKIPPED, SKIPPED, 1),
    "loses all": (loses_all, (0, 1, 3, 4), no_disturbance, {}, SKIPPED, SKIPPED, 1),
    "ignore": (
        loses_one, (0, 1, 3, 4), no_disturbance, {"nonfinite": "ignore"}, SKIPPED, SKIPPED, 1
    ),
    "all freeze one": (is_frozen_on_all, (0, 1, 2, 3, 4), is_frozen_on_all, {}, "", "", 0),
    "gains one": (gains_one, (0, 1, 3, 4), gains_one_later, {}, SKIPPED, SKIPPED, 1),
    "error": (
        raises, (0, 1, 4), no_disturbance, {},
        "3: adamw_lr has no effect", "3: another rank refused this step", 1,
    ),
    "error, ignore": (
        raises, (0, 1, 4), no_disturbance, {"nonfinite": "ignore"},
        "3: adamw_lr has no effect", "3: another rank refused this step", 1,
    ),
    "error on all": (
        raises_on_all, (0, 1, 3, 4), no_disturbance, {},
        "2: adamw_lr has no effect", "2: adamw_lr has no effect", 0,
    ),
    "NaN": (
        has_nan, (0, 1, 4), no_disturbance, {},
        "3: a gradient of the step before", "3: a gradient of the step before", 1,
    ),
    "NaN is skipped": (
        has_nan, (0, 1, 3, 4), no_disturbance, {"nonfinite": "skip"}, "", "", 1
    ),
    "adds a group": (adds_a_group, (0, 1, 3, 4), all_add_a_group, {}, SKIPPED, SKIPPED, 1),
}  # fmt: skip


def run_all() -> dict[str, Any]:
    found: dict[str, Any] = {}
    with reading_waits():
        for name, layout in layouts().items():
            if dist.get_world_size() == 4 and name in ("DDP", "sharded state"):
                continue  # as with two ranks
            references: dict[Any, list[Tensor]] = {}
            for scenario, (disturb, steps, undisturbed, options, *_) in SCENARIOS.items():
                tensors, messages, skipped = run(layout, (0, 1, 2, 3, 4), disturb, **options)
                if (steps, undisturbed) not in references:
                    references[steps, undisturbed] = run(layout, steps, undisturbed)[0]
                expected = references[steps, undisturbed]
                assert len(tensors) == len(expected)
                same = all(map(torch.equal, tensors, expected))
                found[f"{name}, {scenario}"] = scenario, same, messages, skipped
    return found


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_that_disagree_skip_a_step_and_agree_in_the_next(world_size: int) -> None:
    """The result is equal to the bit to that of training without the step that was skipped."""
    for rank, found in enumerate(launch(run_all, world_size)):
        for name, (scenario, same, messages, skipped) in found.items():
            *_, last_message, other_message, expected = SCENARIOS[scenario]
            message = last_message if rank == world_size - 1 else other_message
            assert [m[: len(message)] for m in messages] == ([message] if message else []), name
            assert skipped == expected, name
            assert same, name


def refuse() -> list[list[str]]:
    found = []
    for layout in layouts().values():
        for disturb in (loses_one_for_good, adds_a_group_for_good):
            for nonfinite in ("raise", "ignore"):
                with reading_waits():
                    found.append(run(layout, (0, 1, 2, 3, 4), disturb, nonfinite=nonfinite)[1])
                found.append(run(layout, (0, 1, 2), disturb, nonfinite=nonfinite)[1])
    return found


def test_ranks_that_keep_disagreeing_are_refused_together() -> None:
    """And at once where reading is free, also if gradients are not checked."""
    different = "update different parameters"
    for found in launch(refuse, 2):
        assert found
        for number, messages in enumerate(found):
            if number % 2:  # read at once
                assert [m[0] for m in messages] == ["2"] and different in messages[0], messages
                continue
            assert [m[0] for m in messages] == ["3", "3", "4"], messages
            errors = [m for m in messages if different in m]
            assert len(errors) == 2, messages


COMPILED = (  # name of a layout, whether it is as on an accelerator, options
    ("alone", True, {}),
    ("alone", True, {"nonfinite": "skip"}),
    ("sharded masters", True, {"nonfinite": "skip"}),
    ("FSDP2", True, {}),
)


def compile_steps() -> list[bool]:
    """Whether compiled steps do what steps do, past one that all ranks skip."""
    by_name = {"alone": (Case(SHAPES), keep, {}), **layouts()}
    found = []
    for name, waits, options in COMPILED:
        with reading_waits() if waits else nullcontext():
            ours, theirs = (
                run(by_name[name], (0, 1, 2, 3), has_nan, is_compiled=is_compiled, **options)
                for is_compiled in (True, False)
            )
        found.append(all(map(torch.allclose, ours[0], theirs[0])) and ours[1:] == theirs[1:])
    return found


def test_compiled_steps_raise_skip_and_count_as_others() -> None:
    """On an accelerator and among ranks, too."""
    for found in launch(compile_steps, 2):
        assert found == [True] * len(COMPILED)


def warn_of_compiling() -> list[int]:
    found = []
    for case, place, options in layouts().values():
        params, optimizer = build(case, place, **options)
        give_gradients(case, params, 0, place)
        torch._dynamo.reset()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.compile(optimizer.step, backend="eager")()
        found.append(sum("torch.compile has no effect" in str(w.message) for w in caught))
    return found


def test_compiling_a_step_among_ranks_has_no_effect_and_says_so() -> None:
    for found in launch(warn_of_compiling, 2):
        assert found == [1] * 5


def count_reads() -> dict[str, tuple[list[str], Any]]:
    found = {}
    with reading_waits():
        for name, (case, place, others) in layouts().items():
            for nonfinite in ("raise", "skip", "ignore"):
                params, optimizer = build(case, place, **others, nonfinite=nonfinite)
                reads = Reads()
                for step in range(4):
                    give_gradients(case, params, step, place)
                    if step < 1:  # plans
                        optimizer.step()
                        continue
                    with reads:
                        optimizer.step()
                found[f"{name}, {nonfinite}"] = reads.found, outcome_of(params, optimizer)
    return found


def test_an_ordinary_step_reads_nothing() -> None:
    for outcomes in launch(count_reads, 2):
        assert len(outcomes) == 15
        for name, (reads, outcome) in outcomes.items():
            assert not reads, (name, reads)
            if "masters" not in name and "float16" not in name:
                expected = train(Case(SHAPES, steps=range(4)))
                assert_equal(outcome, expected, Case(SHAPES))


def freeze_on_one_mesh() -> tuple[list[str], bool]:
    """Ranks 0 and 1, and 2 and 3, share a parameter each, and all share another.

    The first two ranks lose the gradient of the one that only they share.
    """
    world = DeviceMesh("cpu", [0, 1, 2, 3])
    pair = DeviceMesh("cpu", [[0, 1], [2, 3]], mesh_dim_names=("pairs", "pair"))["pair"]

    def train_both(steps: tuple[int, ...]) -> tuple[list[Any], list[str]]:
        params = [
            nn.Parameter(distribute_tensor(random((6, 4), i), mesh, [Shard(0)], src_data_rank=None))
            for i, mesh in enumerate((world, pair))
        ]
        optimizer = MuonClip(list(zip("ab", params, strict=True)))
        messages = []
        for step in steps:
            for param in params:
                param.grad = torch.ones_like(param) * (1 + step)
            if step >= 2 and dist.get_rank() < 2:
                params[1].grad = None
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                optimizer.step()
            messages += own_warnings(step, caught)
        return params, messages

    with reading_waits():
        ours, messages = train_both((0, 1, 2, 3, 4))
    expected, _ = train_both((0, 1, 3, 4))
    return messages, all(map(torch.allclose, map(local_tensor, ours), map(local_tensor, expected)))


def test_a_change_on_some_of_the_connected_ranks_costs_a_step() -> None:
    for messages, same in launch(freeze_on_one_mesh, 4):
        assert [message[: len(SKIPPED)] for message in messages] == [SKIPPED] and same


def end_with_a_skipped_step() -> list[list[str]]:
    """Rank 1 has an error, a NaN, or other gradients in the last step of training."""
    found = []
    with reading_waits():
        for disturb in (raises, has_nan, loses_one, no_disturbance):
            case, place, options = layouts()["sharded state"]
            params, optimizer = build(case, place, **options)
            for step in range(3):
                give_gradients(case, params, step, place)
                disturb(step, params, optimizer)
                optimizer.step()
            optimizer.param_groups[0].pop("adamw_lr", None)
            for read in (optimizer.state_dict, partial(optimizer.named_state, [])):
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always")
                    read()
                found.append(own_warnings(2, caught))
    return found


def test_state_that_lacks_the_last_step_is_not_saved_in_silence() -> None:
    for rank, found in enumerate(launch(end_with_a_skipped_step, 2)):
        *skipped, first, second = found
        assert [len(messages) for messages in skipped] == [1] * 6
        assert all("skipped the last step" in messages[0] for messages in skipped)
        assert ("adamw_lr has no effect" in skipped[0][0]) == (rank == 1)
        assert not first and not second


def capture_what_does_not_fit() -> list[str]:
    """No rank reads its flags, which a captured step cannot."""
    found = []
    with reading_waits(), pytest.MonkeyPatch.context() as patch:
        for disturb in (raises_on_all, loses_one):
            case, place, options = layouts()["DDP"]
            params, optimizer = build(case, place, capturable=True, nonfinite="skip", **options)
            for step in range(3):
                patch.setattr(optimizer_module, "_is_capturing", lambda step=step: step == 2)
                give_gradients(case, params, step, place)
                disturb(step, params, optimizer)
                if step == 2 and disturb is loses_one and not last():
                    continue  # it captures its step alone
                try:
                    optimizer.step()
                except (RuntimeError, ValueError) as error:
                    found.append(str(error))
    return found


def test_a_step_that_does_not_fit_is_not_captured() -> None:
    first, second = launch(capture_what_does_not_fit, 2)
    assert len(first) == 1 and "adamw_lr has no effect" in first[0]
    assert len(second) == 2 and "before the capture" in second[1]
