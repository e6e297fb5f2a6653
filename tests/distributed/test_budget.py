"""What is planned without allocating is what a built model has, keeps, computes and sends."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from pretrain import batches, step
from pretrain.build import Run, build
from pretrain.plan import budget
from pretrain.setup import set_up
from tests.distributed import training
from tests.distributed.launch import launch

# No images: the encoder has a test of its own. Sizes that differ, so that none stands for another.
SHAPE = (
    "peak_tflops=1",
    "data.vision_share=0",
    "data.vocab_size=408",
    "optimizer.ns_dtype=float32",
    "language.num_layers=4",
    "language.hidden_size=64",
    "language.ffn_hidden_size=128",
    "language.num_heads=4",
    "language.q_lora_rank=24",
    "language.kv_lora_rank=32",
    "language.qk_nope_head_dim=16",
    "language.v_head_dim=12",
    "language.experts_per_token=3",
    "language.expert_ffn_hidden_size=40",
    "language.shared_expert_ffn_hidden_size=48",
)


class Sent(TorchDispatchMode):
    """Bytes that this rank sends, collectives counted as rings send them, by what it is called."""

    def __init__(self) -> None:
        super().__init__()
        self.sent = {"all_reduce": 0.0, "gather": 0.0, "all_to_all": 0.0, "send": 0.0}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self._count(func._opname, args)
        return func(*args, **(kwargs or {}))

    def _count(self, name: str, args: Any) -> None:
        if name == "send":
            self.sent["send"] += sum(map(_size, args[0]))
            return
        if name not in _RINGS:
            return
        kind, tensors = _RINGS[name]
        group = _group(args)
        ranks = group.size()
        parts = args[tensors]
        while isinstance(parts, list) and isinstance(parts[0], list):
            (parts,) = parts
        sizes = parts if isinstance(parts, list) else [parts]
        if name == "alltoall_base_":  # what is not its own, by the splits
            _, given, _, _, splits = args[:5]
            own = splits[group.rank()] if splits else len(given) / ranks
            rows = len(given) - own
            self.sent[kind] += rows * _size(given) / max(len(given), 1)
            return
        twice = 2 if kind == "all_reduce" else 1
        self.sent[kind] += twice * sum(map(_size, sizes)) * (ranks - 1) / ranks


# The operation, and the argument that holds all parts together.
_RINGS = {
    "allreduce_": ("all_reduce", 0),
    "allreduce_coalesced_": ("all_reduce", 0),
    "allgather_": ("gather", 0),
    "_allgather_base_": ("gather", 0),
    "reduce_scatter_": ("gather", 1),
    "_reduce_scatter_base_": ("gather", 1),
    "alltoall_base_": ("all_to_all", 1),
}


def _group(args: Any) -> dist.ProcessGroup:
    for value in args:
        if isinstance(value, torch.ScriptObject):
            try:
                return dist.ProcessGroup.unbox(value)
            except RuntimeError:  # another kind of object
                continue
    raise AssertionError("no process group")


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def measured(folder: str, every: list[tuple[str, ...]], *overrides: str) -> list[dict[str, Any]]:
    """A real step in each of some settings: what this rank has, keeps, computes and sends."""
    found = []
    here, data = set_up(training.tiny(folder, *overrides))
    for more in every:
        settings = training.tiny(folder, *overrides, *more)
        run = build(settings, here, data)
        micro_batches = batches.for_step(settings, here, data, 1)
        kept = Kept(run)
        with (
            Sent() as step_messages,
            kept,
            FlopCounterMode(display=False) as flops,
        ):
            step.forward_backward(run, micro_batches)
        gradients = sum(_size(p.grad) for _, p in run.parameters() if p.grad is not None)
        step.drop_encoder_gradients(run)
        with Sent() as optimizer_messages:
            run.optimizer.step()
        algorithms = {
            parameter: group["algorithm"]
            for group in run.optimizer.param_groups
            for parameter in group["params"]
        }
        found.append(
            {
                "parameters": {
                    name: (
                        tuple(
                            run.shards[name].whole_shape(p.shape) if name in run.shards else p.shape
                        ),
                        algorithms[p],
                    )
                    for name, p in run.parameters()
                },
                "weights": sum(_size(p) for _, p in run.parameters()),
                "gradients": gradients,
                "optimizer state": sum(
                    _size(value)
                    for _, p in run.parameters()
                    for value in run.optimizer.state[p].values()
                ),
                "kept": kept.size,
                "flops": flops.get_total_flops(),
                "sent": step_messages.sent,
                "sent by the optimizer": sum(optimizer_messages.sent.values()),
            }
        )
    return found


class Kept(torch.autograd.graph.saved_tensors_hooks):
    """Bytes that autograd keeps from forward to backward, but for the parameters."""

    def __init__(self, run: Run) -> None:
        self.size = 0
        seen = {p.untyped_storage()._cdata for _, p in run.parameters()}
        alive: list[Tensor] = []  # so that no storage's place is taken by another

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            in_forward = torch._C._current_graph_task_id() == -1
            if in_forward and storage._cdata not in seen:
                seen.add(storage._cdata)
                alive.append(tensor)
                self.size += storage.nbytes()
            return tensor

        super().__init__(keep, lambda tensor: tensor)


LAYOUTS = [
    (1, ()),
    (2, ("parallel.pipeline=2", "parallel.interleave=2", "language.num_layers=5")),
    (4, ("parallel.tensor=2", "parallel.pipeline=2", "parallel.expert=2")),
    (4, ("parallel.tensor=2",)),
]


@pytest.mark.parametrize(("world_size", "overrides"), LAYOUTS)
def test_a_plan_is_what_a_built_model_has_and_does(
    folder: Path, world_size: int, overrides: tuple[str, ...]
) -> None:
    """Exact, but for messages that depend on who is sent to which expert, and on how evenly
    matrices can be dealt to ranks; and for small things that activations have."""
    every: list[tuple[str, ...]] = [(), ("precision=bfloat16", "recompute.granularity=full")]
    ranks = launch(measured, world_size, str(folder), every, *SHAPE, *overrides)
    for index, more in enumerate(every):
        settings = training.tiny(str(folder), *SHAPE, *overrides, *more)
        place = budget.layout(settings, world_size)
        plan = budget.plan(settings, world_size)
        here = [rank[index] for rank in ranks]
        _check_parameters(settings, here)
        total = sum(v for name, v in plan["flops"].items() if name not in ("total", "model"))
        assert total == sum(rank["flops"] for rank in here)

        a_stage = world_size // place.pipeline
        for rank, found in enumerate(here):
            stage = rank // a_stage
            for name in ("weights", "gradients", "optimizer state"):
                assert plan["memory"][stage][name] == found[name], (stage, name)
            _check_messages(plan["messages"][stage], found["sent"])
        for stage, messages in enumerate(plan["messages"]):
            dealt = [r["sent by the optimizer"] for r in here[stage * a_stage :][:a_stage]]
            assert messages["optimizer"] <= sum(dealt) / a_stage <= 1.3 * messages["optimizer"] + 64

        if world_size == 1:
            (run,) = place.stages[0]
            kept = budget.run_activations(settings, run, place)[0]
            kept += budget.head_activations(settings, place)
            assert here[0]["kept"] == pytest.approx(place.micro_batches * kept, rel=0.06)


def _check_messages(planned: dict[str, float], sent: dict[str, float]) -> None:
    backbone = ("gradients", "encoder gradients", "tensor parallel")
    assert sum(planned[name] for name in backbone) == pytest.approx(
        sent["all_reduce"] + sent["gather"], rel=5e-3, abs=1024
    )
    assert planned["expert parallel"] == pytest.approx(sent["all_to_all"], rel=5e-2)
    assert planned.get("pipeline", 0.0) == sent["send"]


def _check_parameters(settings: Any, here: list[dict[str, Any]]) -> None:
    """Every name, whole shape and algorithm."""
    whole: dict[str, tuple[tuple[int, ...], str]] = {}
    for rank in here:
        for name, (shape, algorithm) in rank["parameters"].items():
            assert whole.setdefault(name, (shape, algorithm)) == (shape, algorithm)
    planned = {}
    for weight in budget.weights(settings):
        for expert in range(max(weight.experts, 1)):
            name = weight.name.format(expert=expert)
            planned[name] = (weight.shape, "muon" if weight.muon else "adamw")
    assert planned == whole
