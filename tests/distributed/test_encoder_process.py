"""DEP has the features and gradients of the colocated encoder, and reports its balance."""

import math
from itertools import chain
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from hypothesis import Phase, given, seed, settings
from hypothesis import strategies as st
from torch import Tensor

from pretrain.config import EncoderProcessConfig, VisionConfig
from pretrain.encoder_process import ColocatedEncoder, EncoderProcess, gradient_reduction
from pretrain.encoder_process.cost import activation_bytes
from pretrain.encoder_process.encoder import Images
from pretrain.encoder_process.exchange import ItemExchange, Piece, gather_grids
from pretrain.errors import PretrainError
from pretrain.model.projector import VisionTower
from pretrain.model.vision import num_features
from pretrain.parallel import image_groups
from tests.distributed.launch import launch

CONFIG = VisionConfig(
    num_layers=2, hidden_size=16, num_heads=2, ffn_hidden_size=24, patch_size=2, position_grid=5
)
Shapes = list[tuple[int, int, int]]
Step = dict[str, Tensor]  # features, and every gradient by its name


def make_tower(dtype: torch.dtype) -> VisionTower:
    torch.manual_seed(0)
    tower = VisionTower(CONFIG, 12)
    torch.nn.init.normal_(tower.encoder.pos_embed)
    return tower.to(dtype)


def make_images(shapes: Shapes, seed: int) -> Images:
    generator = torch.Generator().manual_seed(seed)
    patches = torch.randint(
        256, (sum(t * h * w for t, h, w in shapes), 12), generator=generator, dtype=torch.uint8
    )
    return patches, torch.tensor(shapes, dtype=torch.int64).view(-1, 3)


def micro_batches_of(rank: int, world_size: int, case: str) -> list[Shapes]:
    """Images of a rank's two micro-batches, from a fixed, uneven global batch."""
    sequences: list[Shapes] = [
        [(1, 2, 8), (4, 2, 2)], [(1, 4, 4)], [(1, 2, 2)] * 5, [],
        [(2, 6, 8)], [(1, 2, 2), (1, 8, 6)], [], [(3, 2, 4)],
    ]  # fmt: skip
    if case == "none":
        sequences = [[]] * 8
    if case == "one":
        sequences = [[]] * 7 + [[(1, 4, 6)]]
    share = len(sequences) // world_size
    local = sequences[rank * share : (rank + 1) * share]
    half = len(local) // 2
    return [list(chain(*local[:half])), list(chain(*local[half:]))]


class Place(NamedTuple):
    """A rank's place in the parallel layout of the backbone.

    Attributes:
        needs_features: the rank is in the first pipeline stage.
    """

    data_rank: int
    data_size: int
    context_size: int
    needs_features: bool
    tensor_group: dist.ProcessGroup
    context_group: dist.ProcessGroup


def place_of(tensor: int, pipeline: int, context: int) -> Place:
    """Place of this rank in megatron-core's order: tensor, context, data, then pipeline."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    stage, share = world_size // pipeline, tensor * context
    tensor_groups = [
        dist.new_group(list(range(first, first + tensor))) for first in range(0, world_size, tensor)
    ]
    context_groups = {
        first + offset: dist.new_group(list(range(first + offset, first + share, tensor)))
        for first in range(0, world_size, share)
        for offset in range(tensor)
    }
    return Place(
        data_rank=rank % stage // share,
        data_size=stage // share,
        context_size=context,
        needs_features=rank < stage,
        tensor_group=tensor_groups[rank // tensor],
        context_group=context_groups[rank // share * share + rank % tensor],
    )


def _images_of(case: list[Shapes], place: Place) -> list[Images]:
    """This rank's two micro-batches of a global batch; the sequence is the seed of its pixels."""
    count = len(case) // place.data_size
    local = list(enumerate(case))[place.data_rank * count : (place.data_rank + 1) * count]
    half = len(local) // 2
    micro_batches = []
    for sequences in (local[:half], local[half:]):
        images = [make_images([], 0)]
        images += [
            make_images(shapes if place.needs_features else [], i) for i, shapes in sequences
        ]
        patches, grids = zip(*images, strict=True)
        micro_batches.append((torch.cat(patches), torch.cat(grids)))
    return micro_batches


def _feature_ranks(images: list[Images], place: Place) -> list[Tensor] | None:
    """Context-parallel ranks that need the features: runs that do not end where images do."""
    if place.context_size == 1:
        return None
    counts = [int(num_features(grids).sum()) for _, grids in images]
    return [torch.arange(count) // 3 % place.context_size for count in counts]


def _step(kind: str, case: list[Shapes], place: Place, dtype: torch.dtype) -> Step:
    """Features and reduced gradients of a step with a nonlinear function as backbone."""
    tower = make_tower(dtype)
    make = EncoderProcess if kind == "dep" else ColocatedEncoder
    encoder = make(
        tower,
        dist.group.WORLD,
        needs_features=place.needs_features,
        tensor_group=place.tensor_group,
        context_group=place.context_group,
    )
    images = _images_of(case, place)
    features = encoder.encode(images, None, _feature_ranks(images, place))
    if place.needs_features:
        for part in features:
            (part.sin() * torch.arange(1, 13, dtype=dtype)).sum().backward()
    encoder.backward()
    encoder.reduce_gradients()
    gradients = {n: p.grad for n, p in tower.named_parameters() if p.grad is not None}
    assert len(gradients) == len(list(tower.parameters()))
    return {"features": torch.cat(features).detach(), **gradients}


def _steps_of_both(
    cases: list[list[Shapes]], tensor: int, pipeline: int, context: int, dtype: torch.dtype
) -> list[tuple[Step, Step]]:
    place = place_of(tensor, pipeline, context)
    return [
        (_step("dep", case, place, dtype), _step("colocated", case, place, dtype)) for case in cases
    ]


def _cases() -> list[list[Shapes]]:
    """Global batches of eight sequences: mixed, with one image, with none, and random ones."""
    grid = st.tuples(st.integers(1, 4), st.sampled_from([2, 4, 6, 10]), st.sampled_from([2, 4, 8]))
    sequences = st.lists(st.lists(grid, max_size=4), min_size=8, max_size=8)
    drawn: list[list[Shapes]] = []

    @seed(0)
    @settings(max_examples=6, deadline=None, database=None, phases=[Phase.generate])
    @given(sequences)
    def draw(batch: list[Shapes]) -> None:
        drawn.append(batch)

    draw()
    fixed = [
        [shapes for rank in range(8) for shapes in [list(chain(*micro_batches_of(rank, 8, case)))]]
        for case in ("mixed", "one", "none")
    ]
    return fixed + drawn


@pytest.fixture(scope="module")
def alone() -> list[Step]:
    """The colocated encoder's step in one process, of each case."""
    (steps,) = launch(_steps_of_both, 1, _cases(), 1, 1, 1, torch.float64)
    return [colocated for _, colocated in steps]


@pytest.mark.parametrize(
    ("world_size", "tensor", "pipeline", "context"),
    [
        *[(1, 1, 1, 1), (2, 1, 1, 1), (2, 2, 1, 1), (2, 1, 2, 1), (2, 1, 1, 2)],
        *[(4, 1, 1, 1), (4, 2, 1, 1), (4, 1, 2, 1), (4, 2, 2, 1), (4, 1, 4, 1), (4, 4, 1, 1)],
        *[(4, 2, 1, 2), (4, 1, 2, 2), (4, 1, 1, 2)],
    ],
)
def test_dep_equals_the_colocated_encoder(
    alone: list[Step], world_size: int, tensor: int, pipeline: int, context: int
) -> None:
    """In every layout of the backbone, and equals one process, up to rounding in float64."""
    _check_equal(alone, world_size, (tensor, pipeline, context), torch.float64, 1e-12)


@pytest.mark.parametrize(("world_size", "tensor", "pipeline"), [(2, 1, 1), (4, 2, 2)])
def test_dep_equals_the_colocated_encoder_in_float32(
    alone: list[Step], world_size: int, tensor: int, pipeline: int
) -> None:
    _check_equal(alone, world_size, (tensor, pipeline, 1), torch.float32, 1e-5)


def _check_equal(
    alone: list[Step],
    world_size: int,
    sizes: tuple[int, int, int],
    dtype: torch.dtype,
    tolerance: float,
) -> None:
    for rank in launch(_steps_of_both, world_size, _cases(), *sizes, dtype):
        for (dep, colocated), reference in zip(rank, alone, strict=True):
            assert dep.keys() == colocated.keys()
            for name, expected in colocated.items():
                error = (dep[name] - expected).norm()
                assert error <= tolerance * expected.norm(), name
                if name != "features":
                    error = (expected - reference[name]).norm()
                    assert error <= 10 * tolerance * reference[name].norm(), name


def _steps_in_groups() -> list[tuple[Step, int]]:
    """Reduced gradients of steps in which all four ranks share their images, and only two, planned
    in the step and ahead; and the number of images that a rank's plan has."""
    world, rank = dist.get_world_size(), dist.get_rank()
    context: Any = SimpleNamespace(rank=rank, world_size=world)
    results = []
    for size, ahead in ((4, False), (2, False), (2, True)):
        groups = image_groups(size, context, pipeline=1)
        tower = make_tower(torch.float64)
        encoder = EncoderProcess(
            tower, groups.exchange, planning_group=groups.planning, num_groups=groups.number
        )
        images = [make_images(s, rank) for s in micro_batches_of(rank, world, "mixed")]
        plan = encoder.plan(images, ahead=True) if ahead else None
        features = encoder.encode(images, plan=plan)
        sum((part.sin().sum() for part in features), torch.zeros(())).backward()
        assert encoder._stage1 is not None
        number = len(encoder._stage1.plan.grids)
        encoder.backward()
        encoder.reduce_gradients()
        gradients = {n: p.grad for n, p in tower.named_parameters() if p.grad is not None}
        results.append(({"features": torch.cat(features).detach(), **gradients}, number))
    return results


def test_groups_of_ranks_share_their_images_and_have_the_same_gradients() -> None:
    for (whole, number), (parts, in_group), (ahead, _) in launch(_steps_in_groups, 4):
        assert number == 12 and 0 < in_group < number
        for name, expected in whole.items():
            assert (parts[name] - expected).norm() <= 1e-12 * expected.norm(), name
            assert torch.equal(ahead[name], parts[name])


def _reduced_during_backward() -> tuple[int, int]:
    """Buckets summed when the last gradient is complete, and all buckets; rank 1 has no images."""
    tower = make_tower(torch.float64)
    with mock.patch.object(gradient_reduction, "_BUCKET", 300):
        encoder = EncoderProcess(tower, None, EncoderProcessConfig(spread="round_robin"))
    images = make_images([(1, 4, 4)] if dist.get_rank() == 0 else [], 0)
    (features,) = encoder.encode([images])
    features.sum().backward()
    encoder.backward()
    pending = len(encoder._reduction._pending)
    encoder.reduce_gradients()
    return pending, len(encoder._reduction._buckets)


def test_gradients_are_summed_during_the_backward_pass() -> None:
    (first, buckets), (second, _) = launch(_reduced_during_backward, 2)
    assert first == buckets > 3 and second == 0


def _balance_and_loads(kind: str) -> tuple[float, int, int]:
    """The balance that a rank reports, and the cost and patches of the items that it encoded."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    tower = make_tower(torch.float32)
    make = EncoderProcess if kind == "dep" else ColocatedEncoder
    encoder = make(tower, dist.group.WORLD)
    cost, patches = [], []

    def record(_module: object, args: tuple[torch.Tensor, torch.Tensor]) -> None:
        patches.append(len(args[0]))
        cost.append(int(encoder.cost.loads(args[1]).sum()))

    tower.encoder.register_forward_pre_hook(record)
    with torch.no_grad():
        encoder.encode([make_images(s, 0) for s in micro_batches_of(rank, world_size, "mixed")])
    return encoder.balance, sum(cost), sum(patches)


@pytest.mark.parametrize("kind", ["dep", "colocated"])
def test_the_reported_balance_is_that_of_the_encoded_load(kind: str) -> None:
    results = launch(_balance_and_loads, 2, kind)
    loads = [load for _, load, _ in results]
    assert sum(patches for _, _, patches in results) == 16 + 16 + 16 + 20 + 96 + 52 + 24
    for reported, _, _ in results:
        assert reported == pytest.approx(max(loads) / (sum(loads) / 2))
    if kind == "dep":
        assert results[0][0] < 1.05


def _features_are_leaves() -> bool:
    encoder = EncoderProcess(make_tower(torch.float32), dist.group.WORLD)
    (features,) = encoder.encode([make_images([(1, 2, 2)], 0)])
    (leaf, _), *others = features.grad_fn.next_functions if features.grad_fn else [(None, 0)]
    return not others and type(leaf).__name__ == "AccumulateGrad"


def test_features_of_stage_one_are_views_of_a_leaf() -> None:
    """The backbone's backward pass ends there."""
    assert launch(_features_are_leaves, 1) == [True]


def _observed(kind: str) -> list[tuple[int, list[Tensor]]]:
    """Number of calls of a layer's observer and its max logits, after training and evaluation."""
    tower = make_tower(torch.float64)
    observed: list[Tensor] = []
    attention = tower.encoder.blocks[0].get_submodule("attention")
    attention.observer = observed.append  # type: ignore[assignment]
    make = EncoderProcess if kind == "dep" else ColocatedEncoder
    encoder = make(tower, dist.group.WORLD)
    images = make_images([(1, 2, 2), (2, 2, 4), (1, 2, 2)], 0)
    steps = []
    for training in (True, False):
        tower.train(training)
        (features,) = encoder.encode([images])
        features.sum().backward()
        encoder.backward()
        steps.append((len(observed), list(observed)))
    return steps


def test_items_are_observed_once_a_step_and_not_in_evaluation() -> None:
    (dep, observed), (after_evaluation, _) = launch(_observed, 1, "dep")[0]
    (colocated, expected), _ = launch(_observed, 1, "colocated")[0]
    assert dep == after_evaluation == colocated == 1
    torch.testing.assert_close(observed, expected)


def _bad_image(kind: str) -> str:
    make = EncoderProcess if kind == "dep" else ColocatedEncoder
    encoder = make(make_tower(torch.float32), dist.group.WORLD)
    last = (1, 3, 4) if dist.get_rank() == 1 else (1, 2, 2)
    with pytest.raises(PretrainError) as error:
        encoder.encode([make_images([(1, 2, 2)], 0), make_images([(1, 2, 2), last], 0)])
    return str(error.value)


@pytest.mark.parametrize("kind", ["dep", "colocated"])
def test_all_ranks_name_an_image_that_cannot_be_encoded(kind: str) -> None:
    """No rank waits for the one that has it."""
    for message in launch(_bad_image, 4, kind):
        assert "rank 1 cannot use its images: item 2 has 3 x 4 patches" in message


def _rejected_by_caller() -> str:
    encoder = EncoderProcess(make_tower(torch.float32), dist.group.WORLD)
    with pytest.raises(PretrainError) as error:
        encoder.encode([make_images([], 0)], "too few" if dist.get_rank() else None)
    return str(error.value)


def test_an_error_of_the_caller_is_raised_on_all_ranks() -> None:
    assert launch(_rejected_by_caller, 2) == ["rank 1 cannot use its images: too few"] * 2


def _in_chunks(max_patches: int, memory: float) -> tuple[Step, list[int]]:
    """Features and reduced gradients of a step, and the patches of every forward of the tower.

    Args:
        memory: for activations, in bytes. Infinite: without recomputation.
    """
    tower = make_tower(torch.float64)
    sizes: list[int] = []
    tower.encoder.register_forward_pre_hook(lambda _module, args: sizes.append(len(args[0])))
    limits = EncoderProcessConfig(
        max_patches=max_patches,
        recompute=math.isfinite(memory),
        activation_memory_gib=memory / 2**30 if math.isfinite(memory) else None,
    )
    encoder = EncoderProcess(tower, dist.group.WORLD, limits)
    shapes = [(1, 2, 2), (1, 4, 4), (2, 2, 4), (1, 2, 2), (1, 6, 6), (1, 2, 4)]
    (features,) = encoder.encode([make_images(shapes, dist.get_rank())])
    features.sin().sum().backward()
    encoder.backward()
    encoder.reduce_gradients()
    gradients = {name: p.grad for name, p in tower.named_parameters() if p.grad is not None}
    return {"features": features.detach(), **gradients}, sizes


def test_max_patches_bounds_the_encoders_batch_and_changes_nothing() -> None:
    ((whole, sizes_of_whole),) = launch(_in_chunks, 1, 1000, 0.0)
    ((parts, sizes),) = launch(_in_chunks, 1, 20, 0.0)
    assert sizes_of_whole == [84, 84]
    assert sizes == [20, 20, 36, 8] * 2  # a larger item is encoded alone
    for name, expected in whole.items():
        assert (parts[name] - expected).norm() <= 1e-12 * expected.norm(), name


def _with_memories(memories: list[float]) -> list[tuple[Step, list[int]]]:
    return [_in_chunks(20, memory) for memory in memories]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_activations_are_kept_as_long_as_they_fit_and_change_nothing(world_size: int) -> None:
    """Features and gradients are equal to the bit, whatever is kept."""
    patch = activation_bytes(CONFIG, 8)
    memories = [0.0, patch * 20, patch * 47, patch * 48, patch * 84, math.inf]
    for results in launch(_with_memories, world_size, memories):
        (reference, _), *_ = results
        for step, _ in results:
            assert all(torch.equal(step[name], expected) for name, expected in reference.items())
        if world_size == 1:
            forward = [20, 20, 36, 8]
            again = [[20, 20, 36, 8], [20, 36, 8], [36, 8], [36], [], []]
            assert [sizes for _, sizes in results] == [forward + rest for rest in again]


def _kept_bytes(memory: float) -> tuple[int, float]:
    """Bytes of activations that exist after stage 1, and the share that stage 3 recomputes."""
    tower = make_tower(torch.float64)
    limits = EncoderProcessConfig(max_patches=64, activation_memory_gib=memory / 2**30)
    encoder = EncoderProcess(tower, dist.group.WORLD, limits)
    images = make_images([(1, 8, 8)] * 4, 0)
    seen = {p.untyped_storage()._cdata for p in tower.parameters()}
    alive: list[Tensor] = []
    size = 0

    def keep(tensor: Tensor) -> Tensor:
        nonlocal size
        storage = tensor.untyped_storage()
        if storage._cdata not in seen:
            seen.add(storage._cdata)
            alive.append(tensor)
            size += storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        (features,) = encoder.encode([images])
    features.sum().backward()
    encoder.backward()
    return size, encoder.recomputed


def test_kept_activations_are_within_their_memory() -> None:
    """Within 5 %, the accuracy of the estimate."""
    patch = activation_bytes(CONFIG, 8)
    for chunks in range(5):
        memory = patch * 64 * chunks
        ((size, recomputed),) = launch(_kept_bytes, 1, memory)
        assert 0.8 * memory <= size <= 1.05 * memory
        assert recomputed == 1 - chunks / 4


def _with_capacity(capacity: int) -> str | tuple[int, int]:
    config = EncoderProcessConfig(max_patches_per_rank=capacity)
    encoder = EncoderProcess(make_tower(torch.float32), dist.group.WORLD, config)
    shapes = [(1, 4, 4), (1, 4, 4)] if dist.get_rank() == 0 else [(1, 2, 2), (1, 2, 4)]
    try:
        encoder.encode([make_images(shapes, 0)])
    except PretrainError as error:
        return str(error)
    assert encoder._stage1 is not None
    return len(encoder._stage1.patches), encoder.oversized


def test_max_patches_per_rank_is_respected_or_the_image_without_room_is_named() -> None:
    """16 + 16 + 4 + 8 patches fit on two ranks as 24 and 20, but not as 22 and 22."""
    assert sorted(launch(_with_capacity, 2, 24)) == [(20, 0), (24, 0)]
    for message in launch(_with_capacity, 2, 21):
        assert "=21 is too small for the step's 44 patches on 2 ranks: no room" in str(message)
        assert "'s image " in str(message) and "patches; raise it, or lower" in str(message)


def _backward_first() -> str:
    try:
        EncoderProcess(make_tower(torch.float32), dist.group.WORLD).backward()
    except RuntimeError as error:
        return str(error)
    return "no error"


def test_backward_without_a_forward_is_an_error() -> None:
    assert "needs an encode()" in launch(_backward_first, 1)[0]


def _round_trip(seed: int) -> bool:
    """Whether encoders receive the rows of random items, and owners receive them back."""
    rank, size = dist.get_rank(), dist.get_world_size()
    generator = torch.Generator().manual_seed(seed)
    number = int(torch.randint(0, 12, (), generator=generator))
    owners = torch.randint(size, (number,), generator=generator).tolist()
    encoders = torch.randint(size, (number,), generator=generator).tolist()
    rows = torch.randint(0, 4, (number,), generator=generator).tolist()
    contents = [torch.full((count, 2), float(item)) for item, count in enumerate(rows)]
    exchange = ItemExchange(owners, encoders, dist.group.WORLD)
    owned = torch.cat(
        [torch.empty(0, 2), *(contents[i] for i in range(number) if owners[i] == rank)]
    )
    received = exchange.to_encoders(owned, rows)
    expected = torch.cat([torch.empty(0, 2), *(contents[i] for i in exchange.incoming)])
    right_items = exchange.incoming == [i for i in range(number) if encoders[i] == rank]
    back = exchange.to_owners(received, rows)
    return right_items and torch.equal(received, expected) and torch.equal(back, owned)


def _round_trips() -> bool:
    return all(_round_trip(seed) for seed in range(60))


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_exchanging_rows_and_back_is_the_identity(world_size: int) -> None:
    assert all(launch(_round_trips, world_size))


def _grids_and_owners() -> tuple[list[list[int]], list[int], list[Piece]]:
    rank = dist.get_rank()
    runs = [[(1, 2), (3, rank)]] * rank if rank > 1 else None
    grids = torch.full((rank, 3), 2 * rank)
    all_grids, owners, pieces = gather_grids(grids, dist.group.WORLD, runs=runs)
    return all_grids.tolist(), owners, pieces


def test_all_ranks_gather_all_grids_and_the_ranks_that_need_them() -> None:
    owners = [1, 2, 2, 3, 3, 3]
    pieces = [Piece(0, 1, 1)]
    for item, owner in enumerate(owners[1:], 1):
        pieces += [Piece(item, 1, 2), Piece(item, 3, owner)]
    expected = ([[2 * rank] * 3 for rank in owners], owners, pieces)
    assert launch(_grids_and_owners, 4) == [expected] * 4
