"""A step involves exactly the ranks that share its parameters."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from muonclip import AttentionLayout, MuonClip, QKClip, param_groups
from muonclip.distributed import Sharding, TensorShard
from muonclip.distributed.groups import (
    ConnectedRanks,
    _diameter,
    group_of_copies,
    order_of,
    remember,
)
from muonclip.distributed.sharding import Copies
from tests.distributed.launch import launch
from tests.distributed.optimizer_cases import EXACT, TOLERANCE, random, whole
from tests.distributed.optimizer_cases import Block as Model

SHAPES = ((6, 4), (3, 8), (3, 5, 5), (7,))


def train(params: Sequence[Any], place: Any, bad_rank: int | None = None) -> list[Tensor]:
    """Three steps; in the second one, ``bad_rank`` has a NaN in its last gradient."""
    optimizer = MuonClip(params, **EXACT, nonfinite="skip")
    for step in range(3):
        for index, p in enumerate(params):
            p.grad = place(index, random(p.shape, index, 100 + step))
        if bad_rank is not None and step == 1 and dist.get_rank() == bad_rank:
            gradients = [p.grad.to_local() if isinstance(p, DTensor) else p.grad for p in params]
            next(g for g in reversed(gradients) if g.numel()).fill_(torch.nan)
        optimizer.step()
    assert optimizer.skipped_steps == (bad_rank is not None)
    return [p.detach() for p in params]


def train_alone(skipped: bool = False) -> list[Tensor]:
    params = [nn.Parameter(random(shape, index)) for index, shape in enumerate(SHAPES)]
    optimizer = MuonClip(params, **EXACT)
    for step in (0, 2) if skipped else range(3):
        for index, p in enumerate(params):
            p.grad = random(p.shape, index, 100 + step)
        optimizer.step()
    return [p.detach() for p in params]


def assert_same(found: Sequence[Tensor | None], expected: Sequence[Tensor]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        assert ours is None or (ours - theirs).abs().max() < TOLERANCE


def train_on(meshes: list[DeviceMesh], bad_rank: int | None = None) -> list[Tensor | None]:
    """Parameter i lies on mesh i (modulo their number).

    Returns:
        The whole parameters; None for those of which this rank has no shard.
    """

    def place(index: int, tensor: Tensor) -> Tensor:
        mesh = meshes[index % len(meshes)]
        return distribute_tensor(tensor, mesh, [Shard(0)] * mesh.ndim, src_data_rank=None)

    params = [nn.Parameter(place(i, random(shape, i))) for i, shape in enumerate(SHAPES)]
    train(params, place, bad_rank)
    return [
        None if p.device_mesh.get_coordinate() is None else whole(p.detach())  # type: ignore[attr-defined]
        for p in params
    ]


def shard_on_two_of_three() -> list[Tensor] | None:
    """The third rank never takes a step."""
    mesh = DeviceMesh("cpu", [0, 1])
    if dist.get_rank() == 2:
        return None
    model = Model()
    fully_shard(model, mesh=mesh)
    return train_model(model)


def train_model(model: nn.Module) -> list[Tensor]:
    optimizer = MuonClip(param_groups(model), **EXACT)
    for step in range(2):
        model(random((8, 8), step, dtype=torch.float64)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return [whole(p.detach()) for p in model.parameters()]


def test_a_step_does_not_wait_for_ranks_outside_its_mesh() -> None:
    first, second, third = launch(shard_on_two_of_three, 3)
    assert third is None
    for weights in (first, second):
        assert_same(weights, train_model(Model()))


def clip_on_two_of_three() -> Tensor | None:
    """The third rank never calls the clip; the others see different logits."""
    mesh = DeviceMesh("cpu", [0, 1])
    rank = dist.get_rank()
    if rank == 2:
        return None
    attention = nn.ModuleDict({name: nn.Linear(8, 8, bias=False) for name in "qk"})
    for p in attention.parameters():
        nn.init.ones_(p)
    for layer in attention.values():
        fully_shard(layer, mesh=mesh)
    layout = AttentionLayout.separate(attention["q"], attention["k"], num_heads=2)
    clip = QKClip({"a": layout}, threshold=1.0)
    for _ in range(2):
        clip.observe("a", torch.tensor([0.5, 4.0] if rank else [0.25, 0.5]))
        assert clip.step().max_logits["a"].tolist() == [0.5, 4.0]
    return whole(next(attention.parameters()).detach())


def test_a_clip_does_not_wait_for_ranks_outside_its_mesh() -> None:
    first, second, third = launch(clip_on_two_of_three, 3)
    assert third is None
    for weight in (first, second):
        assert torch.allclose(weight[:4], torch.ones(4, 8))
        assert torch.allclose(weight[4:], torch.full((4, 8), 0.25))


def pairs() -> list[DeviceMesh]:
    return [DeviceMesh("cpu", [0, 1]), DeviceMesh("cpu", [2, 3])]


def train_on_disjoint_meshes() -> list[Tensor | None]:
    return train_on(pairs())


def test_parameters_on_disjoint_meshes_in_one_optimizer() -> None:
    """A rank has no shard of the parameters of the other mesh."""
    for rank, weights in enumerate(launch(train_on_disjoint_meshes, 4)):
        assert [w is None for w in weights] == [i % 2 != rank // 2 for i in range(len(SHAPES))]
        assert_same(weights, train_alone())


def slices() -> list[DeviceMesh]:
    plane = init_device_mesh("cpu", (2, 2), mesh_dim_names=("rows", "columns"))
    return [plane["rows"], plane["columns"]]


def chain() -> list[DeviceMesh]:
    return [DeviceMesh("cpu", [first, first + 1]) for first in range(dist.get_world_size() - 1)]


def train_on_overlapping_meshes(bad_rank: int) -> list[list[Tensor | None]]:
    return [train_on(meshes(), bad_rank) for meshes in (slices, chain)]


@pytest.mark.parametrize("bad_rank", [0, 3])
def test_ranks_connected_through_others_skip_a_step_together(bad_rank: int) -> None:
    """No group joins them: the slices of a plane, and a chain of pairs."""
    expected = train_alone(skipped=True)
    for both in launch(train_on_overlapping_meshes, 4, bad_rank):
        for weights in both:
            assert_same(weights, expected)


def idle_beside_others() -> list[Tensor]:
    """The last rank has no parameters, but is in the process group."""
    params = [nn.Parameter(random(shape, index)) for index, shape in enumerate(SHAPES)]
    last = dist.get_rank() == dist.get_world_size() - 1
    group = dist.new_group([0, 1, 2])
    optimizer = MuonClip([{"params": [] if last else params}], **EXACT, process_group=group)
    shared = list(params[:-1]) if not last else []
    if last:
        with pytest.raises(ValueError, match="update different parameters"):
            optimizer.step()
        return []
    for index, p in enumerate(shared):
        p.grad = random(p.shape, index)
    with pytest.raises(ValueError, match="update different parameters"):
        optimizer.step()
    return [p.detach() for p in params]


def test_a_rank_without_parameters_is_named_and_not_waited_for() -> None:
    *weights, nothing = launch(idle_beside_others, 3)
    assert nothing == []
    for unchanged in weights:
        assert all(map(torch.equal, unchanged, (random(s, i) for i, s in enumerate(SHAPES))))


def without_any_gradient_on_one_rank() -> str:
    mesh = init_device_mesh("cpu", (2,))
    params = [
        nn.Parameter(distribute_tensor(random((4, 4), i), mesh, [Shard(0)])) for i in range(2)
    ]
    optimizer = MuonClip(params)
    if dist.get_rank() == 0:
        for p in params:
            p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match="update different parameters") as error:
        optimizer.step()
    return str(error.value)


def test_a_mesh_of_which_one_rank_has_no_gradient_at_all() -> None:
    """That rank would not come to the group that the others wait in."""
    first, second = launch(without_any_gradient_on_one_rank, 2)
    assert first == second and "2 and 0 of them" in first


def refuse_on_one_rank(step: int) -> str:
    """The last rank has a sparse gradient in this step; ranks 0 and 2 share no parameter."""
    meshes = chain()
    params = []
    for index, mesh in enumerate(meshes):
        weight = distribute_tensor(random((4, 4), index), mesh, [Shard(0)], src_data_rank=None)
        params.append(nn.Parameter(weight))
    own = nn.Parameter(random((5,), 7))
    optimizer = MuonClip([*params, own])
    for now in range(step + 1):
        for p in (*params, own):
            p.grad = torch.ones_like(p)
        if now == step and dist.get_rank() == 2:
            own.grad = torch.ones(5).to_sparse()
        before = [p.detach().clone() for p in params]
        if now < step:
            optimizer.step()
            continue
        with pytest.raises(RuntimeError) as error:
            optimizer.step()
        local = [(p.to_local(), b.to_local()) for p, b in zip(params, before, strict=True)]
        assert all(torch.equal(*pair) for pair in local)
    own.grad = None
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()  # all can continue
    return str(error.value)


@pytest.mark.parametrize("step", [0, 1])
def test_an_error_on_one_rank_is_raised_on_all_connected_ranks(step: int) -> None:
    *others, last = launch(refuse_on_one_rank, 3, step)
    assert "sparse gradient" in last
    assert all("another rank refused" in message and last in message for message in others)


def find_connected() -> list[float]:
    """The largest rank that each set of groups connects this one with."""
    rank = dist.get_rank()
    found = []
    for sets in ([[0, 1], [1, 2], [2, 3]], [[0, 1], [2, 3]], [[0, 2], [1, 2]], [[0, 1, 2, 3], [1]]):
        made = [dist.new_group(ranks) for ranks in sets]
        groups = [g for g, ranks in zip(made, sets, strict=True) if rank in ranks]
        if groups:
            connected = ConnectedRanks(sorted(groups, key=order_of))
            found.append(connected.largest(torch.tensor(float(rank))).item())
            assert connected.first_error(str(rank) if rank == 2 else None) in ("2", None)
    return found


def test_connected_ranks() -> None:
    assert launch(find_connected, 4) == [[3, 1, 2, 3], [3, 1, 2, 3], [3, 3, 2, 3], [3, 3, 3]]
    assert _diameter({0: {0}}) == 0
    assert _diameter({0: {0, 1}, 1: {0, 1}}) == 1
    assert _diameter({0: {0, 1}, 1: {0, 1, 2}, 2: {1, 2}}) == 2
    assert _diameter({0: {0, 1}}) == float("inf")


def train_on_a_plane_of_some_ranks() -> list[Tensor | None]:
    """Ranks 1 to 4 of five, of which rank 1 is in more groups than the others."""
    dist.new_group([0, 1])
    mesh = DeviceMesh("cpu", [[1, 2], [3, 4]])
    return [] if dist.get_rank() == 0 else train_on([mesh])


def test_a_plane_whose_ranks_are_in_different_numbers_of_groups() -> None:
    """torch names a group that its members make alone after that number, and they would wait."""
    outside, *inside = launch(train_on_a_plane_of_some_ranks, 5)
    assert outside == []
    for weights in inside:
        assert_same(weights, train_alone())


# ---------------------------------------------------------------------- scales of gradients

SCALES = (1e-30, 1e-12, 1e-7, 1e-5, 1.0, 1e4, 1e7, 1e30)
SHAPE = (24, 40)


def updates(dtype: torch.dtype, kind: str) -> list[Tensor]:
    """The update of one step, by the scale of the gradient."""
    world = dist.group.WORLD
    found = []
    for scale in SCALES:
        weight, gradient = random(SHAPE, 0), random(SHAPE, 1) * scale
        options: dict[str, Any] = {}
        part = slice(None)
        if kind == "process_group":
            options["process_group"] = world
        elif kind == "shardings":
            rank, width = dist.get_rank(), SHAPE[1] // dist.get_world_size()
            part = slice(rank * width, (rank + 1) * width)
        elif kind != "one process":
            mesh = init_device_mesh("cpu", (4,) if kind == "S0" else (2, 2))
            placements = [Shard(0)] if kind == "S0" else [Replicate(), Shard(0)]
            weight, gradient = (distribute_tensor(x, mesh, placements) for x in (weight, gradient))
        p = nn.Parameter(weight[:, part].clone() if kind == "shardings" else weight.clone())
        p.grad = gradient[:, part].contiguous() if kind == "shardings" else gradient
        if kind == "shardings":
            assert world is not None
            shards = [TensorShard((0, r * width), (SHAPE[0], width)) for r in range(4)]
            options["shardings"] = {p: Sharding(SHAPE, world, tuple(shards))}
        MuonClip([p], lr=1.0, weight_decay=0.0, eps=0.0, ns_dtype=dtype, **options).step()
        after = p.detach()
        if kind == "shardings":
            parts = [torch.empty_like(after) for _ in range(4)]
            dist.all_gather(parts, after.contiguous())
            after = torch.cat(parts, 1)
        found.append(random(SHAPE, 0) - whole(after))
    return found


def step_on_uneven_shards(rows: int) -> None:
    """The first rank has these rows of 8, the second one the rest."""
    assert dist.group.WORLD is not None
    shards = (TensorShard((0, 0), (rows, 4)), TensorShard((rows, 0), (8 - rows, 4)))
    local = shards[dist.get_rank()]
    weight, gradient = random((8, 4), 0), random((8, 4), 1)
    p, reference = nn.Parameter(weight[local.slices].clone()), nn.Parameter(weight)
    p.grad, reference.grad = gradient[local.slices].clone(), gradient
    sharding = Sharding((8, 4), dist.group.WORLD, shards)
    optimizer = MuonClip([("w", p)], shardings={p: sharding})
    optimizer.step()
    MuonClip([("w", reference)]).step()
    assert torch.allclose(p, reference[local.slices], atol=1e-6)
    whole_state = optimizer.full_state_dict(rank=None)["state"][0]
    before = optimizer.state[p]["momentum_buffer"]
    optimizer.load_named_state({"w": whole_state}, [("w", p)])
    momentum = optimizer.state[p]["momentum_buffer"]
    assert torch.equal(momentum, before)
    assert momentum.untyped_storage().nbytes() == momentum.nbytes  # it does not keep the whole


@pytest.mark.parametrize("rows", [5, 7, 8])
def test_uneven_shards_are_parts_of_one_matrix(rows: int) -> None:
    """A rank with one row or none assigns it to Muon like all others."""
    launch(step_on_uneven_shards, 2, rows)


KINDS = ("process_group", "S0", "HSDP", "shardings")
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def all_updates(kinds: tuple[str, ...]) -> dict[Any, list[Tensor]]:
    return {(kind, dtype): updates(dtype, kind) for kind in kinds for dtype in DTYPES}


def test_updates_of_any_scale_equal_one_process() -> None:
    """Shards of a matrix are sent before the norm that they are divided by is known."""
    (alone,) = launch(all_updates, 1, ("one process",))
    for found in launch(all_updates, 4, KINDS):
        for (kind, dtype), values in found.items():
            for scale, ours, theirs in zip(
                SCALES, values, alone["one process", dtype], strict=True
            ):
                error = (ours - theirs).norm() / theirs.norm()
                assert theirs.norm() > 1 and error < 4 * torch.finfo(dtype).eps, (
                    kind,
                    dtype,
                    scale,
                )


def float64_updates(sharded: bool) -> list[Tensor]:
    """Updates of float64 parameters by float32 Newton-Schulz, the default on a CPU."""
    found = []
    for scale in (1.0, 1e-300, 1e-60, 1e60, 1e300):
        weight, gradient = (random(SHAPE, i).double() for i in range(2))
        gradient *= scale
        if sharded:
            mesh = init_device_mesh("cpu", (dist.get_world_size(),))
            weight, gradient = (distribute_tensor(x, mesh, [Shard(0)]) for x in (weight, gradient))
        p = nn.Parameter(weight.clone())
        p.grad = gradient
        group = None if sharded else dist.group.WORLD
        MuonClip([p], lr=1.0, weight_decay=0.0, process_group=group).step()
        found.append(random(SHAPE, 0) - whole(p.detach()))
    return found


def all_float64_updates() -> list[list[Tensor]]:
    return [float64_updates(sharded) for sharded in (False, True)]


def test_float64_updates_of_any_scale_equal_one_process() -> None:
    """float64 momentum is sent in float64, because no other dtype has its range."""
    ((alone, _),) = launch(all_float64_updates, 1)
    for outcome in launch(all_float64_updates, 2):
        for found in outcome:
            for ours, theirs in zip(found, alone, strict=True):
                assert theirs.norm() > 1 and (ours - theirs).norm() < 1e-5 * theirs.norm()


def load_states_placed_otherwise() -> None:
    mesh = init_device_mesh("cpu", (2,))
    weight = random((4, 6), 0)
    params = [
        nn.Parameter(weight),
        nn.Parameter(distribute_tensor(weight, mesh, [Shard(0)])),
        nn.Parameter(distribute_tensor(weight, mesh, [Shard(1)])),
    ]
    optimizers = [MuonClip([("w", p)]) for p in params]
    for p, optimizer in zip(params, optimizers, strict=True):
        p.grad = torch.ones_like(p)
        optimizer.step()
    states = [optimizer.state_dict() for optimizer in optimizers]
    for ours, optimizer in enumerate(optimizers):
        for theirs, state in enumerate(states):
            if ours == theirs or theirs == 0:  # whole tensors load into any placement
                optimizer.load_state_dict(state)
                continue
            with pytest.raises(ValueError, match=r"'w' is .* saved momentum_buffer is .*_state"):
                optimizer.load_state_dict(state)


def test_state_with_other_placements_is_refused() -> None:
    launch(load_states_placed_otherwise, 2)


def make_with_other_groups() -> None:
    group = dist.new_group([0])
    params = [nn.Parameter(torch.ones(2, 2))]
    if dist.get_rank() == 0:
        MuonClip(params, process_group=group)
    else:
        with pytest.raises(ValueError, match="this rank is not in process_group"):
            MuonClip(params, process_group=group)
    mesh: Any = init_device_mesh("cpu", (2,))
    with pytest.raises(TypeError, match=r"mesh.get_group\(\)\), got DeviceMesh"):
        MuonClip(params, process_group=mesh)


def test_a_rank_outside_the_process_group_is_refused() -> None:
    launch(make_with_other_groups, 2)


def step_on_own_processor(with_products: list[bool]) -> tuple[torch.Tensor, torch.Tensor]:
    """The weights after two steps of matrices of which every rank has a copy."""
    from muonclip.kernels import support

    has_products = with_products[dist.get_rank()]
    support._prefers_bfloat16 = lambda: has_products  # type: ignore[assignment]
    params = [nn.Parameter(torch.zeros(96, 112)), nn.Parameter(torch.zeros(12, 4))]
    groups = [{"params": params, "algorithm": "muon"}]
    optimizer = MuonClip(groups, process_group=dist.group.WORLD, nonfinite="ignore")
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()
    return params[0].detach(), params[1].detach()


def test_ranks_on_different_processors_agree_about_arithmetic() -> None:
    """Otherwise they would wait for messages of another size, or their copies would differ."""
    float32 = launch(step_on_own_processor, 2, [False, False])
    mixed = launch(step_on_own_processor, 2, [False, True])
    for weights in (*mixed, float32[1]):
        assert all(map(torch.equal, weights, float32[0]))
    bfloat16 = launch(step_on_own_processor, 2, [True, True])
    assert all(map(torch.equal, *bfloat16))
    assert not torch.equal(bfloat16[0][0], float32[0][0])


def connect_parameters_elsewhere() -> bool:
    from muonclip.kernels import support

    def measure() -> bool:
        raise AssertionError("measured")

    support._prefers_bfloat16 = measure  # type: ignore[assignment]
    params = [nn.Parameter(torch.zeros(96, 112, device="meta"))]
    groups = [{"params": params, "algorithm": "muon"}]
    optimizer = MuonClip(groups, process_group=dist.group.WORLD)
    optimizer._connect()
    return optimizer._avoids_bfloat16


def test_the_processor_is_not_measured_for_parameters_on_other_devices() -> None:
    assert launch(connect_parameters_elsewhere, 2) == [True, True]


def find_copies_that_some_ranks_remember() -> float:
    """Ranks 0 and 2, and 1 and 3, have copies; one of each pair knows a group of them."""
    for ranks in ([0, 2], [1, 3]):
        group = dist.new_group(ranks)
        if dist.get_rank() == ranks[0]:
            remember(group)
    shards = [TensorShard((rank % 2, 0), (1, 4)) for rank in range(4)]
    group = group_of_copies(Copies.of(shards), dist.group.WORLD)
    total = torch.tensor(float(dist.get_rank()))
    dist.all_reduce(total, group=group)
    return total.item()


def test_ranks_with_copies_find_one_group_whatever_they_remember() -> None:
    assert launch(find_copies_that_some_ranks_remember, 4) == [2, 4, 2, 4]
