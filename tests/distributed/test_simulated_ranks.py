"""Buffers of the optimizer's exchange on thousands of ranks, which torch's fake group simulates."""

import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from muonclip import MatrixLayout, MuonClip
from muonclip.distributed import muon
from muonclip.distributed.exchange import BucketExchange, ResultExchange
from muonclip.distributed.muon import DistributedMuon
from muonclip.distributed.sharding import Sharding, TensorShard
from pretrain import config
from pretrain.model.weights import Weight
from pretrain.plan.muon_step import _step
from pretrain.plan.parameters import trained_weights
from pretrain.plan.ranks import ranks_of

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


def first_stage() -> list[Weight]:
    """The matrices of the first stage of Kimi K2.5 that all of its ranks share."""
    ranks = ranks_of(KIMI)
    return [
        weight
        for weight in trained_weights(KIMI)
        if weight.layer is not None and weight.expert is None and weight.optimizer == "muon"
        if ranks.has(0, weight)
    ]


def sharded(weight: Weight, parts: int, group: dist.ProcessGroup) -> tuple[Tensor, Sharding]:
    """A parameter without values, split over neighbouring ranks as megatron-core splits it."""
    shape, parts = list(weight.shape), parts if weight.split else 1
    dim = weight.split.dim if weight.split else 0
    shape[dim] //= parts
    offsets = [[part * shape[d] if d == dim else 0 for d in (0, 1)] for part in range(parts)]
    shards = [TensorShard(tuple(offset), tuple(shape)) for offset in offsets]
    parameter = nn.Parameter(torch.empty(shape, device="meta"))
    parameter.grad = torch.empty_like(parameter)
    placed = tuple(shards[rank % parts] for rank in range(group.size()))
    return parameter, Sharding(weight.shape, group, placed)


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize(
    "group", [(128, 0), (128, 127), (4096, 0), (4096, 4095)], indirect=True, ids=str
)
def test_buffers_have_the_size_of_what_a_rank_sends_and_receives(
    group: dist.ProcessGroup, parts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first rank owns the largest matrix, the last one none."""
    weights = first_stage()
    placed = dict(sharded(weight, parts, group) for weight in weights)
    monkeypatch.setattr(Sharding, "gather", lambda *_: list(placed.values()))
    groups = [
        {"params": [(w.name, p)], "algorithm": "muon", "layout": layout_of(w)}
        for w, p in zip(weights, placed, strict=True)
    ]
    optimizer = MuonClip(groups, ns_dtype=torch.bfloat16, shardings=placed)
    for members in optimizer.param_groups:
        members["updates"] = 1
    work = [(members, members["params"]) for members in optimizer.param_groups]
    params = optimizer._muon_params(work)
    connected: Any = type("Connected", (), {"first_error": lambda self, error: error})()
    plan = DistributedMuon(params, [group], connected, None, placed, {}, [])

    counted = Allocated()
    for kind in (BucketExchange, ResultExchange):
        for name in ("send", "receive", "gather"):
            if hasattr(kind, name):
                monkeypatch.setattr(kind, name, counting(counted, getattr(kind, name), True))
    for name in ("update_momenta", "pre_orthogonalize", "apply_updates"):
        monkeypatch.setattr(muon, name, counting(counted, getattr(muon, name), False))
    counted.is_counting = False
    with torch.no_grad(), counted:
        plan.step(params, None)
    received = 2 * sum(p.numel() for p in placed)
    owned = 2 * sum(u.shape[0] * u.shape[1] for w in plan._work for u in w._exchange.owned)
    assert (owned > 0) == (group.rank() == 0)
    assert counted.most <= 1.1 * (received + owned)
    if not owned:
        assert counted.total <= 1.1 * received

    everything = Allocated()
    monkeypatch.setattr(muon, "apply_updates", lambda *_: None)
    monkeypatch.setattr(muon, "update_momenta", lambda *_: None)
    with torch.no_grad(), everything:
        plan.step(params, None)
    planned = _step(KIMI, ranks_of(KIMI), weights, parts, group.size() // parts)
    if owned:  # what Newton-Schulz needs, too
        assert everything.most == pytest.approx(planned.buffers, rel=0.1)


def layout_of(weight: Weight) -> MatrixLayout | None:
    is_fused = weight.split is not None and weight.split.stacked == 2
    return MatrixLayout((weight.shape[0] // 2,) * 2) if is_fused else None


def counting(counted: Allocated, function: Any, is_counting: bool) -> Any:
    """The function, within which tensors are counted or not."""

    def call(*args: Any) -> Any:
        before, counted.is_counting = counted.is_counting, is_counting
        try:
            return function(*args)
        finally:
            counted.is_counting = before

    return call
