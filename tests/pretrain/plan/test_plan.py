"""Plans of the shipped configurations and of images; configurations that do not fit."""

import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pretrain import cli, config
from pretrain.config import VisionConfig
from pretrain.encoder_process.cost import analytic_cost
from pretrain.errors import PretrainError
from pretrain.model.projector import VisionTower
from pretrain.model.vision import observers_disabled
from pretrain.plan import fit, plan, search
from pretrain.plan.activations import chunk_activations, encoder_activations, layer_activations
from pretrain.plan.flops import encoder_forward_flops
from pretrain.plan.memory import fullest_memory, step_memory
from pretrain.plan.parameters import count_parameters, trained_weights
from pretrain.plan.ranks import ranks_of
from pretrain.plan.workload import Images, images_per_step

KIMI = "configs/kimi_k25.yaml"


def test_the_full_shape_has_the_parameters_of_kimi_k2(capsys: pytest.CaptureFixture[str]) -> None:
    """Its config.json gives 1.026 T, of which each token uses 31.7 B without the embedding's table
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
    assert all(stage["total"] < 80 * 2**30 for stage in found["memory"])


def test_moonlight_has_the_published_numbers_of_parameters() -> None:
    """15.96 B parameters, of which 2.24 B are active, without the embedding and the output head."""
    settings = config.load("configs/moonlight.yaml")
    found = plan(settings, 32)
    head = settings.data.vocab_size * settings.language.hidden_size
    assert found["parameters"]["language"] == 15_960_108_544
    assert found["parameters"]["active"] - head == pytest.approx(2.24e9, rel=0.002)
    assert all(stage["total"] < 74 * 2**30 for stage in found["memory"])


def test_runs_that_start_from_another_are_planned_with_its_vocabulary() -> None:
    embeddings = {
        plan(config.load(f"configs/{name}.yaml"))["parameters"]["by_part"]["embedding"]
        for name in ("laptop", "laptop_long", "laptop_sft")
    }
    assert embeddings == {300 * 96}


_QWEN3 = {"attention": "gqa", "qk_norm": True, "head_dim": 128}


@pytest.mark.parametrize(
    ("vocab_size", "language", "parameters"),
    [
        pytest.param(
            151936,
            _QWEN3
            | dict(num_layers=28, dense_layers=28, hidden_size=1024, ffn_hidden_size=3072)
            | dict(num_heads=16, num_kv_heads=8, tie_embeddings=True),
            596_049_920,
            id="Qwen3-0.6B",
        ),
        pytest.param(
            151936,
            _QWEN3
            | dict(num_layers=48, dense_layers=0, hidden_size=2048, num_heads=32, num_kv_heads=4)
            | dict(num_experts=128, experts_per_token=8, expert_ffn_hidden_size=768)
            | dict(shared_expert_ffn_hidden_size=0, router_score="softmax"),
            30_532_122_624,
            id="Qwen3-30B-A3B",
        ),
        pytest.param(
            102400,
            dict(num_layers=27, hidden_size=2048, ffn_hidden_size=10944, num_heads=16)
            | dict(q_lora_rank=None, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64)
            | dict(v_head_dim=128, num_experts=64, experts_per_token=6, router_score="softmax")
            | dict(expert_ffn_hidden_size=1408, shared_expert_ffn_hidden_size=2816),
            15_706_484_224,
            id="DeepSeek-V2-Lite",
        ),
        pytest.param(
            128256,
            dict(attention="gqa", num_layers=32, dense_layers=32, hidden_size=4096, num_heads=32)
            | dict(num_kv_heads=8, ffn_hidden_size=14336),
            8_030_261_248,
            id="Llama-3.1-8B",
        ),
    ],
)
def test_published_models_have_their_numbers_of_parameters(
    vocab_size: int, language: dict[str, Any], parameters: int
) -> None:
    settings = config.from_dict({"language": {**language, "vocab_size": vocab_size}})
    assert count_parameters(settings)["language"] == parameters


def test_the_configuration_for_one_h200_fits_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "configs/h200.yaml", "--memory", "131"]) == 0
    assert "  fits in 131 GiB" in capsys.readouterr().out
    assert cli.main(["plan", "configs/h200.yaml", "--memory", "80"]) == 0
    assert "DOES NOT FIT in 80 GiB: 29.6 GiB too many; --fit 80" in capsys.readouterr().out


def test_a_single_process_sends_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "configs/h200.yaml", "--processes", "1"]) == 0
    assert capsys.readouterr().out.endswith("sent by a rank in a step, GiB\n  nothing\n")


def test_the_first_line_of_a_plan_has_all_parallel_sizes(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["plan", LONG, "--processes", "1024"]) == 0
    first = capsys.readouterr().out.split("; ")[0]
    assert first == "1024 processes: 4 data-parallel x 4 tensor x 8 context x 8 pipeline"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--processes", "100"], "100 processes cannot be divided by parallel.expert=32"),
        (
            ["--processes", "512", "encoder_process.group_size=24"],
            "encoder_process.group_size=24 must divide 512 processes and be a multiple of 16",
        ),
        (["parallel.expert=7"], "parallel.expert=7 does not divide language.num_experts=384"),
        (["parallel.pipeline=62", "parallel.layout=null"], "is more than language.num_layers=61"),
        (["--processes", "0"], "processes must be > 0, not 0"),
        (["--image-patches", "0"], "image-patches must be > 0, not 0"),
        (["--image-patches", "99999"], "image-patches must be at most 16384, as a sequence"),
        (["--memory", "0"], "memory must be a finite number of GiB > 0, not 0"),
        (["--fit", "nan"], "memory must be a finite number of GiB > 0, not nan"),
        (["--memory", "80", "--json"], "--json compares with no device: leave --memory out"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused_in_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["plan", KIMI, *arguments]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_the_encoder_process_needs_memory_for_at_least_one_image() -> None:
    """However few patches are encoded at a time, and however many ranks share the images."""
    process = ["encoder_process.recompute=true", "encoder_process.max_patches=16"]
    sizes = ["global_batch_size=32", "micro_batch_size=1"]
    overrides = [*process, "vision.num_layers=60", *sizes]
    for processes in (2, 32):
        settings = config.load("configs/laptop.yaml", overrides)
        ranks = ranks_of(settings, processes)
        images = images_per_step(settings, 128)
        assert images.patches / 32 < 128 < images.patches / 2
        one_image = encoder_activations(settings, 128)
        backbone = step_memory(settings, ranks, Images(128, 0.0))[0]["activations"]
        assert step_memory(settings, ranks, images)[0]["activations"] == one_image > backbone


def test_activations_that_the_encoder_keeps_are_planned() -> None:
    """Memory grows by what is kept, up to the images of a rank, and FLOPs fall by its share."""
    base = ["encoder_process.recompute=true", "micro_batch_size=1"]
    planned = {
        memory: plan(config.load("configs/laptop.yaml", [*base, *override]), 2)
        for memory, override in {
            "none": [],
            "zero": ["encoder_process.activation_memory_gib=0"],
            "half": ["encoder_process.activation_memory_gib=1e-3"],
            "much": ["encoder_process.activation_memory_gib=1"],
            "all": ["encoder_process.recompute=false"],
        }.items()
    }
    assert planned["none"] == planned["zero"] and planned["much"] == planned["all"]
    images = {name: p["memory"][0]["images"] for name, p in planned.items()}
    again = {name: p["flops"]["encoder recompute"] for name, p in planned.items()}
    assert images["half"] == pytest.approx(images["zero"] + 1e-3 * 2**30)
    every = images["all"] - images["zero"]
    assert again["all"] == 0 and again["zero"] == planned["zero"]["flops"]["encoder forward"]
    assert again["half"] == pytest.approx(again["zero"] * (1 - 1e-3 * 2**30 / every))


def test_text_only_data_needs_no_images_and_no_optimizer_state_of_the_encoder() -> None:
    """Whatever the vision share, the trainer does not update the encoder then."""
    memory = {}
    for source in ("standard_library", "images"):
        path = ", path: x" if source == "images" else ""
        override = f"data.sources=[{{type: {source}{path}}}]"
        settings = config.load("configs/laptop.yaml", [override, "optimizer.shard_state=false"])
        images = images_per_step(settings)
        assert (images.features > 0) == (source == "images")
        memory[source] = step_memory(settings, ranks_of(settings, 2), images)[0]
    encoder = [weight for weight in trained_weights(settings) if weight.layer is None]
    state = sum(4 * (w.numel if w.optimizer == "muon" else 2 * w.numel + 1) for w in encoder)
    text, both = memory["standard_library"], memory["images"]
    assert both["optimizer state"] - text["optimizer state"] == state
    assert both["weights"] == text["weights"] and text["images"] == 0


def test_selective_recompute_trades_kept_activations_for_recomputed_ones() -> None:
    every = ("core_attn", "mlp", "moe", "shared_experts")
    chunks = {}
    for module in ("none", *every):
        overrides = ["recompute.granularity=selective", f"recompute.modules=[{module}]"]
        settings = config.load("configs/laptop.yaml", overrides if module != "none" else [])
        ranks = ranks_of(settings)
        (chunk,) = ranks.stages[0]
        chunks[module] = chunk_activations(settings, chunk, ranks)
    assert chunks["none"].recomputed == 0
    assert all(chunks[module].kept < chunks["none"].kept for module in every)
    assert all(chunks[module].recomputed > 0 for module in every)
    assert chunks["moe"].kept < chunks["shared_experts"].kept


def test_the_planned_flops_and_activations_of_the_encoder_are_measured(tmp_path: object) -> None:
    """Exact; kept activations within 5 %."""
    shape = VisionConfig(
        num_layers=3, hidden_size=64, num_heads=4, ffn_hidden_size=136, position_grid=2
    )
    tower, hidden = VisionTower(shape, 48), 48
    for parameter in tower.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    grids = torch.tensor([[1, 8, 8]] * 6)
    images = Images(64, 6 * 16)
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
    expected = encoder_forward_flops(cost, images)
    assert forward == expected
    assert both == 3 * expected - 2 * images.patches * 588 * 64

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        tower(patches, grids)
    settings = config.Config(vision=shape, language=config.LanguageConfig(hidden_size=hidden))
    planned = encoder_activations(settings, images.patches)
    assert planned == pytest.approx(sum(seen.values()), rel=0.05)


@pytest.mark.parametrize(
    ("processes", "gib"), [(512, 34.0), (1024, 27.0), (2048, 24.0), (4096, 22.5)]
)
def test_sharded_state_of_kimi_k25_shrinks_with_the_number_of_ranks(
    processes: int, gib: float
) -> None:
    """Weights, gradients and state of the fullest rank, which has 50 GiB with replicated state."""

    def static(*overrides: str) -> float:
        loaded = config.load(KIMI, list(overrides))
        rows = step_memory(loaded, ranks_of(loaded, processes), images_per_step(loaded))
        kinds = ("weights", "gradients", "optimizer state")
        return max(sum(row[kind] for kind in kinds) for row in rows) / 2**30

    assert static() <= gib
    assert static("optimizer.shard_state=false") > 38


def test_the_memory_of_the_optimizers_step_does_not_grow_with_the_ranks() -> None:
    """The first stage of Kimi K2.5, whose dense MLP of 0.49 GiB has one owner.

    In bfloat16 it would be 0.5 to 0.7 GiB less: in float16, updates are in float32 until they are
    rounded, and the Gram form has more intermediate results.
    """
    loaded = config.load(KIMI)
    needed = [
        step_memory(loaded, ranks_of(loaded, processes), images_per_step(loaded))[0]
        for processes in (512, 2048, 8192)
    ]
    sizes = [memory["optimizer step"] / 2**30 for memory in needed]
    # With few ranks, owners have other matrices too.
    assert 3.2 > sizes[0] >= sizes[1] >= sizes[2] > 2


@settings(max_examples=25, deadline=None)
@given(
    dense=st.integers(0, 6),
    stages=st.sampled_from([1, 2, 4]),
    interleave=st.sampled_from([1, 2]),
    recompute=st.sampled_from(["none", "full"]),
    spread=st.permutations([1, 2, 3, 1]),
)
def test_a_search_computes_one_of_alike_stages(
    dense: int, stages: int, interleave: int, recompute: str, spread: list[int]
) -> None:
    """Wherever the dense layers are, the fullest stage is among those that are computed."""
    interleave = interleave if stages > 1 else 1
    lengths = (spread + spread)[: stages * interleave]
    loaded = config.load(
        "configs/laptop.yaml",
        [
            *(
                f"language.num_layers={sum(lengths)}",
                f"language.dense_layers={dense % sum(lengths)}",
            ),
            *(f"parallel.pipeline={stages}", f"parallel.interleave={interleave}"),
            *(f"parallel.layout={lengths}", f"recompute.granularity={recompute}"),
            *("micro_batch_size=1", "parallel.expert=1"),
        ],
    )
    ranks, images = ranks_of(loaded, 2 * stages), images_per_step(loaded)
    rows = step_memory(loaded, ranks, images)
    assert fullest_memory(loaded, ranks, images) in rows
    assert fullest_memory(loaded, ranks, images)["total"] == max(row["total"] for row in rows)


def test_the_published_layout_of_kimi_k2_puts_one_layer_on_the_last_stage() -> None:
    """Megatron-Bridge's recipe for 16 stages."""
    layers = [4] * 15 + [1]
    loaded = config.load(KIMI, [f"parallel.layout={layers}"])
    assert plan(loaded)["layout"]["layers_of_stages"] == layers


LONG = "configs/kimi_k25_256k.yaml"


def test_layouts_for_the_longest_context_fit_or_miss_by_a_stated_amount(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shipped layout is among those found, and its plan has the memory that is listed."""
    assert cli.main(["plan", LONG, "--memory", "80"]) == 0
    assert "  fits in 80 GiB" in capsys.readouterr().out
    loaded = config.load(LONG)
    every = search._sizes(loaded, 512)
    with monkeypatch.context() as patch:
        # The search among all sizes takes half a minute.
        few = [sizes for sizes in every if sizes["expert"] == loaded.parallel.expert]
        patch.setattr(search, "_sizes", lambda *_arguments: few)
        found = fit(loaded, 80, 512)
    sizes = [f"parallel.{name}={getattr(loaded.parallel, name)}" for name in SIZES]
    (shipped,) = (
        layout
        for layout in found["fit"]
        if layout["settings"] == (*sizes, "recompute.granularity=full")
    )
    assert shipped["memory"] in plan(loaded, 512)["memory"]
    seconds = [layout["seconds"] for layout in found["fit"]]
    assert seconds == sorted(seconds) and min(seconds) > 0
    assert all(layout["memory"]["total"] <= 80 * 2**30 for layout in found["fit"])
    assert cli.main(["plan", "configs/h200.yaml", "--fit", "80"]) == 0
    closest = capsys.readouterr().out.splitlines()
    assert closest[0] == "no layout of 1 processes fits in 80 GiB; the closest are:"
    assert closest[1].startswith("   109.6 GiB, 29.6 too many  parallel.tensor=1 ")
    assert closest[2].startswith("    most for optimizer state 53.0, gradients 26.2, ")
    assert closest[-1].startswith("try more --processes; a smaller global_batch_size")


def test_a_search_lists_the_smallest_layouts_if_none_fits() -> None:
    """Including those whose weights and optimizer state alone are larger than the device."""
    loaded = config.load("configs/moonlight.yaml", ["language.num_layers=2"])
    everything = fit(loaded, 1e6, 8)
    smallest = sorted(layout["memory"]["total"] for layout in everything["fit"])[:3]
    found = fit(loaded, 1, 8)
    assert not found["fit"]
    assert [layout["memory"]["total"] for layout in found["not_fit"]] == smallest


SIZES = ("tensor", "context", "pipeline", "expert")


@settings(max_examples=20)
@given(data=st.data())
def test_context_parallelism_divides_activations_except_those_of_whole_sequences(
    data: st.DataObject,
) -> None:
    """Attention's memory is linear in the length; ranks share all tensors but gathered ones."""
    overrides = [f"{name}={value}" for name, value in {
        "language.num_heads": data.draw(st.sampled_from([8, 16])),
        "recompute.granularity": data.draw(st.sampled_from(["none", "full"])),
        "precision": data.draw(st.sampled_from(["float32", "bfloat16"])),
        "micro_batch_size": 1,
    }.items()]  # fmt: skip
    length = 1024 * data.draw(st.integers(1, 256))

    def parts(length: int, context: int) -> dict[str, float]:
        sizes = [f"data.seq_length={length}", f"parallel.context={context}", "vision.num_layers=1"]
        loaded = config.load("configs/h200.yaml", [*overrides, *sizes, "global_batch_size=64"])
        return layer_activations(loaded, 1, ranks_of(loaded, context))

    alone, shared, longer = parts(length, 1), parts(length, 4), parts(4 * length, 4)
    for part, size in alone.items():
        whole = part in ("gathered latents", "keys and values")
        assert shared[part] == pytest.approx(size if whole else size / 4)
        assert longer[part] == pytest.approx(4 * shared[part])


def test_a_search_without_possible_sizes_says_so() -> None:
    with pytest.raises(PretrainError, match="no layout is possible with 3 processes"):
        fit(config.load("configs/h200.yaml"), 80, 3)
