"""Multi-head latent attention (MLA) with tensor, sequence and context parallelism."""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import CheckpointWithoutOutput
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from torch import Tensor, nn

from pretrain.model.context_parallel import SequenceShare, gather_sequence


class DuplicatedLinear(nn.Linear):
    """MLA's down-projections with the whole weight on every tensor-parallel rank.

    Each rank projects its part of the sequence, as with Transformer Engine. Without it,
    megatron-core splits the layers, although all heads share their outputs.
    """

    def __init__(self, split: ColumnParallelLinear) -> None:
        super().__init__(split.input_size, split.output_size, bias=False, dtype=split.weight.dtype)
        # With sequence parallelism, megatron-core sums the gradients of parameters with this
        # attribute over the tensor-parallel ranks, each of which has a part of the sequence.
        setattr(self.weight, "sequence_parallel", True)  # noqa: B010 (for mypy)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        """Output and no bias, as megatron-core's linear layers return them."""
        return super().forward(x), None


class LatentAttention(MLASelfAttention):  # type: ignore[misc]
    """MLA whose ranks exchange the latent and the rotary key, which all heads share.

    Tensor- and context-parallel ranks have parts of the sequence. In training, each of them
    normalizes the latent and rotates the key of its tokens, gathers those of the whole sequence
    (backward: reduce-scatter), and computes keys and values of its heads from them. A token's
    latent and rotary key have ``kv_lora_rank`` + ``qk_pos_emb_head_dim`` channels (Kimi K2: 576,
    1,152 bytes in bfloat16 per token and layer); its keys and values would have 320 for each of 64
    heads, 36 times as many. Keys and values of the whole sequence are computed on every
    context-parallel rank, so that their memory is proportional to the length of the sequence and
    to the number of local heads.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        groups = self.pg_collection
        self._share = SequenceShare(groups.cp.rank(), groups.cp.size())
        if groups.tp.size() > 1:
            for name in ("linear_q_down_proj", "linear_kv_down_proj"):
                if hasattr(self, name):
                    setattr(self, name, DuplicatedLinear(getattr(self, name)))

    def _resolve_qk_norm_config(self, submodules: Any) -> dict[str, Any]:
        """The layers of the spec, as before megatron-core 0.19.

        If queries have no latent, 0.19 would normalize the hidden states before projecting them,
        as no published model does.
        """
        names = ("linear_q_proj", "linear_q_up_proj", "linear_kv_up_proj")
        return {name: getattr(submodules, name) for name in (*names, "q_layernorm", "kv_layernorm")}

    def get_query_key_value_tensors(
        self, hidden_states: Tensor, *arguments: Any, **options: Any
    ) -> tuple[Tensor, ...]:
        """Queries of this rank's tokens, keys and values of all tokens.

        Args:
            hidden_states: [s / (context * tensor), b, h].

        Returns:
            query [s / context, b, heads, d], key [s, b, heads, d] and value [s, b, heads, v] of
            the local heads, and the latents of query and key of this rank's tokens.
        """
        if options.get("inference_context") is not None:  # has a cache, in a single process
            outputs: tuple[Tensor, ...] = super().get_query_key_value_tensors(
                hidden_states, *arguments, **options
            )
            return outputs
        config, tensor = self.config, self.pg_collection.tp
        angles, scale = self._rotary_angles(len(hidden_states) * tensor.size() * self._share.size)
        angles = self._share.take(angles, 0)

        query_latent = hidden_states
        if config.q_lora_rank:
            query_latent = self.q_layernorm(self.linear_q_down_proj(hidden_states)[0])
        compressed, _ = self.linear_kv_down_proj(hidden_states)
        latent, rotary_key = torch.split(
            compressed, [config.kv_lora_rank, config.qk_pos_emb_head_dim], -1
        )
        latent = self.kv_layernorm(latent)
        local_angles = angles.chunk(tensor.size())[tensor.rank()].squeeze(2)
        shared = torch.cat([latent, rotate(rotary_key, local_angles, scale)], -1)

        project = partial(self._project, angles, scale)
        if self.recompute_up_proj:  # in the backward pass, from what all heads share
            self.qkv_up_checkpoint = CheckpointWithoutOutput(fp8=None)  # else it needs TE
            project = partial(self.qkv_up_checkpoint.checkpoint, project)
        query, key, value = project(query_latent, shared)
        return query, key, value, query_latent, latent

    def _project(
        self, angles: Tensor, scale: float, query_latent: Tensor, shared: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value from the latents and rotary keys of this rank's tokens."""
        config, heads = self.config, self.num_attention_heads_per_partition
        project = self.linear_q_up_proj if config.q_lora_rank else self.linear_q_proj
        query: Tensor = project(query_latent)[0]
        query = query.view(*query.shape[:2], heads, self.q_head_dim)
        plain, rotary = torch.split(query, [config.qk_head_dim, config.qk_pos_emb_head_dim], -1)
        query = torch.cat([plain, rotate(rotary, angles, scale)], -1)

        shared = gather_sequence(shared, self.pg_collection.tp_cp, self._share)
        latent, rotary_key = torch.split(
            shared, [config.kv_lora_rank, config.qk_pos_emb_head_dim], -1
        )
        # Not by the layer itself, which would gather its input over the tensor-parallel ranks.
        key_value = F.linear(latent, self.linear_kv_up_proj.weight)
        key_value = key_value.view(*key_value.shape[:2], heads, -1)
        plain, value = torch.split(key_value, [config.qk_head_dim, config.v_head_dim], -1)
        key = torch.cat([plain, rotary_key.unsqueeze(2).expand(-1, -1, heads, -1)], -1)
        return query, key, value.contiguous()

    def _rotary_angles(self, length: int) -> tuple[Tensor, float]:
        """Angles [length, 1, 1, d / 2] of the rotary embedding, and the factor of its table."""
        # megatron-core cuts the table into chunks, on a GPU only, unless packed_seq is True.
        table = self.rotary_pos_emb(length, packed_seq=True)
        table, scale = table if isinstance(table, tuple) else (table, 1.0)
        return table[..., : table.shape[-1] // 2], scale


def rotate(x: Tensor, angles: Tensor, scale: float = 1.0) -> Tensor:
    """Apply a rotary embedding to consecutive pairs of channels.

    As in DeepSeek-V3's code, the first elements of all pairs come first in the result; queries and
    keys are permuted alike.

    Args:
        x: [..., d].
        angles: [..., d / 2], broadcast.
        scale: factor of the result; see YaRN's ``mscale``.
    """
    cos, sin = (angles.cos() * scale).to(x.dtype), (angles.sin() * scale).to(x.dtype)
    first, second = x[..., 0::2], x[..., 1::2]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
