"""Plans of the shipped configurations, of images, and what is said of what does not fit."""

import json

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pretrain import cli, config
from pretrain.config import VisionConfig
from pretrain.encoder_process.cost import analytic_cost
from pretrain.model.projector import VisionTower
from pretrain.model.vision import observers_disabled
from pretrain.plan import budget

KIMI = "configs/kimi_k25.yaml"


def test_the_full_shape_has_the_parameters_of_kimi_k2(capsys: pytest.CaptureFixture[str]) -> None:
    """Its config.json gives 1.026 T, of which a token uses 31.7 B without the embedding's table
    (32.9 B with it); the report rounds to 1.04 T and 32.6 B (arXiv 2507.20534, table 2)."""
    assert cli.main(["plan", KIMI, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    parameters = found["parameters"]
    assert parameters["language"] == 1_026_408_209_408
    assert parameters["active"] == 31_687_072_768
    assert parameters["active"] == pytest.approx(32e9, rel=0.01)
    assert parameters["total"] == pytest.approx(1.04e12, rel=0.015)
    assert parameters["vision"] == parameters["total"] - parameters["language"]
    assert found["layout"]["processes"] == 512
    assert sum(found["layout"]["layers_of_stages"]) == 61
    assert all(stage["total"] < 74 * 2**30 for stage in found["memory"])


def test_what_is_planned_for_one_h200_fits_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "configs/h200.yaml", "--memory", "131"]) == 0
    assert "  fits in 131 GiB" in capsys.readouterr().out
    assert cli.main(["plan", "configs/h200.yaml", "--memory", "80"]) == 0
    assert "DOES NOT FIT in 80 GiB" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--processes", "100"], "100 processes cannot be divided by parallel.expert=32"),
        (["parallel.expert=7"], "parallel.expert=7 does not divide language.num_experts=384"),
        (["parallel.pipeline=62"], "is more than language.num_layers=61"),
        (["--processes", "0"], "processes must be > 0, not 0"),
        (["--image-patches", "0"], "image-patches must be > 0, not 0"),
        (["--memory", "0"], "memory must be > 0 GiB, not 0"),
    ],
)
def test_what_does_not_fit_is_told_as_the_trainer_tells_it(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["plan", KIMI, *arguments]) == 1
    told = capsys.readouterr().err
    assert message in told and told.count("\n") == 1


def test_of_images_that_go_through_the_encoder_apart_the_memory_of_one_is_planned() -> None:
    """However few patches are allowed at a time, or however many ranks share the step's images."""
    few = ["encoder_process.max_patches=16", "vision.num_layers=60", "micro_batch_size=1"]
    for processes in (2, 32):
        settings = config.load("configs/laptop.yaml", few)
        place = budget.layout(settings, processes)
        pictures = budget.images(settings, 128)
        assert pictures.patches / 32 < 128 < pictures.patches / 2
        one = budget.encoder_activations(settings, 128)
        backbone = budget.memory(settings, place, budget.Images(128, 0.0))[0]["activations"]
        planned = budget.memory(settings, place, pictures)[0]["activations"]
        assert planned == one > backbone


def test_of_text_alone_no_images_and_no_state_of_the_encoder_are_planned() -> None:
    """As the trainer has it, which then leaves the encoder as it is, whatever the vision share."""
    found = {}
    for kind in ("standard_library", "images"):
        settings = config.load(
            "configs/laptop.yaml",
            [f"data.sources=[{{type: {kind}{', path: x' if kind == 'images' else ''}}}]"],
        )
        pictures = budget.images(settings)
        assert (pictures.features > 0) == (kind == "images")
        found[kind] = budget.memory(settings, budget.layout(settings, 2), pictures)[0]
    tower = [weight for weight in budget.weights(settings) if weight.vision]
    state = sum(4 * (w.numel if w.muon else 2 * w.numel + 1) for w in tower)
    text, both = found["standard_library"], found["images"]
    assert both["optimizer state"] - text["optimizer state"] == state
    assert both["weights"] == text["weights"] and text["images"] == 0


def test_the_encoder_computes_and_keeps_what_is_planned(tmp_path: object) -> None:
    """Exact but for the resizing of the position table; kept activations within 5 %."""
    shape = VisionConfig(
        num_layers=3, hidden_size=64, num_heads=4, ffn_hidden_size=136, position_grid=2
    )
    tower, hidden = VisionTower(shape, 48), 48
    for parameter in tower.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    grids = torch.tensor([[1, 8, 8]] * 6)
    pictures = budget.Images(64, 6 * 16)
    patches = torch.zeros(6 * 64, 3 * shape.patch_size**2, dtype=torch.uint8)
    seen: dict[int, int] = {p.untyped_storage()._cdata: 0 for p in tower.parameters()}
    alive = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in seen:
            seen[storage._cdata] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with (
        sdpa_kernel(SDPBackend.MATH),
        observers_disabled(tower),
        FlopCounterMode(display=False) as flops,
    ):
        features = tower(patches, grids)
        forward = flops.get_total_flops()
        features.sum().backward()
    both = flops.get_total_flops()
    cost = analytic_cost(shape, hidden)
    resize = 2 * 64 * (8 * 2 * 2 + 8 * 2 * 8)
    expected = pictures.forward_flops(cost)
    assert forward == expected + resize
    assert both == 3 * (expected + resize) - 2 * pictures.patches * 588 * 64 - resize

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        tower(patches, grids)
    settings = config.Config(vision=shape, language=config.LanguageConfig(hidden_size=hidden))
    planned = budget.encoder_activations(settings, pictures.patches)
    assert planned == pytest.approx(sum(seen.values()), rel=0.05)
