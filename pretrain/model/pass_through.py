"""Options of megatron-core that a run's ``megatron`` and ``ddp`` settings pass on.

An option is passed on if it changes speed or memory, but neither the model nor anything that the
trainer relies on. The tables in this file list these options by ``fnmatch`` patterns, so that those
of later versions need no change.
"""

import contextlib
import difflib
import fnmatch
import os
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from importlib import util
from importlib.metadata import version
from typing import Any, Literal, TypeVar

from pretrain.config import rules
from pretrain.errors import PretrainError
from pretrain.model.kernels import Kernels
from pretrain.runtime import without_cuda

C = TypeVar("C")
Section = Literal["megatron", "ddp"]

_ANYWHERE = {
    "megatron": (
        *("bias_activation_fusion", "bias_dropout_fusion", "cross_entropy_*fusion*"),
        *("recompute_modules", "deterministic_mode", "deallocate_pipeline_outputs"),
        *("moe_token_dispatcher_type", "moe_shared_expert_overlap", "batch_p2p_sync"),
        *("defer_embedding_wgrad_compute", "wgrad_deferral_limit"),
        *("overlap_p2p_comm_warmup_flush", "microbatch_group_size_per_vp_stage"),
    ),
    "ddp": ("overlap_grad_reduce", "bucket_size", "num_buckets"),
}
_ON_GPUS = {
    "megatron": (
        *("gradient_accumulation_fusion", "moe_permute_fusion_into_hybridep"),
        *("moe_flex_dispatcher_*", "moe_deepep_num_sms", "moe_hybridep_num_sms"),
    ),
    "ddp": ("nccl_ub", "disable_symmetric_registration"),
}
_WITH_TRANSFORMER_ENGINE = {
    "megatron": (
        *("apply_rope_fusion", "moe_permute_fusion", "moe_router_fusion", "mla_down_proj_fusion"),
        *("fp8*", "fp4*", "first_last_layers_bf16", "num_layers_at_*_in_bf16"),
        *("cpu_offloading*", "*activation_offload*", "offload_modules", "*offloaded*"),
        *("delta_offload_*", "fine_grained_offloading_*"),
        *("disable_parameter_transpose_cache", "moe_router_padding_for_*", "symmetric_ar_type"),
        *("use_te_activation_func", "fused_residual_rmsnorm"),
    ),
    "ddp": (),
}
_NO_EFFECT = "only megatron-core's own training script uses it"
# Reasons for options that match a pattern above or are often asked for.
_NOT_AVAILABLE = {
    "fp8_param": "checkpoints and Muon need weights in `precision`",
    "fp4_param": "checkpoints and Muon need weights in `precision`",
    "fp8_dot_product_attention": "it computes no max logits, which QK-Clip needs",
    "fp8_multi_head_attention": "it computes no max logits, which QK-Clip needs",
    "recompute_*": "set `recompute`",
    "*_parallel*": "set `parallel`",
    "fp16": "set `precision`",
    "bf16": "set `precision`",
    "params_dtype": "set `precision`",
    "qk_clip*": "set optimizer.qk_clip_threshold",
    "*log_max_attention_logit": "QK-Clip always observes max logits",
    "use_distributed_optimizer": "Muon needs whole matrices on every rank",
    "use_megatron_fsdp": "Muon needs whole matrices on every rank",
    "use_custom_fsdp": "Muon needs whole matrices on every rank",
    "overlap_param_gather": "Muon needs whole matrices on every rank",
    "average_in_collective": "gradients are divided once by the weights of all labels",
    "grad_reduce_in_fp32": "gradients are always reduced in at least float32",
    "check_for_nan_in_grad": "set `faults`",
    "check_for_large_grads": "set `faults`",
    "overlap_moe_expert_parallel_comm": "the trainer does not run layers of two micro-batches "
    "together",
    "delay_wgrad_compute": "the trainer does not run layers of two micro-batches together",
    "moe_enable_deepep": "set moe_token_dispatcher_type to flex",
    "tp_comm_*": "the trainer does not create the buffers that it needs",
    "fp8_quantizer_factory": "it names code that would be run",
    "fp4_quantizer_factory": "it names code that would be run",
    "pad_buckets_*": "it has no effect without the distributed optimizer",
    "disable_bf16_reduced_precision_matmul": _NO_EFFECT,
    "pipeline_model_parallel_comm_backend": _NO_EFFECT,
    "*cuda_graph*": "a graph would repeat the documents of the micro-batch that it was captured "
    "with",
}
# Values that an allowed option cannot have.
_REFUSED_VALUES = {
    ("fp8_recipe", "delayed"): "checkpoints do not keep its scales: set tensorwise, blockwise or "
    "mxfp8",
    ("fp8_recipe", "custom"): "it names code that would be run: set tensorwise, blockwise or mxfp8",
    ("fp4_recipe", "custom"): "it names code that would be run: set nvfp4",
}
# Options without effect unless another one is set.
_PARTS = {
    **dict.fromkeys(
        (
            *("moe_flex_dispatcher_*", "moe_deepep_num_sms", "moe_hybridep_num_sms"),
            "moe_permute_fusion_into_hybridep",
        ),
        "moe_token_dispatcher_type=flex",
    ),
    "bucket_size": "overlap_grad_reduce",
    "num_buckets": "overlap_grad_reduce",
    "disable_symmetric_registration": "nccl_ub",
    "wgrad_deferral_limit": "defer_embedding_wgrad_compute",
    "fp8_*": "fp8",
    "fp4_*": "fp4",
    "first_last_layers_bf16": "fp8",
    "num_layers_at_*_in_bf16": "first_last_layers_bf16",
    "moe_router_padding_for_fp8": "fp8",
    "cpu_offloading_*": "cpu_offloading",
    "offload_modules": "fine_grained_activation_offloading",
}
# Importable packages that an option needs, and where they come from.
_PACKAGES = {
    ("moe_token_dispatcher_type", "flex"): ("deep_ep", "DeepEP or HybridEP", "use alltoall"),
    ("gradient_accumulation_fusion", True): (
        "fused_weight_gradient_mlp_cuda",
        "NVIDIA's apex, with its CUDA extensions",
        "leave it out",
    ),
}
# Values with which an option does nothing.
OFF = (None, False, "none", "alltoall", "allgather", "native")


def check_options(
    section: Section,
    options: Mapping[str, Any],
    config_class: type,
    kernels: Kernels,
    controlled: Sequence[str] = (),
    here: bool = True,
) -> dict[str, Any]:
    """Return the options of a section, if each of them can be passed on.

    Args:
        config_class: megatron-core's dataclass with these options.
        controlled: names that the trainer sets itself.
        here: whether this machine must have what the options need.

    Raises:
        PretrainError: names the first option that is unknown, not passed on, not available with
            these kernels or on this device, or of the wrong type.
    """
    hints = typing.get_type_hints(config_class)
    known = {field.name: field.default for field in fields(config_class)}
    checked = {}
    for name, value in options.items():
        key = f"{section}.{name}"
        value = list(value) if isinstance(value, tuple) else value
        if name not in known:
            raise PretrainError(_unknown(section, name, [*known]))
        if name in controlled or not _passed(section, name):
            raise PretrainError(f"{key} cannot be set: {_reason(name, controlled)}")
        if not _matches(value, hints[name]):
            raise PretrainError(
                f"{key} must be {rules.type_name(hints[name])}, not {rules.shortened(value)}"
            )
        minimum = 1 if known[name] is None else 0
        if isinstance(value, int) and value < minimum:
            raise PretrainError(f"{key} must be at least {minimum}, not {value}")
        if isinstance(value, str) and (name, value) in _REFUSED_VALUES:
            raise PretrainError(f"{key} cannot be {value}: {_REFUSED_VALUES[name, value]}")
        if value not in OFF and value != known[name]:
            _check_kernels(section, name, value, kernels)
            if here:
                _check_available(section, name, value, kernels)
            _check_effect(section, name, options)
        checked[name] = value
    if checked.get("fp8") and "fp8_recipe" not in checked:
        raise PretrainError(f"{section}.fp8 needs {section}.fp8_recipe, whose default is delayed")
    return checked


def build_config(config_class: type[C], section: Section, values: Mapping[str, Any]) -> C:
    """Construct megatron-core's configuration.

    Raises:
        PretrainError: megatron-core refuses a value or a combination of values.
    """
    with explained(section):
        return config_class(**values)


@contextlib.contextmanager
def explained(section: Section) -> Iterator[None]:
    """Raise errors of megatron-core as a :class:`PretrainError` of one line."""
    try:
        yield
    except (ValueError, AssertionError, NotImplementedError, ImportError) as error:
        reason = (str(error).splitlines() or ["it gives no reason"])[0]
        raise PretrainError(
            f"megatron-core refuses the configuration: {reason} (change {section}, or the setting "
            "that this option follows from)"
        ) from error


def _passed(section: Section, name: str) -> bool:
    if name in _NOT_AVAILABLE:
        return False
    tables = (_ANYWHERE, _ON_GPUS, _WITH_TRANSFORMER_ENGINE)
    return any(_in(table, section, name) for table in tables)


def _in(table: Mapping[str, Sequence[str]], section: Section, name: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in table[section])


def _unknown(section: Section, name: str, known: Sequence[str]) -> str:
    installed = f"megatron-core {version('megatron-core')} has no option {section}.{name}"
    similar = difflib.get_close_matches(name, known, n=1)
    if _passed(section, name):
        return f"{installed}, but another version may: install that version, or leave it out"
    return f"{installed}" + (f": did you mean {similar[0]!r}?" if similar else "")


def _reason(name: str, controlled: Sequence[str]) -> str:
    matching = [p for p in _NOT_AVAILABLE if fnmatch.fnmatchcase(name, p)]
    if matching:  # the name itself, or else a pattern
        return _NOT_AVAILABLE[name if name in matching else matching[0]]
    if name in controlled:
        return "the trainer sets it from its own settings"
    return "it changes the model, or the trainer does not support it"


def _check_kernels(section: Section, name: str, value: Any, kernels: Kernels) -> None:
    key = f"{section}.{name}={value}"
    needs_engine = _in(_WITH_TRANSFORMER_ENGINE, section, name) or value == "te"
    if needs_engine and kernels != "transformer_engine":
        raise PretrainError(
            f"{key} needs Transformer Engine, but the kernels are {kernels}: set "
            "kernels=transformer_engine, or leave it out"
        )


def _check_available(section: Section, name: str, value: Any, kernels: Kernels) -> None:
    key = f"{section}.{name}={value}"
    if (_in(_ON_GPUS, section, name) or value == "flex") and not without_cuda.USE_CUDA:
        raise PretrainError(f"{key} needs a GPU, but CUDA is not available: leave it out")
    if (
        name == "deterministic_mode"
        and kernels == "transformer_engine"
        and os.environ.get("NVTE_ALLOW_NONDETERMINISTIC_ALGO") != "0"
    ):
        raise PretrainError(
            f"{key} needs NVTE_ALLOW_NONDETERMINISTIC_ALGO=0 in the environment, which Transformer "
            "Engine reads: set it, or leave the option out"
        )
    if isinstance(value, str | bool) and (name, value) in _PACKAGES:
        package, origin, remedy = _PACKAGES[name, value]
        if util.find_spec(package) is None:
            raise PretrainError(
                f"{key} needs the package {package} ({origin}), which is not installed: "
                f"install it, or {remedy}"
            )


def _check_effect(section: Section, name: str, options: Mapping[str, Any]) -> None:
    for pattern, whole in _PARTS.items():
        option = whole.partition("=")[0]
        if fnmatch.fnmatchcase(name, pattern) and options.get(option) in OFF:
            raise PretrainError(
                f"{section}.{name} has no effect without {section}.{whole}: set that, too, or "
                "leave it out"
            )


def _matches(value: Any, hint: Any) -> bool:
    """Whether a value from a configuration file has an annotated type."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if rules.is_union(hint):
        return any(_matches(value, member) for member in arguments)
    if origin is Literal:
        return isinstance(value, str) and value in arguments
    if origin in (list, tuple):
        return isinstance(value, list) and all(_matches(item, arguments[0]) for item in value)
    if hint is types.NoneType:
        return value is None
    if hint is float:
        return type(value) in (int, float)
    return hint in (bool, int, str) and type(value) is hint
