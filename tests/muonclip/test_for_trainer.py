"""``for_trainer``: transformers' Trainer with MuonClip and QK-Clip, without a subclass."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from muonclip import MuonClip, for_trainer
from muonclip.hooks import unwrap_optimizer

transformers = pytest.importorskip("transformers")


def llama() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    model: nn.Module = transformers.LlamaForCausalLM(config)
    return model


def fit(
    folder: Path, model: nn.Module, *, resume: str | None = None, lr: float = 0.02, **options: Any
) -> Any:
    """Train with the Trainer's features: accumulation, clipping, a schedule, saving."""
    arguments = transformers.TrainingArguments(
        str(folder),
        **{
            "max_steps": 4,
            "learning_rate": lr,
            "weight_decay": 0.03,
            "adam_beta2": 0.97,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 1,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "max_grad_norm": 0.5,
            "save_steps": 2,
            "report_to": "none",
            "use_cpu": True,
            **options,
        },
    )
    tokens = (torch.arange(16)[:, None] + torch.arange(8)) % 32
    trainer = transformers.Trainer(
        model,
        arguments,
        train_dataset=[{"input_ids": row, "labels": row} for row in tokens],
        optimizer_cls_and_kwargs=for_trainer(arguments, qk_clip_threshold=1e-3, report=None),
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def weights(trainer: Any) -> list[Tensor]:
    return [p.detach() for p in trainer.model.parameters()]


@pytest.mark.parametrize("precision", [{}, {"bf16": True}, {"gradient_checkpointing": True}])
def test_training_resumes_exactly_with_the_clip(tmp_path: Path, precision: dict[str, Any]) -> None:
    straight = fit(tmp_path / "straight", llama(), **precision)
    optimizer = unwrap_optimizer(straight.optimizer)
    assert isinstance(optimizer, MuonClip)
    assert optimizer.qk_clip is not None and optimizer.qk_clip.result is not None
    assert optimizer.qk_clip.result.num_clipped == 2
    checkpoint = str(tmp_path / "straight" / "checkpoint-2")
    resumed = fit(tmp_path / "resumed", llama(), resume=checkpoint, **precision)
    assert all(map(torch.equal, weights(straight), weights(resumed)))


def test_the_settings_are_those_of_the_trainer(tmp_path: Path) -> None:
    trainer = fit(tmp_path, llama(), lr_scheduler_type="constant", warmup_steps=0, max_steps=1)
    groups = unwrap_optimizer(trainer.optimizer).param_groups
    assert {group["lr"] for group in groups} == {0.02}
    decays = {
        (name.endswith("norm.weight"), group["weight_decay"])
        for group in groups
        for name in group["param_names"]
    }
    assert decays == {(False, 0.03), (True, 0.0)}
    adamw = [group for group in groups if group["algorithm"] == "adamw"]
    assert {(group["momentum"], group["adamw_beta2"]) for group in adamw} == {(0.9, 0.97)}


SMALL = {"vocab_size": 32, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
# Biases of linear layers, of experts [E, n], of positions (a table, an embedding); gains by head.
DECAYED: dict[str, dict[str, Any]] = {
    "GPT2Config": {"n_embd": 8, "n_layer": 1, "n_head": 2, "vocab_size": 32, "n_positions": 8},
    "GptOssConfig": SMALL
    | {"head_dim": 4, "intermediate_size": 8, "num_local_experts": 2, "num_experts_per_tok": 1},
    "SwinConfig": {"embed_dim": 8, "depths": [1], "num_heads": [2], "image_size": 16},
    "T5Config": {"vocab_size": 32, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1}
    | {"num_heads": 2},
    "CohereConfig": SMALL | {"intermediate_size": 8, "use_qk_norm": True},
}


@pytest.mark.parametrize("kind", DECAYED)
def test_weight_decay_leaves_out_what_the_trainer_leaves_out(tmp_path: Path, kind: str) -> None:
    """Against the Trainer's own rule, for models with biases and gains of several dimensions."""
    config = getattr(transformers, kind)(**DECAYED[kind])
    model = transformers.AutoModel.from_config(config)
    arguments = transformers.TrainingArguments(
        str(tmp_path), weight_decay=0.1, report_to="none", use_cpu=True
    )
    factory, options = for_trainer(arguments, report=None)
    decayed = {
        name
        for adamw in ([], ["*"])
        for group in factory(model, **options, adamw=adamw).param_groups
        for name in group["param_names"]
        if group["weight_decay"]
    }
    theirs = transformers.Trainer(model, arguments).get_decay_parameter_names(model)
    # It has a name for each use of tied weights, and decays the sinks of gpt-oss (vectors).
    names = {name for name, _ in model.named_parameters() if not name.endswith(".sinks")}
    assert decayed == names & set(theirs)


def test_adapters_of_peft_are_trained_alone(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(llama(), config)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.warns(UserWarning, match="cannot limit the logits of"):
        fit(tmp_path, model)
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {name for name in before if "lora_" in name}


def test_both_ways_of_calling_a_factory_are_supported() -> None:
    """transformers >= 5 calls ``factory()(model, ...)``, earlier versions ``factory(model, ...)``
    if they are given a model, and otherwise ``factory(groups, ...)``, which have no names."""
    arguments = transformers.TrainingArguments("unused", report_to="none", use_cpu=True)
    factory, options = for_trainer(arguments, qk_clip_threshold=None, report=None)
    model = llama()
    assert isinstance(factory()(model, **options), MuonClip)
    assert isinstance(factory(model, **options), MuonClip)
    with pytest.raises(TypeError, match=r"give for_trainer the model too \(model=model\)"):
        factory([{"params": list(model.parameters())}], **options)


def test_the_model_instead_of_the_arguments_is_refused() -> None:
    with pytest.raises(TypeError, match="needs the TrainingArguments, got LlamaForCausalLM"):
        for_trainer(llama())
