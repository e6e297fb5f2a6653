"""DTensors of any placement: whole matrices are orthogonalized, with the result of one process."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from muonclip import MatrixLayout, MuonClip, orthogonalize, param_groups, update_scale
from muonclip.distributed import muon
from tests.distributed.launch import launch
from tests.distributed.optimizer_cases import (
    EVERY_OPTION,
    EXACT,
    TOLERANCE,
    Block,
    Case,
    Outcome,
    Place,
    Spec,
    assert_equal,
    build,
    give_gradients,
    outcome_of,
    random,
    train,
    train_past_a_bad_gradient,
    whole,
)

GATE_UP = MatrixLayout((4, 6))


def specs(placements: tuple[str, ...], *shapes: tuple[int, ...]) -> tuple[Spec, ...]:
    return tuple(Spec(shape, placements=placements) for shape in shapes)


def cases_for(world_size: int) -> dict[str, Case]:
    line = (world_size,)
    # Uneven; fewer rows than ranks; one row, so that all shards but one are empty.
    matrices = ((8, 6), (6, 8), (7, 5), (3, 8), (8, 3), (1, 9), (9, 1), (1, 1))
    stacks = ((4, 4, 6), (5, 6, 4), (1, 4, 6), (3, 5, 5))
    cases = {
        "rows": Case(specs(("S0",), *matrices), line),
        "columns": Case(specs(("S1",), *matrices), line),
        "replicated": Case(specs(("R",), *matrices, *stacks), line),
        "experts": Case(specs(("S0",), *stacks), line),
        "rows of each expert": Case(specs(("S1",), *stacks), line),
        "columns of each expert": Case(specs(("S2",), *stacks), line),
        "fused": Case(
            (
                Spec((10, 6), GATE_UP, placements=("S0",)),
                Spec((10, 6), GATE_UP, placements=("S1",)),
                Spec((3, 10, 6), GATE_UP, placements=("S0",)),
                Spec((3, 10, 6), GATE_UP, placements=("S1",)),
                Spec((12, 6), MatrixLayout.per_head(12, 3), placements=("S0",)),
                Spec(
                    (6, 12),
                    MatrixLayout((4,), 3, separate=True, transposed=True),
                    placements=("S0",),
                ),
                Spec((8, 3, 2, 2), MatrixLayout(flatten=True), "muon", ("S0",)),
                Spec((8, 3, 2), MatrixLayout(flatten=True), "muon", ("S0",)),
            ),
            line,
        ),
        "AdamW": Case(
            (
                Spec((5,), placements=("S0",)),
                Spec((1,), placements=("S0",)),
                Spec((7, 3), None, "adamw", ("S0",)),
                Spec((3, 7), None, "adamw", ("S1",)),
                Spec((4, 4), placements=("S0",)),
                Spec((), placements=("R",)),
            ),
            line,
        ),
        "gradients that come and go": Case(
            specs(("S0",), *matrices[:4]),
            line,
            without_gradient=frozenset({(0, 0), (1, 0), (1, 1), (2, 2)}),
            steps=range(4),
        ),
        "every option": Case(
            specs(("S0",), (7, 5), (3, 5, 5), (5,)),
            line,
            EVERY_OPTION,
        ),
        "int8": Case(
            specs(("S0",), (7, 5), (1, 9), (3, 5, 5), (5,)),
            line,
            {"momentum_dtype": torch.int8},
            dtype=torch.float64,
        ),
        "decay in the gradient": Case(
            specs(("S0",), (7, 5), (5,)), line, {"weight_decay_mode": "l2", "weight_decay": 0.5}
        ),
    }
    if world_size == 2:
        cases["a mesh of 2 by 1"] = Case(specs(("S0", "S1"), *matrices, *stacks), (2, 1))
        cases["a mesh of 1 by 2"] = Case(specs(("R", "S0"), *matrices, *stacks), (1, 2))
    if world_size == 4:
        two = ("R", "S0"), ("S0", "R"), ("S0", "S1"), ("S1", "S0"), ("S0", "S0"), ("S1", "S1")
        for placements in two:
            case = Case(specs(placements, *matrices, *stacks), (2, 2))
            cases[" x ".join(placements)] = case
        cases["experts x rows"] = Case(specs(("S0", "S1"), *stacks), (2, 2))
        cases["mixed"] = Case(
            tuple(
                Spec(shape, placements=placements)
                for shape, placements in zip(matrices, (*two, *two), strict=False)
            ),
            (2, 2),
        )
    normuon = {
        f"NorMuon, {name}": replace(case, options={**case.options, "variant": "normuon"})
        for name, case in cases.items()
        if name in _WITH_NORMUON
    }
    return cases | normuon


_WITH_NORMUON = {
    "rows", "columns", "replicated", "experts", "columns of each expert", "fused",
    "gradients that come and go", "S0 x S1", "S1 x S0", "experts x rows",
}  # fmt: skip


def placing(mesh: DeviceMesh) -> Place:
    """Lays a whole tensor on the mesh as its spec says."""

    def distribute(spec: Spec, whole: Tensor) -> Tensor:
        placements = [Replicate() if p == "R" else Shard(int(p[1])) for p in spec.placements]
        return distribute_tensor(whole, mesh, placements, src_data_rank=None)

    return distribute


def train_sharded(cases: dict[str, Case]) -> dict[str, Outcome]:
    return {
        name: train(case, placing(init_device_mesh("cpu", case.mesh)))
        for name, case in cases.items()
    }


@pytest.fixture(scope="module")
def launched() -> dict[int, list[dict[str, Outcome]]]:
    return {}


@pytest.mark.parametrize(
    ("world_size", "name"), [(size, name) for size in (1, 2, 4) for name in cases_for(size)]
)
def test_equals_one_process(
    launched: dict[int, list[dict[str, Outcome]]], world_size: int, name: str
) -> None:
    """speculators#821: [1, N] matrices, of which most shards are empty, crashed."""
    cases = cases_for(world_size)
    if world_size not in launched:
        launched[world_size] = launch(train_sharded, world_size, cases)
    expected = train(cases[name])
    for outcomes in launched[world_size]:
        assert_equal(outcomes[name], expected, cases[name])


@st.composite
def spec_on_2_by_2(draw: st.DrawFn) -> Spec:
    shape = tuple(draw(st.lists(st.integers(1, 7), min_size=1, max_size=3)))
    placement = st.sampled_from(["R", *(f"S{dim}" for dim in range(len(shape)))])
    layout = None
    if len(shape) > 1 and draw(st.booleans()):
        rows = shape[-2]
        cut = draw(st.integers(0, rows - 1))
        blocks = (cut, rows - cut) if cut else (rows,)
        layout = MatrixLayout(blocks)
    return Spec(shape, layout, placements=(draw(placement), draw(placement)))


@settings(max_examples=2, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(spec_on_2_by_2(), min_size=30, max_size=40))
def test_any_shape_in_any_placement(found: list[Spec]) -> None:
    """Processes are dear: each example is a model of many parameters."""
    case = Case(tuple(found), (2, 2))
    expected = train(case)
    for outcomes in launch(train_sharded, 4, {"case": case}):
        assert_equal(outcomes["case"], expected, case)


def step_on_shards() -> Tensor:
    """One step of a matrix whose rows lie on two ranks, without momentum or decay."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    p = nn.Parameter(distribute_tensor(random((6, 8), 0), mesh, [Shard(0)]))
    p.grad = distribute_tensor(random((6, 8), 1), mesh, [Shard(0)])
    MuonClip([p], **{**EXACT, "momentum": 0.0, "weight_decay": 0.0}).step()
    return whole(p.detach())


def test_newton_schulz_sees_whole_matrices() -> None:
    """MLM#5961: Newton-Schulz of each shard would give another update."""
    gradient = random((6, 8), 1)
    whole = orthogonalize(gradient, dtype=torch.float64)
    halves = torch.cat([orthogonalize(part, dtype=torch.float64) for part in gradient.chunk(2)])
    for after in launch(step_on_shards, 2):
        update = (random((6, 8), 0) - after) / (EXACT["lr"] * update_scale((6, 8)))
        assert (update - whole).abs().max() < 1e-5
        assert (update - halves).abs().max() > 0.1


def train_block(model: nn.Module, rank: int, size: int, micro_batches: int) -> list[Tensor]:
    """Four steps on a batch of 8 rows, cut over ranks and micro-batches."""
    optimizer = MuonClip(param_groups(model), **EXACT)
    for step in range(4):
        mine = random((8, 8), step, dtype=torch.float64).chunk(size)[rank]
        for part in mine.chunk(micro_batches):
            (model(part).square().mean() / micro_batches).backward()
        optimizer.step()
        optimizer.zero_grad()
    return [whole(p.detach()) for p in model.parameters()]


def train_fsdp2(mode: str, micro_batches: int) -> list[Tensor]:
    rank, size = dist.get_rank(), dist.get_world_size()
    model = Block()
    if mode == "tensor parallel":  # rows and columns cut over 2, and then over 2 again
        mesh = init_device_mesh("cpu", (size // 2, 2), mesh_dim_names=("dp", "tp"))
        parallelize_module(model, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
        rank, size, mesh = mesh.get_local_rank("dp"), size // 2, mesh["dp"]
    elif mode == "replicas":
        mesh = init_device_mesh("cpu", (size // 2, 2), mesh_dim_names=("replicas", "shards"))
    else:
        mesh = init_device_mesh("cpu", (size,))
    fully_shard([model.up, model.down], mesh=mesh)
    fully_shard(model, mesh=mesh, shard_placement_fn=_columns_of_experts)
    return train_block(model, rank, size, micro_batches)


def _columns_of_experts(p: nn.Parameter) -> Shard | None:
    return Shard(1) if p.ndim == 3 else None


@pytest.mark.parametrize(
    ("mode", "world_size"),
    [
        ("shards", 2),
        ("shards", 4),
        ("replicas", 4),
        ("tensor parallel", 4),
    ],
)
def test_fully_shard_equals_one_process(mode: str, world_size: int) -> None:
    """DeepSpeed#8600 too: two micro-batches on each rank are one batch."""
    expected = train_block(Block(), 0, 1, 1)
    for weights in launch(train_fsdp2, world_size, mode, 2):
        for ours, theirs in zip(weights, expected, strict=True):
            assert (ours - theirs).abs().max() < TOLERANCE


PLANE = ("S0", "S1")
STAGES = [
    Case(specs(PLANE, (6, 4), (3, 5, 5))),
    Case((*specs(PLANE, (7, 7), (1, 3), (4, 4)), Spec((5,), placements=("R", "S0")))),
]


def train_pipeline_stage() -> Outcome:
    """Ranks 0, 1 and ranks 2, 3 train different parameters, each pair on its mesh."""
    stage = dist.get_rank() // 2
    mesh = init_device_mesh("cpu", (2, 2, 1), mesh_dim_names=("stages", "rows", "columns"))
    return train(STAGES[stage], placing(mesh["rows", "columns"]))


def test_pipeline_stages_have_different_parameters() -> None:
    for rank, outcome in enumerate(launch(train_pipeline_stage, 4)):
        case = STAGES[rank // 2]
        assert_equal(outcome, train(case), case)


TWO_MESHES = Case(
    (
        Spec((7, 5), placements=("S0",)),
        Spec((4, 6, 5), placements=("S1", "S0")),
        Spec((6,), placements=("S0",)),
        Spec((4, 5, 6), placements=("S0", "S1")),
        Spec((5, 7), placements=("S1",)),
    )
)


def train_on_two_meshes() -> Outcome:
    line = placing(init_device_mesh("cpu", (4,)))
    plane = placing(init_device_mesh("cpu", (2, 2)))
    return train(
        TWO_MESHES, lambda spec, x: (line if len(spec.placements) == 1 else plane)(spec, x)
    )


def test_dense_weights_and_experts_on_different_meshes() -> None:
    for outcome in launch(train_on_two_meshes, 4):
        assert_equal(outcome, train(TWO_MESHES), TWO_MESHES)


MESSAGES = {  # placement, shape: collectives in a step, one of which is that of the flags
    ("S0", (4, 6, 6)): 1,
    ("S0", (3, 6, 6)): 1,
    ("S1", (4, 6, 6)): 3,
    ("S0", (6, 6)): 3,
}


def count_messages() -> list[int]:
    """In a step after the first, which plans."""
    place = placing(init_device_mesh("cpu", (dist.get_world_size(),)))
    counts = []
    for placement, shape in MESSAGES:
        case = Case((Spec(shape, placements=(placement,)),), options={"nonfinite": "ignore"})
        params, optimizer = build(case, place)
        give_gradients(case, params, 0, place)
        optimizer.step()
        with CommDebugMode() as messages:
            optimizer.step()
        counts.append(messages.get_total_counts())
    return counts


def test_experts_on_their_own_ranks_need_no_messages() -> None:
    """Each rank has whole matrices; sharded within them, they travel there and back."""
    assert launch(count_messages, 2) == [list(MESSAGES.values())] * 2


ONE_BAD = Case(specs(("S0",), (7, 4), (1, 6), (3, 4, 4), (5,)))


def with_one_bad_shard(nonfinite: str) -> tuple[str, Outcome, int]:
    """The last rank's shard has an infinity in the second of three steps."""

    def spoil(params: list[Any]) -> None:
        if dist.get_rank() == dist.get_world_size() - 1:
            params[0].grad.to_local()[0, 0] = torch.inf

    place = placing(init_device_mesh("cpu", (dist.get_world_size(),)))
    return train_past_a_bad_gradient(ONE_BAD, spoil, place, nonfinite=nonfinite)


def with_one_bad_shard_both_ways() -> list[tuple[str, Outcome, int]]:
    return [with_one_bad_shard("raise"), with_one_bad_shard("skip")]


def test_a_nonfinite_shard_changes_no_rank() -> None:
    """All ranks leave the step together, and the next one runs on all."""
    expected = train(replace(ONE_BAD, steps=(0, 2)))
    for rank, both in enumerate(launch(with_one_bad_shard_both_ways, 4)):
        for _, outcome, skipped in both:
            assert skipped == 1
            assert_equal(outcome, expected, ONE_BAD)
        (raised, _, _), (quiet, _, _) = both
        assert ("'p0'" if rank == 3 else "on another rank") in raised
        assert quiet == ""


def step_with_odd_gradients() -> Outcome:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    case = Case(specs(("S0",), (6, 4), (6, 4)))
    params, optimizer = build(case, placing(mesh))
    give_gradients(case, params, 0)
    # A sum over ranks that is not formed yet, and another placement than the parameter's.
    params[0].grad = DTensor.from_local(params[0].grad / mesh.size(), mesh, [Partial()])
    params[1].grad = distribute_tensor(params[1].grad, mesh, [Shard(1)])
    optimizer.step()
    return outcome_of(params, optimizer)


def test_gradients_are_redistributed_like_their_parameters() -> None:
    case = Case(specs((), (6, 4), (6, 4)), steps=(0,))
    for outcome in launch(step_with_odd_gradients, 2):
        assert_equal(outcome, train(case), case)


LOW_PRECISION = Case(
    tuple(
        Spec(shape, placements=placements)
        for shape, placements in [
            ((6, 40), ("S0", "S1")),
            ((30, 7), ("R", "S0")),
            ((3, 8, 9), ("S0", "S1")),
            ((1, 9), ("S0", "R")),
            ((40,), ("R", "S0")),
        ]
    ),
    mesh=(2, 2),
    dtype=torch.bfloat16,
)


def train_low_precision(case: Case, option: str) -> Outcome:
    return train(case, placing(init_device_mesh("cpu", case.mesh)), **{option: True})


def test_masters_of_low_precision_shards_equal_one_process() -> None:
    """The master is stepped, and the parameter is the master rounded."""
    expected = train(LOW_PRECISION, master_weights=True)
    for outcome in launch(train_low_precision, 4, LOW_PRECISION, "master_weights"):
        for weight, ours, theirs in zip(
            outcome.weights, outcome.masters, expected.masters, strict=True
        ):
            assert ours is not None and theirs is not None
            assert (ours - theirs).abs().max() < TOLERANCE
            assert torch.equal(weight, ours.bfloat16())


def load_whole_tensors() -> None:
    """State of ``full_state_dict`` loads into FSDP2, saved with it or not."""
    mesh = init_device_mesh("cpu", (2,))
    rows = cases_for(2)["rows"]
    for options in ({}, {"variant": "normuon"}, {"momentum_dtype": torch.int8}):
        case = replace(rows, options={**rows.options, **options})
        params, optimizer = build(case, placing(mesh))
        give_gradients(case, params, 0, placing(mesh))
        optimizer.step()
        saved = optimizer.full_state_dict(rank=None)
        others, other = build(case, placing(mesh))
        for ours, theirs in zip(others, params, strict=True):
            ours.data.copy_(theirs.data)
        other.load_state_dict(saved)
        for each in ((params, optimizer), (others, other)):
            give_gradients(case, each[0], 1, placing(mesh))
            each[1].step()
        for ours, theirs in zip(others, params, strict=True):
            tolerance = 0.02 if "momentum_dtype" in options else 0
            assert torch.allclose(whole(ours), whole(theirs), rtol=0, atol=tolerance)


def test_whole_tensors_load_into_shards() -> None:
    launch(load_whole_tensors, 2)


def copy_state_of_shards() -> None:
    model = nn.Linear(8, 6)
    fully_shard(model)
    optimizer = MuonClip(param_groups(model), variant="normuon", master_weights=True)
    model(torch.randn(4, 8)).square().mean().backward()
    optimizer.step()
    state = optimizer.state[model.weight]
    for name, value in copy.deepcopy(state).items():
        assert torch.equal(value.full_tensor(), state[name].full_tensor()), name
        local = value.to_local()
        assert local.untyped_storage().nbytes() == local.nbytes, name


def test_state_of_shards_can_be_copied() -> None:
    """A view of the whole tensor cannot be, and would keep all of it."""
    launch(copy_state_of_shards, 2)


def load_weights_between_steps() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6), nn.LayerNorm(6)).bfloat16()
    fully_shard(model)
    wanted = {name: torch.full(p.shape, 0.75).bfloat16() for name, p in model.named_parameters()}
    optimizer = MuonClip(param_groups(model), lr=1e-2, weight_decay=0.0, master_weights=True)
    for step in range(3):
        if step == 2:
            set_model_state_dict(model, wanted, options=StateDictOptions(full_state_dict=True))
            for group in optimizer.param_groups:
                group["lr"] = 0.0
        model(torch.randn(4, 8).bfloat16()).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, p in model.named_parameters():
        for tensor in (p, p.main_param):
            assert (tensor.full_tensor() == 0.75).all(), name


def test_masters_of_shards_follow_loaded_weights() -> None:
    launch(load_weights_between_steps, 2)


def test_stochastic_rounding_of_shards() -> None:
    """To a neighbour of the float32 result, up as well as down, and equal on replicas."""
    case = replace(LOW_PRECISION, steps=(0,))
    precise = train(case, master_weights=True).masters
    first, *others = launch(train_low_precision, 4, case, "stochastic_rounding")
    for other in others:
        assert all(map(torch.equal, first.weights, other.weights))
    for weight, target in zip(first.weights, precise, strict=True):
        assert target is not None
        error = weight.float() - target
        spacing = torch.finfo(torch.bfloat16).eps * 2.0 ** target.abs().log2().floor()
        assert (error.abs() <= spacing * 1.001).all()
        away = weight != target.bfloat16()  # from the nearest
        assert 0.1 < away.float().mean() < 0.4 or target.numel() < 40


def wrap_in_fsdp1(use_orig_params: bool) -> None:
    model = FullyShardedDataParallel(
        Block(), use_orig_params=use_orig_params, device_id=torch.device("cpu")
    )
    for call in (param_groups, lambda model: MuonClip(model.named_parameters())):
        with pytest.raises(ValueError, match=r"flat part of what was a matrix .*fully_shard"):
            call(model)


@pytest.mark.parametrize("use_orig_params", [True, False])
def test_flattened_parameters_are_refused(use_orig_params: bool) -> None:
    """DeepSpeed#8438: as vectors they all went to AdamW, without a word."""
    launch(wrap_in_fsdp1, 2, use_orig_params)


def wrap_in_fsdp1_afterwards() -> None:
    model = Block()
    optimizer = MuonClip(param_groups(model), **EXACT)
    wrapped = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    wrapped(random((8, 8), 0, dtype=torch.float64)).square().mean().backward()
    with pytest.raises(ValueError, match=r"flat part of what was a matrix .*fully_shard"):
        optimizer.step()


def test_parameters_flattened_after_construction_are_refused() -> None:
    launch(wrap_in_fsdp1_afterwards, 2)


def step_on_uneven_shards(dim: int) -> str:
    """Rank 0 has 5 of 8 rows or columns, the others one and two; torch would give 3, 3 and 2."""
    mesh = init_device_mesh("cpu", (3,))
    length = (5, 1, 2)[dist.get_rank()]
    shape = [8, 8]
    shape[dim] = length
    local = torch.ones(shape)
    options: Any = {"shape": torch.Size((8, 8)), "stride": (8, 1), "run_check": False}
    p = nn.Parameter(DTensor.from_local(local, mesh, [Shard(dim)], **options))
    p.grad = DTensor.from_local(local.clone(), mesh, [Shard(dim)], **options)
    even = nn.Parameter(distribute_tensor(torch.ones(6, 4), mesh, [Shard(0)]))
    even.grad = torch.ones_like(even)
    optimizer = MuonClip([("even", even), ("uneven", p)], nonfinite="skip")
    with pytest.raises(ValueError, match=r"parameter 'uneven': .*uneven") as error:
        optimizer.step()
    assert torch.equal(p.to_local(), local)  # type: ignore[attr-defined]
    assert torch.equal(even.to_local(), torch.ones_like(even.to_local()))  # type: ignore[attr-defined]
    return str(error.value)


@pytest.mark.parametrize("dim", [0, 1])
def test_uneven_shards_are_refused_on_all_ranks(dim: int) -> None:
    """Megatron-FSDP and RaggedShard; also on a rank whose shard has the expected size."""
    messages = launch(step_on_uneven_shards, 3, dim)
    assert len(set(messages)) == 1 and "fully_shard" in messages[0]


def step_on_shards_with_gaps() -> None:
    """Gate and up in one matrix: transformers' tensor parallelism shards each half."""
    from torch.distributed.tensor.placement_types import _StridedShard

    mesh, placements = init_device_mesh("cpu", (2,)), [_StridedShard(0, split_factor=2)]
    p = nn.Parameter(DTensor.from_local(torch.ones(4, 4), mesh, placements))
    p.grad = DTensor.from_local(torch.ones(4, 4), mesh, placements)
    MuonClip([{"params": [("w", p)], "algorithm": "adamw"}]).step()
    optimizer = MuonClip([{"params": [("w", p)], "algorithm": "muon"}])
    with pytest.raises(ValueError, match=r"parameter 'w': .* gaps, .* give it to AdamW"):
        optimizer.step()


def test_shards_with_gaps_are_refused_for_muon() -> None:
    launch(step_on_shards_with_gaps, 2)


def train_in_buckets(elements: int) -> dict[str, Outcome]:
    """Each bucket goes to its owners while the one before is worked on."""
    muon.BUCKET_ELEMENTS = elements  # type: ignore[attr-defined]
    cases = cases_for(dist.get_world_size())
    return train_sharded({name: cases[name] for name in ("rows", "columns of each expert")})


def test_many_small_buckets_equal_one_process() -> None:
    cases = cases_for(4)
    for outcomes in launch(train_in_buckets, 4, 8):
        for name, outcome in outcomes.items():
            assert_equal(outcome, train(cases[name]), cases[name])
