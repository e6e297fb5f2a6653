"""QK-Clip on real attention: every head's next largest logit is the threshold, and no other moves.

Each ``Attention`` below computes its logits as its kind does, rotary embedding included, and tells
its layout; the properties are then the same for all.
"""

import copy
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from muonclip import AttentionLayout, MuonClip, QKClip, clip_factors, max_logits

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


KINDS = [Separate, Fused, FusedByGroup, MLA]


def scenario(kind: type[Attention], heads: int, groups: int, seed: int) -> tuple[Attention, Tensor]:
    """A layer in float64 whose heads' largest logits spread over both sides of the threshold."""
    torch.manual_seed(seed)
    attention, x = kind(heads, groups), torch.randn(2, 7, HIDDEN)
    attention, x = attention.double(), x.double()
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.mul_(3)
        # Each query head gets a size of its own, alternating small and large.
        for part in (attention.layout.query, attention.layout.query_rope):
            for head, rows in enumerate(part.rows if part else ()):
                part.weight[rows] *= 0.02 if head % 2 else 8.0
                if part.bias is not None:
                    part.bias[rows] *= 0.02 if head % 2 else 8.0
    return attention, x


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=15, deadline=None)
@given(groups=st.integers(1, 3), per_group=st.integers(1, 4), seed=st.integers(0, 2**16))
def test_every_head_comes_down_to_the_threshold_and_no_other_moves(
    kind: type[Attention], groups: int, per_group: int, seed: int
) -> None:
    """Logits of head h are multiplied by exactly min(1, τ / S_h): MHA, GQA and MLA alike."""
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


@pytest.mark.parametrize("kind", KINDS)
def test_scenario_has_heads_on_both_sides(kind: type[Attention]) -> None:
    """Guards the test above against testing nothing."""
    attention, x = scenario(kind, 4, 2, seed=0)
    over = attention.largest(x) > THRESHOLD
    assert over.any() and not over.all()


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_groups_under_the_threshold_keep_their_bits(kind: type[Attention]) -> None:
    """As do values, latent projections and MLA's shared rotary key, whatever happens elsewhere."""
    attention, _ = scenario(kind, 4, 2, seed=0)
    before = copy.deepcopy(attention.state_dict())
    clip = QKClip({"layer": attention.layout}, threshold=THRESHOLD)
    clip.observe("layer", torch.tensor([100.0, 1.0, 1.0, THRESHOLD]))  # group 0 over, group 1 under
    clip.step()
    touched = torch.zeros(4, dtype=torch.bool)
    touched[:2] = attention.layout.num_kv_groups == 2  # heads sharing head 0's key
    touched[0] = True
    layout = attention.layout
    changed = {id(p): set[int]() for p in attention.parameters()}
    for part in filter(None, (layout.query, layout.query_rope)):
        for tensor in filter(lambda t: t is not None, (part.weight, part.bias)):
            changed[id(tensor)] |= set(part.rows[touched].flatten().tolist())
    for tensor in filter(lambda t: t is not None, (layout.key.weight, layout.key.bias)):
        changed[id(tensor)] |= set(layout.key.rows[0].tolist())
    for name, parameter in attention.named_parameters():
        different = (parameter != before[name]).view(parameter.size(0), -1).any(1)
        assert set(different.nonzero().flatten().tolist()) == changed[id(parameter)]


def test_mla_leaves_values_and_the_shared_key_alone() -> None:
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
        """The head under the threshold gets back in its query what the key lost."""
        query, key, rope = clip_factors(torch.tensor([400.0, 50.0]), 100.0, 1)
        assert key.tolist() == [0.5]
        assert query.tolist() == [0.5, 2]
        assert rope.tolist() == [0.25, 1]

    @pytest.mark.parametrize("threshold", [0.0, -1.0, float("nan"), float("inf")])
    def test_bad_threshold(self, threshold: float) -> None:
        with pytest.raises(ValueError, match="threshold must be above 0"):
            clip_factors(torch.ones(2), threshold, 1)

    def test_bad_shape(self) -> None:
        with pytest.raises(ValueError, match="multiple of num_kv_groups=2"):
            clip_factors(torch.ones(3), 1.0, 2)


def layer(seed: int = 0, dtype: torch.dtype = torch.float32) -> Separate:
    torch.manual_seed(seed)
    return Separate(2, 2).to(dtype)


@pytest.mark.parametrize("value", [-5.0, -math.inf, math.inf, math.nan, 0.0])
def test_mlm7517_a_max_that_asks_for_nothing(value: float) -> None:
    """A negative maximum to a power was NaN, and an infinite one would zero the weights."""
    attention = layer()
    before = copy.deepcopy(attention.state_dict())
    clip = QKClip({"layer": attention.layout}, threshold=1.0)
    clip.observe("layer", torch.full((2,), value))
    result = clip.step()
    assert result.num_clipped == 0
    assert all(torch.equal(p, before[name]) for name, p in attention.state_dict().items())


def test_mlm4699_observed_logits_are_detached() -> None:
    attention = layer()
    clip = QKClip({"layer": attention.layout})
    logits = attention(torch.randn(1, 3, HIDDEN)).amax((0, 2, 3))
    assert logits.requires_grad
    clip.observe("layer", logits)
    assert not clip.step().max_logits["layer"].requires_grad


def test_micro_batches_accumulate_and_a_step_starts_afresh() -> None:
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


def test_layers_are_kept_apart() -> None:
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


def test_mlm7382_a_sharded_master_is_refused_before_anything_changes() -> None:
    first, second = layer(0), layer(1)
    second.k.weight.main_param = torch.zeros(3)  # type: ignore[attr-defined]
    clip = QKClip({"first": first.layout, "second": second.layout}, threshold=1.0)
    before = first.q.weight.clone()
    clip.observe("first", torch.tensor([9.0, 9.0]))
    with pytest.raises(ValueError, match=r"'second': the master copy .* sharded"):
        clip.step()
    assert torch.equal(first.q.weight, before)


def test_attached_it_runs_after_the_optimizer() -> None:
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
    """A loss that pulls logits up: without the clip they run away, with it each step ends at τ."""
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
