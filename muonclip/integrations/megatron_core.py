"""megatron-core's GPTModel: its attention layouts, the matrices fused in its parameters, and which
part of them each rank holds.

>>> placed = shardings(model)  # doctest: +SKIP
>>> groups = param_groups(model, layouts=matrix_layouts(model), shardings=placed)  # doctest: +SKIP
>>> optimizer = MuonClip(groups, shardings=placed)  # doctest: +SKIP

Modules are recognised by class name and attributes, with or without Transformer Engine; only
``shardings`` imports megatron-core, for its process groups.
"""

from collections.abc import Iterable, Sequence
from fnmatch import fnmatch
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from muonclip.attention_layouts import AttentionLayout, HeadRows
from muonclip.matrix_layouts import MatrixLayout
from muonclip.param_groups import part_of_matrix

# Attention whose projections ``matrix_layouts`` knows.
_ATTENTION = ("MLASelfAttention", "AbsorbedMLASelfAttention", "SelfAttention", "CrossAttention")

if TYPE_CHECKING:
    import torch.distributed as dist

    from muonclip.distributed.sharding import Sharding


def attention_layouts(
    model: nn.Module, *, exclude: str | Sequence[str] = ()
) -> dict[str, AttentionLayout]:
    """The layouts of a model's self-attention layers, for ``QKClip``.

    Under tensor parallelism these are the layouts of the rank's own heads.

    Args:
        model: a GPTModel or any module around one; layers without attention are skipped.
        exclude: pattern or patterns (``fnmatch``) of names of layers to leave out.

    Returns:
        Module name, e.g. ``"decoder.layers.0.self_attention"`` -> layout.

    Raises:
        ValueError: for an attention whose logits do not follow from its weights' scale (a norm on
            query or key) or whose rows are not whole heads (fewer key groups than tensor-parallel
            ranks), and for attention of another class, cross-attention included.
    """
    layouts: dict[str, AttentionLayout] = {}
    for name, module in model.named_modules():
        if _is_excluded(name, exclude):
            continue
        if _is_a(module, "MLASelfAttention") or _is_a(module, "AbsorbedMLASelfAttention"):
            layouts[name] = _mla(module)
        elif _is_a(module, "SelfAttention"):
            layouts[name] = _gqa(name, module)
        elif _is_attention(module) and not _is_within(name, layouts):
            raise ValueError(
                f"{name} is {type(module).__name__}, an attention whose query and key rows are not "
                "known here, so QK-Clip would not watch it: leave it out with exclude, or add its "
                "AttentionLayout to these"
            )
    return layouts


def matrix_layouts(
    model: nn.Module, *, per_head: bool = False, exclude: str | Sequence[str] = ()
) -> dict[str, MatrixLayout]:
    """The matrices of the model that its parameters fuse, for ``param_groups``.

    These are gate and up in ``linear_fc1`` of gated MLPs (experts too); query, key, value and an
    output gate in ``linear_qkv``, key and value in ``linear_kv``; what Mamba and gated delta net
    layers take from ``in_proj``; the experts that ``GroupedMLP`` keeps in one storage. In MLA they
    are the matrices of the DeepSeek-V2 report (arXiv 2405.04434, section 2.1): W^DKV and W^KR in
    ``linear_kv_down_proj``, W^UK and W^UV in ``linear_kv_up_proj``, and W^UQ and W^QR in
    ``linear_q_up_proj`` (or ``linear_q_proj``).

    Under tensor parallelism they describe the whole parameter, as ``shardings`` puts it together.

    Args:
        model: a GPTModel or any module around one.
        per_head: orthogonalize the query, key and value rows of each head on their own, as for
            GLM-5 (arXiv 2602.15763) and Kimi K3 (arXiv 2607.24653, section 2.5). The output
            projection stays whole: its heads add up in one output.
        exclude: pattern or patterns (``fnmatch``) of names of modules to leave out: their
            parameters are matrices as they are stored, or get layouts of your own.

    Returns:
        Parameter name -> its layout.

    Raises:
        ValueError: for attention of a class that is not known, whose projections may be fused.
    """
    layouts: dict[str, MatrixLayout] = {}
    known: list[str] = []
    for name, module in model.named_modules():
        if _is_excluded(name, exclude):
            continue
        if any(_is_a(module, kind) for kind in _ATTENTION):
            known.append(name)
        elif _is_attention(module) and not _is_within(name, known):
            raise ValueError(
                f"{name} is {type(module).__name__}, an attention that is not known here: if its "
                "projections are fused, Muon would take them for one matrix. Leave it out with "
                "exclude, and add the MatrixLayout of each fused parameter to these"
            )
        config = getattr(module, "config", None)
        if config is None:
            continue
        fused: dict[str, MatrixLayout] = {}
        fc1 = getattr(module, "linear_fc1", None)
        if isinstance(fc1, nn.Module) and getattr(config, "gated_linear_unit", False):
            _, weight = _weights(fc1)[0]
            half = weight.size(0) // 2
            # Each tensor-parallel rank has its rows of gate, then its rows of up.
            fused["linear_fc1"] = MatrixLayout((half, half), _parts(fc1, weight, config))
        if _is_a(module, "MLASelfAttention") or _is_a(module, "AbsorbedMLASelfAttention"):
            heads = config.num_attention_heads
            nope, rope = config.qk_head_dim, config.qk_pos_emb_head_dim
            query = "linear_q_proj" if config.q_lora_rank is None else "linear_q_up_proj"
            fused[query] = MatrixLayout((nope, rope), heads, separate=per_head)
            fused["linear_kv_down_proj"] = MatrixLayout((config.kv_lora_rank, rope))
            if not hasattr(module, "linear_k_up_proj"):
                fused["linear_kv_up_proj"] = MatrixLayout(
                    (nope, config.v_head_dim), heads, separate=per_head
                )
            elif per_head:
                fused["linear_k_up_proj"] = MatrixLayout((nope,), heads, separate=True)
                fused["linear_v_up_proj"] = MatrixLayout((config.v_head_dim,), heads, separate=True)
        elif _is_a(module, "SelfAttention"):
            fused["linear_qkv"] = _qkv(config, per_head)
        elif _is_a(module, "CrossAttention"):
            heads, dim = config.num_attention_heads, config.kv_channels
            fused["linear_kv"] = MatrixLayout((dim, dim), heads, separate=per_head)
            if per_head:
                fused["linear_q"] = MatrixLayout((dim,), heads, separate=True)
        elif _is_a(module, "MambaMixer") or _is_a(module, "GatedDeltaNet"):
            fused["in_proj"] = _recurrent(module)
        elif _is_a(module, "GroupedMLP"):
            fused |= _grouped(module, config)
        for owner, layout in fused.items():
            if owner in module._parameters:
                layouts[_join(name, owner)] = layout
                continue
            for weight_name, _ in _weights(getattr(module, owner)):
                layouts[_join(name, owner, weight_name)] = layout
    return layouts


def shardings(model: nn.Module) -> "dict[Tensor, Sharding]":
    """Which part of each matrix every rank holds, for ``MuonClip`` and ``param_groups``.

    What tensor parallelism cuts is rebuilt for its orthogonalization, and what several ranks hold
    is orthogonalized by one of them: the tensor-parallel, context-parallel and data-parallel ranks
    of a pipeline stage share its matrices among each other, the expert-tensor-parallel and
    expert-data-parallel ranks those of their experts. Stages, and the experts of different ranks,
    have nothing to do with each other.

    The gradients must be those of the whole global batch on every rank: megatron-core's DDP
    without its distributed optimizer leaves them in ``parameter.main_grad`` (after
    ``finalize_model_grads``); give them to the optimizer by ``parameter.grad =
    parameter.main_grad``.

    A collective call: every rank makes it, with its part of the same model, after
    ``parallel_state.initialize_model_parallel``.

    Args:
        model: a GPTModel, or any module around one or several (an ``nn.ModuleList`` of the chunks
            of virtual pipeline stages).

    Returns:
        Parameter -> its sharding, for every matrix that more than one rank holds a part of.

    Raises:
        ImportError: without megatron-core.
        ValueError: on all ranks, if they hold different parameters; for a DDP wrapper that leaves
            each rank a part of the gradients, for tensor parallelism in ``GroupedMLP``, and for
            shards of generalized tensor parallelism (GTP).
    """
    from muonclip.distributed.sharding import Sharding, TensorShard

    parts: dict[bool, dict[Tensor, tuple[tuple[int, ...], TensorShard]]] = {False: {}, True: {}}
    for module in model.modules():
        _check_gradients_are_whole(module)
        for name, parameter in module._parameters.items():
            if parameter is not None and (reason := part_of_matrix(parameter)) is not None:
                raise ValueError(f"{name} of a {type(module).__name__} {reason}")
            if parameter is None or parameter.ndim < 2 or hasattr(parameter, "device_mesh"):
                continue
            expert = not getattr(parameter, "allreduce", True)
            dim = _partition_dim(module, parameter)
            shape, offsets = list(parameter.shape), [0] * parameter.ndim
            if dim is not None and (group := _tensor_group(module, expert)).size() > 1:
                if _is_a(module, "GroupedMLP"):
                    raise ValueError(
                        "GroupedMLP under expert tensor parallelism keeps the parts of its experts "
                        "where they are no part of a matrix: use TEGroupedMLP or SequentialMLP, or "
                        "expert_tensor_parallel_size=1"
                    )
                offsets[dim] = shape[dim] * group.rank()
                shape[dim] *= group.size()
            shard = TensorShard(tuple(offsets), tuple(parameter.shape))
            parts[expert][parameter] = (tuple(shape), shard)

    found: dict[Tensor, Sharding] = {}
    for expert, group_of in ((False, _dense_group), (True, _expert_group)):
        if not parts[expert]:
            continue
        group = group_of()
        if group.size() > 1:
            gathered = Sharding.gather(list(parts[expert].values()), group)
            found |= dict(zip(parts[expert], gathered, strict=True))
    return found


# ---------------------------------------------------------------------- layouts of matrices


def _qkv(config: Any, per_head: bool) -> MatrixLayout:
    """Megatron's order: for each key group its queries, (their gates,) its key, its value."""
    dim, groups = config.kv_channels, config.num_query_groups
    queries = config.num_attention_heads // groups
    parts = 2 if getattr(config, "attention_output_gate", False) else 1
    if per_head:
        return MatrixLayout((dim,) * (queries * parts + 2), groups, separate=True)
    return MatrixLayout((*(queries * dim,) * parts, dim, dim), groups)


def _recurrent(module: Any) -> MatrixLayout:
    """Outputs of a recurrent layer's projection; tensor-parallel ranks have a part of each.

    Mamba: z, x, B, C, dt. Gated delta net: query, key, value, gate, beta, alpha.
    """
    if _is_a(module, "MambaMixer"):
        ranks = module.nheads // module.nheads_local_tp
        inner, state = module.d_inner_local_tp, module.ngroups_local_tp * module.d_state
        return MatrixLayout((inner, inner, state, state, module.nheads_local_tp), ranks)
    ranks = module.tp_size
    rows = (module.qk_dim,) * 2 + (module.v_dim,) * 2 + (module.num_value_heads,) * 2
    return MatrixLayout(tuple(count // ranks for count in rows), ranks)


def _grouped(module: Any, config: Any) -> dict[str, MatrixLayout]:
    """GroupedMLP reads weight1 as [experts, hidden, ffn] and weight2 as [experts, ffn, hidden],
    whatever shapes they have."""
    experts = module.num_local_experts
    hidden, columns = module.weight1.shape
    first, second = columns // experts, module.weight2.size(0) // experts
    return {
        "weight1": MatrixLayout(
            (first // 2, first // 2) if config.gated_linear_unit else None,
            transposed=True,
            view=(experts, hidden, first),
        ),
        "weight2": MatrixLayout(transposed=True, view=(experts, second, hidden)),
    }


def _parts(linear: nn.Module, weight: Tensor, config: Any) -> int:
    """On how many ranks the rows of a weight are."""
    if _partition_dim(linear, weight) != 0:
        return 1
    group = _own_group(linear)
    return int(config.tensor_model_parallel_size if group is None else group.size())


# ---------------------------------------------------------------------- who holds what


def _partition_dim(module: nn.Module, parameter: Tensor) -> int | None:
    """The dimension along which tensor parallelism cuts a parameter; None for a whole one.

    By class before attributes: those are missing with ``perform_initialization=False``, and
    Transformer Engine sets them also where nothing is cut.
    """
    names = [cls.__name__ for cls in type(module).__mro__]
    if any("RowParallel" in name for name in names):
        return 1
    if any("ColumnParallel" in name or name == "VocabParallelEmbedding" for name in names):
        return 0
    if "TELinear" in names:  # duplicated
        return None
    if "GroupedMLP" in names:
        return 1 if parameter is module.weight1 else 0
    if getattr(parameter, "tensor_model_parallel", False):
        return max(getattr(parameter, "partition_dim", 0), 0)
    return None


def _own_group(module: nn.Module) -> "dist.ProcessGroup | None":
    """The tensor-parallel ranks that a linear layer was made for."""
    group = getattr(module, "tp_group", None)
    return getattr(module, "_tp_group", None) if group is None else group


def _tensor_group(module: nn.Module, expert: bool) -> "dist.ProcessGroup":
    group = _own_group(module)
    if group is not None:
        return group
    state = _parallel_state()
    found: dist.ProcessGroup = (
        state.get_expert_tensor_parallel_group()
        if expert
        else state.get_tensor_model_parallel_group()
    )
    return found


def _dense_group() -> "dist.ProcessGroup":
    """The ranks of a pipeline stage."""
    group: dist.ProcessGroup = _parallel_state().get_tensor_and_data_parallel_group(
        with_context_parallel=True
    )
    return group


def _expert_group() -> "dist.ProcessGroup":
    """The ranks that hold the same experts, or parts of them: megatron-core has no such group."""
    import torch.distributed as dist

    from muonclip.distributed.groups import group_of_ranks

    state = _parallel_state()
    tensor, data = state.get_expert_tensor_parallel_group(), state.get_expert_data_parallel_group()
    if tensor.size() == 1:
        return data  # type: ignore[no-any-return]
    if data.size() == 1:
        return tensor  # type: ignore[no-any-return]
    neighbours: list[list[int]] = [[] for _ in range(data.size())]
    dist.all_gather_object(neighbours, dist.get_process_group_ranks(tensor), group=data)
    return group_of_ranks([rank for ranks in neighbours for rank in ranks], [tensor, data])


def _parallel_state() -> Any:
    try:
        return import_module("megatron.core.parallel_state")
    except ImportError as error:
        raise ImportError("shardings needs megatron-core: pip install megatron-core") from error


def _check_gradients_are_whole(module: nn.Module) -> None:
    config = getattr(module, "ddp_config", None)
    if getattr(config, "use_distributed_optimizer", False) or getattr(
        config, "use_megatron_fsdp", False
    ):
        raise ValueError(
            "megatron-core's data-parallel wrapper leaves each rank a part of the gradients, but "
            "Muon needs whole matrices: set use_distributed_optimizer=False and "
            "use_megatron_fsdp=False in DistributedDataParallelConfig"
        )


# ---------------------------------------------------------------------- attention


def _mla(module: Any) -> AttentionLayout:
    config, heads = module.config, module.num_attention_heads_per_partition
    query = module.linear_q_proj if config.q_lora_rank is None else module.linear_q_up_proj
    nope, rope = config.qk_head_dim, config.qk_pos_emb_head_dim
    if hasattr(module, "linear_k_up_proj"):  # absorbed MLA, keys and values apart
        rows = torch.arange(heads * (nope + rope)).view(heads, -1)
        return AttentionLayout(
            HeadRows(query, rows[:, :nope]),
            HeadRows(module.linear_k_up_proj, torch.arange(heads * nope).view(heads, -1)),
            HeadRows(query, rows[:, nope:]),
        )
    return AttentionLayout.mla(
        query,
        module.linear_kv_up_proj,
        num_heads=heads,
        nope_dim=nope,
        rope_dim=rope,
        v_dim=config.v_head_dim,
    )


def _gqa(name: str, module: Any) -> AttentionLayout:
    for norm in ("q_layernorm", "k_layernorm"):
        layer = getattr(module, norm, None)
        if layer is not None and not _is_a(layer, "IdentityOp"):
            raise ValueError(
                f"{name} has a {norm}: it undoes any scale of the weights before it, so QK-Clip "
                "cannot act there (and the norm already bounds the logits): leave the layer out "
                "with exclude"
            )
    if module.config.num_query_groups < module.world_size:
        raise ValueError(
            f"{name} has {module.config.num_query_groups} key groups on {module.world_size} "
            "tensor-parallel ranks, so that heads are cut; use at most one rank per key group"
        )
    return AttentionLayout.fused_by_group(
        module.linear_qkv,
        num_heads=module.num_attention_heads_per_partition,
        num_kv_groups=module.num_query_groups_per_partition,
        output_gate=getattr(module.config, "attention_output_gate", False),
    )


def _weights(linear: nn.Module) -> list[tuple[str, Tensor]]:
    """The matrices of a linear layer: ``weight``, or of a grouped one ``weight0``, ``weight1``…"""
    named = linear.named_parameters(recurse=False)
    return [(name, p) for name, p in named if name.startswith("weight") and p.ndim == 2]


def _is_attention(module: nn.Module) -> bool:
    """Whether a module is an attention by its name, and has matrices itself or in its layers.

    The core of an attention, the product of queries and keys alone, has none.
    """
    if not any("attention" in cls.__name__.lower() for cls in type(module).__mro__):
        return False
    layers = [module, *module.children()]
    return any(p.ndim > 1 for layer in layers for p in layer.parameters(recurse=False))


def _is_excluded(name: str, exclude: str | Sequence[str]) -> bool:
    patterns = (exclude,) if isinstance(exclude, str) else exclude
    parts = name.split(".")
    paths = [".".join(parts[: end + 1]) for end in range(len(parts))]
    return any(fnmatch(path, pattern) for path in paths for pattern in patterns)


def _is_within(name: str, modules: Iterable[str]) -> bool:
    return any(name.startswith(f"{module}.") or not module for module in modules)


def _join(*parts: str) -> str:
    return ".".join(part for part in parts if part)


def _is_a(module: nn.Module, class_name: str) -> bool:
    return any(cls.__name__ == class_name for cls in type(module).__mro__)
