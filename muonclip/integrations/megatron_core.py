"""megatron-core's GPTModel: its attention layouts, fused matrices, and shards.

>>> shards = shardings(model)  # doctest: +SKIP
>>> groups = param_groups(model, layouts=matrix_layouts(model), shardings=shards)  # doctest: +SKIP
>>> optimizer = MuonClip(groups, shardings=shards)  # doctest: +SKIP

Modules are recognized by class name and attributes, with or without Transformer Engine. Only
``shardings`` imports megatron-core, for its process groups.
"""

from collections.abc import Iterable, Sequence
from fnmatch import fnmatch
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from muonclip.attention_layouts import AttentionLayout, HeadRows, NormalizedAttentionError
from muonclip.matrix_layouts import MatrixLayout
from muonclip.param_groups import part_of_matrix

if TYPE_CHECKING:
    import torch.distributed as dist

    from muonclip.distributed.sharding import Sharding

_MLA = ("MLASelfAttention", "AbsorbedMLASelfAttention")


def attention_layouts(
    model: nn.Module, *, exclude: str | Sequence[str] = ()
) -> dict[str, AttentionLayout]:
    """The layouts of a model's self-attention layers, for ``QKClip``.

    Under tensor parallelism they describe the local heads.

    Args:
        model: a GPTModel or a module that contains one; layers without attention are skipped.
        exclude: pattern or patterns (``fnmatch``) of layer names to leave out.

    Returns:
        Module name, e.g. ``"decoder.layers.0.self_attention"`` -> layout.

    Raises:
        ValueError: for an attention whose logits do not follow the scale of its weights (a norm on
            query or key), whose heads are split over ranks (fewer key groups than tensor-parallel
            ranks), or whose class is unknown or cross-attention.
    """
    return {
        name: attention_layout(name, module)
        for name, module in attention_modules(model).items()
        if not _is_excluded(name, exclude)
    }


def attention_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The attention modules of a model by name; not those inside another one."""
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        is_known = _is_a(module, *_MLA, "SelfAttention")
        if is_known or (_is_attention(module) and not _is_within(name, found)):
            found[name] = module
    return found


def attention_layout(name: str, module: nn.Module) -> AttentionLayout:
    """The layout of one of the ``attention_modules``; ``name`` is for errors.

    Raises:
        NormalizedAttentionError, ValueError: as ``attention_layouts``.
    """
    if _is_a(module, *_MLA):
        return _mla(module)
    if _is_a(module, "SelfAttention"):
        return _gqa(name, module)
    raise ValueError(
        f"{name} is {type(module).__name__}, an attention whose query and key rows are not "
        "known, so QK-Clip would not clip it: leave it out with exclude, and add its "
        "AttentionLayout to the result"
    )


def matrix_layouts(
    model: nn.Module, *, per_head: bool = False, exclude: str | Sequence[str] = ()
) -> dict[str, MatrixLayout]:
    """The matrices of the model that its parameters fuse, for ``param_groups``.

    - gate and up in ``linear_fc1`` of gated MLPs, including experts;
    - query, key, value and an output gate in ``linear_qkv``, key and value in ``linear_kv``;
    - the outputs of ``in_proj`` of Mamba and gated delta nets;
    - the experts that ``GroupedMLP`` stores in one parameter;
    - in MLA the matrices of the DeepSeek-V2 report (arXiv 2405.04434, section 2.1): W^DKV and W^KR
      in ``linear_kv_down_proj``, W^UK and W^UV in ``linear_kv_up_proj``, W^UQ and W^QR in
      ``linear_q_up_proj`` (or ``linear_q_proj``); W^DQ, W^DKV and W^KR in ``linear_qkv_down_proj``
      (``mla_down_proj_fusion``).

    Under tensor parallelism they describe the whole parameter, as gathered by ``shardings``.

    Args:
        model: a GPTModel or a module that contains one.
        per_head: orthogonalize the query, key and value rows of each head separately, as for
            GLM-5 (arXiv 2602.15763) and Kimi K3 (arXiv 2607.24653, section 2.5). The output
            projection stays whole, because its heads add up in one output.
        exclude: pattern or patterns (``fnmatch``) of module names to leave out. Their parameters
            are matrices as they are stored, unless you add layouts.

    Returns:
        Parameter name -> its layout.

    Raises:
        ValueError: for an attention of unknown class, whose projections may be fused, and for a
            ``linear_qkv_down_proj`` that tensor parallelism splits.
    """
    layouts: dict[str, MatrixLayout] = {}
    attentions: list[str] = []
    for name, module in model.named_modules():
        if _is_excluded(name, exclude):
            continue
        if _is_a(module, *_MLA, "SelfAttention", "CrossAttention"):
            attentions.append(name)
        elif _is_attention(module) and not _is_within(name, attentions):
            raise ValueError(
                f"{name} is {type(module).__name__}, an attention of unknown class: if its "
                "projections are fused, Muon would orthogonalize them as one matrix. Leave it out "
                "with exclude, and add the MatrixLayout of each fused parameter to the result"
            )
        for child, layout in _fused_matrices(module, per_head).items():
            if child in module._parameters or "." in child:
                layouts[_join(name, child)] = layout
                continue
            for weight_name, _ in _weights(getattr(module, child)):
                layouts[_join(name, child, weight_name)] = layout
    return layouts


def shardings(model: nn.Module) -> "dict[Tensor, Sharding]":
    """The shards of each matrix, for ``MuonClip`` and ``param_groups``.

    Matrices that tensor parallelism splits are gathered for orthogonalization, and matrices that
    several ranks have are orthogonalized by one of them. The tensor-, context- and data-parallel
    ranks of a pipeline stage share the work on its matrices; the expert-tensor- and
    expert-data-parallel ranks share that on their experts. Pipeline stages, and ranks with
    different experts, do not communicate.

    The gradients must be those of the whole global batch on every rank: megatron-core's DDP
    without its distributed optimizer leaves them in ``parameter.main_grad`` (after
    ``finalize_model_grads``); give them to the optimizer by ``parameter.grad =
    parameter.main_grad``.

    A collective call: every rank makes it, with its part of the same model, after
    ``parallel_state.initialize_model_parallel``.

    Args:
        model: a GPTModel, or a module that contains one or several (an ``nn.ModuleList`` of the
            model chunks of virtual pipeline stages).

    Returns:
        Parameter -> its sharding, for every matrix that more than one rank has a shard or copy of.

    Raises:
        ImportError: without megatron-core.
        ValueError: on all ranks, if their parameters differ; for a DDP wrapper that shards the
            gradients, for tensor parallelism in ``GroupedMLP``, and for shards of generalized
            tensor parallelism (GTP).
    """
    import torch.distributed as dist

    from muonclip.distributed.groups import remember
    from muonclip.distributed.sharding import Sharding, TensorShard

    local: dict[bool, dict[Tensor, tuple[tuple[int, ...], TensorShard]]] = {False: {}, True: {}}
    for module in model.modules():
        _check_gradients_are_whole(module)
        for name, parameter in module._parameters.items():
            if parameter is not None and (reason := part_of_matrix(parameter)) is not None:
                raise ValueError(f"{name} of a {type(module).__name__} {reason}")
            if parameter is None or parameter.ndim < 2 or hasattr(parameter, "device_mesh"):
                continue
            is_expert = not getattr(parameter, "allreduce", True)
            dim = _partition_dim(module, parameter)
            shape, offsets = list(parameter.shape), [0] * parameter.ndim
            if dim is not None and (group := _tensor_group(module, is_expert)).size() > 1:
                if _is_a(module, "GroupedMLP"):
                    raise ValueError(
                        "GroupedMLP's matrices cannot be gathered under expert tensor parallelism: "
                        "use TEGroupedMLP or SequentialMLP, or expert_tensor_parallel_size=1"
                    )
                offsets[dim] = shape[dim] * group.rank()
                shape[dim] *= group.size()
            shard = TensorShard(tuple(offsets), tuple(parameter.shape))
            local[is_expert][parameter] = (tuple(shape), shard)

    result: dict[Tensor, Sharding] = {}
    groups: dict[tuple[int, ...], Any] = {}
    for is_expert, get_group in ((False, _dense_group), (True, _expert_group)):
        if local[is_expert] and (group := get_group()).size() > 1:
            remember(replica_group(is_expert))
            # Where all ranks of a stage have the same experts, one group balances all matrices.
            group = groups.setdefault(tuple(dist.get_process_group_ranks(group)), group)
            gathered = Sharding.gather(list(local[is_expert].values()), group)
            result |= dict(zip(local[is_expert], gathered, strict=True))
    return result


# ---------------------------------------------------------------------- layouts of matrices


def _fused_matrices(module: Any, per_head: bool) -> dict[str, MatrixLayout]:
    """The layouts of a module's fused parameters and linear layers, by name."""
    config = getattr(module, "config", None)
    if config is None:
        return {}
    fused: dict[str, MatrixLayout] = {}
    fc1 = getattr(module, "linear_fc1", None)
    if isinstance(fc1, nn.Module) and getattr(config, "gated_linear_unit", False):
        _, weight = _weights(fc1)[0]
        half = weight.size(0) // 2
        # Each tensor-parallel rank has its rows of gate, then its rows of up.
        fused["linear_fc1"] = MatrixLayout((half, half), _row_ranks(fc1, weight, config))
    if _is_a(module, *_MLA):
        heads, value = config.num_attention_heads, config.v_head_dim
        nope, rope = config.qk_head_dim, config.qk_pos_emb_head_dim
        query = "linear_q_proj" if config.q_lora_rank is None else "linear_q_up_proj"
        fused[query] = MatrixLayout((nope, rope), heads, separate=per_head)
        down = getattr(module, "linear_qkv_down_proj", None)
        if hasattr(down, "kv_weight"):  # Transformer Engine's parameters_split
            fused["linear_qkv_down_proj.kv_weight"] = MatrixLayout((config.kv_lora_rank, rope))
        elif down is not None:
            fused["linear_qkv_down_proj"] = _down_projections(module, config)
        else:
            fused["linear_kv_down_proj"] = MatrixLayout((config.kv_lora_rank, rope))
        if not hasattr(module, "linear_k_up_proj"):
            fused["linear_kv_up_proj"] = MatrixLayout((nope, value), heads, separate=per_head)
        elif per_head:
            fused["linear_k_up_proj"] = MatrixLayout((nope,), heads, separate=True)
            fused["linear_v_up_proj"] = MatrixLayout((value,), heads, separate=True)
    elif _is_a(module, "SelfAttention"):
        # Megatron's order: per key group its queries, their output gates, its key and its value.
        dim, groups = config.kv_channels, config.num_query_groups
        queries = config.num_attention_heads // groups
        copies = 2 if getattr(config, "attention_output_gate", False) else 1
        blocks = (
            (dim,) * (queries * copies + 2) if per_head else (*(queries * dim,) * copies, dim, dim)
        )
        fused["linear_qkv"] = MatrixLayout(blocks, groups, separate=per_head)
    elif _is_a(module, "CrossAttention"):
        heads, dim = config.num_attention_heads, config.kv_channels
        fused["linear_kv"] = MatrixLayout((dim, dim), heads, separate=per_head)
        if per_head:
            fused["linear_q"] = MatrixLayout((dim,), heads, separate=True)
    elif _is_a(module, "MambaMixer", "GatedDeltaNet"):
        fused["in_proj"] = _recurrent(module)
    elif _is_a(module, "GroupedMLP"):
        fused |= _grouped(module, config)
    return fused


def _down_projections(module: Any, config: Any) -> MatrixLayout:
    """W^DQ, W^DKV and W^KR in one layer (megatron-core 0.19)."""
    linear = module.linear_qkv_down_proj
    (_, weight), *_ = _weights(linear)
    if (ranks := _row_ranks(linear, weight, config)) > 1:
        raise ValueError(
            f"linear_qkv_down_proj is split over {ranks} tensor-parallel ranks, so that no rank "
            "has consecutive rows of its three matrices: set mla_down_proj_fusion=False"
        )
    return MatrixLayout((config.q_lora_rank, config.kv_lora_rank, config.qk_pos_emb_head_dim))


def _recurrent(module: Any) -> MatrixLayout:
    """Outputs of a recurrent layer's projection, each of them split over tensor-parallel ranks.

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
    """GroupedMLP views weight1 as [experts, hidden, ffn] and weight2 as [experts, ffn, hidden]."""
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


def _row_ranks(linear: nn.Module, weight: Tensor, config: Any) -> int:
    """Number of tensor-parallel ranks that the rows of a weight are split over."""
    if _partition_dim(linear, weight) != 0:
        return 1
    group = _layer_group(linear)
    return int(config.tensor_model_parallel_size if group is None else group.size())


# ---------------------------------------------------------------------- shards


def _partition_dim(module: nn.Module, parameter: Tensor) -> int | None:
    """The dimension along which tensor parallelism splits a parameter; None if it does not.

    The class takes precedence over attributes, which are missing with
    ``perform_initialization=False`` and which Transformer Engine also sets on whole parameters.
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


def _layer_group(module: nn.Module) -> "dist.ProcessGroup | None":
    """The tensor-parallel group of a linear layer, if the layer has one."""
    group = getattr(module, "tp_group", None)
    return getattr(module, "_tp_group", None) if group is None else group


def _tensor_group(module: nn.Module, is_expert: bool) -> "dist.ProcessGroup":
    group: Any = _layer_group(module)
    if group is None and is_expert:
        group = _parallel_state().get_expert_tensor_parallel_group()
    elif group is None:
        group = _parallel_state().get_tensor_model_parallel_group()
    return group  # type: ignore[no-any-return]


def _dense_group() -> "dist.ProcessGroup":
    """The ranks of a pipeline stage."""
    state = _parallel_state()
    return state.get_tensor_and_data_parallel_group(with_context_parallel=True)  # type: ignore[no-any-return]


def _expert_group() -> "dist.ProcessGroup":
    """The ranks that have copies or shards of the same experts; not a group of megatron-core."""
    import torch.distributed as dist

    from muonclip.distributed.groups import group_of_ranks

    state = _parallel_state()
    tensor, data = state.get_expert_tensor_parallel_group(), state.get_expert_data_parallel_group()
    if tensor.size() == 1:
        return data  # type: ignore[no-any-return]
    if data.size() == 1:
        return tensor  # type: ignore[no-any-return]
    gathered: list[list[int]] = [[] for _ in range(data.size())]
    dist.all_gather_object(gathered, dist.get_process_group_ranks(tensor), group=data)
    return group_of_ranks([rank for ranks in gathered for rank in ranks], [tensor, data])


def replica_group(is_expert: bool = False) -> "dist.ProcessGroup":
    """The data- and context-parallel ranks, which have copies of the same shards and heads.

    Args:
        is_expert: of experts; otherwise of all other parameters, as for ``QKClip``.
    """
    state = _parallel_state()
    if is_expert:
        return state.get_expert_data_parallel_group()  # type: ignore[no-any-return]
    return state.get_data_parallel_group(with_context_parallel=True)  # type: ignore[no-any-return]


def is_initialized() -> bool:
    """Whether megatron-core's parallel state is initialized."""
    return bool(_parallel_state().model_parallel_is_initialized())


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
            "megatron-core's data-parallel wrapper shards the gradients, but Muon needs whole "
            "matrices: set use_distributed_optimizer=False and use_megatron_fsdp=False in "
            "DistributedDataParallelConfig"
        )


# ---------------------------------------------------------------------- attention


def _mla(module: Any) -> AttentionLayout:
    config, heads = module.config, module.num_attention_heads_per_partition
    query = module.linear_q_proj if config.q_lora_rank is None else module.linear_q_up_proj
    nope, rope = config.qk_head_dim, config.qk_pos_emb_head_dim
    if hasattr(module, "linear_k_up_proj"):  # absorbed MLA: separate keys and values
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
            raise NormalizedAttentionError(
                f"{name} has a {norm}, which undoes any scaling of the weights before it: QK-Clip "
                "cannot clip there, and the norm already bounds the logits. Leave the layer out "
                "with exclude"
            )
    if module.config.num_query_groups < module.world_size:
        raise ValueError(
            f"{name} has {module.config.num_query_groups} key groups on {module.world_size} "
            "tensor-parallel ranks, so heads are split: use at most one rank per key group"
        )
    return AttentionLayout.fused_by_group(
        module.linear_qkv,
        num_heads=module.num_attention_heads_per_partition,
        num_kv_groups=module.num_query_groups_per_partition,
        output_gate=getattr(module.config, "attention_output_gate", False),
    )


def _weights(linear: nn.Module) -> list[tuple[str, Tensor]]:
    """The matrices of a linear layer: ``weight``, or ``weight0``, ``weight1``… of a grouped one."""
    named = linear.named_parameters(recurse=False)
    return [(name, p) for name, p in named if name.startswith("weight") and p.ndim == 2]


def _is_attention(module: nn.Module) -> bool:
    """Whether a module is an attention by its class name, with matrices in it or its layers.

    The core of an attention, the product of queries and keys, has none.
    """
    if not any("attention" in cls.__name__.lower() for cls in type(module).__mro__):
        return False
    layers = [module, *module.children()]
    return any(p.ndim > 1 for layer in layers for p in layer.parameters(recurse=False))


def _is_excluded(name: str, exclude: str | Sequence[str]) -> bool:
    patterns = (exclude,) if isinstance(exclude, str) else exclude
    components = name.split(".")
    paths = [".".join(components[: end + 1]) for end in range(len(components))]
    return any(fnmatch(path, pattern) for path in paths for pattern in patterns)


def _is_within(name: str, modules: Iterable[str]) -> bool:
    return any(name.startswith(f"{module}.") or not module for module in modules)


def _join(*names: str) -> str:
    return ".".join(name for name in names if name)


def _is_a(module: nn.Module, *class_names: str) -> bool:
    return any(cls.__name__ in class_names for cls in type(module).__mro__)
