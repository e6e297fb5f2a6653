"""The routers' selection of experts, by megatron-core's own function."""


def fused_topk_with_score_function(logits, topk, **options):
    from megatron.core.transformer.moe import moe_utils

    return moe_utils.topk_routing_with_score_function(logits, topk, fused=False, **options)


def fused_compute_score_for_moe_aux_loss(*_arguments, **_options):
    raise NotImplementedError


def fused_moe_aux_loss(*_arguments, **_options):
    raise NotImplementedError
