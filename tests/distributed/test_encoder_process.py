"""DEP gives the features and gradients of encoding at home, and its balance is what it says."""

from itertools import chain
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from hypothesis import Phase, given, seed, settings
from hypothesis import strategies as st
from torch import Tensor

from pretrain.config import VisionConfig
from pretrain.encoder_process import ColocatedEncoder, EncoderProcess
from pretrain.encoder_process.encoder import Images
from pretrain.encoder_process.exchange import ItemExchange, gather_grids
from pretrain.errors import PretrainError
from pretrain.model.projector import VisionTower
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
    """The images of a rank's two micro-batches: a fixed global batch, dealt out unevenly."""
    everything: list[Shapes] = [
        [(1, 2, 8), (4, 2, 2)], [(1, 4, 4)], [(1, 2, 2)] * 5, [],
        [(2, 6, 8)], [(1, 2, 2), (1, 8, 6)], [], [(3, 2, 4)],
    ]  # fmt: skip
    if case == "none":
        everything = [[]] * 8
    if case == "one":
        everything = [[]] * 7 + [[(1, 4, 6)]]
    share = len(everything) // world_size
    mine = everything[rank * share : (rank + 1) * share]
    half = len(mine) // 2
    return [list(chain(*mine[:half])), list(chain(*mine[half:]))]


class Place(NamedTuple):
    """What a backbone's layout means for a rank: which share of the batch it has, whether its
    stage takes in images, and which ranks do so with it."""

    data_rank: int
    data_size: int
    needs_features: bool
    tensor_group: dist.ProcessGroup | None


def place_of(tensor: int, pipeline: int) -> Place:
    """In megatron-core's order of ranks: tensor, then data, then pipeline."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    stage = world_size // pipeline
    groups = [
        dist.new_group(list(range(first, first + tensor))) for first in range(0, world_size, tensor)
    ]
    return Place(rank % stage // tensor, stage // tensor, rank < stage, groups[rank // tensor])


def _images_of(case: list[Shapes], place: Place) -> list[Images]:
    """This rank's two micro-batches of a global batch of sequences; pixels go by the sequence."""
    count = len(case) // place.data_size
    mine = list(enumerate(case))[place.data_rank * count : (place.data_rank + 1) * count]
    half = len(mine) // 2
    micro_batches = []
    for part in (mine[:half], mine[half:]):
        made = [make_images(shapes if place.needs_features else [], i) for i, shapes in part]
        empty = make_images([], 0)
        micro_batches.append(
            (
                torch.cat([empty[0], *(p for p, _ in made)]),
                torch.cat([empty[1], *(g for _, g in made)]),
            )
        )
    return micro_batches


def _step(kind: str, case: list[Shapes], place: Place, dtype: torch.dtype) -> Step:
    """Features and reduced gradients of a step whose backbone is a fixed nonlinear function."""
    tower = make_tower(dtype)
    make = EncoderProcess if kind == "dep" else ColocatedEncoder
    encoder = make(
        tower,
        dist.group.WORLD,
        needs_features=place.needs_features,
        tensor_group=place.tensor_group,
    )
    features = encoder.encode(_images_of(case, place))
    if place.needs_features:
        for part in features:
            (part.sin() * torch.arange(1, 13, dtype=dtype)).sum().backward()
    encoder.backward()
    encoder.reduce_gradients()
    gradients = {n: p.grad for n, p in tower.named_parameters() if p.grad is not None}
    assert len(gradients) == len(list(tower.parameters()))
    return {"features": torch.cat(features).detach(), **gradients}


def _steps_of_both(
    cases: list[list[Shapes]], tensor: int, pipeline: int, dtype: torch.dtype
) -> list[tuple[Step, Step]]:
    place = place_of(tensor, pipeline)
    return [
        (_step("dep", case, place, dtype), _step("colocated", case, place, dtype)) for case in cases
    ]


def _cases() -> list[list[Shapes]]:
    """Global batches of eight sequences: one mixed, one with a single image, one with none, and
    whatever hypothesis draws, from no image to many images and clips."""
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


@pytest.mark.parametrize(
    ("world_size", "tensor", "pipeline"),
    [
        *[(1, 1, 1), (2, 1, 1), (2, 2, 1), (2, 1, 2), (4, 1, 1), (4, 2, 1), (4, 1, 2), (4, 2, 2)],
        *[(4, 1, 4), (4, 4, 1)],
    ],
)
def test_dep_equals_encoding_at_home(world_size: int, tensor: int, pipeline: int) -> None:
    """In every layout of the backbone, to float64's rounding, as one process with all images."""
    _check_equal(world_size, tensor, pipeline, torch.float64, 1e-12)


@pytest.mark.parametrize(("world_size", "tensor", "pipeline"), [(2, 1, 1), (4, 2, 2)])
def test_dep_equals_encoding_at_home_in_float32(
    world_size: int, tensor: int, pipeline: int
) -> None:
    _check_equal(world_size, tensor, pipeline, torch.float32, 1e-5)


def _check_equal(
    world_size: int, tensor: int, pipeline: int, dtype: torch.dtype, tolerance: float
) -> None:
    cases = _cases()
    (alone,) = launch(_steps_of_both, 1, cases, 1, 1, torch.float64)
    for rank in launch(_steps_of_both, world_size, cases, tensor, pipeline, dtype):
        for (with_dep, at_home), (_, reference) in zip(rank, alone, strict=True):
            assert with_dep.keys() == at_home.keys()
            for name, expected in at_home.items():
                error = (with_dep[name] - expected).norm()
                assert error <= tolerance * expected.norm(), name
                if name != "features":
                    error = (expected - reference[name]).norm()
                    assert error <= 10 * tolerance * reference[name].norm(), name


def _balance_and_loads(kind: str) -> tuple[float, int, int]:
    """What a rank tells of the balance, and the cost and the patches of what it encoded."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    tower = make_tower(torch.float32)
    make = EncoderProcess if kind == "dep" else ColocatedEncoder
    encoder = make(tower, dist.group.WORLD)
    cost, patches = [], []

    def look(_module: object, args: tuple[torch.Tensor, torch.Tensor]) -> None:
        patches.append(len(args[0]))
        cost.append(int(encoder.cost.loads(args[1]).sum()))

    tower.encoder.register_forward_pre_hook(look)
    with torch.no_grad():
        encoder.encode([make_images(s, 0) for s in micro_batches_of(rank, world_size, "mixed")])
    return encoder.balance, sum(cost), sum(patches)


@pytest.mark.parametrize("kind", ["dep", "colocated"])
def test_the_balance_told_is_the_load_encoded(kind: str) -> None:
    results = launch(_balance_and_loads, 2, kind)
    loads = [load for _, load, _ in results]
    assert sum(patches for _, _, patches in results) == 16 + 16 + 16 + 20 + 96 + 52 + 24
    for told, _, _ in results:
        assert told == pytest.approx(max(loads) / (sum(loads) / 2))
    if kind == "dep":
        assert results[0][0] < 1.05


def _memory_of_graph() -> bool:
    """Stage 1 keeps no activations: its features have no graph behind them."""
    encoder = EncoderProcess(make_tower(torch.float32), dist.group.WORLD)
    (features,) = encoder.encode([make_images([(1, 2, 2)], 0)])
    (leaf, _), *others = features.grad_fn.next_functions if features.grad_fn else [(None, 0)]
    return not others and type(leaf).__name__ == "AccumulateGrad"


def test_stage_one_keeps_no_activations() -> None:
    assert launch(_memory_of_graph, 1) == [True]


def _observed(kind: str) -> list[tuple[int, list[Tensor]]]:
    """How often a layer's observer was called, after each part of a step, and what it was told."""
    tower = make_tower(torch.float64)
    told: list[Tensor] = []
    attention = tower.encoder.blocks[0].get_submodule("attention")
    attention.observer = told.append  # type: ignore[assignment]
    make = EncoderProcess if kind == "dep" else ColocatedEncoder
    encoder = make(tower, dist.group.WORLD)
    images = make_images([(1, 2, 2), (2, 2, 4), (1, 2, 2)], 0)
    steps = []
    for training in (True, False):
        tower.train(training)
        (features,) = encoder.encode([images])
        features.sum().backward()
        encoder.backward()
        steps.append((len(told), list(told)))
    return steps


def test_every_item_is_observed_once_a_step_and_never_in_evaluation() -> None:
    (dep, told), (later, _) = launch(_observed, 1, "dep")[0]
    (home, reference), _ = launch(_observed, 1, "colocated")[0]
    # One call for the two images of one length, one for the clip.
    assert dep == later == home == 2
    torch.testing.assert_close(told, reference)


def _bad_image(kind: str) -> str:
    make = EncoderProcess if kind == "dep" else ColocatedEncoder
    encoder = make(make_tower(torch.float32), dist.group.WORLD)
    last = (1, 3, 4) if dist.get_rank() == 1 else (1, 2, 2)
    with pytest.raises(PretrainError) as error:
        encoder.encode([make_images([(1, 2, 2)], 0), make_images([(1, 2, 2), last], 0)])
    return str(error.value)


@pytest.mark.parametrize("kind", ["dep", "colocated"])
def test_an_image_that_cannot_be_encoded_is_named_on_every_rank(kind: str) -> None:
    """Nobody is left waiting for the rank that has it."""
    for told in launch(_bad_image, 4, kind):
        assert "rank 1 cannot use its images: item 2 has 3 x 4 patches" in told


def _refusing() -> str:
    encoder = EncoderProcess(make_tower(torch.float32), dist.group.WORLD)
    with pytest.raises(PretrainError) as error:
        encoder.encode([make_images([], 0)], "too few" if dist.get_rank() else None)
    return str(error.value)


def test_what_the_caller_finds_wrong_ends_all_ranks() -> None:
    assert launch(_refusing, 2) == ["rank 1 cannot use its images: too few"] * 2


def _in_chunks(max_patches: int) -> tuple[Step, list[int]]:
    tower = make_tower(torch.float64)
    seen: list[int] = []
    tower.encoder.register_forward_pre_hook(lambda _module, args: seen.append(len(args[0])))
    encoder = EncoderProcess(tower, dist.group.WORLD, max_patches=max_patches)
    images = make_images([(1, 2, 2), (1, 4, 4), (2, 2, 4), (1, 2, 2), (1, 6, 6), (1, 2, 4)], 0)
    (features,) = encoder.encode([images])
    features.sin().sum().backward()
    encoder.backward()
    gradients = {name: p.grad for name, p in tower.named_parameters() if p.grad is not None}
    return {"features": features.detach(), **gradients}, seen


def test_chunks_bound_what_is_encoded_at_a_time_and_change_nothing() -> None:
    ((whole, at_once),) = launch(_in_chunks, 1, 1000)
    ((parts, in_chunks),) = launch(_in_chunks, 1, 20)
    assert at_once == [84, 84]
    assert in_chunks == [20, 20, 36, 8] * 2  # a larger item goes alone
    for name, expected in whole.items():
        assert (parts[name] - expected).norm() <= 1e-12 * expected.norm(), name


def _with_capacity(capacity: int) -> str | tuple[int, int]:
    encoder = EncoderProcess(
        make_tower(torch.float32), dist.group.WORLD, max_patches_per_rank=capacity
    )
    mine = [(1, 4, 4), (1, 4, 4)] if dist.get_rank() == 0 else [(1, 2, 2), (1, 2, 4)]
    try:
        encoder.encode([make_images(mine, 0)])
    except PretrainError as error:
        return str(error)
    assert encoder._sent is not None
    return len(encoder._sent.patches), encoder.oversized


def test_a_cap_on_a_ranks_patches_is_kept_or_the_image_without_room_is_named() -> None:
    """16 + 16 + 4 + 8 patches on two ranks: 24 and 20 fit, 22 each do not."""
    held = launch(_with_capacity, 2, 24)
    assert sorted(held) == [(20, 0), (24, 0)]
    for told in launch(_with_capacity, 2, 21):
        assert "max_patches_per_rank=21 leaves no room on any of 2 ranks for rank " in str(told)
        assert "patches) beside the step's 44: raise it" in str(told)


def _backward_first() -> str:
    try:
        EncoderProcess(make_tower(torch.float32), dist.group.WORLD).backward()
    except RuntimeError as error:
        return str(error)
    return "no error"


def test_backward_without_a_forward_is_refused() -> None:
    assert "needs an encode()" in launch(_backward_first, 1)[0]


def _round_trip(seed: int) -> bool:
    """Random items to random ranks: encoders get the right rows, owners get them back."""
    rank, size = dist.get_rank(), dist.get_world_size()
    generator = torch.Generator().manual_seed(seed)
    number = int(torch.randint(0, 12, (), generator=generator))
    owners = sorted(torch.randint(size, (number,), generator=generator).tolist())
    encoders = torch.randint(size, (number,), generator=generator).tolist()
    rows = torch.randint(0, 4, (number,), generator=generator).tolist()
    contents = [torch.full((count, 2), float(item)) for item, count in enumerate(rows)]
    exchange = ItemExchange(owners, encoders, dist.group.WORLD)
    mine = torch.cat(
        [torch.empty(0, 2), *(contents[i] for i in range(number) if owners[i] == rank)]
    )
    received = exchange.to_encoders(mine, rows)
    expected = torch.cat([torch.empty(0, 2), *(contents[i] for i in exchange.incoming)])
    right_items = sorted(exchange.incoming) == [i for i in range(number) if encoders[i] == rank]
    back = exchange.to_owners(received, rows)
    return right_items and torch.equal(received, expected) and torch.equal(back, mine)


def _round_trips() -> bool:
    return all(_round_trip(seed) for seed in range(60))


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_what_is_sent_comes_back(world_size: int) -> None:
    assert all(launch(_round_trips, world_size))


def _grids() -> list[list[list[int]]]:
    mine = torch.full((dist.get_rank(), 3), dist.get_rank())
    return [theirs.tolist() for theirs in gather_grids(mine, dist.group.WORLD)]


def test_every_rank_learns_every_grid() -> None:
    expected = [[[rank] * 3] * rank for rank in range(4)]
    assert launch(_grids, 4) == [expected] * 4
