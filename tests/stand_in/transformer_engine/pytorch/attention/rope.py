def apply_rotary_pos_emb(*_arguments, **_options):
    raise NotImplementedError("set megatron.apply_rope_fusion=false")
