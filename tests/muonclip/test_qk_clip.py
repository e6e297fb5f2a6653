"""QK-Clip on real attention: clipped heads reach the threshold exactly, others do not change.

Each ``Attention`` below computes its logits as its kind does, rotary embedding included, and tells
its layout; the properties are then the same for all.
"""

import copy
import math
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from muonclip import (
    AttentionLayout,
    ClipResult,
    HeadRows,
    MuonClip,
    QKClip,
    clip_factors,
    max_logits,
    max_logits_bound,
)
from muonclip.reference import clip_factor

HIDDEN = 12
THRESHOLD = 20.0


def rotate(x: Tensor) -> Tensor:
    """Rotary embedding of [..., length, d]."""
    half = x.size(-1) // 2
    angle = torch.arange(x.size(-2))[:, None] / 100 ** (torch.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


def heads_of(x: Tensor, heads: int) -> Tensor:
    """[batch, length, heads * d] -> [batch, heads, length, d]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


class Attention(nn.Module):
    """Queries and keys of one layer; ``forward`` gives its logits [batch, heads, s, s]."""

    layout: AttentionLayout

    def __init__(self, heads: int, groups: int) -> None:
        super().__init__()
        self.heads, self.groups = heads, groups

    def query_key(self, x: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        query, key = self.query_key(x)
        key = key.repeat_interleave(self.heads // key.size(1), 1)
        return query @ key.mT / math.sqrt(query.size(-1))

    def largest(self, x: Tensor) -> Tensor:
        return max_logits(*self.query_key(x))


class Separate(Attention):
    def __init__(self, heads: int, groups: int) -> None:
        super().__init__(heads, groups)
        self.q, self.k = nn.Linear(HIDDEN, heads * 4), nn.Linear(HIDDEN, groups * 4)
        self.layout = AttentionLayout.separate(
            self.q, self.k, num_heads=heads, num_kv_groups=groups
        )

    def query_key(self, x: Tensor) -> tuple[Tensor, Tensor]:
        query, key = heads_of(self.q(x), self.heads), heads_of(self.k(x), self.groups)
        return rotate(query), rotate(key)


class Fused(Attention):
    def __init__(self, heads: int, groups: int) -> None:
        super().__init__(heads, groups)
        self.qkv = nn.Linear(HIDDEN, (heads + 2 * groups) * 4)
        self.layout = AttentionLayout.fused(self.qkv, num_heads=heads, num_kv_groups=groups)

    def query_key(self, x: Tensor) -> tuple[Tensor, Tensor]:
        query, key, _ = self.qkv(x).split([self.heads * 4, self.groups * 4, self.groups * 4], -1)
        return rotate(heads_of(query, self.heads)), rotate(heads_of(key, self.groups))


class FusedByGroup(Attention):
    def __init__(self, heads: int, groups: int) -> None:
        super().__init__(heads, groups)
        self.qkv = nn.Linear(HIDDEN, (heads + 2 * groups) * 4)
        self.layout = AttentionLayout.fused_by_group(
            self.qkv, num_heads=heads, num_kv_groups=groups
        )

    def query_key(self, x: Tensor) -> tuple[Tensor, Tensor]:
        by_group = self.qkv(x).unflatten(-1, (self.groups, -1, 4))  # [b, s, groups, q.. k v, 4]
        query = by_group[..., :-2, :].flatten(2, 3).transpose(1, 2)
        key = by_group[..., -2, :].transpose(1, 2)
        return rotate(query), rotate(key)


class MLA(Attention):
    """q = [nope, rotary], k = [up-projected latent, rotary key shared by the heads]."""

    def __init__(self, heads: int, groups: int) -> None:
        super().__init__(heads, heads)
        self.q = nn.Linear(HIDDEN, heads * (4 + 2), bias=False)
        self.kv_down = nn.Linear(HIDDEN, 5 + 2, bias=False)
        self.kv_up = nn.Linear(5, heads * (4 + 3), bias=False)
        self.layout = AttentionLayout.mla(
            self.q, self.kv_up, num_heads=heads, nope_dim=4, rope_dim=2, v_dim=3
        )

    def query_key(self, x: Tensor) -> tuple[Tensor, Tensor]:
        query_nope, query_rope = heads_of(self.q(x), self.heads).split([4, 2], -1)
        latent, key_rope = self.kv_down(x).split([5, 2], -1)
        key_nope, _ = heads_of(self.kv_up(latent), self.heads).split([4, 3], -1)
        key_rope = rotate(key_rope)[:, None].expand(-1, self.heads, -1, -1)
        return torch.cat([query_nope, rotate(query_rope)], -1), torch.cat([key_nope, key_rope], -1)


class Columns(Attention):
    """One projection stored as [in, out], as in GPT-2."""

    def __init__(self, heads: int, groups: int) -> None:
        super().__init__(heads, groups)
        rows = (heads + 2 * groups) * 4
        self.weight, self.bias = (
            nn.Parameter(torch.randn(HIDDEN, rows)),
            nn.Parameter(torch.randn(rows)),
        )
        self.layout = AttentionLayout.fused(
            lambda: (self.weight, self.bias), num_heads=heads, num_kv_groups=groups, dim=1
        )

    def query_key(self, x: Tensor) -> tuple[Tensor, Tensor]:
        sizes = [self.heads * 4, self.groups * 4, self.groups * 4]
        query, key, _ = (x @ self.weight + self.bias).split(sizes, -1)
        return rotate(heads_of(query, self.heads)), rotate(heads_of(key, self.groups))


class Normalized(Attention):
    """A norm over the queries of all heads, with one gain per head, whose rows are scaled."""

    def __init__(self, heads: int, groups: int) -> None:
        super().__init__(heads, groups)
        self.q, self.k = nn.Linear(HIDDEN, heads * 4), nn.Linear(HIDDEN, groups * 4)
        self.q_norm, self.k_norm = nn.RMSNorm(heads * 4), nn.LayerNorm(groups * 4)
        nn.init.normal_(self.k_norm.bias)
        self.layout = AttentionLayout.separate(
            self.q_norm, self.k_norm, num_heads=heads, num_kv_groups=groups
        )

    def query_key(self, x: Tensor) -> tuple[Tensor, Tensor]:
        query, key = self.q_norm(self.q(x)), self.k_norm(self.k(x))
        return rotate(heads_of(query, self.heads)), rotate(heads_of(key, self.groups))


KINDS = [Separate, Fused, FusedByGroup, MLA, Columns, Normalized]


def tensors(part: HeadRows | None) -> list[tuple[Tensor, Tensor]]:
    """Weight and bias of query or key as views with rows first, and each head's rows."""
    if part is None:
        return []
    found = [(part.weight.detach().movedim(part.dim, 0), part.rows)]
    if part.bias is not None:
        found.append((part.bias.detach(), part.rows))
    return found


def scenario(kind: type[Attention], heads: int, groups: int, seed: int) -> tuple[Attention, Tensor]:
    """A layer in float64 whose heads' largest logits spread over both sides of the threshold."""
    torch.manual_seed(seed)
    attention, x = kind(heads, groups), torch.randn(2, 7, HIDDEN)
    attention, x = attention.double(), x.double()
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.mul_(3)
        # Query heads have alternately small and large weights.
        for part in (attention.layout.query, attention.layout.query_rope):
            for tensor, rows_of_heads in tensors(part):
                for head, rows in enumerate(rows_of_heads):
                    tensor[rows] *= 0.02 if head % 2 else 8.0
    return attention, x


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=15, deadline=None)
@given(groups=st.integers(1, 3), per_group=st.integers(1, 4), seed=st.integers(0, 2**16))
def test_heads_above_the_threshold_reach_it_and_others_do_not_change(
    kind: type[Attention], groups: int, per_group: int, seed: int
) -> None:
    """Logits of head h are multiplied by exactly min(1, τ / S_h) in MHA, GQA and MLA."""
    attention, x = scenario(kind, groups * per_group, groups, seed)
    logits, before = attention(x), attention.largest(x)
    clip = QKClip({"layer": attention.layout}, threshold=THRESHOLD)
    clip.observe("layer", before)
    result = clip.step()

    gamma = (THRESHOLD / before).where(before > THRESHOLD, 1.0)
    assert torch.allclose(attention(x), logits * gamma[:, None, None], rtol=1e-5, atol=1e-5)
    after = attention.largest(x)
    over = before > THRESHOLD
    assert torch.allclose(after[over], torch.full_like(after[over], THRESHOLD), rtol=1e-5)
    assert torch.allclose(after[~over], before[~over], rtol=1e-5, atol=1e-7)
    assert result.num_clipped == over.sum()
    assert torch.allclose(result.max_logits["layer"].double(), before, rtol=1e-6)


class TestBiases:
    """An additive bias is part of the logits but not of the rows that a clip scales."""

    @pytest.mark.parametrize("kind", [Separate, MLA])
    @settings(max_examples=40, deadline=None)
    @given(
        groups=st.integers(1, 3),
        per_group=st.integers(1, 3),
        shape=st.sampled_from(["bhqk", "b1qk", "hqk", "h11", "qk", "k"]),
        given_as=st.sampled_from(["bias", "mask", "both"]),
        masks=st.sampled_from(["nothing", "-inf", "least"]),
        offset=st.sampled_from([-100.0, 0.0, 15.0, 40.0]),
        causal=st.booleans(),
        exact=st.booleans(),
        seed=st.integers(0, 2**16),
    )
    def test_entries_are_scaled_to_the_threshold_and_no_further(
        self,
        kind: type[Attention],
        groups: int,
        per_group: int,
        shape: str,
        given_as: str,
        masks: str,
        offset: float,
        causal: bool,
        exact: bool,
        seed: int,
    ) -> None:
        """Compared with the definition for each entry in float64."""
        attention, x = scenario(kind, groups * per_group, groups, seed)
        products = attention(x)
        batch, heads, length, _ = products.shape
        sizes = {"b": batch, "h": heads, "q": length, "k": length, "1": 1}
        bias = 10 * torch.randn([sizes[letter] for letter in shape]) + offset
        allowed = torch.rand(bias.shape) < (1.0 if masks == "nothing" else 0.7)
        options: dict[str, Any] = {"causal": causal}
        if given_as == "both":
            options |= {"bias": bias, "mask": allowed}
        else:
            least = -math.inf if masks == "-inf" else torch.finfo(bias.dtype).min
            options[given_as] = bias.masked_fill(~allowed, least)
        counted = allowed.expand(products.shape)
        if causal:
            counted = counted & torch.ones(length, length, dtype=torch.bool).tril()
        full = bias.double().expand(products.shape)
        gamma = torch.tensor(
            [
                clip_factor(products[:, h][counted[:, h]], full[:, h][counted[:, h]], THRESHOLD)
                for h in range(heads)
            ]
        )

        clip = QKClip({"layer": attention.layout}, threshold=THRESHOLD, exact=exact)
        # In two micro-batches.
        query, key = attention.query_key(x)
        for row in range(batch):
            part = {
                name: value[row : row + 1] if torch.is_tensor(value) and value.ndim == 4 else value
                for name, value in options.items()
            }
            clip.observe_attention("layer", query[row : row + 1], key[row : row + 1], **part)
        result = clip.step()
        assert torch.allclose(result.factors["layer"], gamma, rtol=1e-5)
        assert result.num_clipped == (result.factors["layer"] < 1).sum()
        logits = (products + full).where(counted, -math.inf)
        largest = logits.amax((0, 2, 3))
        over = largest > THRESHOLD
        assert torch.allclose(result.max_logits["layer"][over].double(), largest[over], rtol=1e-5)
        assert (result.upper_bounds["layer"].double() >= largest - 1e-4).all()
        after = attention(x)
        wanted = products * gamma[:, None, None]
        assert torch.allclose(after, wanted, rtol=1e-5, atol=1e-5)
        at_stake = (after + full)[counted & (full < THRESHOLD)]
        assert (at_stake <= THRESHOLD + 1e-4).all()

    def test_a_bias_above_the_threshold_does_not_shrink_the_weights(self) -> None:
        """No factor on q and k can lower such a logit, so repeated steps must not scale them."""
        attention, x = layer(), torch.randn(2, 5, HIDDEN)
        before = copy.deepcopy(attention.state_dict())
        clip = QKClip({"layer": attention.layout}, threshold=THRESHOLD)
        for value in (THRESHOLD, THRESHOLD + 1, 1e30, math.inf):
            clip.observe_attention("layer", *attention.query_key(x), bias=torch.tensor([value]))
            assert clip.step().num_clipped == 0
        assert all(torch.equal(p, before[name]) for name, p in attention.state_dict().items())

    def test_a_bias_just_below_the_threshold_does_not_divide_by_zero(self) -> None:
        attention, x = layer(), torch.randn(2, 5, HIDDEN)
        bias = torch.tensor([THRESHOLD]).nextafter(torch.zeros(1))
        clip = QKClip({"layer": attention.layout}, threshold=THRESHOLD)
        clip.observe_attention("layer", *attention.query_key(x), bias=bias)
        assert clip.step().num_clipped == 2
        assert all(p.isfinite().all() for p in attention.parameters())
        assert (attention(x) + bias <= THRESHOLD + 1e-4).all()

    @pytest.mark.parametrize("masked", [-math.inf, torch.finfo(torch.float32).min])
    def test_a_floating_mask_clips_bit_identically_to_a_boolean_mask(self, masked: float) -> None:
        x = 4 * torch.randn(2, 5, HIDDEN, generator=torch.Generator().manual_seed(0))
        allowed = torch.ones(5, 5, dtype=torch.bool).tril()
        states = []
        for mask in (allowed, torch.zeros(5, 5).masked_fill(~allowed, masked)):
            attention = layer()
            clip = QKClip({"layer": attention.layout}, threshold=0.5)
            clip.observe_attention("layer", *attention.query_key(x), mask=mask)
            assert clip.step().num_clipped == 2
            states.append(attention.state_dict())
        assert all(torch.equal(p, states[1][name]) for name, p in states[0].items())

    def test_a_trained_bias_is_not_scaled_and_gets_no_gradient_from_the_clip(self) -> None:
        attention, x = layer(), torch.randn(2, 5, HIDDEN)
        bias = nn.Parameter(torch.full((2, 5, 5), 10.0))
        clip = QKClip({"layer": attention.layout}, threshold=10.5)
        clip.observe_attention("layer", *attention.query_key(x), bias=bias)
        result = clip.step()
        assert result.num_clipped == 2
        assert (bias == 10).all() and bias.grad is None
        assert not result.max_logits["layer"].requires_grad


@pytest.mark.parametrize("kind", KINDS)
def test_scenario_has_heads_on_both_sides(kind: type[Attention]) -> None:
    """Ensures that the tests above cover clipped and unclipped heads."""
    attention, x = scenario(kind, 4, 2, seed=0)
    over = attention.largest(x) > THRESHOLD
    assert over.any() and not over.all()


@pytest.mark.parametrize("kind", KINDS)
def test_unclipped_groups_stay_bit_identical(kind: type[Attention]) -> None:
    """Values, latent projections and MLA's shared rotary key, too."""
    attention, _ = scenario(kind, 4, 2, seed=0)
    before = copy.deepcopy(attention.state_dict())
    clip = QKClip({"layer": attention.layout}, threshold=THRESHOLD)
    clip.observe("layer", torch.tensor([100.0, 1.0, 1.0, THRESHOLD]))  # group 0 over, group 1 under
    clip.step()
    touched = torch.zeros(4, dtype=torch.bool)
    touched[:2] = attention.layout.num_kv_groups == 2  # heads sharing head 0's key
    touched[0] = True
    layout = attention.layout
    changed = {p.data_ptr(): set[int]() for p in attention.parameters()}
    dims = {p.data_ptr(): 0 for p in attention.parameters()}
    dims[layout.query.weight.data_ptr()] = layout.query.dim
    for part in (layout.query, layout.query_rope):
        for tensor, rows in tensors(part):
            changed[tensor.data_ptr()] |= set(rows[touched].flatten().tolist())
    for tensor, rows in tensors(layout.key):
        changed[tensor.data_ptr()] |= set(rows[0].tolist())
    for name, parameter in attention.named_parameters():
        different = (parameter != before[name]).movedim(dims[parameter.data_ptr()], 0)
        different = different.reshape(len(different), -1).any(1)
        assert set(different.nonzero().flatten().tolist()) == changed[parameter.data_ptr()]


def test_mla_does_not_scale_values_or_the_shared_key() -> None:
    attention, _ = scenario(MLA, 4, 4, seed=0)
    assert isinstance(attention, MLA)
    down, up = attention.kv_down.weight.clone(), attention.kv_up.weight.clone()
    query = attention.q.weight.clone()
    clip = QKClip({"layer": attention.layout}, threshold=25.0)
    clip.observe("layer", torch.full((4,), 100.0))
    clip.step()
    assert torch.equal(attention.kv_down.weight, down)
    new, old = attention.kv_up.weight.view(4, 7, 5), up.view(4, 7, 5)
    assert torch.allclose(new[:, :4], old[:, :4] * 0.5)  # k without position: its root
    assert torch.equal(new[:, 4:], old[:, 4:])  # values
    new, old = attention.q.weight.view(4, 6, HIDDEN), query.view(4, 6, HIDDEN)
    assert torch.allclose(new[:, :4], old[:, :4] * 0.5)  # q without position: its root
    assert torch.allclose(new[:, 4:], old[:, 4:] * 0.25)  # rotary q: all of the factor


class TestClipFactors:
    @settings(max_examples=100, deadline=None)
    @given(
        groups=st.integers(1, 4),
        per_group=st.integers(1, 4),
        threshold=st.floats(0.1, 1e3),
        data=st.data(),
    )
    def test_products_are_gamma(
        self, groups: int, per_group: int, threshold: float, data: st.DataObject
    ) -> None:
        values = st.floats(allow_nan=True, allow_infinity=True, width=32)
        drawn = data.draw(
            st.lists(values, min_size=groups * per_group, max_size=groups * per_group)
        )
        largest = torch.tensor(drawn)
        query, key, rope = clip_factors(largest, threshold, groups)
        product = query * key.repeat_interleave(per_group)
        assert torch.allclose(product, rope, rtol=1e-6)
        assert all(((f > 0) & f.isfinite()).all() for f in (query, key, rope))
        assert (rope <= 1).all() and (key <= 1).all()
        calm = ~((largest > threshold) & largest.isfinite())
        assert (rope[calm] == 1).all()
        whole = calm.view(groups, -1).all(1)
        assert (key[whole] == 1).all()
        assert (query.view(groups, -1)[whole] == 1).all()

    def test_one_head_per_group_is_the_published_rule(self) -> None:
        query, key, rope = clip_factors(torch.tensor([400.0, 50.0]), 100.0, 2)
        assert query.tolist() == [0.5, 1]
        assert key.tolist() == [0.5, 1]
        assert rope.tolist() == [0.25, 1]

    def test_a_group_shares_its_key(self) -> None:
        """The query of a head below the threshold compensates for the factor on its key."""
        query, key, rope = clip_factors(torch.tensor([400.0, 50.0]), 100.0, 1)
        assert key.tolist() == [0.5]
        assert query.tolist() == [0.5, 2]
        assert rope.tolist() == [0.25, 1]

    @pytest.mark.parametrize("threshold", [0.0, -1.0, float("nan"), float("inf")])
    def test_an_invalid_threshold_is_refused(self, threshold: float) -> None:
        with pytest.raises(ValueError, match="threshold must be above 0"):
            clip_factors(torch.ones(2), threshold, 1)

    def test_an_invalid_shape_is_refused(self) -> None:
        with pytest.raises(ValueError, match="multiple of num_kv_groups=2"):
            clip_factors(torch.ones(3), 1.0, 2)


def layer(seed: int = 0, dtype: torch.dtype = torch.float32) -> Separate:
    torch.manual_seed(seed)
    return Separate(2, 2).to(dtype)


@pytest.mark.parametrize("value", [-5.0, -math.inf, math.inf, math.nan, 0.0])
def test_negative_and_non_finite_maxima_change_nothing(value: float) -> None:
    """Megatron-LM#7517: a power of a negative maximum is NaN; infinity zeroes the weights."""
    attention = layer()
    before = copy.deepcopy(attention.state_dict())
    clip = QKClip({"layer": attention.layout}, threshold=1.0)
    clip.observe("layer", torch.full((2,), value))
    result = clip.step()
    assert result.num_clipped == 0
    assert all(torch.equal(p, before[name]) for name, p in attention.state_dict().items())


def test_observed_logits_are_detached() -> None:
    attention = layer()
    clip = QKClip({"layer": attention.layout})
    logits = attention(torch.randn(1, 3, HIDDEN)).amax((0, 2, 3))
    assert logits.requires_grad
    clip.observe("layer", logits)
    assert not clip.step().max_logits["layer"].requires_grad


def test_maxima_accumulate_over_micro_batches_until_a_step() -> None:
    """A NaN in one micro-batch does not hide the others."""
    attention = layer()
    clip = QKClip({"layer": attention.layout}, threshold=100.0)
    for seen in ([5.0, 300.0], [math.nan, math.inf], [7.0, 200.0]):
        clip.observe("layer", torch.tensor(seen))
    first = clip.step()
    assert first.max_logits["layer"].tolist() == [7.0, 300.0]
    assert first.num_clipped == 1
    before = attention.k.weight.clone()
    second = clip.step()
    assert second.max_logits["layer"].tolist() == [-math.inf] * 2
    assert torch.equal(attention.k.weight, before)
    assert first.max_logits["layer"].tolist() == [7.0, 300.0]  # not overwritten


def test_a_step_without_clipping_reports_the_logits_and_resets_them() -> None:
    """For a step that the optimizer skipped."""
    attention = layer()
    before = copy.deepcopy(attention.state_dict())
    clip = QKClip({"layer": attention.layout}, threshold=10.0)
    results: list[ClipResult] = []
    clip.register_step_post_hook(results.append)
    clip.observe("layer", torch.tensor([400.0, 5.0]))
    result = clip.step(clip=False)
    assert result.max_logits["layer"].tolist() == [400.0, 5.0]
    assert result.num_clipped == 0
    assert clip.result is result and results == [result]
    clip.observe("layer", torch.tensor([9.0, 7.0]))
    assert clip.step().max_logits["layer"].tolist() == [9.0, 7.0]
    for name, tensor in attention.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    clip.observe("layer", torch.tensor([400.0, 5.0]))
    assert clip.step().num_clipped == 1


def test_layers_are_clipped_separately() -> None:
    first, second = layer(0), layer(1)
    clip = QKClip({"first": first.layout, "second": second.layout}, threshold=100.0)
    before = first.q.weight.clone(), second.q.weight.clone()
    clip.observe("second", torch.tensor([400.0, 400.0]))
    clip.step()
    assert torch.equal(first.q.weight, before[0])
    assert torch.allclose(second.q.weight, before[1] * 0.5)


def test_master_copies_are_scaled_and_the_weight_follows() -> None:
    attention = layer(dtype=torch.bfloat16)
    masters = {}
    for name, parameter in attention.named_parameters():
        masters[name] = parameter.detach().float() * 1.0001  # more than bfloat16 can hold
        parameter.main_param = masters[name].clone()  # type: ignore[attr-defined]
    before = attention.q.weight.clone()
    clip = QKClip({"layer": attention.layout}, threshold=100.0)
    clip.observe("layer", torch.tensor([900.0, 1.0]))
    clip.step()
    for name, parameter in attention.named_parameters():
        main = parameter.main_param  # type: ignore[attr-defined]
        assert torch.allclose(main[:4], masters[name][:4] / 3)
        assert torch.equal(parameter[:4], main[:4].bfloat16())
        assert torch.equal(main[4:], masters[name][4:])
    assert torch.equal(attention.q.weight[4:], before[4:])


@pytest.mark.parametrize(
    ("master", "sharded", "message"),
    [
        (torch.zeros(3), False, r"'second': the master copy .* is \(3,\): it must be sharded as"),
        (torch.zeros(8, 12), True, r"'second': the master copy .* is \(8, 12\)"),
        (torch.zeros(3), True, "of 96 elements have 3 elements over the process group"),
        (None, True, "of 96 elements have 0 elements over the process group"),
    ],
)
def test_a_master_with_unknown_sharding_is_refused_before_any_change(
    master: Tensor | None, sharded: bool, message: str
) -> None:
    first, second = layer(0), layer(1)
    weight: Any = second.k.weight
    weight.main_param, weight.main_param_sharded = master, sharded
    clip = QKClip({"first": first.layout, "second": second.layout}, threshold=1.0)
    before = first.q.weight.clone()
    clip.observe("first", torch.tensor([9.0, 9.0]))
    with pytest.raises(ValueError, match=message):
        clip.step()
    assert torch.equal(first.q.weight, before)


def test_an_attached_clip_runs_after_the_optimizer() -> None:
    attention = layer()
    optimizer = MuonClip(attention.named_parameters(), lr=0.1)
    clip = QKClip({"layer": attention.layout}, threshold=1.0)
    handle = clip.attach(optimizer)
    twin = copy.deepcopy(attention)
    for model in (attention, twin):
        torch.manual_seed(1)
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
    clip.observe("layer", torch.tensor([4.0, 4.0]))
    optimizer.step()
    assert clip.result is not None and clip.result.num_clipped == 2
    MuonClip(twin.named_parameters(), lr=0.1).step()
    assert torch.allclose(attention.q.weight, twin.q.weight * 0.5)
    handle.remove()
    clip.observe("layer", torch.tensor([9.0, 9.0]))
    optimizer.step()
    assert clip.result.max_logits["layer"].tolist() == [4.0, 4.0]


def test_training_stays_at_the_threshold() -> None:
    """A loss that raises logits: without the clip they diverge, with it each step ends at τ."""
    x = torch.randn(2, 6, HIDDEN, generator=torch.Generator().manual_seed(0))
    ends = {}
    for clipped in (False, True):
        attention = layer()
        optimizer = MuonClip(attention.named_parameters(), lr=0.3, weight_decay=0.0)
        clip = QKClip({"layer": attention.layout}, threshold=5.0)
        if clipped:
            clip.attach(optimizer)
        for _ in range(30):
            optimizer.zero_grad()
            (-attention(x).logsumexp(-1).mean()).backward()
            clip.observe("layer", attention.largest(x))
            optimizer.step()
        ends[clipped] = attention.largest(x).max()
    assert ends[False] > 100
    # The clip uses the logits before the update, so one update's growth may remain.
    assert ends[True] < 25


@pytest.mark.parametrize(
    ("act", "error", "message"),
    [
        (lambda: QKClip({}), ValueError, "layouts is empty"),
        (lambda: QKClip({"a": layer().layout}, threshold=0), ValueError, "threshold must be"),
        (
            lambda: QKClip({"a": layer().layout}).observe("b", torch.ones(2)),
            KeyError,
            "no layout for layer 'b'",
        ),
        (
            lambda: QKClip({"a": layer().layout}).observe("a", torch.ones(2, 2)),
            ValueError,
            "'a' has 2 heads",
        ),
    ],
)
def test_errors(act: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        act()


def test_two_layers_with_one_weight_are_refused() -> None:
    attention = layer()
    with pytest.raises(ValueError, match="'a' and 'b' share a weight"):
        QKClip({"a": attention.layout, "b": attention.layout})


class Saved:
    """A tensor that a graph keeps for its backward pass."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class TestObserveAttention:
    """Exact logits are computed only for heads whose bound is above the threshold."""

    @pytest.mark.parametrize("kind", KINDS)
    @settings(max_examples=10, deadline=None)
    @given(
        groups=st.integers(1, 3),
        per_group=st.integers(1, 3),
        causal=st.booleans(),
        seed=st.integers(0, 2**16),
    )
    def test_the_clip_is_that_of_exact_logits(
        self, kind: type[Attention], groups: int, per_group: int, causal: bool, seed: int
    ) -> None:
        attention, x = scenario(kind, groups * per_group, groups, seed)
        logits, (query, key) = attention(x), attention.query_key(x)
        largest = max_logits(query, key, causal=causal)
        clip = QKClip({"layer": attention.layout}, threshold=THRESHOLD)
        clip.observe_attention("layer", query, key, causal=causal)
        result = clip.step()
        gamma = (THRESHOLD / largest).where(largest > THRESHOLD, 1.0)
        assert torch.allclose(attention(x), logits * gamma[:, None, None], rtol=1e-5, atol=1e-5)
        # A head's largest logit lies between what was computed and the bound.
        seen, bound = result.max_logits["layer"], result.upper_bounds["layer"]
        over = largest > THRESHOLD
        assert torch.allclose(seen[over].double(), largest[over], rtol=1e-6)
        assert torch.equal(seen[over], bound[over])
        assert (bound.double() >= largest * (1 - 1e-6)).all() and (bound[~over] <= THRESHOLD).all()

    def test_a_bound_is_not_reported_as_a_max_logit(self) -> None:
        """Without ``exact``, heads without computed logits report -inf."""
        attention, x = layer(), torch.randn(2, 5, HIDDEN)
        query, key = attention.query_key(x)
        clip = QKClip({"layer": attention.layout})
        clip.observe_attention("layer", query, key)
        result = clip.step()
        assert result.max_logits["layer"].tolist() == [-math.inf] * 2
        assert torch.equal(result.upper_bounds["layer"], max_logits_bound(query, key))
        clip.exact = True
        clip.observe_attention("layer", query, key)
        result = clip.step()
        assert torch.equal(result.max_logits["layer"], max_logits(query, key))
        assert torch.equal(result.upper_bounds["layer"], result.max_logits["layer"])

    def test_micro_batches_with_and_without_logits(self) -> None:
        """A head needs only its bound in the first micro-batch and its logits in the second."""
        attention = layer()
        clip = QKClip({"layer": attention.layout}, threshold=10.0)
        along, across = torch.zeros(1, 2, 1, 4), torch.zeros(1, 2, 1, 4)
        along[..., 0], across[..., 1] = 4.0, 4.0
        clip.observe_attention("layer", along, along)  # logits 8 = bounds
        clip.observe_attention("layer", 2 * along, across)  # logits 0, bounds 16
        result = clip.step()
        assert result.max_logits["layer"].tolist() == [0.0, 0.0]
        assert result.upper_bounds["layer"].tolist() == [8.0, 8.0]
        clip.observe_attention("layer", along, along)
        clip.observe_attention("layer", 2 * along, along)
        result = clip.step()
        assert result.max_logits["layer"].tolist() == [16.0, 16.0]
        assert result.upper_bounds["layer"].tolist() == [16.0, 16.0]

    def test_a_floating_mask_can_raise_logits(self) -> None:
        """A bound on the products alone would miss them."""
        attention = layer()
        clip = QKClip({"layer": attention.layout}, threshold=10.0)
        query = torch.zeros(1, 2, 1, 4)
        mask = torch.tensor([5.0, 30.0]).view(2, 1, 1)
        clip.observe_attention("layer", query, query, mask=mask)
        result = clip.step()
        assert result.max_logits["layer"].tolist() == [-math.inf, 30.0]
        assert result.upper_bounds["layer"].tolist() == [5.0, 30.0]

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_non_finite_logits_are_ignored(self, value: float) -> None:
        """They do not affect other heads."""
        attention = layer()
        query = torch.ones(1, 2, 3, 4)
        query[0, 0, 1, 2] = value
        clip = QKClip({"layer": attention.layout}, threshold=1.0)
        clip.observe_attention("layer", query, torch.ones(1, 2, 3, 4))
        result = clip.step()
        assert result.max_logits["layer"].tolist() == [-math.inf, 2.0]
        assert result.upper_bounds["layer"].tolist() == [-math.inf, 2.0]
        assert all(p.isfinite().all() for p in attention.parameters())

    def test_observed_queries_and_keys_are_freed(self) -> None:
        """Megatron-LM#4699: recorded logits kept each micro-batch's graph alive."""
        attention = layer()
        clip = QKClip({"layer": attention.layout}, exact=True)
        saved: list[weakref.ref[Saved]] = []

        def pack(tensor: Tensor) -> Saved:
            kept = Saved(tensor)
            saved.append(weakref.ref(kept))
            return kept

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
            query, key = attention.query_key(torch.randn(1, 3, HIDDEN))
        clip.observe_attention("layer", query, key)
        clip.observe("layer", (query * key).amax((0, 2, 3)))
        assert saved and all(reference() is not None for reference in saved)
        del query, key
        assert all(reference() is None for reference in saved)
        result = clip.step()
        assert not result.max_logits["layer"].requires_grad

    def test_errors(self) -> None:
        clip = QKClip({"a": layer().layout})
        query = torch.zeros(1, 2, 3, 4)
        with pytest.raises(KeyError, match="no layout for layer 'b'"):
            clip.observe_attention("b", query, query)
        with pytest.raises(
            ValueError, match=r"'a' has 2 heads: query must be \[..., 2, queries, d\]"
        ):
            clip.observe_attention("a", query[:, :1], query)
        with pytest.raises(ValueError, match="agree in d"):
            clip.observe_attention("a", query, query[..., :2])


def test_layers_of_different_shapes_get_separate_factors() -> None:
    """Factors of consecutive layers of one shape are computed at once."""
    kinds = [(Separate, 4, 2), (Fused, 6, 3), (MLA, 3, 3), (Columns, 4, 1), (Separate, 2, 2)]
    scenarios = [scenario(kind, heads, groups, 7) for kind, heads, groups in kinds]
    clip = QKClip(
        {str(i): attention.layout for i, (attention, _) in enumerate(scenarios)},
        threshold=THRESHOLD,
    )
    wanted = []
    for i, (attention, x) in enumerate(scenarios):
        largest = attention.largest(x)
        gamma = (THRESHOLD / largest).where(largest > THRESHOLD, 1.0)
        wanted.append(attention(x) * gamma[:, None, None])
        clip.observe(str(i), largest)
    clip.step()
    for (attention, x), logits in zip(scenarios, wanted, strict=True):
        assert torch.allclose(attention(x), logits, rtol=1e-5, atol=1e-5)


def test_parameters_that_replace_others_are_clipped() -> None:
    """FSDP2 replaces parameters."""
    attention = layer()
    clip = QKClip({"layer": attention.layout}, threshold=100.0)
    old = attention.q.weight
    attention.q.weight = nn.Parameter(old.detach().clone())
    before = old.detach().clone()
    clip.observe("layer", torch.tensor([400.0, 400.0]))
    clip.step()
    assert torch.equal(old, before)
    assert torch.allclose(attention.q.weight, before * 0.5)


def test_a_flattened_parameter_is_refused_before_any_change() -> None:
    """FSDP1 gives each rank a flat shard with unknown rows."""
    attention = layer()
    clip = QKClip({"layer": attention.layout}, threshold=1.0)
    attention.k.weight = nn.Parameter(attention.k.weight.detach().flatten()[:5].clone())
    before = attention.q.weight.detach().clone()
    clip.observe("layer", torch.tensor([9.0, 9.0]))
    with pytest.raises(ValueError, match=r"'layer': a weight now has shape \(5,\), but its"):
        clip.step()
    assert torch.equal(attention.q.weight, before)


def test_step_hooks() -> None:
    clip = QKClip({"layer": layer().layout})
    seen: list[ClipResult] = []
    handle = clip.register_step_post_hook(seen.append)
    result = clip.step()
    handle.remove()
    clip.step()
    assert len(seen) == 1 and seen[0] is result


def test_query_and_key_that_share_rows_are_refused() -> None:
    weight = torch.ones(4, 3)
    with pytest.raises(ValueError, match="'a': query and key share rows"):
        QKClip({"a": AttentionLayout.separate(weight, weight, num_heads=2)})


@pytest.mark.gpu
def test_the_model_may_move_to_a_gpu_after_the_clip_was_made() -> None:
    attention = layer()
    clip = QKClip({"layer": attention.layout}, threshold=1.0)
    attention.cuda()
    before = attention.q.weight.detach().clone()
    clip.observe("layer", torch.tensor([4.0, 4.0], device="cuda"))
    assert clip.step().max_logits["layer"].is_cuda
    assert torch.allclose(attention.q.weight, before * 0.5)
