"""transformers' models: maxima equal those of a float64 attention, and clips are exact.

Models are built from small configurations; nothing is downloaded.
"""

import copy
import importlib
import math
import pickle
import sys
import warnings
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from muonclip import AttentionLayout, HeadRows, MuonClip, QKClip, for_model, param_groups
from muonclip.monitor import MaxLogitMonitor
from muonclip.reference import clip_factor

transformers = pytest.importorskip("transformers", minversion="5")
from muonclip.integrations.transformers import (  # noqa: E402
    attention_layouts,
    qk_clip,
    watch,
)

VOCABULARY, LENGTH = 40, 11
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
GQA = SMALL | {"num_key_value_heads": 2}
MLA = SMALL | {
    "num_key_value_heads": 4,
    "kv_lora_rank": 10,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 6,
    "v_head_dim": 5,
    "n_routed_experts": 2,
    "num_experts_per_tok": 1,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 8,
    "first_k_dense_replace": 2,  # no experts: they cannot run in float64
}
GPT2 = {"n_embd": 24, "n_layer": 2, "n_head": 4, "vocab_size": VOCABULARY, "n_inner": 32}

# One model for each supported structure.
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "separate": ("LlamaConfig", GQA),
    "separate, biases": ("Qwen2Config", GQA),
    "separate, sliding window": ("MistralConfig", GQA | {"sliding_window": 3}),
    "fused": ("Phi3Config", GQA),
    "fused by head": ("GPTNeoXConfig", SMALL),
    "fused by head, under another name": (
        "GPTBigCodeConfig",
        GPT2 | {"multi_query": False, "bos_token_id": None, "eos_token_id": None},
    ),
    "fused in four parts": (
        "CodeGenConfig",
        GPT2 | {"rotary_dim": 4, "bos_token_id": None, "eos_token_id": None},
    ),
    "columns": ("GPT2Config", GPT2 | {"bos_token_id": None, "eos_token_id": None}),
    "MLA": ("DeepseekV3Config", MLA | {"q_lora_rank": 12}),
    "MLA, one query projection": ("DeepseekV3Config", MLA | {"q_lora_rank": None}),
    "gain for each head": ("Olmo2Config", GQA),
    "gain for each head, 2-D": ("CohereConfig", GQA | {"use_qk_norm": True}),
    "capital names": ("CTRLConfig", GPT2 | {"dff": 32, "bos_token_id": None}),
    "encoder": ("BertConfig", SMALL | {"pad_token_id": 0}),
    "position bias": (
        "T5Config",
        {"vocab_size": VOCABULARY, "d_model": 24, "d_kv": 6, "d_ff": 32, "num_layers": 2}
        | {"num_heads": 4, "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": None},
    ),
}


# Vision towers, whose position biases reach attention as a special kind of mask.
BEIT: dict[str, Any] = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 32,
    "image_size": 16,
    "patch_size": 4,
    "drop_path_rate": 0.0,
}
SWIN: dict[str, Any] = {
    "embed_dim": 8,
    "depths": [2],
    "num_heads": [4],
    "window_size": 2,
    "image_size": 16,
    "patch_size": 4,
    "drop_path_rate": 0.0,
}
VISION: dict[str, tuple[str, dict[str, Any]]] = {
    "bias in each layer": ("BeitConfig", BEIT | {"use_relative_position_bias": True}),
    "bias shared by layers": ("BeitConfig", BEIT | {"use_shared_relative_position_bias": True}),
    "bias and shifted windows": ("SwinConfig", SWIN),
}


def make_model(kind: str, spread: float = 1.0) -> nn.Module:
    """A model in training mode whose query heads differ in scale by ``spread`` or more."""
    torch.manual_seed(0)
    if kind in VISION:
        name, options = VISION[kind]
        config = getattr(transformers, name)(**options)
        return prepared(transformers.AutoModel.from_config(config), spread, size=400.0)
    name, options = CONFIGS[kind]
    config = getattr(transformers, name)(**options)
    for option in ("attention_dropout", "attn_pdrop", "resid_pdrop", "embd_pdrop", "dropout_rate",
                   "hidden_dropout_prob", "attention_probs_dropout_prob"):  # fmt: skip
        if hasattr(config, option):
            setattr(config, option, 0.0)
    auto = {"encoder": "AutoModelForMaskedLM", "position bias": "AutoModelForSeq2SeqLM"}
    model: nn.Module = getattr(transformers, auto.get(kind, "AutoModelForCausalLM")).from_config(
        config
    )
    return prepared(model, spread)


def prepared(model: nn.Module, spread: float, size: float = 4.0) -> nn.Module:
    """The model in training mode, with larger query heads and random position biases."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "relative" in name:
                parameter.normal_()
        for index, layout in enumerate(attention_layouts(model).values()):
            for part in (layout.query, layout.query_rope):
                if part is not None:
                    weight = part.weight.detach().movedim(part.dim, 0)
                    for head, rows in enumerate(part.rows):
                        weight[rows] *= size * spread ** (head + index)
    return model.train()


def batch(padding: str = "none") -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, VOCABULARY, (3, LENGTH), generator=generator)
    present = torch.ones_like(ids)
    if padding == "right":
        present[0, 6:] = present[2, 3:] = 0
    elif padding == "left":
        present[0, :5] = present[2, :8] = 0
    return {"input_ids": ids, "attention_mask": present, "labels": ids}


def images(size: int = 2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {"pixel_values": torch.randn(size, 3, 16, 16, generator=generator)}


@pytest.fixture(scope="module", autouse=True)
def reference_attention() -> Iterator[None]:
    """Registers a float64 attention that stores the logits of its modules and their maxima."""

    def reference(
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        position_bias: Tensor | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        repeats = query.size(1) // key.size(1)
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
        scaling = query.size(-1) ** -0.5 if scaling is None else scaling
        products = torch.einsum("bhqd,bhkd->bhqk", query, key) * scaling
        bias, allowed = torch.zeros_like(products), torch.ones_like(products, dtype=torch.bool)
        if position_bias is not None:
            bias = bias + position_bias
        if attention_mask is not None:
            mask = attention_mask[..., : key.size(-2)].expand(products.shape)
            allowed = mask > -1e30
            bias = bias + mask.where(allowed, 0.0)
        logits = (products + bias).where(allowed, -math.inf)
        assert logits.dtype == torch.float64
        module.largest = logits.amax((0, 2, 3))
        module.entries = products.detach(), bias.detach(), allowed
        # A query that attends to nothing, as padding does, attends to everything.
        logits = logits.where((logits > -math.inf).any(-1, keepdim=True), 0.0)
        return (logits.softmax(-1) @ value).transpose(1, 2).contiguous(), None

    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    transformers.AttentionInterface.register("reference", reference)
    transformers.AttentionMaskInterface.register("reference", ALL_MASK_ATTENTION_FUNCTIONS["eager"])
    yield
    del transformers.AttentionInterface._global_mapping["reference"]
    del transformers.AttentionMaskInterface._global_mapping["reference"]


def in_float64(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Any]:
    """The attention modules of a copy of the model, after a forward pass in float64."""
    twin: Any = copy.deepcopy(model).double()
    twin.set_attn_implementation("reference")
    images = {n: x.double() for n, x in inputs.items() if n == "pixel_values"}
    twin(**inputs | images)
    return {name: module for name, module in twin.named_modules() if hasattr(module, "largest")}


def expected(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The largest logits of a copy of the model in float64."""
    return {name: module.largest for name, module in in_float64(model, inputs).items()}


def forward(model: nn.Module, inputs: dict[str, Tensor], implementation: str) -> Any:
    any_model: Any = model
    if "stand_in" in implementation:  # a name that transformers would not let through
        any_model.config._attn_implementation = implementation
    else:
        any_model.set_attn_implementation(implementation)
    if implementation == "flex_attention":
        # Compiling takes long and changes nothing here; on a CPU there is no backward pass.
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            return model(**inputs)
    return model(**inputs)


def close(actual: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    return actual.keys() == wanted.keys() and all(
        torch.allclose(actual[name].double(), wanted[name], rtol=1e-4, atol=1e-5) for name in actual
    )


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("padding", ["none", "right", "left"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa", "flex_attention"])
@pytest.mark.parametrize("kind", ["separate", "separate, sliding window", "MLA", "encoder"])
def test_maxima_equal_those_of_a_float64_attention(
    kind: str, implementation: str, padding: str
) -> None:
    """Rotary embedding, causality, padding, sliding windows, shared key heads: all as they enter
    the softmax, whichever attention runs."""
    model, inputs = make_model(kind), batch(padding)
    wanted = expected(model, inputs)
    clip = qk_clip(model, exact=True)
    forward(model, inputs, implementation)
    assert close(clip.step().max_logits, wanted)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", [*CONFIGS, *VISION])
def test_clipped_heads_reach_the_threshold(kind: str, implementation: str) -> None:
    """In a real model: each layer's heads over it, exactly; the other heads are as they were.

    Layer after layer, since a layer's input changes with the layers before it. Position biases,
    which a clip does not scale, count as the definition has it, entry by entry.
    """
    model = make_model(kind, spread=1.3)
    inputs = images() if kind in VISION else batch("right")
    layers = in_float64(model, inputs)
    assert list(layers) == list(attention_layouts(model))
    biased = False
    for name in layers:
        layer = in_float64(model, inputs)[name]
        products, bias, allowed = layer.entries
        biased |= bool(bias.any())
        threshold = float(layer.largest.detach().sort().values[-3:-1].mean())
        gamma = torch.tensor(
            [
                clip_factor(products[:, h][allowed[:, h]], bias[:, h][allowed[:, h]], threshold)
                for h in range(products.size(1))
            ]
        )
        clip = QKClip({name: attention_layouts(model)[name]}, threshold=threshold)
        handle = watch(model, clip)
        forward(model, inputs, implementation)
        result = clip.step()
        handle.remove()
        assert 1 <= result.num_clipped < len(gamma)
        assert torch.allclose(result.factors[name], gamma, rtol=1e-4)
        after, same_bias, _ = in_float64(model, inputs)[name].entries
        assert torch.allclose(after, products * gamma[:, None, None], rtol=1e-4, atol=1e-6)
        assert torch.equal(bias, same_bias)
        at_stake = (after + bias)[allowed & (bias < threshold)]
        assert at_stake.max() <= threshold * (1 + 1e-5)
    assert biased == (kind in VISION or kind == "position bias")


@settings(max_examples=25, deadline=None)
@given(
    heads=st.sampled_from([1, 4]),
    rows=st.sampled_from([1, 3]),
    boolean=st.booleans(),
    share=st.floats(0, 1),
    implementation=st.sampled_from(["eager", "sdpa"]),
    seed=st.integers(0, 2**16),
)
def test_four_dimensional_masks_of_the_user(
    heads: int, rows: int, boolean: bool, share: float, implementation: str, seed: int
) -> None:
    """They reach the attention function unchanged: prefixes, trees, biases."""
    model, inputs = make_model("separate"), batch()
    generator = torch.Generator().manual_seed(seed)
    shape = (rows, heads, LENGTH, LENGTH)
    allowed = torch.rand(shape, generator=generator) < share
    bias = torch.randn(shape, generator=generator)
    floating = bias.masked_fill(~allowed, torch.finfo().min)
    if boolean:
        floating = torch.zeros(shape).masked_fill(~allowed, torch.finfo().min)
    wanted = expected(model, inputs | {"attention_mask": floating})
    mask = allowed if boolean and implementation == "sdpa" else floating
    clip = qk_clip(model, exact=True)
    forward(model, inputs | {"attention_mask": mask}, implementation)
    seen = clip.step().max_logits
    first = "model.layers.0.self_attn"
    assert torch.allclose(seen[first].double(), wanted[first], rtol=1e-4, atol=1e-5)
    if allowed.any(-1).all():  # implementations differ in what rows give that attend to nothing
        assert close(seen, wanted)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("implementation", ["eager", "sdpa", "flex_attention"])
@pytest.mark.parametrize(("earlier", "static"), [(7, False), (10, False), (7, True)])
@pytest.mark.parametrize("kind", ["separate", "separate, sliding window"])
def test_more_keys_than_queries(kind: str, earlier: int, static: bool, implementation: str) -> None:
    """Cached keys come before the queries, and unused slots do not count."""
    if static and implementation == "flex_attention":
        pytest.skip("transformers 5.24 builds another mask there than its other attentions do")
    model, whole = make_model(kind), batch("left")

    def run(model: Any, implementation: str) -> None:
        """Run the last tokens, after the earlier ones in evaluation mode."""
        cache = (
            transformers.StaticCache(config=model.config, max_cache_len=16)
            if static
            else transformers.DynamicCache(config=model.config)
        )
        ids, present = whole["input_ids"], whole["attention_mask"]
        parts = (ids[:, :earlier], present[:, :earlier]), (ids[:, earlier:], present)
        for training, (tokens, mask) in zip((False, True), parts, strict=True):
            inputs = {"input_ids": tokens, "attention_mask": mask, "past_key_values": cache}
            with torch.no_grad():
                forward(model.train(training), inputs, implementation)

    twin = copy.deepcopy(model).double()
    run(twin, "reference")
    clip = qk_clip(model, exact=True)
    run(model, implementation)
    wanted: dict[str, Any] = {name: twin.get_submodule(name) for name in clip.layouts}
    assert close(clip.step().max_logits, {name: m.largest for name, m in wanted.items()})


def test_a_batch_of_only_padding_is_ignored() -> None:
    model, inputs = make_model("encoder"), batch()
    inputs["attention_mask"].zero_()
    clip = qk_clip(model, exact=True)
    forward(model, inputs, "eager")
    result = clip.step()
    assert all((seen == -math.inf).all() for seen in result.max_logits.values())


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_does_not_change_the_maxima(
    reentrant: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each layer is observed once, although its forward pass runs twice."""
    model, inputs = make_model("separate"), batch("right")
    any_model: Any = model
    wanted = expected(model, inputs)
    any_model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    any_model.enable_input_require_grads()
    clip = qk_clip(model, exact=True)
    calls = []
    original = clip.observe_attention
    monkeypatch.setattr(
        clip,
        "observe_attention",
        lambda name, *a, **k: (calls.append(name), original(name, *a, **k)),
    )
    forward(model, inputs, "sdpa").loss.backward()
    assert sorted(calls) == sorted(wanted)
    assert close(clip.step().max_logits, wanted)


def test_only_training_is_watched_and_only_until_the_handle_is_removed() -> None:
    model, inputs = make_model("separate"), batch()
    clip = QKClip(attention_layouts(model), exact=True)
    handle = watch(model, clip)
    model.eval()
    forward(model, inputs, "sdpa")
    assert all((seen == -math.inf).all() for seen in clip.step().max_logits.values())
    model.train()
    forward(model, inputs, "sdpa")
    assert all((seen > -math.inf).all() for seen in clip.step().max_logits.values())
    handle.remove()
    handle.remove()
    forward(model, inputs, "sdpa")
    assert all((seen == -math.inf).all() for seen in clip.step().max_logits.values())
    watch(model, clip).remove()


def test_exports_of_a_model_in_training_do_not_count() -> None:
    model = make_model("separate")
    model.config.use_cache = False  # type: ignore[union-attr]
    ids = batch()["input_ids"]
    expected = model(ids).logits
    clip = qk_clip(model, threshold=1e-6)
    exported = torch.export.export(model, (ids,), strict=False)
    assert clip.step().num_clipped == 0
    assert torch.allclose(exported.module()(ids).logits, expected)


def test_copies_are_not_watched() -> None:
    """A watched model can be copied (for example to average weights) and pickled."""
    model, inputs = make_model("separate"), batch()
    clip = qk_clip(model, exact=True)
    twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    for twin in twins:
        forward(twin.train(), inputs, "sdpa")
        assert all((seen == -math.inf).all() for seen in clip.step().max_logits.values())
    forward(model, inputs, "sdpa")
    assert all((seen > -math.inf).all() for seen in clip.step().max_logits.values())


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_training_is_bit_identical_when_watched(implementation: str) -> None:
    inputs = batch("right")
    losses, gradients = [], []
    for watched in (False, True):
        model = make_model("MLA")
        if watched:
            qk_clip(model, exact=True)
        torch.manual_seed(2)
        loss = forward(model, inputs, implementation).loss
        loss.backward()
        losses.append(loss.detach())
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert torch.equal(*losses)
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_a_compiled_model_is_watched() -> None:
    model, inputs = make_model("separate"), batch("right")
    wanted = expected(model, inputs)
    clip = qk_clip(model, exact=True)
    any_model: Any = model
    for decoder_layer in any_model.model.layers:
        decoder_layer.compile(backend="eager")
    for _ in range(2):
        forward(model, inputs, "sdpa").loss.backward()
        assert close(clip.step().max_logits, wanted)


class TestFlashAttention:
    """Flash attention returns no max logits, and its only masks are lengths and windows.

    The kernel itself needs a GPU.
    """

    @pytest.fixture
    def flash(self) -> Iterator[str]:
        """A stand-in with the kernels' arguments that computes attention per sequence."""
        from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

        def attend(
            module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
            scaling: float | None = None, sliding_window: int | None = None,
            cu_seq_lens_q: Tensor | None = None, position_ids: Tensor | None = None, **_: Any,
        ) -> tuple[Tensor, None]:  # fmt: skip
            output = torch.zeros(*query.shape[:-1], value.size(-1))
            largest = torch.full((query.size(1),), -math.inf, dtype=torch.float64)
            for row in range(len(query)):
                ends: list[int] = []
                if cu_seq_lens_q is not None:
                    ends = cu_seq_lens_q[1:-1].tolist()
                elif len(query) == 1 and position_ids is not None:
                    ends = (position_ids[0, 1:] == 0).nonzero().flatten().add(1).tolist()
                for piece in torch.arange(LENGTH).tensor_split(ends):
                    if attention_mask is not None:
                        piece = piece[attention_mask[row].bool()]
                    q, k, v = (x[row, :, piece] for x in (query, key, value))
                    allowed = torch.ones(len(piece), len(piece)).tril().bool()
                    if sliding_window is not None:
                        allowed &= (
                            torch.ones(len(piece), len(piece)).triu(1 - sliding_window).bool()
                        )
                    output[row, :, piece] = F.scaled_dot_product_attention(
                        q, k, v, attn_mask=allowed, scale=scaling, enable_gqa=True
                    )
                    logits = q.double() @ k.double().repeat_interleave(len(q) // len(k), 0).mT
                    logits = (logits * scaling).where(allowed, -math.inf)
                    largest = torch.maximum(largest, logits.amax((1, 2)))
            module.largest = largest
            return output.transpose(1, 2).contiguous(), None

        name = "flash_stand_in"
        transformers.AttentionInterface.register(name, attend)
        transformers.AttentionMaskInterface.register(
            name, ALL_MASK_ATTENTION_FUNCTIONS["flash_attention_2"]
        )
        yield name
        del transformers.AttentionInterface._global_mapping[name]
        del transformers.AttentionMaskInterface._global_mapping[name]

    @staticmethod
    def agrees(model: nn.Module, inputs: dict[str, Tensor], flash: str) -> bool:
        """The observed maxima equal those of the stand-in in float64."""
        clip = qk_clip(model, exact=True)
        forward(model, inputs, flash)
        met: dict[str, Any] = {name: model.get_submodule(name) for name in clip.layouts}
        return close(clip.step().max_logits, {name: m.largest for name, m in met.items()})

    @pytest.mark.parametrize("padding", ["none", "right", "left"])
    @pytest.mark.parametrize("kind", ["separate", "separate, sliding window"])
    def test_padding_and_windows(self, kind: str, padding: str, flash: str) -> None:
        """Padding queries do not count, because the kernel does not receive them."""
        assert self.agrees(make_model(kind), batch(padding), flash)

    @pytest.mark.parametrize("boundaries", ["position_ids", "cu_seq_lens"])
    @pytest.mark.parametrize("kind", ["separate", "separate, sliding window"])
    def test_packed_sequences(self, kind: str, boundaries: str, flash: str) -> None:
        model, ids = make_model(kind), batch()["input_ids"][:1]
        positions = torch.cat([torch.arange(n) for n in (4, 2, 5)])[None]
        inputs: dict[str, Any] = {"input_ids": ids, "position_ids": positions, "use_cache": False}
        wanted = expected(model, inputs)  # transformers makes the mask of packed sequences itself
        assert not close(wanted, expected(model, {"input_ids": ids}))
        if boundaries == "cu_seq_lens":
            boundaries = torch.tensor([0, 4, 6, 11], dtype=torch.int32)
            inputs |= {"cu_seq_lens_q": boundaries, "cu_seq_lens_k": boundaries}
            inputs |= {"max_length_q": 5, "max_length_k": 5}
        assert self.agrees(model, inputs, flash)
        met: dict[str, Any] = {name: model.get_submodule(name) for name in wanted}
        assert close({name: m.largest for name, m in met.items()}, wanted)


class FlashKernels(ModuleType):
    """The functions of the package flash_attn_interface, sequence by sequence in float64.

    transformers' own code decides what they are called with. They keep the largest logits.
    """

    def __init__(self) -> None:
        super().__init__("flash_attn_interface")
        self.largest: list[Tensor] = []

    def flash_attn_func(
        self, q: Tensor, k: Tensor, v: Tensor, softmax_scale: float | None = None,
        causal: bool = False, window_size: tuple[int, int] = (-1, -1),
    ) -> Tensor:  # fmt: skip
        """q, k: [batch, length, heads, d]. The last query is aligned with the last key."""
        for queries, keys in zip(
            q.double().transpose(1, 2), k.double().transpose(1, 2), strict=True
        ):
            keys = keys.repeat_interleave(len(queries) // len(keys), 0)
            logits = queries @ keys.mT * (softmax_scale or q.size(-1) ** -0.5)
            first = keys.size(1) - queries.size(1)
            distance = torch.arange(queries.size(1))[:, None] + first - torch.arange(keys.size(1))
            seen = distance >= 0 if causal else torch.ones_like(distance, dtype=torch.bool)
            before, after = window_size
            if before >= 0:
                seen = seen & (distance <= before) & (-distance <= after)
            if logits.numel():
                self.largest.append(logits.where(seen, -math.inf).amax((1, 2)))
        return v.new_zeros(*q.shape[:-1], v.size(-1))

    def flash_attn_varlen_func(
        self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
        max_seqlen_q: int, max_seqlen_k: int, softmax_scale: float | None = None,
        causal: bool = False, window_size: tuple[int, int] = (-1, -1),
    ) -> Tensor:  # fmt: skip
        """q, k: [all lengths, heads, d]."""
        edges = zip(cu_seqlens_q.tolist(), cu_seqlens_k.tolist(), strict=True)
        for (q_start, k_start), (q_stop, k_stop) in pairwise(edges):
            parts = (q[None, q_start:q_stop], k[None, k_start:k_stop], v[None, k_start:k_stop])
            self.flash_attn_func(*parts, softmax_scale, causal, window_size)
        return v.new_zeros(*q.shape[:-1], v.size(-1))

    flash_attn_with_kvcache = None


class FlashAttention(nn.Module):
    """Calls transformers' flash attention with its projections."""

    def __init__(self, heads: int, groups: int, causal: bool) -> None:
        super().__init__()
        sizes = (heads, groups, groups)
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(12, 6 * n) for n in sizes)
        self.head_dim, self.is_causal = 6, causal
        self.config = SimpleNamespace(_attn_implementation="flash_attention_3")

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None, **options: Any) -> Tensor:
        q, k, v = (
            f(y).unflatten(-1, (-1, 6)).transpose(1, 2)
            for f, y in ((self.q_proj, x), (self.k_proj, context), (self.v_proj, context))
        )
        attend = transformers.AttentionInterface().get_interface("flash_attention_3", None)
        mixed: Tensor = attend(self, q, k, v, mask, scaling=0.7, **options)[0]
        return mixed


@settings(max_examples=150, deadline=None)
@given(
    how=st.sampled_from(
        [
            "plain",
            "padded",
            "padded, later",
            "static cache",
            "packed",
            "packed, other keys",
            "positions",
            "positions, later",
        ]
    ),
    batch=st.integers(1, 3),
    queries=st.integers(1, 9),
    keys=st.integers(1, 9),
    groups=st.integers(1, 2),
    causal=st.booleans(),
    window=st.none() | st.integers(1, 5),
    share=st.floats(0.1, 1),
    seed=st.integers(0, 2**16),
)
def test_flash_attention_maxima_equal_those_of_the_kernels(
    how: str,
    batch: int,
    queries: int,
    keys: int,
    groups: int,
    causal: bool,
    window: int | None,
    share: float,
    seed: int,
) -> None:
    """For all arguments of transformers' code: padding, caches, packed sequences."""
    utilities: Any = importlib.import_module("transformers.modeling_flash_attention_utils")
    torch.manual_seed(seed)
    mask: Tensor | None = None
    options: dict[str, Any] = {"sliding_window": window}
    if how in ("padded", "packed", "positions"):
        queries = keys
    if how in ("padded, later", "static cache", "positions, later"):  # the last queries
        queries = min(queries, keys)
    if how == "padded":
        mask = (torch.rand(batch, keys) < share).long()
    elif how in ("padded, later", "static cache"):  # on the left
        starts = torch.randint(keys, (batch, 1))
        mask = (torch.arange(keys) >= starts).long()
        mask[:, -1] = 1
        keys += 4 * (how == "static cache")
    elif how.startswith("packed"):
        for name, rows in (("q", batch * queries), ("k", batch * keys)):
            edges = [0, *torch.randint(rows + 1, (2,)).sort().values.tolist(), rows]
            options[f"cu_seq_lens_{name}"] = torch.tensor(edges, dtype=torch.int32)
            options[f"max_length_{name}"] = rows
        if how == "packed":
            options["cu_seq_lens_k"] = options["cu_seq_lens_q"]
    elif how == "positions, later":
        batch = 1
        options["position_ids"] = torch.arange(keys - queries, keys)[None]
    elif how == "positions":
        batch = 1
        positions = torch.arange(keys)
        options["position_ids"] = (positions % (1 + seed % 5))[None] + seed % 2
    model = nn.ModuleDict({"attention": FlashAttention(2 * groups, groups, causal)}).train()
    clip = qk_clip(model, exact=True)
    kernels = FlashKernels()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "flash_attn_interface", kernels)
        patch.setattr(utilities, "_loaded_implementation", None)
        model["attention"](
            torch.randn(batch, queries, 12), torch.randn(batch, keys, 12), mask, **options
        )
        patch.setattr(utilities, "_loaded_implementation", None)
    nothing = torch.full((2 * groups,), -math.inf, dtype=torch.float64)
    largest = torch.stack([nothing, *kernels.largest]).amax(0)
    seen = clip.step().max_logits["attention"].double()
    assert torch.allclose(seen, largest, rtol=1e-4, atol=1e-5)


class TestLayouts:
    def test_names_and_sizes(self) -> None:
        layouts = attention_layouts(make_model("separate, biases"))
        assert list(layouts) == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
        layout = layouts["model.layers.1.self_attn"]
        assert (layout.num_heads, layout.num_kv_groups) == (4, 2)
        assert layout.query.bias is not None and layout.key.bias is not None

    def test_a_gain_per_head_is_scaled_instead_of_the_projection(self) -> None:
        model = make_model("gain for each head")
        layout = attention_layouts(model)["model.layers.0.self_attn"]
        attention: Any = model.get_submodule("model.layers.0.self_attn")
        assert layout.query.weight is attention.q_norm.weight
        assert layout.key.weight is attention.k_norm.weight

    @pytest.mark.parametrize(
        ("name", "options", "bound"),
        [
            ("Qwen3Config", {"head_dim": 8}, 8**0.5),
            ("Gemma3TextConfig", {"head_dim": 8, "query_pre_attn_scalar": 16}, 2.0),
            ("StableLmConfig", {"qk_layernorm": True}, 6 * 6**0.5),  # gains 2 and 3
            ("PersimmonConfig", {"num_attention_heads": 3}, 1.5 * 8**0.5),  # biases of a half
        ],
    )
    def test_normalized_queries_and_keys_are_refused(
        self, name: str, options: dict[str, Any], bound: float
    ) -> None:
        """The error states the norm's bound on the logits, which holds."""
        config = getattr(transformers, name)(**{**GQA, **options})
        model = transformers.AutoModelForCausalLM.from_config(config).train()
        with torch.no_grad():
            for layer in model.model.layers if name == "StableLmConfig" else ():
                layer.self_attn.q_layernorm.norms[1].weight.fill_(2)
                layer.self_attn.k_layernorm.norms[0].weight[3] = -3
            for layer in model.model.layers if name == "PersimmonConfig" else ():
                layer.self_attn.q_layernorm.bias.fill_(0.5)
        with pytest.raises(ValueError, match=rf"norm bounds the logits, here to {bound:.3g},") as e:
            qk_clip(model)
        assert 'exclude="model.layers.0.self_attn"' in str(e.value)
        assert all((x <= bound).all() for x in expected(model, batch()).values())
        assert attention_layouts(model, exclude="*.self_attn") == {}
        assert attention_layouts(model, exclude=["*.0.*", "*.1.*"]) == {}
        with pytest.raises(ValueError, match="or exclude leaves none"):
            qk_clip(model, exclude="*")

    def test_layers_without_attention_are_skipped(self) -> None:
        """Megatron-LM#7382: hybrid models such as Jamba, with mostly Mamba layers."""
        config = transformers.JambaConfig(
            **GQA, attn_layer_period=2, attn_layer_offset=1, expert_layer_offset=3,
            expert_layer_period=4, mamba_d_state=4,
        )  # fmt: skip
        model = transformers.AutoModelForCausalLM.from_config(config).train()
        wanted = expected(model, batch())
        clip = qk_clip(model, exact=True)
        assert list(clip.layouts) == ["model.layers.1.self_attn"]
        forward(model, batch(), "sdpa")
        assert close(clip.step().max_logits, wanted)

    def test_a_model_without_registered_attention_is_refused(self) -> None:
        config = transformers.BloomConfig(
            vocab_size=VOCABULARY, hidden_size=24, n_layer=1, n_head=4
        )
        with pytest.raises(ValueError, match="BloomForCausalLM has no attention that goes through"):
            qk_clip(transformers.AutoModelForCausalLM.from_config(config))

    def test_an_unknown_structure_is_refused(self) -> None:
        class Attention(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.to_query, self.to_key = nn.Linear(4, 4), nn.Linear(4, 4)

            def forward(self, x: Tensor) -> Any:
                return transformers.AttentionInterface().get_interface("sdpa", None)

        model = nn.ModuleDict({"odd": Attention()})
        with pytest.raises(
            ValueError, match=r"odd: the attention of Attention is not known \(to_q"
        ):
            attention_layouts(model)
        assert attention_layouts(model, exclude="odd") == {}


def test_a_bias_that_depends_on_the_queries_is_refused() -> None:
    """Scaling q would scale the bias too, but by another factor than q·k."""
    config = transformers.GraniteSpeech5EncoderConfig(
        hidden_size=24, num_hidden_layers=1, num_attention_heads=4, intermediate_size=32
    )
    model = transformers.AutoModel.from_config(config).train()
    qk_clip(model)
    with pytest.raises(ValueError, match="the bias that is added to its logits changes too"):
        model(torch.randn(2, 20, 4 * config.num_mel_bins))


@pytest.mark.parametrize("positions", ["rotary", "relative_key"])
def test_conformers_are_clipped_unless_positions_depend_on_the_queries(positions: str) -> None:
    config = transformers.Wav2Vec2BertConfig(
        hidden_size=24, num_hidden_layers=1, num_attention_heads=4, intermediate_size=32,
        feature_projection_input_dim=10, conv_depthwise_kernel_size=3,
        position_embeddings_type=positions,
    )  # fmt: skip
    model = transformers.AutoModel.from_config(config).train()
    clip = qk_clip(model, threshold=1e-3)
    inputs = torch.randn(2, 20, 10)
    if positions == "relative_key":
        with pytest.raises(ValueError, match="the bias that is added to its logits changes too"):
            model(inputs)
        return
    model(inputs)
    assert int(clip.step().num_clipped) == 4


class Tempered(nn.Module):
    """Attention with a learned temperature per head, and optionally one query for the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(24, 24) for _ in range(3))
        self.num_heads, self.is_causal = 4, False
        self.temperature = nn.Parameter(torch.tensor([1.0, 3.0, 7.0, 11.0]).view(4, 1, 1))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        q, k, v = (
            f(y).unflatten(-1, (4, 6)).transpose(1, 2)
            for f, y in ((self.q_proj, x), (self.k_proj, context), (self.v_proj, context))
        )
        self.seen = q.detach(), k.detach()
        attend = transformers.AttentionInterface().get_interface("eager", self.eager)
        mixed: Tensor = attend(self, q, k, v, None, scaling=self.temperature)
        return mixed

    @staticmethod
    def eager(_self: Any, q: Tensor, k: Tensor, v: Tensor, _mask: Any, scaling: Tensor) -> Tensor:
        return (q @ k.mT * scaling).softmax(-1) @ v


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 2])
def test_temperatures_multiply_in_float32_and_queries_are_shared(
    rows: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"attention": Tempered().to(dtype)}).train()
    attention: Any = model["attention"]
    clip = qk_clip(model, exact=True)
    attention(torch.randn(rows, 9, 24, dtype=dtype), torch.randn(2, 5, 24, dtype=dtype))
    query, key = (x.double() for x in attention.seen)
    logits = query @ key.mT * attention.temperature.detach().double()
    seen = clip.step().max_logits["attention"].double()
    assert torch.allclose(seen, logits.amax((0, 2, 3)), rtol=1e-5)


@pytest.mark.parametrize("shapes", [((0, 9), (0, 5)), ((2, 0), (2, 5)), ((2, 9), (2, 0))])
def test_empty_batches_and_sequences(shapes: tuple[tuple[int, int], tuple[int, int]]) -> None:
    """They do not raise errors, and do not complete the trial of a layer."""
    model = nn.ModuleDict({"attention": Tempered()}).train()
    attention: Any = model["attention"]
    layout = attention_layouts(model)["attention"]
    rows_of_other_heads = HeadRows(layout.query.projection, layout.query.rows.flip(0))
    clip = QKClip({"attention": AttentionLayout(rows_of_other_heads, layout.key)}, threshold=1e-6)
    watch(model, clip)
    attention(*(torch.randn(*shape, 24) for shape in shapes))
    result = clip.step()
    assert result.num_clipped == 0
    assert (result.upper_bounds["attention"] == -math.inf).all()
    with pytest.raises(ValueError, match="when the rows of its layout are scaled"):
        attention(torch.randn(2, 9, 24), torch.randn(2, 5, 24))


class TestTrial:
    """The first forward pass tests each layout, so that a wrong guess raises an error."""

    def test_a_norm_that_its_name_does_not_reveal_is_refused(self) -> None:
        """A projection that normalizes its outputs itself."""

        class Normalized(nn.Linear):
            def forward(self, x: Tensor) -> Tensor:
                return nn.functional.rms_norm(super().forward(x), (self.out_features,))

        model = make_model("separate")
        attention: Any = model.get_submodule("model.layers.0.self_attn")
        attention.q_proj.__class__ = Normalized
        qk_clip(model)
        for _ in range(2):  # and again, if the error was passed over
            with pytest.raises(ValueError, match=r"layers\.0\.self_attn': when the rows"):
                forward(model, batch(), "sdpa")

    def test_rows_of_other_heads_are_refused(self) -> None:
        model = make_model("separate")
        name = "model.layers.0.self_attn"
        layout = attention_layouts(model)[name]
        query = HeadRows(layout.query.projection, layout.query.rows.flip(0))
        watch(model, QKClip({name: AttentionLayout(query, layout.key)}))
        with pytest.raises(ValueError, match=r"layers\.0\.self_attn': when the rows"):
            forward(model, batch(), "sdpa")

    def test_a_wrong_number_of_heads_is_refused(self) -> None:
        model = make_model("separate")
        name = "model.layers.0.self_attn"
        attention: Any = model.get_submodule(name)
        layout = AttentionLayout.separate(
            attention.q_proj, attention.k_proj, num_heads=2, num_kv_groups=1
        )
        watch(model, QKClip({name: layout}))
        with pytest.raises(ValueError, match=r"layers\.0\.self_attn' has 2 heads: query must be"):
            forward(model, batch(), "sdpa")

    def test_attention_that_bypasses_the_registry_is_refused(self) -> None:
        """As GPT-2 with ``reorder_and_upcast_attn``."""
        model = make_model("columns")
        for module in model.modules():
            if hasattr(module, "reorder_and_upcast_attn"):
                module.reorder_and_upcast_attn = True
        qk_clip(model)
        with pytest.raises(ValueError, match="did not ask transformers' registry"):
            forward(model, batch(), "eager")

    def test_the_trial_does_not_change_parameters(self) -> None:
        model = make_model("fused")
        before = {name: p for name, p in model.named_parameters()}
        values = {name: p.detach().clone() for name, p in before.items()}
        qk_clip(model)
        forward(model, batch(), "sdpa")
        for name, parameter in model.named_parameters():
            assert parameter is before[name] and torch.equal(parameter, values[name])

    def test_the_trial_draws_no_random_numbers(self) -> None:
        """Training with dropout in an adapter equals training without QK-Clip."""
        peft = pytest.importorskip("peft")
        config = peft.LoraConfig(r=2, target_modules=["q_proj", "k_proj"], lora_dropout=0.5)
        losses: list[list[Tensor]] = []
        for is_watched in (False, True):
            model = peft.get_peft_model(make_model("separate"), config)
            model.train().requires_grad_(True)
            torch.manual_seed(1)
            for name, parameter in model.named_parameters():
                if "lora_B" in name:  # zero at the start, where dropout has no effect
                    nn.init.normal_(parameter)
            if is_watched:
                clip = qk_clip(model)
            losses.append([forward(model, batch(), "sdpa").loss.detach() for _ in range(3)])
        assert losses[0] == losses[1] and losses[0][0] != losses[0][1]
        assert all(x.isfinite().all() for x in clip.step().upper_bounds.values())

    @pytest.mark.parametrize("part", ["embed_tokens", "layers.0.self_attn.v_proj"])
    @pytest.mark.parametrize("number", [math.nan, math.inf])
    def test_numbers_that_are_not_finite_are_no_verdict(self, part: str, number: float) -> None:
        """Nor do they count for the clip. A later batch is tested."""
        model = make_model("separate")
        weight: Any = model.get_submodule(f"model.{part}").weight
        healthy = weight.detach().clone()
        clip = qk_clip(model, threshold=1e-3)
        with torch.no_grad():
            weight[batch()["input_ids"][0, 0] if part == "embed_tokens" else 0] = number
        forward(model, batch(), "sdpa")
        with torch.no_grad():
            weight.copy_(healthy)
        forward(model, batch(), "sdpa")
        assert clip.step().num_clipped == 8

    def test_a_wrong_layout_is_refused_after_a_batch_that_is_not_finite(self) -> None:
        model = make_model("separate")
        embedding: Any = model.get_submodule("model.embed_tokens")
        projection = model.get_submodule("model.layers.0.self_attn.q_proj")
        projection.register_forward_hook(lambda *args: F.rms_norm(args[2], (24,)))
        healthy = embedding.weight.detach().clone()
        qk_clip(model)
        with torch.no_grad():
            embedding.weight.fill_(math.nan)
        forward(model, batch(), "sdpa")
        with torch.no_grad():
            embedding.weight.copy_(healthy)
        with pytest.raises(ValueError, match="when the rows"):
            forward(model, batch(), "sdpa")

    @pytest.mark.parametrize("computed", [False, True])
    def test_functional_call_runs_a_watched_model(self, computed: bool) -> None:
        """With tensors that are not parameters, or are computed from others."""
        model = make_model("separate")
        clip = qk_clip(model, threshold=1e-3)
        tensors = {
            name: p * 1.0 if computed else p.detach().clone().requires_grad_()
            for name, p in model.named_parameters()
        }
        torch.func.functional_call(model, tensors, (), batch())
        assert clip.step().num_clipped == 8


def test_gradients_of_single_samples_are_refused() -> None:
    model = make_model("separate")
    qk_clip(model)

    def loss(tensors: dict[str, Tensor], ids: Tensor) -> Tensor:
        inputs = {"input_ids": ids[None], "labels": ids[None]}
        output: Tensor = torch.func.functional_call(model, tensors, (), inputs).loss
        return output

    tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
    with pytest.raises(RuntimeError, match=r"QK-Clip cannot observe .* within torch\.vmap"):
        torch.vmap(torch.func.grad(loss), (None, 0))(tensors, batch()["input_ids"])


def test_errors_of_watch() -> None:
    model = make_model("separate")
    clip = QKClip(attention_layouts(model))
    with pytest.raises(ValueError, match="the clip has no layer 'other'"):
        watch(model, clip, layers=["other"])
    wrapped = nn.ModuleDict({"module": model})
    with pytest.raises(ValueError, match=r"'model.layers.0.self_attn' is not in ModuleDict"):
        watch(wrapped, clip)
    transformers.AttentionInterface.register("home_made", lambda *args, **kwargs: None)
    watch(model, clip)
    with pytest.raises(ValueError, match="attn_implementation 'home_made' is not known"):
        forward(model, batch(), "home_made")
    del transformers.AttentionInterface._global_mapping["home_made"]


def test_the_trainer_clips(tmp_path: Path) -> None:
    """transformers#39495: Trainer, MuonClip and QK-Clip with accumulation and checkpointing."""
    pytest.importorskip("accelerate")
    threshold = 0.5
    ends = {}
    for clipped in (False, True):
        model = make_model("separate", spread=1.3)
        optimizer = MuonClip(param_groups(model), lr=0.1)
        clip = qk_clip(model, threshold=threshold if clipped else 1e9, exact=True)
        clip.attach(optimizer)
        monitor = MaxLogitMonitor(clip)
        generator = torch.Generator().manual_seed(3)
        data = [
            {"input_ids": ids, "labels": ids}
            for ids in torch.randint(1, VOCABULARY, (64, LENGTH), generator=generator)
        ]
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path), per_device_train_batch_size=4, gradient_accumulation_steps=2,
            max_steps=8, gradient_checkpointing=True, use_cpu=True, report_to=[],
            save_strategy="no", logging_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
        transformers.Trainer(
            model, arguments, train_dataset=data, optimizers=(optimizer, schedule)
        ).train()
        assert monitor.steps == 8
        ends[clipped] = max(float(x.max()) for x in monitor.latest.values())
    assert ends[False] > 3 * threshold
    # The clip uses the logits before the update, so one update's growth may remain.
    assert ends[True] < 2.5 * threshold


@pytest.mark.parametrize("kind", [*CONFIGS, *VISION])
def test_for_model_clips_every_structure(kind: str) -> None:
    """Each layer is found, observed and clipped, without a warning."""
    model = make_model(kind)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        optimizer = for_model(model, 0.01, qk_clip_threshold=1e-3, report=None)
    clip = optimizer.qk_clip
    assert clip is not None and clip.layouts.keys() == attention_layouts(model).keys()
    inputs = images() if kind in VISION else batch()
    outputs = model(**inputs)
    loss = outputs.last_hidden_state.square().mean() if kind in VISION else outputs.loss
    loss.backward()
    optimizer.step()
    assert clip.result is not None and not clip.result.skipped
    for name, factors in clip.result.factors.items():
        assert (factors < 1).any(), name


def test_for_model_clips_the_parts_of_a_vision_language_model_that_are_not_normalized() -> None:
    vision = {**SMALL, "image_size": 8, "patch_size": 4, "projection_dim": 24}
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**vision),
        text_config=transformers.Qwen3Config(**GQA, head_dim=6),
        image_token_index=7,
        vision_feature_layer=-1,
    )
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(config).train()
    optimizer = for_model(model, 0.01, qk_clip_threshold=1e-3, report=None)
    assert optimizer.qk_clip is not None and optimizer.report is not None
    assert {name.split(".")[1] for name in optimizer.qk_clip.layouts} == {"vision_tower"}
    normalized = [n for n, reason in optimizer.report.not_clipped.items() if "normal" in reason]
    assert {name.split(".")[1] for name in normalized} == {"language_model"}
    ids = torch.tensor([[7, 7, 7, 7, 1, 2, 3]])
    model(input_ids=ids, labels=ids, pixel_values=torch.randn(1, 3, 8, 8)).loss.backward()
    optimizer.step()
    assert optimizer.qk_clip.result is not None
    assert optimizer.qk_clip.result.num_clipped > 0
