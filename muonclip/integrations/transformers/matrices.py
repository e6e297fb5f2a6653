"""Hugging Face transformers: the matrices fused in a model's parameters.

>>> groups = param_groups(model, layouts=matrix_layouts(model))  # doctest: +SKIP
>>> optimizer = MuonClip(groups)  # doctest: +SKIP

Found from the structure of its modules: what children they have, the shapes of their weights, and
the sizes that they or their configurations tell. transformers itself is never imported.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from muonclip.matrix_layouts import WHOLE, MatrixLayout

# Queries, keys and values as linear layers of their own, by the names that models give them.
_SEPARATE = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q", "k", "v"),
    ("q_lin", "k_lin", "v_lin"),
    ("query_proj", "key_proj", "value_proj"),
    ("linear_q", "linear_k", "linear_v"),
)
# In one layer: all queries, then all keys, then all values ...
_FUSED = {"qkv_proj", "qkv", "Wqkv", "c_attn", "att_proj", "qkv_linear"}
# ... or for each head (or key group) its queries, its key and its value.
_FUSED_BY_GROUP = {"query_key_value"}
_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads")
_KEY_HEADS = ("num_key_value_heads", "num_kv_heads", "kv_heads")
_HEAD_DIM = (
    "head_dim", "head_size", "attention_head_size", "key_value_proj_dim", "d_kv", "head_k_dim"
)  # fmt: skip


def matrix_layouts(
    model: nn.Module, *, per_head: bool = False, exclude: str | Sequence[str] = ()
) -> dict[str, MatrixLayout]:
    """The matrices of the model that its parameters fuse, for ``param_groups``.

    - query, key and value in one layer (Phi-3, GPT-2, GPT-NeoX, Falcon, vision towers), and the
      output gate in ``q_proj`` (Qwen3-Next);
    - gate and up in one layer (Phi-3, GLM, ModernBERT) or in one stack of experts, in two halves or
      in alternate rows (gpt-oss);
    - in MLA (DeepSeek-V2 and V3, Kimi) the matrices of the DeepSeek-V2 report (arXiv 2405.04434,
      section 2.1): W^DKV and W^KR in ``kv_a_proj_with_mqa``, W^UK and W^UV in ``kv_b_proj``, W^UQ
      and W^QR in ``q_b_proj`` or ``q_proj``;
    - what Mamba, Mamba-2, gated delta nets and short convolutions take from one projection;
    - storage as [inputs, outputs]: ``Conv1D``, and experts of gpt-oss, Llama 4, DBRX.

    Everything else is one matrix, or a stack of experts, and needs no layout. Torch's own modules
    are known to ``param_groups``.

    Args:
        model: any module with models of transformers in it.
        per_head: orthogonalize the query, key and value rows of each head on their own, as for
            GLM-5 (arXiv 2602.15763) and Kimi K3 (arXiv 2607.24653, section 2.5); of gated delta
            nets too. The output projection stays whole: its heads add up in one output.
        exclude: pattern or patterns (``fnmatch``) of names of parameters to leave out.

    Returns:
        Parameter name -> its layout.

    Raises:
        ValueError: for a fused layer that is not known, or with other sizes than its module tells;
            with ``per_head`` for an attention that does not tell the size of its heads.
    """
    patterns = (exclude,) if isinstance(exclude, str) else tuple(exclude)
    layouts = {}
    for path, module in model.named_modules():
        for leaf, weight in _matrices(module):
            name = f"{path}.{leaf}" if path else leaf
            if any(fnmatchcase(name, pattern) for pattern in patterns):
                continue
            try:
                layout = _layout(module, leaf, weight, per_head)
                layout.check(weight.shape)
            except ValueError as error:
                raise ValueError(
                    f"{name} of {type(module).__name__}: {error}. Declare its MatrixLayout, or "
                    f"leave it as it is with exclude={name!r}"
                ) from None
            if layout != WHOLE:
                layouts[name] = layout
    return layouts


def _matrices(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """A module's own matrices and stacks, and those of its linear children."""
    for name, parameter in module.named_parameters(recurse=False):
        if name != "weight" and parameter.ndim in (2, 3):
            yield name, parameter
    for name, child in module.named_children():
        weight = child._parameters.get("weight")
        if weight is not None and weight.ndim in (2, 3) and not _is_torchs_own(child):
            yield f"{name}.weight", weight


def _is_torchs_own(module: nn.Module) -> bool:
    """Whether its weight is no matrix, or one whose place in its parent tells nothing."""
    return isinstance(module, nn.modules.conv._ConvNd | nn.Embedding | nn.LayerNorm)


def _layout(module: nn.Module, leaf: str, weight: Tensor, per_head: bool) -> MatrixLayout:
    child = leaf.removesuffix(".weight")
    if child == leaf:
        return _of_own(module, leaf, weight, per_head)
    rows, _ = _shape(module, child)
    for rule in (_mla, _recurrent, _fused_attention, _separate_attention, _gated, _grouped):
        layout = rule(module, child, rows, per_head)
        if layout is not None:
            break
    else:
        if "qkv" in child.lower() or "gate_up" in child or child in _FUSED_BY_GROUP:
            raise ValueError("what it fuses, and in which order, is not known")
        layout = WHOLE
    if layout.blocks is not None and len(layout.blocks) == 1 and not layout.separate:
        layout = WHOLE  # no rotary part, say
    return replace(layout, transposed=_is_transposed(module, child))


# ---------------------------------------------------------------------- attention


def _mla(module: Any, child: str, rows: int, per_head: bool) -> MatrixLayout | None:
    nope, rope, value, latent = (
        getattr(module, name, None)
        for name in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "kv_lora_rank")
    )
    if nope is None or rope is None or value is None or latent is None:
        return None
    of_each_head = {
        "q_proj": (nope, rope),
        "q_b_proj": (nope, rope),
        "q_gate_proj": (nope, rope, value),
        "kv_b_proj": (nope, value),
    }
    if child == "kv_a_proj_with_mqa":
        return MatrixLayout(_present(latent, rope))
    if child not in of_each_head:
        return None
    blocks = _present(*of_each_head[child])
    return MatrixLayout(blocks, _divide(rows, sum(blocks), "rows a head"), separate=per_head)


def _fused_attention(module: Any, child: str, rows: int, per_head: bool) -> MatrixLayout | None:
    kind = type(module).__name__
    deberta = child == "in_proj" and rows == 3 * getattr(module, "all_head_size", 0)
    key_value = child == "to_kv" or (child == "kv_proj" and hasattr(module, "kv_projection_size"))
    if not (deberta or key_value or child in _FUSED | _FUSED_BY_GROUP):
        return None
    heads, dim = _number(module, *_HEADS), _number(module, *_HEAD_DIM)
    groups = _number(module, *_KEY_HEADS) or heads
    if key_value or getattr(module, "is_cross_attention", False):  # queries are elsewhere
        half = _divide(rows, 2, "rows of keys and of values")
        if dim is None and groups is not None:
            dim = _divide(half, groups, "rows of a head")
        return _heads_of((half, half), dim, per_head)
    if kind == "CodeGenAttention":  # four parts, each its queries, values and keys
        part = _divide(rows, 12, "rows of a quarter's queries")
        return _heads_of((rows,), dim, True) if per_head else MatrixLayout((part,) * 3, 4)
    by_group = (
        deberta
        or child in _FUSED_BY_GROUP
        or "LightningAttention" in kind
        or isinstance(getattr(module, "multi_query", None), bool)
    )
    if heads is None or groups is None:
        if by_group or rows % 3:
            raise ValueError("its module does not tell the number of heads")
        return _heads_of((rows // 3,) * 3, dim, per_head)
    found = _divide(rows, heads + 2 * groups, "rows of a head")
    if dim not in (None, found):
        raise ValueError(f"{rows} rows are not those of {heads} + 2 x {groups} heads of {dim}")
    if not by_group:
        return _heads_of((heads * found, groups * found, groups * found), found, per_head)
    queries = _divide(heads, groups, "query heads of a key head")
    if per_head:
        return MatrixLayout((found,) * (queries + 2), groups, separate=True)
    return MatrixLayout((queries * found, found, found), groups)


def _separate_attention(module: Any, child: str, rows: int, per_head: bool) -> MatrixLayout | None:
    names = next((names for names in _SEPARATE if child in names), None)
    if names is None or not all(_is_linear(module, name) for name in names[:2]):
        return None
    heads, dim = _number(module, *_HEADS), _number(module, *_HEAD_DIM)
    if child == names[0] and heads is not None and dim is not None and rows == 2 * heads * dim:
        return MatrixLayout((dim, dim), heads, separate=per_head)  # an output gate beside each head
    if not per_head:
        return WHOLE
    if child == names[2]:
        dim = _number(module, "v_head_dim", "head_v_dim") or dim
    if dim is None and heads is not None:
        dim = _divide(_shape(module, names[0])[0], heads, "rows of a head")
    return _heads_of((rows,), dim, per_head)


def _heads_of(blocks: tuple[int, ...], dim: int | None, per_head: bool) -> MatrixLayout:
    """Blocks one after another, or their heads apart."""
    if not per_head:
        return MatrixLayout(blocks)
    if dim is None:
        raise ValueError("its module does not tell the size of its heads")
    return MatrixLayout.per_head(sum(blocks), _divide(sum(blocks), dim, "heads"))


# ---------------------------------------------------------------------- other layers


def _recurrent(module: Any, child: str, rows: int, per_head: bool) -> MatrixLayout | None:
    """Mamba, gated delta nets, short convolutions: what they project their input to."""
    inner, state = (getattr(module, name, None) for name in ("intermediate_size", "ssm_state_size"))
    if inner is not None and state is not None:
        if child == "in_proj" and hasattr(module, "n_mamba_heads"):  # Zamba: x, z in turn
            return MatrixLayout((1, 1), inner)
        if child == "in_proj" and rows == 2 * inner:  # Mamba: x, z
            return MatrixLayout((inner, inner))
        if child == "in_proj":  # Mamba-2: z, x, B, C, step
            shared = module.n_groups * state
            return MatrixLayout((inner, inner, shared, shared, module.num_heads))
        if child == "x_proj":
            return MatrixLayout((rows - 2 * state, state, state))
    if child == "in_proj" and type(module).__name__.endswith("ShortConv"):
        return MatrixLayout((_divide(rows, 3, "rows of a gate"),) * 3)
    if child.startswith("in_proj_") and hasattr(module, "head_k_dim"):
        keys, values = module.num_k_heads, module.num_v_heads
        share = _divide(values, keys, "value heads of a key head")
        key, value = module.head_k_dim, module.head_v_dim
        if child == "in_proj_qkvz" and per_head:
            return MatrixLayout((key, key, *(value,) * (2 * share)), keys, separate=True)
        if child == "in_proj_qkvz":
            return MatrixLayout((key, key, share * value, share * value), keys)
        if child == "in_proj_qkv" and per_head:
            return MatrixLayout((*(key,) * (2 * keys), *(value,) * values))
        if child == "in_proj_qkv":
            return MatrixLayout((keys * key, keys * key, values * value))
        if child == "in_proj_ba":
            return MatrixLayout((share, share), keys)
    return None


def _gated(module: nn.Module, child: str, rows: int, per_head: bool) -> MatrixLayout | None:
    """A projection to twice what a later one takes back: gate and up, one after the other."""
    _, columns = _shape(module, child)
    children = list(module._modules)
    for name in children[children.index(child) + 1 :]:
        if _is_linear(module, name) and _shape(module, name) == (columns, rows / 2):
            return MatrixLayout((rows // 2, rows // 2))
    return None


def _grouped(module: nn.Module, child: str, rows: int, per_head: bool) -> MatrixLayout | None:
    """A linear layer of groups that each have inputs of their own (DeepSeek-V4)."""
    layer = module.get_submodule(child)
    if not type(layer).__name__.endswith("GroupedLinear"):
        return None
    groups = _number(layer, "n_groups")
    if groups is None:
        raise ValueError("it does not tell the number of its groups")
    return MatrixLayout((_divide(rows, groups, "rows of a group"),), groups, separate=True)


def _of_own(module: Any, name: str, weight: Tensor, per_head: bool) -> MatrixLayout:
    """Of what a module keeps itself: experts, mostly."""
    kind = type(module).__name__
    if kind == "XLNetRelativeAttention" and name in ("q", "k", "v", "r", "o"):
        hidden, heads, dim = weight.shape
        view = (hidden, heads * dim)
        if per_head and name != "o":
            return MatrixLayout((dim,), heads, separate=True, transposed=True, view=view)
        return MatrixLayout(transposed=name != "o", view=view)
    if name == "x_proj_weight" and hasattr(module, "ssm_state_size"):  # Zamba
        state = module.ssm_state_size
        return MatrixLayout((weight.size(-2) - 2 * state, state, state))
    if name in ("w1", "v1", "w2") and hasattr(module, "moe_num_experts"):  # DBRX: [E * ffn, hidden]
        experts = module.moe_num_experts
        rows = _divide(weight.size(0), experts, "rows of an expert")
        if name == "w2":
            return MatrixLayout(transposed=True, view=(experts, rows, weight.size(1)))
        return MatrixLayout((rows,), experts, separate=True)
    down, fused = (module._parameters.get(which) for which in ("down_proj", "gate_up_proj"))
    if weight.ndim != 3 or down is None or name not in ("down_proj", "gate_up_proj", "up_proj"):
        return WHOLE
    transposed = getattr(module, "is_transposed", None)
    if transposed is None:
        transposed = fused is not None and fused.size(-1) == 2 * down.size(-2)
    if name != "gate_up_proj":
        return MatrixLayout(transposed=transposed)
    half = _divide(weight.size(-1 if transposed else -2), 2, "rows of gate and of up")
    if getattr(module, "is_concatenated", True):
        return MatrixLayout((half, half), transposed=transposed)
    return MatrixLayout((1, 1), half, transposed=transposed)


# ---------------------------------------------------------------------- what modules tell


def _is_linear(module: nn.Module, child: str) -> bool:
    layer = module._modules.get(child)
    weight = None if layer is None else layer._parameters.get("weight")
    return weight is not None and weight.ndim in (2, 3) and not _is_torchs_own(layer)  # type: ignore[arg-type]


def _is_transposed(module: nn.Module, child: str) -> bool:
    """Whether it is the Conv1D of GPT-2, whose weight is [in, out]."""
    return type(module._modules[child]).__name__ == "Conv1D"


def _shape(module: nn.Module, child: str) -> tuple[int, int]:
    """Outputs and inputs of a linear child."""
    layer: Any = module._modules[child]
    rows, columns = layer.weight.shape[-2:]
    return (columns, rows) if _is_transposed(module, child) else (rows, columns)


def _number(module: nn.Module, *names: str) -> int | None:
    """The first of these attributes that is a number, of the module before its configuration."""
    for source in (module, getattr(module, "config", None)):
        for name in names:
            value = getattr(source, name, None)
            if type(value) is int:
                return value
    return None


def _present(*blocks: int) -> tuple[int, ...]:
    return tuple(block for block in blocks if block)


def _divide(whole: int, parts: int, what: str) -> int:
    if parts < 1 or whole % parts:
        raise ValueError(f"{whole} / {parts} {what} is no whole number")
    return whole // parts
