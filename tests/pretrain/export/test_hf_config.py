"""Every configuration becomes a ``config.json`` and comes back; others are refused by key."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain.config import LanguageConfig, RopeScalingConfig, VisionConfig
from pretrain.errors import PretrainError
from pretrain.export.hf_config import from_hf_config, to_hf_config
from pretrain.model.weights import language_weights

sizes = st.integers(1, 4096)
MODEL: dict[str, Any] = {
    "num_layers": st.integers(2, 90),
    "hidden_size": st.integers(64, 4096),
    "ffn_hidden_size": sizes,
    "num_heads": st.integers(1, 64),
    "rope_base": st.floats(1.01, 1e7),
    "norm_eps": st.sampled_from([1e-5, 1e-6]),
    "tie_embeddings": st.booleans(),
}
MLA = {
    "q_lora_rank": st.none() | sizes,
    "kv_lora_rank": sizes,
    "rope_scaling": st.one_of(
        st.just(RopeScalingConfig()),
        st.builds(
            RopeScalingConfig,
            factor=st.floats(1.01, 100),
            original_max_position_embeddings=sizes,
            beta_fast=st.floats(1.0, 64.0),
            beta_slow=st.floats(0.1, 1.0),
            mscale=st.just(1.0),
            mscale_all_dim=st.floats(0.0, 2.0),
        ),
    ),
}
GQA = {
    "attention": st.just("gqa"),
    "head_dim": st.integers(1, 64).map(lambda half: 2 * half),
    "num_heads": st.just(24),
    "num_kv_heads": st.sampled_from([1, 8, 24]),
}
EXPERTS = {
    "dense_layers": st.integers(0, 1),
    "num_experts": st.integers(8, 512),
    "experts_per_token": st.integers(1, 8),
    "expert_ffn_hidden_size": st.just(64),
}
DEEPSEEK = {
    "shared_expert_ffn_hidden_size": st.sampled_from([0, 64, 128, 192]),
    "router_scaling": st.floats(0.1, 10),
}
GROUPS = {
    "num_experts": st.just(64),
    "expert_groups": st.sampled_from([4, 8]),
    "expert_groups_per_token": st.just(2),
    "experts_per_token": st.integers(4, 5),
}
SOFTMAX = {"router_score": st.just("softmax")}


def models(*settings: dict[str, Any]) -> st.SearchStrategy[LanguageConfig]:
    """Models with some settings, later ones in place of earlier ones."""
    merged = {name: value for part in settings for name, value in part.items()}
    return st.builds(LanguageConfig, **merged)


def dense(*settings: dict[str, Any]) -> st.SearchStrategy[LanguageConfig]:
    layers = {"num_layers": st.just(3), "dense_layers": st.just(3)}
    return models(MODEL, *settings, layers)


VISION = st.builds(
    VisionConfig,
    num_layers=sizes,
    hidden_size=st.sampled_from([64, 128, 1152]),
    ffn_hidden_size=sizes,
    patch_size=st.integers(2, 32),
    position_grid=st.integers(1, 128),
)
DEEPSEEK_V3 = (
    models(MODEL, MLA, EXPERTS, DEEPSEEK)
    | models(MODEL, MLA, EXPERTS, DEEPSEEK, GROUPS)
    | dense(MLA)
)
UNNORMALIZED = {
    "experts_per_token": st.integers(2, 8),
    "normalize_expert_weights": st.just(False),
}
QWEN3_MOE = {
    "qk_norm": st.just(True),
    "shared_expert_ffn_hidden_size": st.just(0),
    "router_scaling": st.just(1.0),
    "experts_per_token": st.integers(2, 8),
    "normalize_expert_weights": st.booleans(),
}


@given(DEEPSEEK_V3, st.none() | VISION)
def test_configurations_survive_a_round_trip(
    language: LanguageConfig, vision: VisionConfig | None
) -> None:
    check_round_trip(language, vision, "deepseek_v3")


@pytest.mark.parametrize(
    ("model_type", "strategy"),
    [
        ("deepseek_v2", models(MODEL, MLA, EXPERTS, DEEPSEEK, SOFTMAX, UNNORMALIZED)),
        ("qwen3_moe", models(MODEL, GQA, EXPERTS, SOFTMAX, QWEN3_MOE)),
        ("qwen3", dense(GQA, {"qk_norm": st.just(True)})),
        ("llama", dense(GQA)),
    ],
)
def test_language_models_of_other_architectures_survive_a_round_trip(
    model_type: str, strategy: st.SearchStrategy[LanguageConfig]
) -> None:
    @given(strategy)
    def survive(language: LanguageConfig) -> None:
        check_round_trip(language, None, model_type)
        with pytest.raises(PretrainError, match="export it with --text-only"):
            to_hf_config(language, VisionConfig(), 1000, 256, {}, 4)

    survive()


def check_round_trip(
    language: LanguageConfig, vision: VisionConfig | None, model_type: str
) -> None:
    config_json = to_hf_config(language, vision, 1000, 256, {}, 4)
    assert config_json.get("text_config", config_json)["model_type"] == model_type
    fields, vision_fields, vocab_size, *_ = from_hf_config(config_json)
    fields["rope_scaling"] = RopeScalingConfig(**fields["rope_scaling"])
    assert LanguageConfig(**fields) == language
    assert (None if vision_fields is None else VisionConfig(**vision_fields)) == vision
    assert vocab_size == 1000


def test_transformers_keys_and_published_keys_are_read() -> None:
    config_json = to_hf_config(LanguageConfig(), VisionConfig(num_layers=3), 1000, 256, {}, 4)
    for drop in (("vt_", "init_"), ("num_", "hidden", "intermediate", "pos_emb_h", "pos_emb_w")):
        vision = {
            name: value
            for name, value in config_json["vision_config"].items()
            if not name.startswith(drop)
        }
        fields = from_hf_config(config_json | {"vision_config": vision}).vision
        assert VisionConfig(**fields or {}) == VisionConfig(num_layers=3)


ORIGINAL = {"original_max_position_embeddings": 4096}
DEEPSEEK_YARN = {"beta_fast": 32, "beta_slow": 1, "factor": 40, "type": "yarn"}
DEEPSEEK_FILE = {
    **{"attention_bias": False, "attention_dropout": 0.0, "aux_loss_alpha": 0.001, "ep_size": 1},
    **{"hidden_act": "silu", "initializer_range": 0.02, "kv_lora_rank": 512, "moe_layer_freq": 1},
    **{"pretraining_tp": 1, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "seq_aux": True},
    **{"tie_word_embeddings": False, "use_cache": True, "v_head_dim": 128},
}
V3_FILE = DEEPSEEK_FILE | {
    **{"model_type": "deepseek_v3", "norm_topk_prob": True, "scoring_func": "sigmoid"},
    **{"topk_method": "noaux_tc", "n_shared_experts": 1, "num_nextn_predict_layers": 0},
}
BLOCKS = {
    **{"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8"},
    "weight_block_size": [128, 128],
}
QWEN3_FILE = {
    **{"attention_bias": False, "attention_dropout": 0.0, "head_dim": 128, "hidden_act": "silu"},
    **{"initializer_range": 0.02, "max_position_embeddings": 40960, "rms_norm_eps": 1e-06},
    **{"rope_scaling": None, "rope_theta": 1000000, "sliding_window": None, "vocab_size": 151936},
    **{"use_cache": True, "use_sliding_window": False},
}
# Keys of config.json that concern the architecture, and the number of parameters in 10^9, without
# multi-token prediction.
PUBLISHED_FILES: dict[str, tuple[dict[str, Any], float]] = {
    "deepseek-ai/DeepSeek-V3": (
        V3_FILE
        | {"first_k_dense_replace": 3, "hidden_size": 7168, "intermediate_size": 18432}
        | {"max_position_embeddings": 163840, "moe_intermediate_size": 2048, "n_group": 8}
        | {"n_routed_experts": 256, "num_attention_heads": 128, "num_experts_per_tok": 8}
        | {"num_hidden_layers": 61, "num_key_value_heads": 128, "num_nextn_predict_layers": 1}
        | {"q_lora_rank": 1536, "quantization_config": BLOCKS, "rms_norm_eps": 1e-06}
        | {"rope_scaling": DEEPSEEK_YARN | {"mscale": 1.0, "mscale_all_dim": 1.0, **ORIGINAL}}
        | {"rope_theta": 10000, "routed_scaling_factor": 2.5, "topk_group": 4}
        | {"vocab_size": 129280},
        671.0,
    ),
    "moonshotai/Moonlight-16B-A3B": (
        V3_FILE
        | {"first_k_dense_replace": 1, "hidden_size": 2048, "intermediate_size": 11264}
        | {"max_position_embeddings": 8192, "moe_intermediate_size": 1408, "n_group": 1}
        | {"n_routed_experts": 64, "n_shared_experts": 2, "num_attention_heads": 16}
        | {"num_experts_per_tok": 6, "num_hidden_layers": 27, "num_key_value_heads": 16}
        | {"q_lora_rank": None, "rms_norm_eps": 1e-05, "rope_scaling": None}
        | {"rope_theta": 50000.0, "routed_scaling_factor": 2.446, "topk_group": 1}
        | {"vocab_size": 163840},
        15.96,
    ),
    "moonshotai/Kimi-K2-Base": (
        V3_FILE
        | {"model_type": "kimi_k2", "first_k_dense_replace": 1, "hidden_size": 7168}
        | {"intermediate_size": 18432, "max_position_embeddings": 131072, "n_group": 1}
        | {"moe_intermediate_size": 2048, "n_routed_experts": 384, "num_attention_heads": 64}
        | {"num_experts_per_tok": 8, "num_hidden_layers": 61, "num_key_value_heads": 64}
        | {"q_lora_rank": 1536, "quantization_config": BLOCKS, "rms_norm_eps": 1e-05}
        | {"rope_scaling": DEEPSEEK_YARN | {"factor": 32.0, "beta_fast": 1.0, **ORIGINAL}}
        | {"rope_theta": 50000.0, "routed_scaling_factor": 2.827, "topk_group": 1}
        | {"vocab_size": 163840},
        1026.4,
    ),
    "deepseek-ai/DeepSeek-V2-Lite": (
        DEEPSEEK_FILE
        | {"model_type": "deepseek_v2", "first_k_dense_replace": 1, "hidden_size": 2048}
        | {"intermediate_size": 10944, "max_position_embeddings": 163840, "n_group": 1}
        | {"moe_intermediate_size": 1408, "n_routed_experts": 64, "n_shared_experts": 2}
        | {"norm_topk_prob": False, "num_attention_heads": 16, "num_experts_per_tok": 6}
        | {"num_hidden_layers": 27, "num_key_value_heads": 16, "q_lora_rank": None}
        | {"rms_norm_eps": 1e-06, "rope_theta": 10000, "routed_scaling_factor": 1.0}
        | {"rope_scaling": DEEPSEEK_YARN | {"mscale": 0.707, "mscale_all_dim": 0.707, **ORIGINAL}}
        | {"scoring_func": "softmax", "topk_group": 1, "topk_method": "greedy"}
        | {"vocab_size": 102400},
        15.71,
    ),
    "Qwen/Qwen3-30B-A3B": (
        QWEN3_FILE
        | {"model_type": "qwen3_moe", "decoder_sparse_step": 1, "hidden_size": 2048}
        | {"intermediate_size": 6144, "max_window_layers": 48, "mlp_only_layers": []}
        | {"moe_intermediate_size": 768, "norm_topk_prob": True, "num_attention_heads": 32}
        | {"num_experts": 128, "num_experts_per_tok": 8, "num_hidden_layers": 48}
        | {"num_key_value_heads": 4, "output_router_logits": False}
        | {"router_aux_loss_coef": 0.001, "tie_word_embeddings": False},
        30.53,
    ),
    "Qwen/Qwen3-0.6B": (
        QWEN3_FILE
        | {"model_type": "qwen3", "hidden_size": 1024, "intermediate_size": 3072}
        | {"max_window_layers": 28, "num_attention_heads": 16, "num_hidden_layers": 28}
        | {"num_key_value_heads": 8, "tie_word_embeddings": True},
        0.596,
    ),
    "meta-llama/Meta-Llama-3-8B": (
        {"model_type": "llama", "attention_bias": False, "attention_dropout": 0.0}
        | {"hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02}
        | {"intermediate_size": 14336, "max_position_embeddings": 8192, "pretraining_tp": 1}
        | {"num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8}
        | {"rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 500000.0}
        | {"tie_word_embeddings": False, "use_cache": True, "vocab_size": 128256},
        8.030,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED_FILES)
def test_published_models_have_their_number_of_parameters(name: str) -> None:
    config_json, billions = PUBLISHED_FILES[name]
    model = from_hf_config(config_json)
    scaling = RopeScalingConfig(**model.language["rope_scaling"])
    language = LanguageConfig(**model.language | {"rope_scaling": scaling})
    total = sum(
        weight.numel * (1 if weight.expert is None else language.num_experts)
        for weight in language_weights(language, model.vocab_size, experts=range(1))
        if weight.optimizer is not None
    )
    assert not model.unknown_keys
    assert total / 1e9 == pytest.approx(billions, rel=5e-4)
    assert model.fp8_block == ((128, 128) if "quantization_config" in config_json else None)
    assert list(model.mtp_layers) == ([61] if name == "deepseek-ai/DeepSeek-V3" else [])
    # The default becomes a value in an export.
    width = {"head_dim": language.gqa_head_dim} if language.attention == "gqa" else {}
    exported = to_hf_config(language, None, model.vocab_size, 256, {}, 4)
    assert from_hf_config(exported).language == model.language | width


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}


def test_the_published_yarn_settings_of_kimi_k2_are_read() -> None:
    config_json = to_hf_config(LanguageConfig(), None, 1000, 256, {}, 4)
    del config_json["rope_parameters"]
    published = {
        **{"beta_fast": 1.0, "beta_slow": 1.0, "factor": 64.0, "mscale": 1.0},
        **{"mscale_all_dim": 1.0, "original_max_position_embeddings": 4096, "type": "yarn"},
    }
    fields = from_hf_config(
        config_json | {"rope_scaling": published, "rope_theta": 50000.0}
    ).language
    assert fields["rope_base"] == 50000.0
    assert fields["rope_scaling"] == {k: v for k, v in published.items() if k != "type"}
    fields = from_hf_config(config_json | {"rope_scaling": YARN}).language
    assert (fields["rope_scaling"]["mscale"], fields["rope_scaling"]["mscale_all_dim"]) == (1, 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, 'config.json has model_type="gpt2": only kimi_k25 (text and im'),
        ({"model_type": None}, "config.json has model_type=null: only kimi_k25 (text and images)"),
        ({"quantization_config": {"bits": 4}}, "quantization_config.quant_method=null: only fp8"),
        (
            {"quantization_config": BLOCKS | {"quant_method": "gptq"}},
            '_method="gptq": only fp8',
        ),
        ({"quantization_config": BLOCKS | {"fmt": "e5m2"}}, 'config.fmt="e5m2": only e4m3 is'),
        ({"quantization_config": BLOCKS | {"activation_scheme": "static"}}, "only dynamic is supp"),
        ({"quantization_config": BLOCKS | {"weight_block_size": None}}, "weight_block_size=null"),
        (
            {"quantization_config": BLOCKS | {"weight_block_size": [128, 0]}},
            "it must be two numbers",
        ),
        ({"n_group": 3}, "in config.json, n_group=3 does not divide n_routed_experts=8"),
        (
            {"n_group": 4, "num_experts_per_tok": 4},
            "in config.json, topk_group=1 needs num_experts_per_tok=2, not 4",
        ),
        ({"scoring_func": "softmax"}, 'scoring_func="softmax": this trainer\'s models have "sig'),
        ({"topk_method": "greedy"}, 'topk_method="greedy": this trainer\'s models have "noaux_tc"'),
        ({"rope_interleave": False}, "rope_interleave=false: this trainer's models have true"),
        ({"moe_layer_freq": 2}, "config.json has moe_layer_freq=2: this trainer's models have 1"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "config.json has layer_types="),
        ({"attention_bias": True}, "config.json has attention_bias=true: this trainer's models"),
        ({"sliding_window": 512}, "config.json has sliding_window=512: this trainer's models"),
        ({"num_nextn_predict_layers": -1}, "config.json has num_nextn_predict_layers=-1"),
        ({"rope_parameters": {"rope_type": "longrope"}}, 'rope_parameters.rope_type="longrope"'),
        ({"rope_parameters": [1]}, "config.json has rope_parameters=[1]: it must be an object"),
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": 4}},
            "rope_parameters.original_max_position_embeddings=null: it must be a whole number",
        ),
        ({"rope_scaling": YARN}, "4096}: it contradicts rope_parameters"),
        ({"rope_parameters": YARN | {"attention_factor": 1.2}}, "attention_factor=1.2"),
        ({"rope_parameters": YARN | {"mscale": 0.5}}, "in config.json, rope_parameters.mscale_all"),
        ({"rope_parameters": YARN | {"factor": float("nan")}}, "factor=NaN: it must be a finite"),
        ({"kv_lora_rank": None}, "config.json has kv_lora_rank=null: it must be a whole number"),
        ({"n_shared_experts": -1}, "config.json has n_shared_experts=-1: it must be a whole numb"),
        ({"n_routed_experts": 1}, "config.json has n_routed_experts=1: it must be a whole number"),
        ({"first_k_dense_replace": -1}, "config.json has first_k_dense_replace=-1: it must be a"),
        (
            {"num_experts_per_tok": 99},
            "in config.json, num_experts_per_tok is 99 of only 8 experts",
        ),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000: it must be a whole number"),
        ({"num_hidden_layers": 10**6}, "in config.json, num_hidden_layers must be in [1, 10000]"),
        ({"hidden_size": 64.0}, "hidden_size=64.0: it must be a whole number from 1"),
        ({"qk_rope_head_dim": 7}, "in config.json, qk_rope_head_dim must be even, not 7"),
        ({"rms_norm_eps": "1e-5"}, 'rms_norm_eps="1e-5": it must be a finite number'),
        ({"num_key_value_heads": 2}, "num_key_value_heads=2: this trainer's models have 4"),
        ({"norm_topk_prob": False}, "config.json has norm_topk_prob=false"),
    ],
)
def test_an_unsupported_language_model_is_refused_naming_the_key(
    change: dict[str, Any], message: str
) -> None:
    config_json = to_hf_config(LanguageConfig(), None, 1000, 256, {}, 4)
    with pytest.raises(PretrainError) as error:
        from_hf_config(config_json | change)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vt_hidden_size": 64}, "vision_config.vt_hidden_size=64: another key says 1152"),
        (
            {"hidden_size": 36, "vt_hidden_size": 36},
            "vision_config.hidden_size=36 must be num_attention_heads=16 times",
        ),
        ({"mm_hidden_size": 7}, "vision_config.mm_hidden_size=7: this trainer's models have 1152"),
        ({"init_pos_emb_width": 9}, "vision_config.init_pos_emb_width=9: another key says 64"),
        ({"merge_kernel_size": [3, 3]}, "vision_config.merge_kernel_size=[3, 3]"),
    ],
)
def test_an_unsupported_vision_encoder_is_refused_naming_the_key(
    change: dict[str, Any], message: str
) -> None:
    config_json = to_hf_config(LanguageConfig(), VisionConfig(), 1000, 256, {}, 4)
    config_json["vision_config"] |= change
    with pytest.raises(PretrainError) as error:
        from_hf_config(config_json)
    assert message in str(error.value).replace("config.json has ", "")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda values: st.lists(values, max_size=2) | st.dictionaries(st.text(max_size=3), values),
    max_leaves=4,
)


@given(st.data())
def test_any_change_is_read_or_refused_in_one_line(data: st.DataObject) -> None:
    config_json = to_hf_config(LanguageConfig(), VisionConfig(), 1000, 256, {}, 4)
    part = data.draw(
        st.sampled_from([config_json, config_json["text_config"], config_json["vision_config"]])
    )
    key = data.draw(st.sampled_from(sorted(part)))
    part[key] = data.draw(JSON)
    try:
        language, vision, vocab_size, *_ = from_hf_config(config_json)
    except PretrainError as error:
        assert "\n" not in str(error) and "config.json" in str(error)
        return
    language["rope_scaling"] = RopeScalingConfig(**language["rope_scaling"])
    LanguageConfig(**language)
    VisionConfig(**(vision or {}))
    assert vocab_size > 0


def test_unknown_keys_are_reported_if_they_are_in_use() -> None:
    config_json = to_hf_config(LanguageConfig(), VisionConfig(), 1000, 256, {}, 4)
    config_json["text_config"] |= {"attention_multiplier": 2.0, "z_loss": 0.0, "mup": None}
    assert from_hf_config(config_json).unknown_keys == ["text_config.attention_multiplier"]


GROUPED = {"attention": "gqa", "num_kv_heads": 2}
GROUPED_EXPERTS = {
    **{"attention": "gqa", "qk_norm": True, "router_score": "softmax", "router_scaling": 1.0},
    "shared_expert_ffn_hidden_size": 0,
}


@pytest.mark.parametrize(
    ("settings", "change", "message"),
    [
        (GROUPED | {"dense_layers": 4}, {"mlp_bias": True}, "mlp_bias=true: this trainer's models"),
        (
            GROUPED | {"dense_layers": 4},
            {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}},
            'rope_parameters.rope_type="llama3": only default is supported with grouped-query att',
        ),
        (
            GROUPED | {"dense_layers": 4, "qk_norm": True},
            {"sliding_window": 512, "use_sliding_window": True},
            "config.json has sliding_window=512: this trainer's models have null",
        ),
        (
            GROUPED | {"dense_layers": 4, "qk_norm": True},
            {"head_dim": None},
            "config.json has head_dim=null: it must be a whole number",
        ),
        (
            GROUPED | {"dense_layers": 4},
            {"num_key_value_heads": 3},
            "in config.json, num_key_value_heads=3 does not divide num_attention_heads=4",
        ),
        (GROUPED_EXPERTS, {"mlp_only_layers": [1]}, "layers without experts must be the first on"),
        (GROUPED_EXPERTS, {"decoder_sparse_step": 2}, "decoder_sparse_step=2: this trainer's"),
        (GROUPED_EXPERTS, {"norm_topk_prob": 1}, "norm_topk_prob=1: it must be true or false"),
        (
            {"router_score": "softmax", "normalize_expert_weights": False},
            {"topk_method": "group_limited_greedy"},
            'topk_method="group_limited_greedy": this trainer\'s models have "greedy"',
        ),
        (
            {"router_score": "softmax", "normalize_expert_weights": False},
            {"norm_topk_prob": True},
            "config.json has norm_topk_prob=true: this trainer's models have false",
        ),
    ],
)
def test_other_language_models_are_refused_naming_the_key(
    settings: dict[str, Any], change: dict[str, Any], message: str
) -> None:
    config_json = to_hf_config(LanguageConfig(**settings), None, 1000, 256, {}, 4)
    from_hf_config(config_json)
    with pytest.raises(PretrainError) as error:
        from_hf_config(config_json | change)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shared_expert_ffn_hidden_size": 100}, "shared_expert_ffn_hidden_size=100"),
        ({"num_experts": 1, "experts_per_token": 1}, "at least 2 experts"),
        ({"expert_groups": 8, "expert_groups_per_token": 8}, "at least 2 experts in each group"),
        ({"router_score": "softmax"}, "normalize_expert_weights=True cannot be exported"),
        (GROUPED_EXPERTS | {"qk_norm": False}, "qk_norm=False cannot be exported"),
        (GROUPED_EXPERTS | {"router_scaling": 2.0}, "router_scaling=2.0 cannot be exported"),
    ],
)
def test_models_that_no_published_architecture_has_are_refused(
    settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(PretrainError, match=message) as error:
        to_hf_config(LanguageConfig(**settings), None, 1000, 256, {}, 4)
    assert "\n" not in str(error.value)
