"""Layers with Transformer Engine's parameters and collectives, in plain torch."""

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn


class _Gather(torch.autograd.Function):
    """All-gather the first dimension; backward: reduce-scatter."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return _all_gather(x, group)

    @staticmethod
    def backward(ctx, grad):
        return _reduce_scatter(grad, ctx.group), None


class _ReduceScatter(torch.autograd.Function):
    """Reduce-scatter the first dimension; backward: all-gather."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return _reduce_scatter(x, group)

    @staticmethod
    def backward(ctx, grad):
        return _all_gather(grad, ctx.group), None


def _all_gather(x, group):
    parts = [
        torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(group.size())
    ]
    dist.all_gather(parts, x.contiguous(), group=group)
    return torch.cat(parts)


def _reduce_scatter(x, group):
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total.chunk(group.size())[group.rank()].clone()


class _Module(nn.Module):
    """A module with an extra state, as all of Transformer Engine's have."""

    def get_extra_state(self):
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, _state):
        pass


class RMSNorm(nn.Module):
    def __init__(
        self, normalized_shape=None, eps=1e-5, sequence_parallel=None, params_dtype=None,
        zero_centered_gamma=False, hidden_size=None, device="cuda",
    ):  # fmt: skip
        super().__init__()
        assert not zero_centered_gamma
        size = hidden_size if normalized_shape is None else normalized_shape
        self.weight = nn.Parameter(torch.ones(size, device=device, dtype=params_dtype))
        self.weight.sequence_parallel = sequence_parallel
        self.eps = eps

    def forward(self, x):
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class LayerNorm(RMSNorm):
    def forward(self, x):
        raise NotImplementedError


class _Linear(_Module):
    def __init__(
        self, in_features, out_features, sequence_parallel=False, fuse_wgrad_accumulation=False,
        tp_group=None, tp_size=1, get_rng_state_tracker=None, rng_tracker_name=None,
        init_method=None, bias=True, return_bias=False, params_dtype=None, parallel_mode=None,
        device="cuda", num_gemms=None,
    ):  # fmt: skip
        super().__init__()
        assert not (bias or return_bias or fuse_wgrad_accumulation)
        assert parallel_mode in (None, "row", "column")
        self.in_features, self.out_features = in_features, out_features
        self.tp_size = tp_size if tp_group is None else tp_group.size()
        self.tp_group, self.parallel_mode = tp_group, parallel_mode
        self.use_bias = bias
        if parallel_mode == "column":
            self.out_features //= self.tp_size
        if parallel_mode == "row":
            self.in_features //= self.tp_size
        self.sequence_parallel = self.tp_size > 1 and sequence_parallel
        self.num_gemms = num_gemms
        for name in ["weight"] if num_gemms is None else [f"weight{i}" for i in range(num_gemms)]:
            shape = (self.out_features, self.in_features)
            weight = nn.Parameter(torch.empty(shape, device=device, dtype=params_dtype))
            weight.tensor_model_parallel = True  # also of whole weights, as in the original
            weight.partition_dim = 1 if parallel_mode == "row" else 0
            self.register_parameter(name, weight)
        self.weight_names = ["weight"]

    def _multiply(self, x):
        if self.tp_size > 1 and self.parallel_mode == "column":
            assert self.sequence_parallel
            x = _Gather.apply(x, self.tp_group)
        weights = [getattr(self, name) for name in self.weight_names]
        y = F.linear(x, weights[0] if len(weights) == 1 else torch.cat(weights))
        if self.tp_size > 1 and self.parallel_mode == "row":
            assert self.sequence_parallel
            y = _ReduceScatter.apply(y, self.tp_group)
        return y


class Linear(_Linear):
    def forward(self, inp, is_first_microbatch=None):
        return self._multiply(inp)


class LayerNormLinear(_Linear):
    def __init__(
        self, in_features, out_features, eps=1e-5, normalization="LayerNorm",
        return_layernorm_output=False, zero_centered_gamma=False, **options,
    ):  # fmt: skip
        super().__init__(in_features, out_features, **options)
        assert normalization == "RMSNorm" and not return_layernorm_output
        self.eps = eps
        dtype, device = self.weight.dtype, self.weight.device
        self.layer_norm_weight = nn.Parameter(torch.ones(in_features, dtype=dtype, device=device))
        self.layer_norm_weight.sequence_parallel = self.sequence_parallel

    def forward(self, inp, is_first_microbatch=None):
        gain = self.layer_norm_weight
        return self._multiply(F.rms_norm(inp, gain.shape, gain, self.eps))


class GroupedLinear(_Linear):
    def __init__(self, num_gemms, in_features, out_features, ub_name=None, **options):
        super().__init__(in_features, out_features, num_gemms=num_gemms, **options)

    def forward(self, inp, m_splits, is_first_microbatch=None):
        assert sum(m_splits) == len(inp)
        parts = zip(inp.split(m_splits), range(self.num_gemms), strict=True)
        return torch.cat([F.linear(x, getattr(self, f"weight{i}")) for x, i in parts])


class DotProductAttention(_Module):
    """Causal attention within the documents of one row ("thd")."""

    def __init__(
        self, num_attention_heads, kv_channels, num_gqa_groups=None, attention_dropout=0.1,
        attn_mask_type="causal", sequence_parallel=False, tp_size=1, get_rng_state_tracker=None,
        tp_group=None, layer_number=None, attention_type="self", softmax_scale=None,
        return_max_logit=False,
    ):  # fmt: skip
        super().__init__()
        channels = (kv_channels, kv_channels) if isinstance(kv_channels, int) else kv_channels
        self.hidden_size_per_attention_head_k, self.hidden_size_per_attention_head_v = channels
        self.softmax_scale = softmax_scale or 1 / math.sqrt(channels[0])
        self.return_max_logit = return_max_logit
        assert attention_dropout == 0

    def forward(
        self, query_layer, key_layer, value_layer, attention_mask=None, qkv_format=None,
        cu_seqlens_q=None, cu_seqlens_kv=None, cu_seqlens_q_padded=None,
        cu_seqlens_kv_padded=None, max_seqlen_q=None, max_seqlen_kv=None, attn_mask_type=None,
        pad_between_seqs=None,
    ):  # fmt: skip
        assert (qkv_format, attn_mask_type, attention_mask) == ("thd", "padding_causal", None)
        assert cu_seqlens_q.dtype == torch.int32 and torch.equal(cu_seqlens_q, cu_seqlens_kv)
        lengths = cu_seqlens_q.diff().tolist()
        assert max(lengths) <= max_seqlen_q == max_seqlen_kv
        assert value_layer.shape[-1] == self.hidden_size_per_attention_head_v
        shared = query_layer.shape[1] // key_layer.shape[1]
        parts = (x.split(lengths) for x in (query_layer, key_layer, value_layer))
        documents = zip(*parts, strict=True)
        outputs, largest = [], []
        for document in documents:
            q, k, v = (x.transpose(0, 1) for x in document)
            k, v = (x.repeat_interleave(shared, 0) for x in (k, v))
            logits = q @ k.mT * self.softmax_scale
            later = torch.ones(logits.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
            logits = logits.masked_fill(later, -math.inf)
            largest.append(logits.detach().amax((1, 2)))
            outputs.append((logits.softmax(-1) @ v).transpose(0, 1))
        context = torch.cat(outputs).flatten(1)
        if self.return_max_logit:
            return context, torch.stack(largest).amax(0).to(context.dtype)
        return context
