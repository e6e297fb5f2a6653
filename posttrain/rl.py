"""Reinforcement learning with outcome rewards, from an exported model to an exported model."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset

from posttrain import evaluate, model, modes
from posttrain.config import Config
from posttrain.data import Picture, open_pretraining_data, pictures
from posttrain.model import Exported
from posttrain.modes import Mode
from posttrain.rewards.text import edit_distance_reward
from posttrain.run import Run, locked
from posttrain.trainer import RlTrainer, arguments
from pretrain.data import Data
from pretrain.errors import PretrainError
from pretrain.runtime.progress import Progress


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
        found = _choose(exported, data, mode, config)
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
            args=arguments(config, run.checkpoints),
            train_dataset=Dataset.from_dict(
                {
                    "prompt": [[{"role": "user", "content": ""}]] * len(found),
                    "images": [[picture.image] for picture in found],
                    "answer": [picture.text for picture in found],
                }
            ),
        )
        return run.train(trainer)


def _choose(exported: Exported, data: Data, mode: Mode, config: Config) -> list[Picture]:
    """The training images, in a fixed order."""
    count, share = config.rl.images, config.rl.solved_share
    if share is None:
        return pictures(data, "train", count)
    solved: list[Picture] = []
    unsolved: list[Picture] = []
    wanted = round(count * (1 - share))
    exported.model.eval()
    with Progress("choosing images that are not solved yet", wanted, "images") as progress:
        asked = 0
        while len(unsolved) < wanted:
            found = pictures(data, "train", asked + count)
            for reading, picture in zip(
                evaluate.transcribe(exported, found[asked:], config.evaluation, mode),
                found[asked:],
                strict=True,
            ):
                (solved if reading.is_exact else unsolved).append(picture)
            progress(len(unsolved))
            if len(found) < asked + count:
                break  # there are no more
            asked = len(found)
    exported.model.train()
    unsolved = unsolved[:wanted]
    chosen = unsolved + solved[: round(len(unsolved) * share / (1 - share)) if share < 1 else count]
    random.Random(config.seed).shuffle(chosen)
    return chosen


def _reading(completions: Sequence[Any], answer: Sequence[str], **_: Any) -> list[float]:
    """The reward of each transcription."""
    texts = [completion[0]["content"].strip("\n") for completion in completions]
    return [edit_distance_reward(text, truth) for text, truth in zip(texts, answer, strict=True)]
