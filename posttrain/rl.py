"""Reinforcement learning with outcome rewards, from an exported model to an exported model."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from trl import GRPOConfig

from posttrain import model, modes
from posttrain.config import Config
from posttrain.data import open_pretraining_data, pictures
from posttrain.rewards.text import edit_distance_reward
from posttrain.run import Run, locked
from posttrain.trainer import RlTrainer
from pretrain.errors import PretrainError


def train(config: Config) -> Path:
    """Train a model, or resume its training.

    Returns:
        The folder of the trained model.

    Raises:
        PretrainError: the model, the data or a setting is unusable.
    """
    with locked(config, "rl") as termination:
        exported = model.load(Path(config.model))
        data = open_pretraining_data(config.pretraining, exported.folder)
        mode = modes.find(exported, "document")
        run = Run("rl", config, exported, data, mode, termination)
        found = pictures(data, "train", config.rl.images)
        if len(found) < config.rl.prompts:
            raise PretrainError(
                f"{config.pretraining} has {len(found)} images for training, fewer than "
                f"rl.prompts={config.rl.prompts}: lower it, or add images"
            )
        exported.hf_tokenizer.chat_template = exported.processor.chat_template = mode.template
        exported.model.generation_config.eos_token_id = mode.ends
        trainer = RlTrainer(
            rl=config.rl,
            optimizer_options=config.optimizer,
            model=exported.model,
            processing_class=exported.processor,
            reward_funcs=[_reading],
            args=_arguments(config, run),
            train_dataset=Dataset.from_dict(
                {
                    "prompt": [[{"role": "user", "content": ""}]] * len(found),
                    "images": [[picture.image] for picture in found],
                    "answer": [picture.text for picture in found],
                }
            ),
        )
        return run.train(trainer)


def _reading(completions: Sequence[Any], answer: Sequence[str], **_: Any) -> list[float]:
    """The reward of each transcription."""
    texts = [completion[0]["content"].strip("\n") for completion in completions]
    return [edit_distance_reward(text, truth) for text, truth in zip(texts, answer, strict=True)]


def _arguments(config: Config, run: Run) -> GRPOConfig:
    rl, optimizer = config.rl, config.optimizer
    return GRPOConfig(
        output_dir=str(run.checkpoints),
        max_steps=config.steps,
        seed=config.seed,
        learning_rate=optimizer.lr,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=optimizer.warmup_steps,
        max_grad_norm=optimizer.clip_grad_norm,
        per_device_train_batch_size=rl.prompts * rl.group_size,
        gradient_accumulation_steps=1,
        num_generations=rl.group_size,
        num_iterations=rl.updates,
        max_completion_length=rl.max_tokens,
        temperature=rl.temperature,
        loss_type="dapo",
        scale_rewards="none",
        beta=0.0,
        logging_steps=1,
        save_steps=config.save_every,
        save_total_limit=2,
        report_to="none",
        disable_tqdm=True,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        dataloader_pin_memory=False,
    )
