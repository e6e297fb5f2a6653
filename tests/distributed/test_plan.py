"""The plan of a configuration equals what a built model has, keeps, computes and sends."""

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils import flop_counter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from muonclip.distributed import ShardedState
from pretrain import batches, step
from pretrain.build import Run, build
from pretrain.config import Config
from pretrain.plan import plan
from pretrain.plan.activations import chunk_activations, head_activations
from pretrain.plan.memory import step_memory
from pretrain.plan.optimizer_state import state_of_ranks
from pretrain.plan.parameters import trained_weights
from pretrain.plan.ranks import Ranks, ranks_of
from pretrain.plan.shared_matrices import shared_matrices
from pretrain.plan.workload import images_per_step
from pretrain.startup import set_up
from tests.distributed import training
from tests.distributed.launch import launch

# No images: tests/pretrain/plan has a test of the encoder. Different sizes, so that none passes for
# another one.
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
    """Bytes that this rank sends, by operation; collectives count as rings send them."""

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
        if name == "alltoall_base_":  # all but its own part, by the splits
            _, given, _, _, splits = args[:5]
            own = splits[group.rank()] if splits else len(given) / ranks
            rows = len(given) - own
            self.sent[kind] += rows * _size(given) / max(len(given), 1)
            return
        twice = 2 if kind == "all_reduce" else 1
        self.sent[kind] += twice * sum(map(_size, sizes)) * (ranks - 1) / ranks


# Kind of operation, and the position of the argument with all parts.
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


def measure(
    folder: str, variations: list[tuple[str, ...]], *overrides: str
) -> list[dict[str, Any]]:
    """Measure a real step of each variation: what this rank has, keeps, computes and sends."""
    results = []
    context, data = set_up(training.tiny(folder, *overrides))
    for variation in variations:
        settings = training.tiny(folder, *overrides, *variation)
        run = build(settings, context, data)
        micro_batches = training.one_document_each(batches.for_step(settings, context, data, 1))
        kept = Kept(run)
        with Sent() as step_traffic, kept, _flop_counter() as flops:
            step.forward_backward(run, micro_batches)
        gradients = sum(_size(p.grad) for _, p in run.parameters() if p.grad is not None)
        step.drop_encoder_gradients(run)
        run.optimizer.step()  # sends weights to the owners of new master copies
        with Sent() as optimizer_traffic:
            run.optimizer.step()
        algorithms = {
            parameter: group["algorithm"]
            for group in run.optimizer.param_groups
            for parameter in group["params"]
        }
        results.append(
            {
                "parameters": {
                    name: (run.weights[name].numel, algorithms[p]) for name, p in run.parameters()
                },
                "weights": sum(_size(p) for _, p in run.parameters()),
                "gradients": gradients,
                "optimizer state": sum(
                    _size(part)
                    for _, p in run.parameters()
                    for value in run.optimizer.state[p].values()
                    for part in (value.parts if isinstance(value, ShardedState) else [value])
                ),
                "kept": kept.size,
                "flops": flops.get_total_flops(),
                "sent": step_traffic.sent,
                "sent by the optimizer": sum(optimizer_traffic.sent.values()),
            }
        )
    return results


def _flop_counter() -> FlopCounterMode:
    # torch counts baddbmm, but not the operation in place, and no grouped products.
    def baddbmm(_: Any, a: Any, b: Any, **_options: Any) -> int:
        return flop_counter.bmm_flop(a, b)

    mapping = {torch.ops.aten.baddbmm_: baddbmm, **training.GROUPED}
    return FlopCounterMode(display=False, custom_mapping=mapping)


class Kept(torch.autograd.graph.saved_tensors_hooks):
    """Bytes that autograd keeps from forward to backward, without the parameters."""

    def __init__(self, run: Run) -> None:
        self.size = 0
        seen = {p.untyped_storage()._cdata for _, p in run.parameters()}
        alive: list[Tensor] = []  # so that no address is used twice

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            in_forward = torch._C._current_graph_task_id() == -1
            if in_forward and storage._cdata not in seen:
                seen.add(storage._cdata)
                alive.append(tensor)
                self.size += storage.nbytes()
            return tensor

        super().__init__(keep, lambda tensor: tensor)


class Live(TorchDispatchMode):
    """Bytes of the tensors that are made within, at their most."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.device.type == "cpu":
                storage = tensor.untyped_storage()
                if storage._cdata not in self._sizes:
                    self._sizes[storage._cdata] = storage.nbytes()
                    self.now += storage.nbytes()
                    self.most = max(self.most, self.now)
                    weakref.finalize(storage, self._freed, storage._cdata)
        return result

    def _freed(self, address: int) -> None:
        self.now -= self._sizes.pop(address, 0)


def measure_peak(folder: str, variations: list[tuple[str, ...]], *overrides: str) -> list[int]:
    """Most bytes of a micro-batch's forward and backward pass, for each variation."""
    peaks = []
    context, data = set_up(training.tiny(folder, *overrides))
    for variation in variations:
        settings = training.tiny(folder, *overrides, *variation)
        run = build(settings, context, data)
        micro_batches = batches.for_step(settings, context, data, 1)[:1]
        step.forward_backward(run, micro_batches)
        with Live() as live:
            step.forward_backward(run, micro_batches)
        peaks.append(live.most)
    return peaks


def test_activations_and_temporary_tensors_are_what_is_alive_at_most(folder: Path) -> None:
    """Within 20 %, if experts, a dense MLP or the logits need most. On a CPU, attention makes
    copies in float32, which flex_attention on a GPU does not."""
    overrides = (*SHAPE, "precision=bfloat16", "micro_batch_size=8", "language.num_layers=2")
    full = "recompute.granularity=full"
    variations: list[tuple[str, ...]] = [
        (),
        (full,),
        (full, "language.expert_ffn_hidden_size=400"),
        (full, "language.ffn_hidden_size=1024"),
        (full, "language.vocab_size=8000"),
    ]
    (peaks,) = launch(measure_peak, 1, str(folder), variations, *overrides)
    for variation, peak in zip(variations, peaks, strict=True):
        settings = training.tiny(str(folder), *overrides, *variation)
        images = images_per_step(settings)
        (memory,) = step_memory(settings, ranks_of(settings, 1), images)
        planned = memory["activations"] + memory["temporary tensors"]
        assert planned == pytest.approx(peak, rel=0.2), variation


# Updates travel to owners as scaled float16.
SCALED = ("optimizer.ns_dtype=float16", "optimizer.shard_state=false")
INTERLEAVED = ("parallel.pipeline=2", "parallel.interleave=2", "language.num_layers=5")


@pytest.mark.parametrize(
    ("world_size", "overrides"),
    [
        (1, ()),
        (2, INTERLEAVED),
        (2, (*INTERLEAVED, "parallel.layout=[0,1,4,0]")),
        (4, ("parallel.tensor=2", "parallel.pipeline=2", "parallel.expert=2")),
        (4, ("parallel.tensor=2",)),
        (4, ("parallel.tensor=2", *SCALED)),
        (2, SCALED),
        (1, training.SHAPES["dense"]),
        (2, ("parallel.tensor=2", *training.SHAPES["queries without LoRA"])),
        (2, ("parallel.tensor=2", *training.SHAPES["normalized softmax, no shared expert"])),
    ],
)
def test_the_plan_equals_what_a_built_model_has_and_does(
    folder: Path, world_size: int, overrides: tuple[str, ...]
) -> None:
    """Exact except for traffic that depends on routing and on how evenly matrices are distributed,
    and for small tensors among the activations."""
    other = ("recompute.granularity=full", "optimizer.momentum_dtype=bfloat16")
    variations: list[tuple[str, ...]] = [(), ("precision=bfloat16", *other)]
    measured = launch(measure, world_size, str(folder), variations, *SHAPE, *overrides)
    for index, variation in enumerate(variations):
        settings = training.tiny(str(folder), *SHAPE, *overrides, *variation)
        ranks = ranks_of(settings, world_size)
        planned = plan(settings, world_size)
        results = [rank[index] for rank in measured]
        _check_parameters(planned["parameters"], results)
        total = sum(v for name, v in planned["flops"].items() if name not in ("total", "model"))
        assert total == pytest.approx(sum(result["flops"] for result in results), rel=1e-12)

        per_stage = world_size // ranks.pipeline
        for rank, result in enumerate(results):
            stage = rank // per_stage
            for name in ("weights", "gradients"):
                assert planned["memory"][stage][name] == result[name], (stage, name)
            _check_traffic(planned["messages"][stage], result["sent"])
        for stage, traffic in enumerate(planned["messages"]):
            held = [r["optimizer state"] for r in results[stage * per_stage :][:per_stage]]
            _check_state(settings, ranks, stage, held)
            sent = [r["sent by the optimizer"] for r in results[stage * per_stage :][:per_stage]]
            assert sum(sent) / per_stage == pytest.approx(traffic["optimizer"], rel=0.02, abs=64)

        for rank, result in enumerate(results):
            stage = rank // per_stage
            chunks = ranks.stages[stage]
            kept = sum(chunk_activations(settings, chunk, ranks).kept for chunk in chunks)
            if stage == ranks.pipeline - 1:
                kept += head_activations(settings, ranks)
            # Routing depends on the data; 100 bytes a token are for tokens, labels and losses.
            small = 100 * ranks.micro_batches * ranks.tokens(settings)
            expected = ranks.micro_batches * kept
            assert result["kept"] == pytest.approx(expected, rel=0.05, abs=small), stage


def test_the_plan_of_context_parallelism_equals_what_a_built_model_has_and_sends(
    folder: Path,
) -> None:
    """FLOPs within 5 %, since attention computes whole blocks of each rank's chunks."""
    overrides = (*SHAPE, "parallel.context=2", "parallel.expert=2")
    variations: list[tuple[str, ...]] = [(), ("precision=bfloat16", "recompute.granularity=full")]
    measured = launch(measure, 2, str(folder), variations, *overrides)
    for index, variation in enumerate(variations):
        settings = training.tiny(str(folder), *overrides, *variation)
        ranks, planned = ranks_of(settings, 2), plan(settings, 2)
        (memory,), (messages,), (chunks,) = planned["memory"], planned["messages"], ranks.stages
        results = [rank[index] for rank in measured]
        total = sum(v for name, v in planned["flops"].items() if name not in ("total", "model"))
        assert total == pytest.approx(sum(result["flops"] for result in results), rel=0.05)
        kept = sum(chunk_activations(settings, chunk, ranks).kept for chunk in chunks)
        kept += head_activations(settings, ranks)
        _check_state(settings, ranks, 0, [result["optimizer state"] for result in results])
        for result in results:
            for name in ("weights", "gradients"):
                assert memory[name] == result[name], name
            assert messages["context parallel"] > 0
            _check_traffic(messages, result["sent"])
            assert result["kept"] == pytest.approx(ranks.micro_batches * kept, rel=0.05)


def _check_state(settings: Config, ranks: Ranks, stage: int, held: list[int]) -> None:
    """That of every rank is exact."""
    is_updated = images_per_step(settings).update
    weights = [weight for weight in trained_weights(settings) if ranks.has(stage, weight)]
    shared = shared_matrices(settings, ranks, weights, is_updated)
    assert state_of_ranks(settings, ranks, weights, is_updated, shared) == held, stage


def _check_traffic(planned: dict[str, float], sent: dict[str, float]) -> None:
    backbone = ("gradients", "encoder gradients", "tensor parallel", "context parallel")
    assert sum(planned.get(name, 0.0) for name in backbone) == pytest.approx(
        sent["all_reduce"] + sent["gather"], rel=5e-3, abs=1024
    )
    assert planned.get("expert parallel", 0.0) == pytest.approx(sent["all_to_all"], rel=5e-2)
    assert planned.get("pipeline", 0.0) == sent["send"]


def _check_parameters(planned: dict[str, Any], results: list[dict[str, Any]]) -> None:
    parameters = {name: p for result in results for name, p in result["parameters"].items()}
    assert planned["total"] == sum(numel for numel, _ in parameters.values())
    assert planned["muon"] == sum(n for n, algorithm in parameters.values() if algorithm == "muon")
    vision = sum(n for name, (n, _) in parameters.items() if name.startswith("vision."))
    assert planned["vision"] == vision == planned["total"] - planned["language"]
