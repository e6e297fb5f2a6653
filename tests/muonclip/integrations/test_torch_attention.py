"""nn.MultiheadAttention: observed logits are the layer's, and clips are exact."""

import copy
import math
import pickle
import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from muonclip import AttentionLayout, MuonClip, QKClip, for_model, param_groups
from muonclip.integrations.torch_attention import attention_layouts, qk_clip, watch

EMBED, HEADS, BATCH, QUERIES, KEYS = 12, 3, 2, 5, 7


def largest_of_weights(module: nn.MultiheadAttention, *args: Any, **kwargs: Any) -> Tensor:
    """The largest logits, [heads], from the attention weights that torch's own layer returns.

    In float64 a softmax over few logits can be undone: a logit is the logarithm of its weight plus
    its row's logsumexp, which a key of zeros (logit 0, by ``add_zero_attn``) tells.
    """
    assert module.add_zero_attn
    kwargs |= {"need_weights": True, "average_attn_weights": False}
    _, weights = module(*args, **kwargs)
    logits = weights.log() - weights[..., -1:].log()
    return logits.movedim(-3, 0).flatten(1).amax(1)


def attention(seed: int = 0, **options: Any) -> nn.MultiheadAttention:
    torch.manual_seed(seed)
    module = nn.MultiheadAttention(EMBED, HEADS, add_zero_attn=True, **options).double().train()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return module


@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask and attn_mask")
@settings(max_examples=60, deadline=None)
@given(
    fused=st.booleans(),
    bias=st.booleans(),
    batch_first=st.booleans(),
    batched=st.booleans(),
    attn_mask=st.sampled_from(["none", "boolean", "floating", "by head"]),
    padding=st.sampled_from(["none", "boolean", "floating"]),
    need_weights=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_maxima_are_those_of_the_layer(
    fused: bool,
    bias: bool,
    batch_first: bool,
    batched: bool,
    attn_mask: str,
    padding: str,
    need_weights: bool,
    seed: int,
) -> None:
    """With any projection, order of dimensions and mask."""
    sizes = {} if fused else {"kdim": 6, "vdim": 4}
    module = attention(seed, bias=bias, batch_first=batch_first, **sizes)
    query = torch.randn(BATCH, QUERIES, EMBED).double()
    key = torch.randn(BATCH, KEYS, EMBED if fused else 6).double()
    value = torch.randn(BATCH, KEYS, EMBED if fused else 4).double()
    options: dict[str, Any] = {}
    masked = torch.rand(QUERIES, KEYS) < 0.3
    if attn_mask == "boolean":
        options["attn_mask"] = masked
    elif attn_mask == "floating":
        options["attn_mask"] = torch.randn(QUERIES, KEYS).double().masked_fill(masked, -math.inf)
    elif attn_mask == "by head":
        count = (BATCH if batched else 1) * HEADS
        options["attn_mask"] = torch.rand(count, QUERIES, KEYS) < 0.3
    absent = torch.rand(BATCH, KEYS) < 0.3
    if padding == "boolean":
        options["key_padding_mask"] = absent
    elif padding == "floating":
        options["key_padding_mask"] = torch.zeros(BATCH, KEYS).double().masked_fill(absent, -9.0)
    inputs = [query, key, value]
    if not batched:
        inputs = [x[0] for x in inputs]
        if padding != "none":
            options["key_padding_mask"] = options["key_padding_mask"][0]
    elif not batch_first:
        inputs = [x.transpose(0, 1) for x in inputs]
    expected = largest_of_weights(module, *inputs, **options)

    clip = qk_clip(module, exact=True)
    module(*inputs, need_weights=need_weights, **options)
    observed = clip.step().max_logits[""]
    assert torch.allclose(observed.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_a_causal_hint_has_the_layers_meaning(need_weights: bool, padded: bool) -> None:
    """It overrides the mask, unless weights or padding make the layer use the mask."""
    module, x = attention(batch_first=True), torch.randn(BATCH, KEYS, EMBED).double()
    later = torch.ones(KEYS, KEYS).triu(1).bool()
    options: dict[str, Any] = {"attn_mask": torch.zeros(KEYS, KEYS).bool(), "is_causal": True}
    if padded:
        options["key_padding_mask"] = torch.zeros(BATCH, KEYS).bool()
    believed = not need_weights and not padded
    if believed:  # the zero key comes last, out of every query's sight
        expected = expected_without_zero_key(module, x, later)
    else:
        expected = largest_of_weights(module, x, x, x)
    clip = qk_clip(module, exact=True)
    module(x, x, x, need_weights=need_weights, **options)
    observed = clip.step().max_logits[""].double()
    assert torch.allclose(observed, expected, rtol=1e-4, atol=1e-4)


def expected_without_zero_key(module: nn.MultiheadAttention, x: Tensor, masked: Tensor) -> Tensor:
    q, k, _ = (x @ module.in_proj_weight.T + module.in_proj_bias).chunk(3, -1)
    q, k = (y.unflatten(-1, (HEADS, -1)) for y in (q, k))
    logits = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(EMBED // HEADS)
    return logits.masked_fill(masked, -math.inf).amax((0, 2, 3))


@pytest.mark.parametrize(
    ("batch", "length", "masked"),  # torch itself fails on an empty batch with a mask
    [(0, 5, False), (2, 0, False), (2, 0, True), (0, 0, False)],
)
def test_empty_batches_and_sequences(batch: int, length: int, masked: bool) -> None:
    """Watching a layer does not prevent them."""
    module, x = attention(batch_first=True), torch.randn(batch, length, EMBED).double()
    options: dict[str, Any] = {"need_weights": False}
    if masked:
        options["attn_mask"] = torch.zeros(batch * HEADS, length, length, dtype=torch.bool)
        options["key_padding_mask"] = torch.zeros(batch, length, dtype=torch.bool)
    clip = qk_clip(module, threshold=1e-6)
    module(x, x, x, **options)
    assert clip.step().num_clipped == 0


def test_a_floating_mask_that_raises_logits_is_a_bias() -> None:
    """The factor on queries and keys must account for the bias."""
    module, x = attention(), torch.randn(QUERIES, BATCH, EMBED).double()
    bias = torch.full((QUERIES, QUERIES), 2.0).double()
    before = largest_of_weights(module, x, x, x)
    threshold = float(before.detach().sort().values[:2].mean()) + 2.0
    clip = qk_clip(module, threshold=threshold)
    module(x, x, x, attn_mask=bias)
    assert clip.step().num_clipped == 2
    after = largest_of_weights(module, x, x, x) + 2.0
    assert torch.allclose(after, (before + 2.0).clamp(max=threshold), rtol=1e-5)


@pytest.mark.parametrize("sizes", [{}, {"kdim": 6, "vdim": 4}])
@pytest.mark.parametrize("bias", [True, False])
def test_clips_are_exact(sizes: dict[str, int], bias: bool) -> None:
    """Query, key and value share one bias: each part is scaled with its rows."""
    module = attention(bias=bias, **sizes)
    query = torch.randn(QUERIES, BATCH, EMBED).double()
    key = torch.randn(KEYS, BATCH, sizes.get("kdim", EMBED)).double()
    value = torch.randn(KEYS, BATCH, sizes.get("vdim", EMBED)).double()
    before = largest_of_weights(module, query, key, value)
    threshold = float(before.detach().median())
    clip = qk_clip(module, threshold=threshold)
    module(query, key, value)
    assert clip.step().num_clipped == 1
    after = largest_of_weights(module, query, key, value)
    assert torch.allclose(after, before.clamp(max=threshold), rtol=1e-5)
    if module.in_proj_bias is not None:  # values are not scaled
        fresh = attention(bias=bias, **sizes)
        assert torch.equal(module.in_proj_bias[-EMBED:], fresh.in_proj_bias[-EMBED:])


def test_a_transformer_is_watched_layer_by_layer() -> None:
    """Encoder and decoder, self- and cross-attention, with masks; checkpointed or not."""
    torch.manual_seed(0)
    model = nn.Transformer(EMBED, 2, 2, 2, 16, dropout=0.0, batch_first=True)
    source, target = torch.randn(BATCH, KEYS, EMBED), torch.randn(BATCH, QUERIES, EMBED)
    clip = qk_clip(model, exact=True)
    assert list(clip.layouts)[:2] == ["encoder.layers.0.self_attn", "encoder.layers.1.self_attn"]
    assert "decoder.layers.1.multihead_attn" in clip.layouts and len(clip.layouts) == 6
    mask = nn.Transformer.generate_square_subsequent_mask(QUERIES)

    def run() -> Any:
        return model(source, target, tgt_mask=mask, tgt_is_causal=True)

    run().sum().backward()
    plain = clip.step().max_logits
    assert all(x.isfinite().all() for x in plain.values())
    torch.utils.checkpoint.checkpoint(run, use_reentrant=False).sum().backward()
    again = clip.step().max_logits
    assert all(torch.equal(x, again[name]) for name, x in plain.items())


def test_only_training_is_watched_and_only_until_the_handle_is_removed() -> None:
    module, x = attention(), torch.randn(QUERIES, EMBED).double()
    clip = QKClip(attention_layouts(module), exact=True)
    handle = watch(module, clip)
    module.eval()(x, x, x)
    assert (clip.step().max_logits[""] == -math.inf).all()
    module.train()(x, x, x)
    assert (clip.step().max_logits[""] > -math.inf).all()
    handle.remove()
    handle.remove()
    module(x, x, x)
    assert (clip.step().max_logits[""] == -math.inf).all()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_exports_of_a_model_in_training_do_not_count() -> None:
    """``SummaryWriter.add_graph`` traces a model, too."""
    model = nn.TransformerEncoderLayer(EMBED, HEADS, dropout=0.0, batch_first=True)
    x = torch.randn(BATCH, QUERIES, EMBED)
    clip = qk_clip(model, threshold=1e-6)
    expected = model(x)
    clip.step(clip=False)
    exported = torch.export.export(model, (x,), strict=False)
    traced = torch.jit.trace(model, x, check_trace=False)
    assert clip.step().num_clipped == 0
    assert torch.allclose(exported.module()(x), expected) and torch.allclose(traced(x), expected)


def test_copies_are_not_watched() -> None:
    """A watched model can be copied (for example to average weights) and pickled."""
    module, x = attention(), torch.randn(QUERIES, EMBED).double()
    clip = qk_clip(module, exact=True)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        twin.train()(x, x, x)
        assert (clip.step().max_logits[""] == -math.inf).all()
    module(x, x, x)
    assert (clip.step().max_logits[""] > -math.inf).all()


def test_training_with_qk_clip_and_attach_stays_at_the_threshold() -> None:
    """Without the clip logits diverge."""
    ends = {}
    x = torch.randn(BATCH, KEYS, EMBED, generator=torch.Generator().manual_seed(0))
    for threshold in (1e9, 5.0):
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(EMBED, HEADS, 16, dropout=0.0, batch_first=True)
        optimizer = MuonClip(param_groups(layer), lr=0.3, weight_decay=0.0)
        clip = qk_clip(layer, threshold=threshold, exact=True)
        clip.attach(optimizer)
        for _ in range(25):
            optimizer.zero_grad()
            (layer(x) - x.roll(1, 1)).square().mean().backward()
            optimizer.step()
        assert clip.result is not None
        ends[threshold] = float(clip.result.max_logits["self_attn"].max())
    assert ends[1e9] > 20
    # The clip uses the logits before the update, so one update's growth may remain.
    assert ends[5.0] < 12


def test_gradients_of_single_samples_are_refused() -> None:
    """Within torch.vmap a logit cannot be compared with the threshold."""
    module, x = attention().float(), torch.randn(3, QUERIES, EMBED)

    def loss(tensors: dict[str, Tensor], x: Tensor) -> Tensor:
        output: Tensor = torch.func.functional_call(module, tensors, (x, x, x))[0]
        return output.sum()

    tensors = {name: parameter.detach() for name, parameter in module.named_parameters()}
    clip = qk_clip(module)
    with pytest.raises(RuntimeError, match=r"QK-Clip cannot observe .* within torch\.vmap"):
        torch.vmap(torch.func.grad(loss), (None, 0))(tensors, x)
    with pytest.raises(RuntimeError, match=r"QK-Clip cannot observe .* within torch\.vmap"):
        torch.vmap(lambda maxima: clip.observe("", maxima))(torch.ones(2, HEADS))
    torch.func.grad(loss)(tensors, x[0])
    assert clip.step().upper_bounds[""].isfinite().all()


def test_a_removed_clip_does_not_refuse_vmap() -> None:
    clip = qk_clip(attention().float())
    clip.remove()
    torch.vmap(lambda maxima: clip.observe("", maxima), out_dims=None)(torch.ones(2, HEADS))


def test_unsupported_modules_are_refused() -> None:
    with pytest.raises(ValueError, match="0: add_bias_kv adds a key without a projection"):
        attention_layouts(nn.ModuleList([nn.MultiheadAttention(4, 2, add_bias_kv=True)]))
    with pytest.raises(ValueError, match=r"Linear contains no nn\.MultiheadAttention"):
        qk_clip(nn.Linear(2, 2))
    module = attention()
    clip = QKClip(attention_layouts(module))
    with pytest.raises(ValueError, match="'' is a ModuleList, not an"):
        watch(nn.ModuleList([module]), clip)
    with pytest.raises(ValueError, match="the clip has no layer 'other'"):
        watch(module, clip, layers=["other"])


class SelfAttention(nn.MultiheadAttention):
    def forward(self, x: Tensor) -> Any:  # type: ignore[override]
        return super().forward(x, x, x)


class Rotary(nn.MultiheadAttention):
    def forward(self, query: Tensor, key: Tensor, value: Tensor, angles: Tensor) -> Any:  # type: ignore[override]
        return super().forward(query, key, value)


class Passing(nn.MultiheadAttention):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


class Short(nn.MultiheadAttention):
    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Any:  # type: ignore[override]
        return super().forward(query, key, value, need_weights=False)


@pytest.mark.parametrize("kind", [SelfAttention, Rotary])
def test_a_forward_with_other_arguments_is_refused(kind: type[nn.MultiheadAttention]) -> None:
    """for_model warns and trains without a clip there."""
    model = nn.ModuleDict({"attention": kind(EMBED, HEADS)})
    with pytest.raises(ValueError, match=f"attention: the forward of {kind.__name__} has other"):
        qk_clip(model)
    layout = AttentionLayout.fused(model["attention"].in_proj_weight, num_heads=HEADS)
    clip = QKClip({"attention": layout})
    with pytest.raises(ValueError, match=f"attention: the forward of {kind.__name__} has other"):
        watch(model, clip)
    with pytest.warns(
        UserWarning, match=f"cannot limit .*attention: .*the forward of {kind.__name__}"
    ):
        optimizer = for_model(model, report=None)
    x = torch.randn(QUERIES, BATCH, EMBED)
    model["attention"](x, *([x, x, x] if kind is Rotary else []))[0].sum().backward()
    optimizer.step()
    assert optimizer.qk_clip is None


@pytest.mark.parametrize("kind", [Passing, Short])
def test_a_subclass_with_torchs_arguments_is_observed(kind: type[nn.MultiheadAttention]) -> None:
    module, x = attention(), torch.randn(QUERIES, BATCH, EMBED).double()
    expected = largest_of_weights(module, x, x, x)
    module.__class__ = kind
    clip = qk_clip(module, exact=True)
    module(x, x, x)
    observed = clip.step().max_logits[""].double()
    assert torch.allclose(observed, expected, rtol=1e-4, atol=1e-4)


def test_importing_needs_torch_only() -> None:
    """Integrations and the monitor do not import the libraries that they support."""
    code = (
        "import sys, muonclip.monitor, muonclip.integrations.torch_attention\n"
        "import muonclip.integrations.transformers\n"
        "print([m for m in ('transformers', 'matplotlib') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
