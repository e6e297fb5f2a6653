"""The cost model counts FLOPs and bytes of the encoder, and is fitted to measured times."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pretrain.config import VisionConfig
from pretrain.encoder_process import cost
from pretrain.encoder_process.cost import (
    CostModel,
    analytic_cost,
    fit_cost,
    measured_cost,
    time_packs,
    transfer_bytes,
)
from pretrain.errors import PretrainError
from pretrain.model.projector import VisionTower
from pretrain.model.vision import VisionAttention
from tests.distributed.launch import launch

CONFIG = VisionConfig(
    num_layers=2, hidden_size=16, num_heads=2, ffn_hidden_size=24, patch_size=2, position_grid=5
)
LANGUAGE_HIDDEN_SIZE = 12
shapes = st.tuples(st.integers(1, 4), st.sampled_from([2, 4, 6]), st.sampled_from([2, 4, 8]))


def make_tower() -> VisionTower:
    torch.manual_seed(0)
    tower = VisionTower(CONFIG, LANGUAGE_HIDDEN_SIZE)
    torch.nn.init.normal_(tower.encoder.pos_embed)
    return tower


# ---------------------------------------------------------------------- analytic cost


@settings(deadline=None, max_examples=25)
@given(st.lists(shapes, min_size=1, max_size=4))
def test_flops_are_those_of_the_matrix_products_that_run(grids: list[tuple[int, int, int]]) -> None:
    tower = make_tower()

    def flops(grids: list[tuple[int, int, int]]) -> int:
        all_grids = torch.tensor(grids)
        patches = torch.zeros(int(all_grids.prod(1).sum()), 12, dtype=torch.uint8)
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            tower(patches, all_grids)
        return counter.get_total_flops()

    expected = analytic_cost(CONFIG, LANGUAGE_HIDDEN_SIZE).costs(torch.tensor(grids)).sum()
    # The difference, because the position table is resized once for all items of a grid.
    assert flops(grids * 2) - flops(grids) == expected


@settings(deadline=None)
@given(st.lists(shapes, min_size=1, max_size=6), st.sampled_from([2, 4]))
def test_transfer_bytes_are_pixels_features_and_gradients(
    grids: list[tuple[int, int, int]], itemsize: int
) -> None:
    tower = make_tower().to({2: torch.bfloat16, 4: torch.float32}[itemsize])
    transferred = transfer_bytes(torch.tensor(grids), CONFIG, LANGUAGE_HIDDEN_SIZE, itemsize)
    for grid, sent in zip(grids, transferred, strict=True):
        patches = torch.zeros(int(np.prod(grid)), 12, dtype=torch.uint8)
        features = tower(patches, torch.tensor([grid]))
        assert sent == patches.nbytes + 2 * features.nbytes


@settings(deadline=None)
@given(st.lists(shapes, max_size=6))
def test_loads_are_integers_in_thousandths_of_a_patch(grids: list[tuple[int, int, int]]) -> None:
    all_grids = torch.tensor(grids, dtype=torch.int64).view(-1, 3)
    model = CostModel(per_patch=2.0, per_feature=3.0, per_pair=0.5, per_item=7.0)
    loads = model.loads(all_grids)
    assert loads.dtype == np.int64
    for (frames, rows, columns), load in zip(grids, loads, strict=True):
        patches = frames * rows * columns
        expected = 7 + 2 * patches + 3 * (rows // 2) * (columns // 2) + 0.5 * patches**2
        assert abs(load - 500 * expected) <= 0.5
    assert CostModel(5.0, 0.0, 0.0).loads(all_grids).tolist() == [
        1000 * t * h * w for t, h, w in grids
    ]


# ---------------------------------------------------------------------- fit

PACKS = [
    [(1, 2, 2)] * 16, [(1, 4, 4)] * 4, [(1, 8, 8)], [(1, 2, 2)] * 64, [(4, 4, 4)] * 4,
    [(1, 16, 16)], [(1, 30, 40)],
]  # fmt: skip
positive = st.floats(0.1, 10)


def seconds(model: CostModel, fixed: float, pack: list[tuple[int, int, int]]) -> float:
    return fixed + float(model.costs(torch.tensor(pack)).sum())


def machine(product: float, attention: float, item: float) -> CostModel:
    """Cost model in seconds, given nanoseconds per FLOP and microseconds per item."""
    flops = analytic_cost(CONFIG, LANGUAGE_HIDDEN_SIZE)
    return CostModel(
        per_patch=product * 1e-9 * flops.per_patch,
        per_feature=product * 1e-9 * flops.per_feature,
        per_pair=attention * 1e-9 * flops.per_pair,
        per_item=item * 1e-6,
    )


def refit(model: CostModel, fixed: float) -> CostModel:
    flops = analytic_cost(CONFIG, LANGUAGE_HIDDEN_SIZE)
    return fit_cost(flops, [(pack, seconds(model, fixed * 1e-4, pack)) for pack in PACKS])


@settings(deadline=None)
@given(positive, st.floats(0, 10), st.floats(0, 10))
def test_a_fit_recovers_the_model_of_exact_times(product: float, item: float, fixed: float) -> None:
    model = machine(product, product, item)
    fitted = refit(model, fixed)
    assert fitted.per_patch == pytest.approx(model.per_patch, rel=1e-6)
    assert fitted.per_feature == pytest.approx(model.per_feature, rel=1e-6)
    assert fitted.per_pair == pytest.approx(model.per_pair, rel=1e-6)
    assert fitted.per_item == pytest.approx(model.per_item, abs=1e-6 * model.per_patch)


@settings(deadline=None)
@given(positive, st.floats(0.2, 5), st.floats(0, 10), st.floats(0, 10))
def test_a_fit_recovers_another_speed_of_attention_up_to_the_prior(
    product: float, attention: float, item: float, fixed: float
) -> None:
    model = machine(product, attention * product, item)
    fitted = refit(model, fixed)
    for pack in PACKS:
        predicted = seconds(fitted, fixed * 1e-4, pack)
        assert predicted == pytest.approx(seconds(model, fixed * 1e-4, pack), rel=0.05)


@pytest.mark.filterwarnings("ignore:the measured time of the vision encoder")
@settings(deadline=None)
@given(st.lists(st.floats(0.3, 3), min_size=len(PACKS), max_size=len(PACKS)))
def test_a_fit_to_noise_has_no_negative_coefficient(noise: list[float]) -> None:
    flops = analytic_cost(CONFIG, LANGUAGE_HIDDEN_SIZE)
    samples = [
        (pack, factor * seconds(flops, 1e4, pack))
        for pack, factor in zip(PACKS, noise, strict=True)
    ]
    fitted = fit_cost(flops, samples)
    assert fitted.per_patch > 0
    assert min(fitted.per_feature, fitted.per_pair, fitted.per_item) >= 0
    assert fit_cost(flops, samples) == fitted


def test_without_visible_attention_its_flops_are_as_fast_as_others() -> None:
    flops = analytic_cost(VisionConfig(), 7168)
    small = [[(1, 2, 2)] * 40, [(1, 2, 4)] * 40, [(1, 4, 4)] * 40, [(1, 4, 4)] * 80]
    noise = [1.02, 0.98, 1.02, 1.0]
    samples = [(p, n * seconds(flops, 1e9, p)) for p, n in zip(small, noise, strict=True)]
    fitted = fit_cost(flops, samples)
    assert fitted.per_pair / fitted.per_patch == pytest.approx(
        flops.per_pair / flops.per_patch, rel=0.1
    )


def test_times_that_do_not_grow_give_flops_and_a_warning() -> None:
    flops = analytic_cost(CONFIG, LANGUAGE_HIDDEN_SIZE)
    with pytest.warns(UserWarning, match="does not grow with its patches"):
        assert fit_cost(flops, [(pack, 1.0) for pack in PACKS]) == flops


# ---------------------------------------------------------------------- measured cost


def test_measuring_does_not_change_the_tower() -> None:
    tower = make_tower()
    before = {name: value.clone() for name, value in tower.state_dict().items()}
    observed: list[object] = []
    for layer in tower.modules():
        if isinstance(layer, VisionAttention):
            layer.observer = observed.append
    random_numbers = torch.get_rng_state()
    samples = time_packs(tower, seconds=0.01, max_patches=256)
    assert len(samples) >= 5
    assert all(seconds > 0 for _, seconds in samples)
    assert all(16 <= sum(t * h * w for t, h, w in grids) <= 256 for grids, _ in samples)
    assert not observed
    assert torch.equal(torch.get_rng_state(), random_numbers)
    assert all(weight.grad is None for weight in tower.parameters())
    for name, value in tower.state_dict().items():
        assert torch.equal(value, before[name])
    # A frozen encoder has no backward.
    assert time_packs(tower.requires_grad_(False), seconds=0.01, max_patches=64)


def _measured(cache: Path | None) -> CostModel:
    return measured_cost(make_tower(), dist.group.WORLD, cache=cache, seconds=0.01, max_patches=64)


def test_all_ranks_get_the_first_ranks_model_and_reuse_the_cache(tmp_path: Path) -> None:
    cache = tmp_path / "run" / "cost.json"
    first, second = launch(_measured, 2, cache)
    assert first == second == CostModel(**json.loads(cache.read_text())["model"])
    assert launch(_measured, 2, cache) == [first, first]
    # A measurement of another device is not used.
    stored = json.loads(cache.read_text())
    stored["setting"]["device"] = "another"
    stored["model"] = dict.fromkeys(stored["model"], 1.0)
    cache.write_text(json.dumps(stored))
    again, same = launch(_measured, 2, cache)
    assert again == same != CostModel(1.0, 1.0, 1.0, 1.0)
    assert json.loads(cache.read_text())["setting"]["device"] != "another"


def _damaged(cache: Path) -> str:
    with pytest.raises(PretrainError) as caught:
        _measured(cache)
    return str(caught.value)


def test_errors_name_a_cache_that_is_damaged_or_cannot_be_written(tmp_path: Path) -> None:
    cache = tmp_path / "cost.json"
    for text in ("{", "[]", '{"setting": {}, "model": {"seconds": 1}}'):
        cache.write_text(text)
        first, second = launch(_damaged, 2, cache)
        assert first == second
        assert "cost.json has no measured cost model: delete it" in first
    (tmp_path / "file").touch()
    below = tmp_path / "file" / "cost.json"
    assert launch(_damaged, 2, below) == [f"cannot write {below}: File exists"] * 2


def _tower_fails_on_first_rank() -> str:
    tower = make_tower()
    if dist.get_rank() == 0:
        del tower.encoder.final_norm
    try:
        measured_cost(tower, dist.group.WORLD, seconds=0.01, max_patches=64)
    except RuntimeError as error:
        return str(error)
    return "no error"


def test_all_ranks_raise_the_first_ranks_error() -> None:
    first, second = launch(_tower_fails_on_first_rank, 2)
    assert first == second
    assert first.startswith(
        "the first rank cannot measure the vision encoder's cost: AttributeError"
    )
    assert "final_norm" in first


def test_packs_have_the_requested_patches_in_different_grids() -> None:
    for side in (8.0, 12.0, 32.0):
        pack = cost._pack(1024, side)
        patches = [t * h * w for t, h, w in pack]
        assert 1024 <= sum(patches) < 1024 + max(patches)
        assert all(h % 2 == 0 < h and w % 2 == 0 < w for _, h, w in pack)
        assert 0.5 * side**2 < sum(patches) / len(patches) < 2 * side**2
        assert len(set(pack)) > 0.8 * len(pack)
