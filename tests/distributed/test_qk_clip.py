"""QK-Clip over real processes: the largest logit of any rank decides on every rank, and each rank
scales the part of a weight that it holds."""

import copy
import math
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from muonclip import AttentionLayout, MuonClip, QKClip, param_groups
from tests.distributed.launch import launch


def clip_once(pairs: bool) -> tuple[list[list[float]], int, torch.Tensor]:
    """One step where rank r's logits are 100 * (r + 1) in head 0 and 1 in head 1.

    With ``pairs`` only ranks (0, 1), (2, 3)… are joined.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    group = None
    if pairs:
        groups = [dist.new_group([first, first + 1]) for first in range(0, world_size, 2)]
        group = groups[rank // 2]
    query, key = torch.ones(4, 3), torch.ones(4, 3)
    layout = AttentionLayout.separate(query, key, num_heads=2)
    other = AttentionLayout.separate(torch.ones(4, 3), torch.ones(4, 3), num_heads=2)
    clip = QKClip({"layer": layout, "other": other}, threshold=100.0, process_group=group)
    clip.observe("layer", torch.tensor([100.0 * (rank + 1), 1.0]))
    result = clip.step()
    maxima = [maximum.tolist() for maximum in result.max_logits.values()]
    return maxima, int(result.num_clipped), query @ key.T


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_maximum_over_ranks(world_size: int) -> None:
    untouched = torch.ones(4, 3) @ torch.ones(4, 3).T
    for maxima, num_clipped, logits in launch(clip_once, world_size, False):
        assert maxima == [[100.0 * world_size, 1.0], [-torch.inf, -torch.inf]]
        assert num_clipped == (world_size > 1)
        assert torch.allclose(logits[:2, :2], untouched[:2, :2] / world_size)
        assert torch.equal(logits[2:, 2:], untouched[2:, 2:])


def test_only_the_process_group_counts() -> None:
    """Tensor-parallel neighbours have other heads, whose maxima must not count."""
    results = launch(clip_once, 4, True)
    assert [maxima[0][0] for maxima, _, _ in results] == [200.0, 200.0, 400.0, 400.0]


def clip_with_biases() -> tuple[list[float], list[float]]:
    """Ranks' biases differ, and the last rank's batch is empty.

    The largest logit is rank 0's, the least factor rank 1's.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    layout = AttentionLayout.separate(torch.ones(4, 3), torch.ones(4, 3), num_heads=2)
    clip = QKClip({"layer": layout}, threshold=100.0)
    batch = 0 if rank == world_size - 1 else 1
    query, key = torch.zeros(batch, 2, 1, 4), torch.zeros(batch, 2, 1, 4)
    query[..., 0], key[..., 0] = 1.0, 130.0 if rank == 0 else 40.0
    bias = torch.tensor([0.0 if rank == 0 else 80.0])
    clip.observe_attention("layer", query, key, scale=1.0, bias=bias)
    result = clip.step()
    return result.max_logits["layer"].tolist(), result.factors["layer"].tolist()


def test_the_smallest_factor_of_all_ranks_is_used() -> None:
    """(100 - 80) / 40 is less than 100 / 130, although 120 is less than 130."""
    for maxima, factors in launch(clip_with_biases, 3):
        assert maxima == [130.0, 130.0]
        assert factors == pytest.approx([0.5, 0.5])


# Placements on a mesh of one dimension, and of two.
LINES = [(Shard(0),), (Shard(1),), (Replicate(),)]
GRIDS = [
    (Shard(0), Shard(0)),
    (Shard(0), Shard(1)),
    (Shard(1), Shard(1)),
    (Replicate(), Shard(0)),
    (Shard(1), Replicate()),
]
# Heads, key groups and head size; 10 rows do not divide by 4, and of 2 rows some ranks hold none.
SHAPES = [(4, 2, 4), (5, 5, 2), (2, 1, 1)]


def scaled_whole(weights: dict[str, Tensor], heads: int, groups: int) -> dict[str, Tensor]:
    """Plain weights after ``observe_and_step`` in one process."""
    whole = {name: weight.clone() for name, weight in weights.items()}
    layout = AttentionLayout.separate(
        (whole["query"], whole["query bias"]), whole["key"], num_heads=heads, num_kv_groups=groups
    )
    factors = QKClip({"layer": layout}, threshold=100.0)
    factors.process_group = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    factors.observe("layer", maxima(heads, dist.get_world_size() - 1))
    factors.step()
    return whole


def maxima(heads: int, rank: int) -> Tensor:
    """Largest logits that grow with the rank; those of every second head stay below 100."""
    return torch.tensor([120.0 + 10 * rank + 7 * h if h % 2 == 0 else 50.0 for h in range(heads)])


def scale_shards() -> int:
    """Clip DTensors of every placement and shape; they must equal plain tensors bit for bit."""
    world_size, rank = dist.get_world_size(), dist.get_rank()
    meshes: list[tuple[DeviceMesh, list[tuple[Any, ...]]]] = [
        (init_device_mesh("cpu", (world_size,)), LINES)
    ]
    if world_size == 4:
        meshes.append((init_device_mesh("cpu", (2, 2)), GRIDS))
    cases = 0
    for mesh, all_placements in meshes:
        for placements in all_placements:
            for heads, groups, dim in SHAPES:
                torch.manual_seed(0)
                weights = {
                    "query": torch.randn(heads * dim, 6),
                    "query bias": torch.randn(heads * dim),
                    "key": torch.randn(groups * dim, 3),
                }
                # Columns of a bias are none: it lies as the rows do.
                rows_only = [p if p == Shard(0) else Replicate() for p in placements]
                sharded = {
                    name: distribute_tensor(
                        weight.clone(), mesh, rows_only if weight.ndim == 1 else placements
                    )
                    for name, weight in weights.items()
                }
                # A master in double the precision of its bfloat16 copy, as an optimizer keeps it.
                low: Any = distribute_tensor(weights["key"].bfloat16(), mesh, placements)
                low.main_param = sharded["key"]
                layout = AttentionLayout.separate(
                    (sharded["query"], sharded["query bias"]),
                    low,
                    num_heads=heads,
                    num_kv_groups=groups,
                )
                clip = QKClip({"layer": layout}, threshold=100.0)
                clip.observe("layer", maxima(heads, rank))
                result = clip.step()
                assert result.max_logits["layer"].equal(maxima(heads, world_size - 1))
                wanted = scaled_whole(weights, heads, groups)
                for name, shard in sharded.items():
                    assert shard.placements == tuple(rows_only if shard.ndim == 1 else placements)
                    assert shard.full_tensor().equal(wanted[name]), (name, placements, heads)
                changed = wanted["key"] != weights["key"]
                copied = torch.where(changed, wanted["key"].bfloat16(), weights["key"].bfloat16())
                assert low.full_tensor().equal(copied), (placements, heads)
                cases += 1
    return cases


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_shards_are_scaled_like_whole_weights(world_size: int) -> None:
    """Any placement on one or two mesh dimensions, uneven and empty shards, biases, masters."""
    expected = len(SHAPES) * (len(LINES) + (len(GRIDS) if world_size == 4 else 0))
    assert launch(scale_shards, world_size) == [expected] * world_size


class Attention(nn.Module):
    """Causal attention with shared key heads that a clip observes."""

    def __init__(self, heads: int = 4, groups: int = 2, dim: int = 8) -> None:
        super().__init__()
        self.heads, self.groups, self.clip = heads, groups, None
        self.q, self.k, self.v = (nn.Linear(16, n * dim) for n in (heads, groups, groups))
        self.out = nn.Linear(heads * dim, 16)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            f(x).unflatten(-1, (n, -1)).transpose(1, 2)
            for f, n in ((self.q, self.heads), (self.k, self.groups), (self.v, self.groups))
        )
        if self.clip is not None:
            self.clip.observe_attention("layer", q, k, causal=True)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.out(y.transpose(1, 2).flatten(2))


def train(shape: tuple[int, ...] | None, bfloat16: bool) -> tuple[dict[str, Tensor], list[int]]:
    """Train with a clip that scales: by FSDP2 on a mesh of this shape, or in one process.

    In float64 without ``bfloat16``, so that rounding decides nothing.

    Returns:
        The whole parameters at the end, and how many heads each step clipped.
    """
    torch.manual_seed(0)
    model = Attention().double()
    if bfloat16:
        model.bfloat16()
        model.k.bias = None  # its gradient is rounding alone, which AdamW would blow up
    # Made before the parameters are replaced by sharded ones.
    layout = AttentionLayout.separate(model.q, model.k, num_heads=4, num_kv_groups=2)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    if shape is None:
        rank, world_size = 0, 1
    else:
        names = ("replicate", "shard")[-len(shape) :]
        fully_shard(model, mesh=init_device_mesh("cpu", shape, mesh_dim_names=names))
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.5)
    if bfloat16:
        optimizer = MuonClip(param_groups(model), lr=0.02, master_weights=True)
    group = None if shape else dist.new_group([dist.get_rank()], use_local_synchronization=True)
    clip = model.clip = QKClip({"layer": layout}, threshold=0.5, process_group=group)
    clip.attach(optimizer)
    generator = torch.Generator().manual_seed(1)
    clipped = []
    for _ in range(4):
        x = 4 * torch.randn(8, 6, 16, generator=generator)
        x = x.chunk(world_size)[rank].to(model.q.weight.dtype)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        assert clip.result is not None
        clipped.append(int(clip.result.num_clipped))
    state = {}
    for name, parameter in model.named_parameters():
        whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        if bfloat16:
            master: Any = parameter.main_param
            assert whole.equal((master.full_tensor() if shape else master).bfloat16())
        state[name] = whole.detach().double()
    return state, clipped


def train_both_ways(shape: tuple[int, ...], bfloat16: bool) -> float:
    """The largest difference between training on several ranks and in one process."""
    sharded, clipped = train(shape, bfloat16)
    whole, clipped_alone = train(None, bfloat16)
    assert clipped == clipped_alone and sum(clipped) > 4
    return max(float((sharded[name] - whole[name]).abs().max()) for name in whole)


@pytest.mark.parametrize(("world_size", "shape"), [(1, (1,)), (2, (2,)), (4, (4,)), (4, (2, 2))])
def test_fsdp2_training_equals_one_process(world_size: int, shape: tuple[int, ...]) -> None:
    """Sharded (replicated, too, on a mesh of two dimensions), with a clip made before."""
    assert max(launch(train_both_ways, world_size, shape, False)) < 1e-6


def test_fsdp2_with_master_weights() -> None:
    """The float32 masters are sharded like their bfloat16 weights and scaled with them."""
    assert max(launch(train_both_ways, 2, (2,), True)) < 0.01


def train_llama(sharded: bool, each: bool = False) -> tuple[list[Tensor], list[int]]:
    """A transformers model with the clip of ``integrations.transformers``, made before FSDP2.

    Four ranks have two shards each of the heads and of the batch. With ``each``, FSDP2 shards each
    projection again before its result enters attention.
    """
    import transformers

    from muonclip.integrations.transformers import qk_clip

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    model: Any = transformers.AutoModelForCausalLM.from_config(config).double().train()
    group = None if sharded else dist.new_group([dist.get_rank()], use_local_synchronization=True)
    clip = qk_clip(model, threshold=0.02, process_group=group)
    shape = (2, dist.get_world_size() // 2)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("data", "tensor"))
    columns = {f"self_attn.{name}_proj": ColwiseParallel() for name in "qkv"}
    if sharded:
        for block in model.model.layers:
            if shape[1] > 1:
                plan = {**columns, "self_attn.o_proj": RowwiseParallel()}
                parallelize_module(block, mesh["tensor"], plan)
            for projection in block.self_attn.children() if each else ():
                fully_shard(projection, mesh=mesh["data"])
            fully_shard(block, mesh=mesh["data"])
        fully_shard(model, mesh=mesh["data"])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    clip.attach(optimizer)
    clipped = []
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        ids = torch.randint(32, (4, 6), generator=generator)
        if sharded:
            ids = ids.chunk(2)[mesh["data"].get_local_rank()]
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        assert clip.result is not None
        clipped.append(int(clip.result.num_clipped))
    whole = [p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters()]
    return [p.detach() for p in whole], clipped


def train_llama_both_ways(each: bool) -> float:
    sharded, clipped = train_llama(True, each)
    whole, clipped_alone = train_llama(False)
    assert clipped == clipped_alone and sum(clipped) > 4
    return max(float((a - b).abs().max()) for a, b in zip(sharded, whole, strict=True))


@pytest.mark.parametrize(("world_size", "each"), [(2, False), (4, False), (4, True)])
def test_fsdp2_trains_a_transformers_model(world_size: int, each: bool) -> None:
    """``qk_clip`` before sharding: the clip follows the parameters that FSDP2 replaces, and under
    tensor parallelism knows a rank's heads by their rows."""
    pytest.importorskip("transformers", minversion="5")
    assert max(launch(train_llama_both_ways, world_size, each)) < 1e-6


def clip_under_tensor_parallelism() -> None:
    """FSDP2 over column-parallel projections: both split the rows, the inner one first."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    torch.manual_seed(0)
    model = Attention()
    whole = copy.deepcopy(model)
    colwise = {"q": ColwiseParallel(), "k": ColwiseParallel()}
    parallelize_module(model, mesh["tensor"], colwise)
    fully_shard(model, mesh=mesh["data"])
    # A rank's attention sees its own heads; the maxima of the others come from where they are.
    largest = torch.tensor([400.0, 50.0, 900.0, 1600.0])
    own = slice(2 * mesh["tensor"].get_local_rank(), 2 * mesh["tensor"].get_local_rank() + 2)
    seen = torch.full((4,), -math.inf)
    seen[own] = largest[own]
    for attention, maximum in ((model, seen), (whole, largest)):
        layout = AttentionLayout.separate(attention.q, attention.k, num_heads=4, num_kv_groups=2)
        clip = QKClip({"layer": layout}, threshold=100.0)
        clip.observe("layer", maximum)
        clip.step()
    for name, parameter in model.named_parameters():
        if name[0] in "qk":
            assert isinstance(parameter, DTensor) and len(parameter.placements) == 2
            assert parameter.full_tensor().equal(whole.get_parameter(name)), name


def test_fsdp2_on_top_of_tensor_parallelism() -> None:
    launch(clip_under_tensor_parallelism, 4)


def observe_own_heads() -> None:
    mesh = init_device_mesh("cpu", (2,))
    query, key = (distribute_tensor(torch.ones(8, 3), mesh, [Shard(0)]) for _ in "qk")
    clip = QKClip({"layer": AttentionLayout.separate(query, key, num_heads=4)}, threshold=100.0)
    largest = torch.tensor([400.0, 50.0, 900.0, 1600.0])
    clip.observe("layer", largest.chunk(2)[dist.get_rank()])
    for heads in (1, 3):
        with pytest.raises(ValueError, match="layer 'layer' has 4 heads"):
            clip.observe("layer", largest[:heads])
    assert torch.equal(clip.step().max_logits["layer"], largest)


def test_kernels_return_the_maxima_of_a_ranks_heads() -> None:
    launch(observe_own_heads, 2)


def clip_sharded_masters() -> None:
    """Masters as Megatron's distributed optimizer keeps them: one flat buffer over all weights,
    cut evenly among the ranks, so that cuts fall within rows and some ranks hold nothing of a
    weight."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    masters = [torch.randn(8, 5), torch.randn(8), torch.randn(4, 5)]
    copies: list[Any] = [master.bfloat16() for master in masters]
    buffer = torch.cat([master.flatten() for master in masters])
    edges = [round(len(buffer) * r / world_size) for r in (rank, rank + 1)]
    begin = 0
    for master, low in zip(masters, copies, strict=True):
        start, stop = (min(max(edge - begin, 0), master.numel()) for edge in edges)
        low.main_param = master.flatten()[start:stop].clone() if stop > start else None
        low.main_param_sharded = True
        low.piece = slice(start, stop)
        begin += master.numel()
    plain = [master.clone() for master in masters]
    for _ in range(2):
        for query, bias, key in (copies, plain):
            layout = AttentionLayout.separate((query, bias), key, num_heads=4, num_kv_groups=2)
            clip = QKClip({"layer": layout}, threshold=100.0)
            clip.observe("layer", maxima(4, rank))
            clip.step()
    for low, before, wanted in zip(copies, masters, plain, strict=True):
        if low.main_param is not None:
            assert low.main_param.equal(wanted.flatten()[low.piece])
        assert torch.allclose(low.float(), wanted, rtol=2**-6)
        assert low[wanted == before].equal(before.bfloat16()[wanted == before])
        everywhere = [torch.empty_like(low) for _ in range(world_size)]
        dist.all_gather(everywhere, low.contiguous())
        assert all(other.equal(low) for other in everywhere)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_sharded_masters_are_scaled(world_size: int) -> None:
    """Megatron-LM#7382: its clip crashed on them."""
    launch(clip_sharded_masters, world_size)


def refuse() -> list[str]:
    """The errors of weights that cannot be scaled; no other weight may change."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    errors = []
    query = torch.ones(4, 3)
    partial = DTensor.from_local(torch.ones(4, 3), mesh, [Partial()])
    plain_master: Any = distribute_tensor(torch.ones(4, 3), mesh, [Shard(0)])
    plain_master.main_param = torch.ones(4, 3)
    for key in (partial, plain_master):
        clip = QKClip({"layer": AttentionLayout.separate(query, key, num_heads=2)}, threshold=1.0)
        clip.observe("layer", torch.tensor([4.0, 4.0]))
        try:
            clip.step()
        except ValueError as error:
            errors.append(str(error))
        assert query.equal(torch.ones(4, 3))
    return errors


def test_weights_that_cannot_be_scaled_are_refused_before_any_change() -> None:
    for errors in launch(refuse, 2):
        assert "reduce it first" in errors[0]
        assert "layer 'layer': the master copy (main_param)" in errors[1]


def warnings_of_a_step(observing: int) -> list[str]:
    """The warnings of a step in which one rank or no rank observes the layer."""
    qkv = nn.Linear(3, 24)
    clip = QKClip({"layer": AttentionLayout.fused_by_group(qkv, num_heads=2)})
    optimizer = torch.optim.SGD(qkv.parameters(), lr=0.1)
    clip.attach(optimizer)
    qkv(torch.ones(3)).sum().backward()
    if dist.get_rank() == observing:
        clip.observe("layer", torch.ones(2))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        optimizer.step()
    return [str(warning.message) for warning in said if "QK-Clip" in str(warning.message)]


def test_a_layer_that_another_rank_observed_is_not_reported() -> None:
    """A rank may have no images in a batch."""
    assert launch(warnings_of_a_step, 2, 1) == [[], []]
    for said in launch(warnings_of_a_step, 2, -1):
        assert len(said) == 1 and "did not observe layer" in said[0]
