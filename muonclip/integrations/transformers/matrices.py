"""Matrices that transformers' models fuse in their parameters, by the structure of their modules.

The layouts follow from the names of linear layers, the shapes of their weights, and the sizes that
modules or their configurations state. transformers itself is never imported.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from torch import Tensor, nn

from muonclip.adapters import base_layer, inner_layers
from muonclip.integrations.transformers import structure
from muonclip.matrix_layouts import WHOLE, MatrixLayout


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
    - input projections of Mamba, Mamba-2, gated delta nets and short convolutions;
    - weights stored as [inputs, outputs]: ``Conv1D``, and experts of gpt-oss, Llama 4, DBRX.

    All other parameters are one matrix or a stack of experts and need no layout. ``param_groups``
    handles torch's own modules. Frozen parameters are left out; copies and layers inside PEFT's
    wrappers are those of the module that contains the wrapper.

    Args:
        model: any module that contains models of transformers.
        per_head: orthogonalize the query, key and value rows of each head separately, as for
            GLM-5 (arXiv 2602.15763) and Kimi K3 (arXiv 2607.24653, section 2.5); gated delta nets
            included. The output projection stays whole, because its heads add up in one output.
        exclude: pattern or patterns (``fnmatch``) of parameter names to leave out.

    Returns:
        Parameter name -> its layout.

    Raises:
        UnknownMatricesError: a ``ValueError``, for an unknown trained fused layer, for sizes that
            contradict the module's, and with ``per_head`` for an attention without a known head
            size.
    """
    layouts = {}
    seen: set[str] = set()
    for path, module in model.named_modules():
        for matrix in _matrices(module):
            name = f"{path}.{matrix.name}" if path else matrix.name
            # PEFT's wrappers come after the module that contains them and knows their matrices.
            if name in seen or structure.is_excluded(name, exclude):
                continue
            seen.add(name)
            try:
                layout = _layout(module, matrix, per_head)
                layout.check(matrix.weight.shape)
            except ValueError as error:
                raise UnknownMatricesError(name, type(module).__name__, str(error)) from None
            if layout != WHOLE:
                layouts[name] = layout
    return layouts


class UnknownMatricesError(ValueError):
    """The matrices that a parameter stores are not known.

    Attributes:
        name: of the parameter.
        problem: without a remedy.
    """

    def __init__(self, name: str, module: str, reason: str) -> None:
        self.name, self.problem = name, f"{name} of {module}: {reason}"
        super().__init__(
            f"{self.problem}. Declare its MatrixLayout, or leave it as it is with exclude={name!r}"
        )


class _Matrix(NamedTuple):
    """A trained matrix, or stack of matrices, of a module.

    Attributes:
        name: of the parameter in the module.
        child: the linear child of the module to which it belongs; empty for a parameter of the
            module itself.
        weight: the parameter.
    """

    name: str
    child: str
    weight: Tensor


def _matrices(module: nn.Module) -> Iterator[_Matrix]:
    """Matrices and stacks among a module's parameters, and the weights of its linear children.

    Frozen ones are left out: they may be quantized. PEFT wraps a child, or trains a copy of it.
    """
    for name, parameter in module.named_parameters(recurse=False):
        if name != "weight" and _is_matrix(parameter):
            yield _Matrix(name, "", parameter)
    for child, outer in module.named_children():
        for name, layer in inner_layers(outer, child):
            weight = layer._parameters.get("weight")
            if weight is not None and _is_matrix(weight) and not _is_torch_module(layer):
                yield _Matrix(f"{name}.weight", child, weight)


def _is_matrix(parameter: Tensor) -> bool:
    return parameter.requires_grad and parameter.ndim in (2, 3)


def _is_torch_module(module: nn.Module) -> bool:
    """Whether ``param_groups`` handles the module, whatever its name in its parent."""
    return isinstance(module, nn.modules.conv._ConvNd | nn.Embedding | nn.LayerNorm)


def _layout(module: nn.Module, matrix: _Matrix, per_head: bool) -> MatrixLayout:
    child = matrix.child
    if not child:
        return _direct_parameter(module, matrix.name, matrix.weight, per_head)
    layer = base_layer(module.get_submodule(child))
    rows, _ = structure.linear_shape(layer)
    for rule in (_mla, _recurrent, _fused_attention, _separate_attention, _gated, _grouped):
        layout = rule(module, child, rows, per_head)
        if layout is not None:
            break
    else:
        if "qkv" in child.lower() or "gate_up" in child or child in structure.FUSED_BY_GROUP:
            raise ValueError("the matrices that it fuses and their order are not known")
        layout = WHOLE
    if layout.blocks is not None and len(layout.blocks) == 1 and not layout.separate:
        layout = WHOLE  # for example without a rotary part
    return replace(layout, transposed=structure.is_transposed(layer))


# ---------------------------------------------------------------------- attention


def _mla(module: nn.Module, child: str, rows: int, per_head: bool) -> MatrixLayout | None:
    dims = structure.mla_dims(module)
    if dims is None:
        return None
    if child == "kv_a_proj_with_mqa":
        return MatrixLayout(_nonzero(dims.latent, dims.rope))
    blocks_of_head = {
        "q_proj": (dims.nope, dims.rope),
        "q_b_proj": (dims.nope, dims.rope),
        "q_gate_proj": (dims.nope, dims.rope, dims.value),
        "kv_b_proj": (dims.nope, dims.value),
    }
    if child not in blocks_of_head:
        return None
    blocks = _nonzero(*blocks_of_head[child])
    return MatrixLayout(blocks, _divide(rows, sum(blocks), "rows per head"), separate=per_head)


def _fused_attention(module: Any, child: str, rows: int, per_head: bool) -> MatrixLayout | None:
    class_name = type(module).__name__
    deberta = child == "in_proj" and rows == 3 * getattr(module, "all_head_size", 0)
    key_value = child == "to_kv" or (child == "kv_proj" and hasattr(module, "kv_projection_size"))
    if not (deberta or key_value or child in structure.FUSED + structure.FUSED_BY_GROUP):
        return None
    heads, head_dim = structure.num_heads(module), structure.head_dim(module)
    groups = structure.num_key_heads(module) or heads
    if key_value or getattr(module, "is_cross_attention", False):  # no queries
        half = _divide(rows, 2, "rows of keys and of values")
        if head_dim is None and groups is not None:
            head_dim = _divide(half, groups, "rows per head")
        return _heads((half, half), head_dim, per_head)
    if class_name == "CodeGenAttention":  # four parts, each with its queries, values and keys
        part = _divide(rows, 12, "rows of queries in a quarter")
        return _heads((rows,), head_dim, True) if per_head else MatrixLayout((part,) * 3, 4)
    by_group = (
        deberta
        or child in structure.FUSED_BY_GROUP
        or "LightningAttention" in class_name
        or isinstance(getattr(module, "multi_query", None), bool)
    )
    if heads is None or groups is None:
        if by_group or rows % 3:
            raise ValueError("its module does not state the number of heads")
        return _heads((rows // 3,) * 3, head_dim, per_head)
    dim = _divide(rows, heads + 2 * groups, "rows per head")
    if head_dim not in (None, dim):
        raise ValueError(f"{rows} rows are not {heads} + 2 x {groups} heads of {head_dim}")
    if not by_group:
        return _heads((heads * dim, groups * dim, groups * dim), dim, per_head)
    queries = _divide(heads, groups, "query heads per key head")
    if per_head:
        return MatrixLayout((dim,) * (queries + 2), groups, separate=True)
    return MatrixLayout((queries * dim, dim, dim), groups)


def _separate_attention(
    module: nn.Module, child: str, rows: int, per_head: bool
) -> MatrixLayout | None:
    names = next((names for names in structure.SEPARATE if child in names), None)
    if names is None or not all(_is_linear(module, name) for name in names[:2]):
        return None
    query, _, value = names
    heads, head_dim = structure.num_heads(module), structure.head_dim(module)
    if child == query and heads and head_dim and rows == 2 * heads * head_dim:
        # Each head's queries, then its output gate.
        return MatrixLayout((head_dim, head_dim), heads, separate=per_head)
    if not per_head:
        return WHOLE
    if child == value:
        head_dim = structure.number(module, ("v_head_dim", "head_v_dim")) or head_dim
    if head_dim is None and heads is not None:
        query_rows, _ = structure.linear_shape(module.get_submodule(query))
        head_dim = _divide(query_rows, heads, "rows per head")
    return _heads((rows,), head_dim, per_head)


def _heads(blocks: tuple[int, ...], head_dim: int | None, per_head: bool) -> MatrixLayout:
    """Blocks one after another, or each of their heads separately."""
    if not per_head:
        return MatrixLayout(blocks)
    if head_dim is None:
        raise ValueError("its module does not state the size of its heads")
    return MatrixLayout.per_head(sum(blocks), _divide(sum(blocks), head_dim, "heads"))


# ---------------------------------------------------------------------- other layers


def _recurrent(module: Any, child: str, rows: int, per_head: bool) -> MatrixLayout | None:
    """Input projections of Mamba, gated delta nets and short convolutions."""
    inner, state = (getattr(module, name, None) for name in ("intermediate_size", "ssm_state_size"))
    if inner is not None and state is not None:
        if child == "in_proj" and hasattr(module, "n_mamba_heads"):  # Zamba: x, z alternate
            return MatrixLayout((1, 1), inner)
        if child == "in_proj" and rows == 2 * inner:  # Mamba: x, z
            return MatrixLayout((inner, inner))
        if child == "in_proj":  # Mamba-2: z, x, B, C, step
            shared = module.n_groups * state
            return MatrixLayout((inner, inner, shared, shared, module.num_heads))
        if child == "x_proj":
            return MatrixLayout((rows - 2 * state, state, state))
    if child == "in_proj" and type(module).__name__.endswith("ShortConv"):
        return MatrixLayout((_divide(rows, 3, "rows per gate"),) * 3)
    if child.startswith("in_proj_") and hasattr(module, "head_k_dim"):
        keys, values = module.num_k_heads, module.num_v_heads
        share = _divide(values, keys, "value heads per key head")
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
    """Gate and up in one layer: a later layer of the module maps half of its rows back."""
    _, columns = structure.linear_shape(module.get_submodule(child))
    children = list(module._modules)
    for name in children[children.index(child) + 1 :]:
        if _is_linear(module, name) and structure.linear_shape(module.get_submodule(name)) == (
            columns,
            rows / 2,
        ):
            return MatrixLayout((rows // 2, rows // 2))
    return None


def _grouped(module: nn.Module, child: str, rows: int, per_head: bool) -> MatrixLayout | None:
    """A linear layer of groups with separate inputs (DeepSeek-V4)."""
    layer = base_layer(module.get_submodule(child))
    if not type(layer).__name__.endswith("GroupedLinear"):
        return None
    groups = structure.number(layer, ("n_groups",))
    if groups is None:
        raise ValueError("it does not state the number of its groups")
    return MatrixLayout((_divide(rows, groups, "rows per group"),), groups, separate=True)


def _direct_parameter(module: Any, name: str, weight: Tensor, per_head: bool) -> MatrixLayout:
    """The layout of a parameter without a linear layer around it: mostly experts."""
    if type(module).__name__ == "XLNetRelativeAttention" and name in ("q", "k", "v", "r", "o"):
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
        rows = _divide(weight.size(0), experts, "rows per expert")
        if name == "w2":
            return MatrixLayout(transposed=True, view=(experts, rows, weight.size(1)))
        return MatrixLayout((rows,), experts, separate=True)
    down, fused = (module._parameters.get(key) for key in ("down_proj", "gate_up_proj"))
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


# ---------------------------------------------------------------------- helpers


def _is_linear(module: nn.Module, child: str) -> bool:
    outer = module._modules.get(child)
    if outer is None:
        return False
    layer = base_layer(outer)
    weight = layer._parameters.get("weight")
    return weight is not None and weight.ndim in (2, 3) and not _is_torch_module(layer)


def _nonzero(*blocks: int) -> tuple[int, ...]:
    return tuple(block for block in blocks if block)


def _divide(total: int, divisor: int, quotient: str) -> int:
    if divisor < 1 or total % divisor:
        raise ValueError(f"the number of {quotient}, {total} / {divisor}, is not an integer")
    return total // divisor
