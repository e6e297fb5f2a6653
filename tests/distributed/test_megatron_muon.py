"""megatron-core's tensor, expert, pipeline and data parallelism: the step is that of one process.

Each rank's part of the whole model is taken from megatron-core's own checkpointing
(``sharded_state_dict``), not from the code under test.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from muonclip import MuonClip, param_groups
from muonclip.integrations import megatron_core
from tests.distributed.launch import launch

VOCABULARY, HIDDEN, HEADS, SEQUENCE, BATCH = 64, 32, 4, 8, 4
Piece = tuple[str, tuple[int, ...]]  # a tensor of the whole model, and where in it
Whole = dict[str, dict[tuple[int, ...], Tensor]]  # the pieces by tensor and place
Case = tuple[str, bool]  # the kind of model, and whether heads are orthogonalized apart
CASES: tuple[Case, ...] = (("gqa", False), ("gqa", True), ("mla", False), ("mla", True))


@dataclass(frozen=True)
class Layout:
    """Sizes of the parallel groups."""

    tensor: int = 1
    pipeline: int = 1
    expert: int = 1
    expert_tensor: int | None = None


def build(kind: str, layout: Layout, *, duplicated: bool = False) -> Any:
    """This rank's part of a GPTModel: dense with grouped queries, or MLA with experts.

    With ``duplicated``, tensor parallelism leaves MLA's ``linear_kv_down_proj`` whole, as it is
    with Transformer Engine; otherwise it is cut.
    """
    from megatron.core import parallel_state
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

    from pretrain.model.language import CoreAttention, RMSNorm
    from pretrain.model.latent_attention import DuplicatedLinear
    from pretrain.runtime import without_cuda, without_transformer_engine

    without_cuda.enable()
    without_transformer_engine.enable()
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(
            layout.tensor,
            layout.pipeline,
            expert_model_parallel_size=layout.expert,
            expert_tensor_parallel_size=layout.expert_tensor,
        )
        model_parallel_cuda_manual_seed(1)
    common: dict[str, Any] = {
        "num_layers": 2,
        "hidden_size": HIDDEN,
        "ffn_hidden_size": 48,
        "num_attention_heads": HEADS,
        "tensor_model_parallel_size": layout.tensor,
        "pipeline_model_parallel_size": layout.pipeline,
        "sequence_parallel": layout.tensor > 1,  # experts ask for it
        "pipeline_dtype": torch.float32,
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "activation_func": nn.functional.silu,
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "calculate_per_token_loss": True,
        "perform_initialization": False,
        "use_cpu_initialization": True,
        "gradient_accumulation_fusion": False,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        "persist_layer_norm": False,
    }
    if kind == "gqa":
        config = TransformerConfig(
            **common, num_query_groups=2, kv_channels=8, attention_output_gate=True
        )
    else:
        config = MLATransformerConfig(
            **common,
            expert_model_parallel_size=layout.expert,
            expert_tensor_parallel_size=parallel_state.get_expert_tensor_parallel_world_size(),
            q_lora_rank=16,
            kv_lora_rank=12,
            qk_head_dim=8,
            qk_pos_emb_head_dim=4,
            v_head_dim=8,
            rope_type="rope",
            qk_layernorm=True,
            num_moe_experts=4,
            moe_layer_freq=[0, 1],
            moe_router_topk=2,
            moe_ffn_hidden_size=24,
            moe_shared_expert_intermediate_size=24,
            moe_router_score_function="sigmoid",
            moe_router_load_balancing_type="none",
            moe_token_dispatcher_type="alltoall",
        )
    spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False)
    spec.layer_norm = RMSNorm
    for layer in spec.layer_specs:
        layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = RMSNorm
        if kind == "mla":
            attention = layer.submodules.self_attention.submodules
            attention.core_attention = CoreAttention
            attention.q_layernorm = attention.kv_layernorm = RMSNorm
    model = GPTModel(
        config=config,
        transformer_layer_spec=spec,
        vocab_size=VOCABULARY,
        max_sequence_length=SEQUENCE,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        position_embedding_type="rope" if kind == "gqa" else "none",
        share_embeddings_and_output_weights=False,
    )
    if duplicated and layout.tensor > 1 and kind == "mla":
        for layer in model.decoder.layers:
            attention = layer.self_attention
            attention.linear_kv_down_proj = DuplicatedLinear(attention.linear_kv_down_proj)
    return model


def pieces(model: Any) -> Iterator[tuple[nn.Parameter, Tensor, Any]]:
    """Every part of a parameter that lies together in a tensor of the whole model."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

    parameters = {parameter.data_ptr(): parameter for parameter in model.parameters()}
    for entry in model.sharded_state_dict().values():
        parts = entry.build() if isinstance(entry, ShardedTensorFactory) else [entry]
        for part in parts:
            if isinstance(part, ShardedTensor):
                yield parameters[entry.data.data_ptr()], part.data.detach(), part


def whole_piece(part: Any, what: str) -> Tensor:
    """This rank's part of a random tensor of the whole model."""
    digest = hashlib.sha256(f"{what}:{part.key}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    whole = torch.randn(part.global_shape, generator=generator)
    first = part.prepend_axis_num
    where = [slice(start, start + 1) for start in part.global_offset[:first]]
    where += [
        slice(start, start + size)
        for start, size in zip(part.global_offset[first:], part.local_shape, strict=True)
    ]
    return whole[tuple(where)].view(part.local_shape)


def start(model: Any) -> None:
    for _, values, part in pieces(model):
        values.copy_(whole_piece(part, "weight") * 0.1)


def give_gradients(model: Any, step: int) -> None:
    for parameter, values, part in pieces(model):
        if parameter.grad is None:
            parameter.grad = torch.empty_like(parameter)
        offset = values.storage_offset() - parameter.storage_offset()
        gradient = parameter.grad.as_strided(values.shape, values.stride(), offset)
        gradient.copy_(whole_piece(part, f"gradient {step}"))


def results(model: Any) -> dict[Piece, Tensor]:
    return {(part.key, part.global_offset): values.clone() for _, values, part in pieces(model)}


def optimizer_for(model: Any, per_head: bool) -> MuonClip:
    placed = megatron_core.shardings(model)
    layouts = megatron_core.matrix_layouts(model, per_head=per_head)
    return MuonClip(
        param_groups(model, layouts=layouts, shardings=placed),
        lr=0.02,
        ns_dtype=torch.float64,
        adjust_lr="original",  # a scale that distinguishes rows from columns
        adamw_eps=1e-4,  # so that rounding errors of tiny gradients do not matter
        variant="muon" if per_head else "normuon",
        shardings=placed,
    )


def steps_with_given_gradients(layout: Layout) -> dict[Case, tuple[dict[Piece, Tensor], int]]:
    """Three steps; what this rank then has, and how many matrices it shares with others."""
    outcomes = {}
    for kind, per_head in CASES:
        model = build(kind, layout)
        start(model)
        optimizer = optimizer_for(model, per_head)
        for step in range(3):
            give_gradients(model, step)
            optimizer.step()
        outcomes[kind, per_head] = results(model), len(optimizer.shardings)
    return outcomes


def merged(ranks: list[dict[Piece, Tensor]]) -> Whole:
    """The pieces of all ranks; copies must be equal to the bit."""
    whole: Whole = {}
    for rank in ranks:
        for (key, place), values in rank.items():
            found = whole.setdefault(key, {})
            if place in found:
                assert torch.equal(found[place], values), f"copies of {key} differ"
            found[place] = values
    return whole


def assert_same(parts: Whole, reference: Whole, tolerance: float) -> None:
    """Tensor by tensor, however each is cut."""
    assert parts.keys() == reference.keys()
    for key in reference:
        ours, theirs = _assembled(parts[key]), _assembled(reference[key])
        assert ours.shape == theirs.shape, key
        error = (ours - theirs).norm() / theirs.norm()
        assert error <= tolerance, f"{key}: {error:.1e}"


def _assembled(parts: dict[tuple[int, ...], Tensor]) -> Tensor:
    placed = {place: values.view((1,) * (len(place) - values.ndim) + values.shape)
              for place, values in parts.items()}  # fmt: skip
    shape = [
        max(place[d] + values.shape[d] for place, values in placed.items())
        for d in range(len(next(iter(placed))))
    ]
    whole = torch.full(shape, torch.nan)
    for place, values in placed.items():
        where = [slice(start, start + n) for start, n in zip(place, values.shape, strict=True)]
        whole[tuple(where)] = values
    assert not whole.isnan().any(), "a part is missing"
    return whole


@pytest.fixture(scope="module")
def alone() -> dict[Case, Whole]:
    """The result of one process."""
    (outcomes,) = launch(steps_with_given_gradients, 1, Layout())
    assert all(shared == 0 for _, shared in outcomes.values())
    return {case: merged([pieces]) for case, (pieces, _) in outcomes.items()}


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        pytest.param(2, Layout(tensor=2), id="tp"),
        pytest.param(2, Layout(expert=2), id="ep"),
        pytest.param(4, Layout(tensor=4), id="tp-more-ranks-than-key-groups"),
        pytest.param(4, Layout(tensor=2, pipeline=2), id="tp-pp"),
        pytest.param(4, Layout(pipeline=2), id="pp-dp"),
        pytest.param(4, Layout(expert=2), id="ep-dp"),
        pytest.param(4, Layout(tensor=2, expert=2, expert_tensor=2), id="tp-ep-experts-cut"),
        pytest.param(4, Layout(tensor=2, expert=2, expert_tensor=1), id="tp-ep-experts-whole"),
        pytest.param(4, Layout(tensor=2, expert_tensor=1), id="tp-dp-experts-whole"),
    ],
)
def test_given_gradients(alone: dict[Case, Whole], ranks: int, layout: Layout) -> None:
    """MLM#5961: Newton-Schulz on shards is other maths."""
    outcomes = launch(steps_with_given_gradients, ranks, layout)
    for case in CASES:
        assert all(outcome[case][1] > 0 for outcome in outcomes)
        assert_same(merged([outcome[case][0] for outcome in outcomes]), alone[case], 1e-5)


# ---------------------------------------------------------------------- a training run


def train(kind: str, layout: Layout) -> tuple[dict[Piece, Tensor], list[float]]:
    """Three steps of megatron-core's schedule, data-parallel wrapper and gradient buffers."""
    from megatron.core import parallel_state
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.pipeline_parallel.schedules import get_forward_backward_func

    # Cut, its rotary key's gradient would lack other ranks' heads: megatron-core 0.16 leaves them.
    model = build(kind, layout, duplicated=True)
    start(model)
    replicas = DistributedDataParallel(model.config, DistributedDataParallelConfig(), model)
    model.config.finalize_model_grads_func = finalize_model_grads
    model.config.no_sync_func = replicas.no_sync
    optimizer = optimizer_for(replicas, False)
    everyones = torch.randint(
        VOCABULARY, (3, BATCH, SEQUENCE + 1), generator=torch.Generator().manual_seed(0)
    )
    rank = parallel_state.get_data_parallel_rank()
    share = BATCH // parallel_state.get_data_parallel_world_size()
    later = torch.ones(SEQUENCE, SEQUENCE, dtype=torch.bool).triu(1)[None, None]
    mask = later if kind == "gqa" else None  # CoreAttention is causal
    losses: list[float] = []

    def forward_step(batches: Any, network: nn.Module) -> tuple[Tensor, Any]:
        batch = next(batches)
        output = network(batch[:, :-1], torch.arange(SEQUENCE)[None], mask, labels=batch[:, 1:])
        return output, lambda values: (values.sum(), torch.tensor(values.numel()), {"loss": values})

    for batch in everyones:
        replicas.zero_grad_buffer()
        mine = batch[rank * share : (rank + 1) * share].split(1)
        stored = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter(mine),
            model=[replicas],
            num_microbatches=len(mine),
            seq_length=SEQUENCE,
            micro_batch_size=1,
            forward_only=False,
        )
        for parameter in model.parameters():
            parameter.grad = parameter.main_grad
        optimizer.step()
        optimizer.zero_grad()
        losses += [float(entry["loss"].detach().mean()) for entry in stored]
    return results(model), losses


@pytest.mark.parametrize(
    ("ranks", "kind", "layout"),
    [
        (4, "gqa", Layout(tensor=2)),
        (4, "gqa", Layout(tensor=2, pipeline=2)),
        (4, "mla", Layout(expert=2, pipeline=2)),
        (4, "mla", Layout(tensor=2, expert=2, expert_tensor=1)),
    ],
    ids=["tp-dp", "tp-pp", "ep-pp", "tp-ep"],
)
def test_a_training_run(ranks: int, kind: str, layout: Layout) -> None:
    """Its gradients come from megatron-core's buffers; their own rounding differs by layout."""
    ((reference, losses),) = launch(train, 1, kind, Layout())
    outcomes = launch(train, ranks, kind, layout)
    assert_same(merged([pieces for pieces, _ in outcomes]), merged([reference]), 1e-5)
    together = [loss for _, theirs in outcomes for loss in theirs]
    assert set(together) and min(together) > 0 and losses[0] != losses[-1]


# ---------------------------------------------------------------------- what goes wrong


def step_without_a_gradient(lacking: int) -> str:
    model = build("gqa", Layout(tensor=2))
    start(model)
    optimizer = optimizer_for(model, False)
    for index, parameter in enumerate(model.parameters()):
        missing = index == 2 and dist.get_rank() == lacking
        parameter.grad = None if missing else torch.ones_like(parameter)
    before = {place: values.clone() for place, values in results(model).items()}
    with pytest.raises(ValueError, match="update different parameters") as error:
        optimizer.step()
    assert all(torch.equal(values, before[place]) for place, values in results(model).items())
    return str(error.value)


@pytest.mark.parametrize("lacking", [0, 1])
def test_a_gradient_missing_on_one_rank_is_an_error_on_all(lacking: int) -> None:
    """A clear one, before anything moves: otherwise ranks would wait for each other for ever."""
    messages = launch(step_without_a_gradient, 2, lacking)
    assert len(set(messages)) == 1
    assert "every rank of a group must have gradients for the same ones" in messages[0]


def make_shardings(distributed_optimizer: bool) -> str:
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    model = build("gqa", Layout(tensor=2))
    config = DistributedDataParallelConfig(use_distributed_optimizer=distributed_optimizer)
    wrapped = DistributedDataParallel(model.config, config, model)
    with pytest.raises(ValueError) as error:
        megatron_core.shardings(wrapped)
    return str(error.value)


def test_partial_gradients_are_refused() -> None:
    for message in launch(partial(make_shardings, True), 2):
        assert "set use_distributed_optimizer=False" in message
