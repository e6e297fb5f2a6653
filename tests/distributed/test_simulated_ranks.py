"""Buffers of the optimizer's exchange on thousands of ranks, which torch's fake group simulates."""

import math
import pickle
import weakref
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from muonclip import MuonClip
from muonclip.distributed import groups, muon
from muonclip.distributed.exchange import BucketExchange, ResultExchange
from muonclip.distributed.groups import ConnectedRanks
from muonclip.distributed.muon import DistributedMuon
from muonclip.distributed.owners import StateOwners
from muonclip.distributed.sharding import Sharding, TensorShard, local_tensor
from muonclip.muon import MuonParam
from muonclip.orthogonalize import default_ns_dtype
from pretrain import config
from pretrain.model.weights import Weight
from pretrain.plan.muon_step import step_buffers
from pretrain.plan.parameters import trained_weights
from pretrain.plan.ranks import ranks_of
from pretrain.plan.shared_matrices import shared_matrices

KIMI = config.load("configs/kimi_k25.yaml")


class Allocated(TorchDispatchMode):
    """Bytes of the tensors that are made while ``is_counting``: in total, and at most at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = self.total = 0
        self.is_counting = True
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {_address(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_leaves(result):
            if self.is_counting and isinstance(tensor, Tensor) and _address(tensor) not in given:
                storage = tensor.untyped_storage()
                self._sizes[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                self.total += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self._freed, storage._cdata)
        return result

    def _freed(self, address: int) -> None:
        self.now -= self._sizes.pop(address, 0)


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


@pytest.fixture
def group(request: pytest.FixtureRequest) -> Iterator[dist.ProcessGroup]:
    size, rank = request.param
    dist.init_process_group("fake", rank=rank, world_size=size, store=FakeStore())
    assert dist.group.WORLD is not None
    yield dist.group.WORLD
    dist.destroy_process_group()


STAGE = ranks_of(KIMI)


def dense() -> list[Weight]:
    """The matrices of the first stage of Kimi K2.5 that all of its ranks share."""
    return [
        weight
        for weight in trained_weights(KIMI)
        if weight.layer is not None and weight.expert is None and weight.optimizer == "muon"
        if STAGE.has(0, weight)
    ]


def experts() -> list[Weight]:
    """The matrices of the experts that a rank of the first stage shares with few other ranks."""
    return [
        weight
        for weight in trained_weights(KIMI)
        if weight.expert is not None and STAGE.has(0, weight)
        for _ in range(STAGE.tensors(weight))
    ]


def encoder() -> list[Weight]:
    """The matrices of the vision encoder and the projector, of which every rank has a copy."""
    weights = trained_weights(KIMI)
    return [weight for weight in weights if weight.layer is None and weight.optimizer == "muon"]


def sharded(
    weight: Weight, parts: int, group: dist.ProcessGroup, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Sharding]:
    """A parameter without values, split over neighbouring ranks as megatron-core splits it."""
    shape, parts = list(weight.shape), parts if weight.split else 1
    dim = weight.split.dim if weight.split else 0
    shape[dim] //= parts
    offsets = [[part * shape[d] if d == dim else 0 for d in (0, 1)] for part in range(parts)]
    shards = [TensorShard(tuple(offset), tuple(shape)) for offset in offsets]
    placed = tuple(shards[rank % parts] for rank in range(group.size()))
    parameter = nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"))
    return parameter, Sharding(weight.shape, group, placed)


def copied(weight: Weight, group: dist.ProcessGroup) -> tuple[Tensor, Sharding]:
    """A parameter of which all ranks have copies, as with DDP."""
    whole = TensorShard.whole(weight.shape)
    parameter = nn.Parameter(torch.empty(weight.shape, device="meta"))
    return parameter, Sharding(weight.shape, group, (whole,) * group.size())


def fully_sharded(weight: Weight, group: dist.ProcessGroup) -> tuple[Tensor, Sharding]:
    """A DTensor whose rows are split over all ranks, as with FSDP2."""
    rows, *rest = weight.shape
    bounds = [min(rows, -(-rows // group.size()) * rank) for rank in range(group.size() + 1)]
    shards = tuple(
        TensorShard((first if last > first else 0, *(0 for _ in rest)), (last - first, *rest))
        for first, last in pairwise(bounds)
    )
    local = torch.empty(shards[group.rank()].sizes, device="meta")
    parameter = DTensor.from_local(
        local,
        DeviceMesh.from_group(group, "cpu"),
        [Shard(0)],
        run_check=False,
        shape=torch.Size(weight.shape),
        stride=(rest[0], 1),
    )
    return nn.Parameter(parameter), Sharding(weight.shape, group, shards)


class Sizes(NamedTuple):
    """Bytes of a simulated step on a rank.

    Attributes:
        received, owned: of its shards, and of what it receives of the whole matrices that it
            orthogonalizes.
        most, total: of the buffers of the exchange: at most at once, and in total.
    """

    received: int
    owned: int
    most: int
    total: int


def planned_step(
    weights: Sequence[Weight],
    placed: Sequence[tuple[Tensor, Sharding]],
    group: dist.ProcessGroup,
    monkeypatch: pytest.MonkeyPatch,
    **options: Any,
) -> tuple[DistributedMuon, list[MuonParam]]:
    """The plan of a step of Muon for these parameters on one rank, and its parameters."""
    monkeypatch.setattr(Sharding, "gather", lambda *_: [sharding for _, sharding in placed])
    groups = [
        {
            "params": [(f"{number}.{w.name}", p)],
            "algorithm": "muon",
            "layout": w.layout(KIMI.parallel),
        }
        for number, (w, (p, _)) in enumerate(zip(weights, placed, strict=True))
    ]
    optimizer = MuonClip(groups, **{"ns_dtype": torch.bfloat16, **options})
    for parameter, _ in placed:
        if parameter.dtype != torch.float32:
            parameter.grad_dtype = torch.float32
        parameter.grad = torch.empty_like(parameter, dtype=torch.float32)
    connected: Any = type("Connected", (), {"first_error": lambda self, error: error})()
    optimizer._groups, optimizer._connected = [group], connected
    owners = {}
    if optimizer.shard_state:
        optimizer._owners = StateOwners(None, dict(placed))
        shared = [
            optimizer._shared_param(p, g) for g in optimizer.param_groups for p in g["params"]
        ]
        optimizer._owners.add(shared, [group], connected)
        owners = {param: optimizer._owners.owners(param) for param, _ in placed}
    for members in optimizer.param_groups:
        members["updates"] = 1
    params = optimizer._muon_params(optimizer._work())
    plan = DistributedMuon(
        params, [group], connected, optimizer.process_group, optimizer.shardings, owners, []
    )
    return plan, params


def simulate(
    weights: Sequence[Weight],
    placed: Sequence[tuple[Tensor, Sharding]],
    group: dist.ProcessGroup,
    monkeypatch: pytest.MonkeyPatch,
    **options: Any,
) -> Sizes:
    """A step of Muon for these parameters, with the messages of one rank, which are bounded."""
    plan, params = planned_step(weights, placed, group, monkeypatch, **options)
    counted = Allocated()
    with monkeypatch.context() as patch:
        for kind in (BucketExchange, ResultExchange):
            for name in ("send", "receive", "gather"):
                if hasattr(kind, name):
                    patch.setattr(kind, name, counting(counted, getattr(kind, name), True))
        for name in ("update_momenta", "pre_orthogonalize", "apply_updates"):
            patch.setattr(muon, name, counting(counted, getattr(muon, name), False))
        counted.is_counting = False
        with torch.no_grad(), counted:
            plan.step(params, None)
    received = 2 * sum(local_tensor(p).numel() for p, _ in placed)
    # An owner receives updates in 16 bits, or gradients in float32 where it keeps the momentum. It
    # decodes scaled float16 in float32.
    itemsize = 4 if options.get("shard_state") else 2
    if options.get("ns_dtype") == torch.float16:
        itemsize += 4
    owned = itemsize * sum(math.prod(u.shape) for w in plan._work for u in w._exchange.owned)
    assert counted.most <= 1.1 * (received + owned)
    return Sizes(received, owned, counted.most, counted.total)


def simulate_sharded(
    weights: Sequence[Weight],
    parts: int,
    group: dist.ProcessGroup,
    monkeypatch: pytest.MonkeyPatch,
    **options: Any,
) -> Sizes:
    """``simulate`` with matrices that megatron-core splits."""
    dtype = torch.bfloat16 if options.get("master_weights") else torch.float32
    placed = [sharded(weight, parts, group, dtype) for weight in weights]
    return simulate(weights, placed, group, monkeypatch, shardings=dict(placed), **options)


@pytest.mark.parametrize(
    ("shard_state", "ns_dtype"),
    [(False, torch.bfloat16), (False, torch.float16), (True, torch.bfloat16)],
    ids=str,
)
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize(
    "group", [(128, 0), (128, 127), (4096, 0), (4096, 4095)], indirect=True, ids=str
)
def test_buffers_have_the_size_of_what_a_rank_sends_and_receives(
    group: dist.ProcessGroup,
    parts: int,
    shard_state: bool,
    ns_dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first rank owns the largest matrix, the last one none."""
    options = {"shard_state": shard_state, "master_weights": shard_state, "ns_dtype": ns_dtype}
    sizes = simulate_sharded(dense(), parts, group, monkeypatch, **options)
    assert (sizes.owned > 0) == (group.rank() == 0)
    if not sizes.owned:
        assert sizes.total <= 1.1 * sizes.received


@pytest.mark.parametrize("ns_dtype", ["bfloat16", "float16", "auto"])
@pytest.mark.parametrize("shard_state", [False, True])
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("group", [(128, 0), (4096, 0)], indirect=True, ids=str)
def test_the_plan_has_the_memory_of_the_step(
    group: dist.ProcessGroup,
    parts: int,
    shard_state: bool,
    ns_dtype: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The rank that owns most, with all tensors that a step on an accelerator allocates."""
    if ns_dtype == "auto":
        choose_as_on_a_gpu(monkeypatch)
    weights = dense()
    dtype = torch.bfloat16 if shard_state else torch.float32
    placed = [sharded(weight, parts, group, dtype) for weight in weights]
    options = {"shard_state": shard_state, "master_weights": shard_state}
    options["ns_dtype"] = None if ns_dtype == "auto" else getattr(torch, ns_dtype)
    step, params = planned_step(
        weights, placed, group, monkeypatch, shardings=dict(placed), **options
    )
    everything = Allocated()
    with torch.no_grad(), everything:
        step.step(params, torch.zeros((), device="meta"))
    settings = config.load(
        "configs/kimi_k25.yaml",
        [
            *(f"parallel.tensor={parts}", f"optimizer.shard_state={shard_state}".lower()),
            f"precision={'bfloat16' if shard_state else 'float32'}",
            f"optimizer.ns_dtype={ns_dtype}",
        ],
    )
    ranks = ranks_of(settings, group.size() * KIMI.parallel.pipeline)
    shared = shared_matrices(settings, ranks, weights, lambda weight: True)
    planned = step_buffers(settings, ranks, weights, lambda weight: True, shared)
    assert everything.most == pytest.approx(planned, rel=0.1)


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("group", [(4, 0), (128, 0), (128, 127)], indirect=True, ids=str)
def test_buffers_of_experts(
    group: dist.ProcessGroup, parts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """128 and 4,096 ranks, 32 of which have different experts."""
    simulate_sharded(experts(), parts, group, monkeypatch)


@pytest.mark.parametrize(
    "group", [(128, 0), (128, 127), (4096, 0), (4096, 4095)], indirect=True, ids=str
)
def test_buffers_of_copies(group: dist.ProcessGroup, monkeypatch: pytest.MonkeyPatch) -> None:
    """The vision encoder's matrices, under ``process_group``."""
    weights = encoder()
    placed = [copied(weight, group) for weight in weights]
    simulate(weights, placed, group, monkeypatch, process_group=group)


@pytest.mark.parametrize("ns_dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "group", [(128, 0), (128, 127), (4096, 0), (4096, 4095)], indirect=True, ids=str
)
def test_buffers_of_fully_sharded_matrices(
    group: dist.ProcessGroup, ns_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An owner receives whole matrices and returns them; others send and receive shards."""
    weights = dense()
    placed = [fully_sharded(weight, group) for weight in weights]
    simulate(weights, placed, group, monkeypatch, ns_dtype=ns_dtype)


@pytest.mark.parametrize("group", [(4096, 0)], indirect=True, ids=str)
def test_no_rank_sends_a_list_of_all_ranks(
    group: dist.ProcessGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every rank would receive the square of their number: 50 MB, and 1.2 GB once unpickled."""
    sent = []
    gather = groups.values_of_ranks

    def record(value: Any, group: dist.ProcessGroup) -> Any:
        sent.append(len(pickle.dumps(value)))
        return gather(value, group)

    monkeypatch.setattr(groups, "values_of_ranks", record)
    connected = ConnectedRanks([group])
    assert 0 < sum(sent) < 100
    assert connected.largest(torch.ones(1)) == 1


def choose_as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let parameters without a device have the dtypes of Newton-Schulz of those on a GPU."""
    cuda = torch.device("cuda")
    monkeypatch.setattr(
        "muonclip.optimizer.default_ns_dtype",
        lambda _, dtype, shapes: default_ns_dtype(cuda, dtype, shapes),
    )


def counting(counted: Allocated, function: Any, is_counting: bool) -> Any:
    """The function, within which tensors are counted or not."""

    def call(*args: Any) -> Any:
        before, counted.is_counting = counted.is_counting, is_counting
        try:
            return function(*args)
        finally:
            counted.is_counting = before

    return call
