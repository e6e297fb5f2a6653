"""Options for megatron-core are passed on, or refused in one line that says why."""

import dataclasses
import sys
from importlib import util
from importlib.metadata import version
from typing import Any

import pytest
import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.transformer.transformer_config import MLATransformerConfig

from pretrain.config import Config, LanguageConfig, ParallelConfig, RecomputeConfig
from pretrain.errors import PretrainError
from pretrain.model.megatron_config import check_megatron, ddp_config, transformer_config
from pretrain.model.pass_through import Section, check_options
from pretrain.plan import plan
from pretrain.runtime import without_cuda

SELECTIVE = RecomputeConfig(granularity="selective")


def build(megatron: dict[str, Any], recompute: RecomputeConfig = SELECTIVE) -> MLATransformerConfig:
    return transformer_config(
        LanguageConfig(), ParallelConfig(), recompute, torch.float32, megatron=megatron
    )


def test_options_arrive_in_the_configuration_of_megatron_core() -> None:
    config = build({"bias_activation_fusion": True, "recompute_modules": ("mla_up_proj",)})
    assert config.bias_activation_fusion and config.recompute_modules == ["mla_up_proj"]
    assert build({}).recompute_modules == ["core_attn"]
    ddp = {"bucket_size": 100, "overlap_grad_reduce": True}
    assert ddp_config(torch.bfloat16, ddp) == DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, **ddp
    )


@pytest.mark.parametrize(
    ("megatron", "message"),
    [
        ({"moe_permute_fusin": True}, "has no option megatron.moe_permute_fusin: did you mean 'mo"),
        ({"fp8_of_a_later_version": True}, "another version may"),
        ({"num_layers": 3}, "megatron.num_layers cannot be set: the trainer sets it"),
        ({"fp16": True}, "megatron.fp16 cannot be set: set `precision`"),
        ({"tensor_model_parallel_size": 2}, "cannot be set: set `parallel`"),
        ({"recompute_granularity": "full"}, "cannot be set: set `recompute`"),
        ({"mtp_num_layers": 1}, "it changes the model, or the trainer does not support it"),
        ({"fp8_param": True}, "checkpoints and Muon need weights"),
        ({"moe_permute_fusion": True}, "needs Transformer Engine, but the kernels are torch"),
        ({"cross_entropy_fusion_impl": "te"}, "needs Transformer Engine"),
        ({"moe_token_dispatcher_type": "flex"}, "needs a GPU"),
        ({"cuda_graph_impl": "local"}, "a graph would repeat the documents"),
        ({"enable_cuda_graph": True}, "a graph would repeat the documents"),
        ({"tp_comm_overlap": True}, "the trainer does not create the buffers"),
        ({"pipeline_model_parallel_comm_backend": "ucc"}, "only megatron-core's own training"),
        ({"fp8_quantizer_factory": "os.system"}, "it names code that would be run"),
        ({"cross_entropy_loss_fusion": True}, "rounds the gradient of the loss to bfloat16"),
        ({"microbatch_group_size_per_vp_stage": 2}, "no effect with parallel.interleave=1"),
        ({"microbatch_group_size_per_vp_stage": 0}, "must be at least 1, not 0"),
        ({"wgrad_deferral_limit": -1}, "must be at least 0, not -1"),
        ({"wgrad_deferral_limit": 2}, "no effect without megatron.defer_embedding_wgrad_compute"),
        ({"recompute_modules": []}, "must name at least one module"),
        ({"bias_activation_fusion": 1}, "megatron.bias_activation_fusion must be bool, not 1"),
        ({"recompute_modules": "mlp"}, "must be a list of str or null, not 'mlp'"),
        ({"recompute_modules": ["x"]}, "megatron-core refuses the configuration: Invalid choices"),
        ({"moe_token_dispatcher_type": "no"}, "must be one of 'allgather', 'alltoall', 'flex'"),
    ],
)  # fmt: skip
def test_other_options_are_refused(megatron: dict[str, Any], message: str) -> None:
    with pytest.raises(PretrainError) as error:
        build(megatron)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("ddp", "message"),
    [
        ({"overlap_grad_reduc": True}, "did you mean 'overlap_grad_reduce'?"),
        ({"use_distributed_optimizer": True}, "Muon needs whole matrices"),
        ({"grad_reduce_in_fp32": False}, "gradients are always reduced in at least float32"),
        ({"bucket_size": 100}, "ddp.bucket_size has no effect without ddp.overlap_grad_reduce"),
        ({"bucket_size": 0}, "ddp.bucket_size must be at least 1, not 0"),
        ({"pad_buckets_for_high_nccl_busbw": True}, "no effect without the distributed optimizer"),
        ({"bucket_size": "big"}, "ddp.bucket_size must be int or null, not 'big'"),
        ({"nccl_ub": True}, "ddp.nccl_ub=True needs a GPU"),
    ],
)
def test_other_options_of_gradient_reduction_are_refused(ddp: dict[str, Any], message: str) -> None:
    with pytest.raises(PretrainError) as error:
        ddp_config(torch.float32, ddp)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_recomputed_modules_need_selective_recomputation() -> None:
    with pytest.raises(PretrainError, match=r"needs recompute\.granularity=selective"):
        build({"recompute_modules": ["mlp"]}, RecomputeConfig())


@pytest.mark.parametrize(
    ("language", "megatron", "message"),
    [
        ({"dense_layers": 4}, {"recompute_modules": ["moe"]}, "has moe, which no layer has"),
        ({"dense_layers": 0}, {"recompute_modules": ["mlp"]}, "has mlp, which no layer has"),
        ({"dense_layers": 4}, {"moe_token_dispatcher_type": "flex"}, "without layers of experts"),
        (
            {"shared_expert_ffn_hidden_size": 0},
            {"moe_shared_expert_overlap": True},
            "no effect without shared experts",
        ),
    ],
)
def test_options_without_effect_on_the_model_are_refused(
    monkeypatch: pytest.MonkeyPatch,
    language: dict[str, int],
    megatron: dict[str, Any],
    message: str,
) -> None:
    monkeypatch.setattr(without_cuda, "USE_CUDA", True)
    monkeypatch.setattr(util, "find_spec", lambda _package: True)
    with pytest.raises(PretrainError, match=message):
        transformer_config(
            LanguageConfig(**language),
            ParallelConfig(),
            SELECTIVE,
            torch.float32,
            megatron=megatron,
        )


def test_options_that_contradict_the_pipeline_are_refused() -> None:
    parallel = ParallelConfig(pipeline=2, interleave=2)
    with pytest.raises(PretrainError, match="is still sending"):
        transformer_config(
            LanguageConfig(),
            parallel,
            RecomputeConfig(),
            torch.float32,
            megatron={"deallocate_pipeline_outputs": True},
        )
    for size in (1, 3, 17):
        options = {"microbatch_group_size_per_vp_stage": size}
        run = Config(global_batch_size=16, micro_batch_size=1, parallel=parallel, megatron=options)
        with pytest.raises(PretrainError, match=f"={size} cannot divide 16 micro-"):
            run.check_world_size(2)


def test_options_name_the_package_that_they_need(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(without_cuda, "USE_CUDA", True)
    for options, package in (
        ({"moe_token_dispatcher_type": "flex"}, "deep_ep"),
        ({"gradient_accumulation_fusion": True}, "fused_weight_gradient_mlp_cuda"),
    ):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(PretrainError, match=f"needs the package {package} .* not installed"):
            build(options)


def test_deterministic_attention_needs_a_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformer Engine otherwise raises an error when the model is built."""
    name, options = "NVTE_ALLOW_NONDETERMINISTIC_ALGO", {"deterministic_mode": True}
    arguments: Any = ("megatron", options, MLATransformerConfig, "transformer_engine")
    monkeypatch.delenv(name, raising=False)
    with pytest.raises(PretrainError, match=f"needs {name}=0 in the environment"):
        check_options(*arguments)
    monkeypatch.setenv(name, "0")
    assert check_options(*arguments) == options
    assert build(options).deterministic_mode


@pytest.mark.parametrize("section", ["megatron", "ddp"])
def test_every_field_of_megatron_core_is_passed_on_or_refused_in_one_line(section: Section) -> None:
    config_class = {"megatron": MLATransformerConfig, "ddp": DistributedDataParallelConfig}[section]
    passed = []
    for field in dataclasses.fields(config_class):
        value = None if callable(field.default) else field.default
        try:
            check_options(section, {field.name: value}, config_class, "transformer_engine")
            passed.append(field.name)
        except PretrainError as error:
            assert str(error).startswith(f"{section}.{field.name}") and "\n" not in str(error)
    assert {"megatron": "fp8_margin", "ddp": "overlap_grad_reduce"}[section] in passed
    assert not {"num_layers", "fp16", "use_distributed_optimizer"}.intersection(passed)


def test_an_option_that_is_off_is_accepted_everywhere() -> None:
    build({"moe_permute_fusion": False, "moe_shared_expert_overlap": False, "fp8": None})


def test_the_configuration_of_a_run_is_checked_as_a_whole() -> None:
    assert check_megatron(Config()) == "torch"
    with pytest.raises(PretrainError, match="did you mean 'bucket_size'"):
        check_megatron(Config(ddp={"bucketsize": 1}))
    with pytest.raises(PretrainError, match="needs a GPU, and CUDA is not available"):
        check_megatron(Config(kernels="transformer_engine"))


def test_an_error_names_the_installed_version() -> None:
    with pytest.raises(PretrainError, match=f"megatron-core {version('megatron-core')} has no"):
        build({"zzz": 1})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (Config(megatron={"num_layers": 2}), "megatron.num_layers cannot be set"),
        (Config(ddp={"bucketsize": 2}), "did you mean 'bucket_size'"),
        (Config(kernels="torch", megatron={"moe_permute_fusion": True}), "the kernels are torch"),
        (Config(kernels="transformer_engine"), "needs precision=bfloat16"),
    ],
)
def test_plan_refuses_options_that_no_machine_has(config: Config, message: str) -> None:
    with pytest.raises(PretrainError, match=message):
        plan(config)


def test_plan_accepts_options_that_this_machine_lacks() -> None:
    options = {"moe_token_dispatcher_type": "flex", "moe_permute_fusion": True}
    assert plan(Config(precision="bfloat16", megatron=options))
