"""Evaluation of a model on held-out data: images, tasks, and the loss of text."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch

from posttrain import agentic, metrics, modes
from posttrain.config import Config, EvaluationConfig
from posttrain.data import (
    Picture,
    held_out_texts,
    open_images,
    open_pretraining_data,
    pictures,
)
from posttrain.environment.core import Task
from posttrain.losses import Row, weighted_loss
from posttrain.model import TRAINED, Exported, load
from posttrain.tasks import AGENTIC, OF_IMAGES, generated_task
from pretrain.data import Data
from pretrain.data.media.png import png_base64
from pretrain.reading import Reading, listing, scores

SHOWN: modes.Messages = [{"role": "user", "content": [{"type": "image"}]}]
"""The conversation that asks for the text in an image."""
_MAX_CAPTION_TOKENS = 24
_MAX_PICTURES = 48
_PICTURE_SIZE = (448, 448)


def run(config: Config) -> None:
    """Evaluate the trained model of a run, or else the one that it starts from."""
    trained = Path(config.run_dir) / TRAINED
    exported = load(trained if trained.is_dir() else Path(config.model))
    data = open_pretraining_data(config.pretraining, exported.folder)
    images = open_images(config, exported.folder)
    found, readings = held_out(exported, data, config, images)
    print(f"{exported.folder}: {' | '.join(metrics.cells(found)) or 'no data'}")
    if text := listing(readings):
        print(text)


@torch.no_grad()
def held_out(
    exported: Exported, data: Data, config: Config, images: Data | None = None
) -> tuple[dict[str, float | None], list[Reading]]:
    """The metrics of a model, and its transcriptions.

    Args:
        images: data of the images of ``rl.tasks.read.images``, whose transcriptions are returned if
            given.
    """
    model, options = exported.model, config.evaluation
    was_training = model.training
    model.eval()
    try:
        readings = []
        reads_images = exported.has_images and options.images > 0
        if reads_images:
            readings = transcribe(exported, pictures(data, "held_out", options.images), options)
        loss = text_loss(model, held_out_texts(data, options.text_sequences), options)
        found = {"held_out_text_loss": loss, **scores(readings)}
        if images is not None and reads_images:
            readings = transcribe(exported, pictures(images, "held_out", options.images), options)
            found |= {f"changed_{name}": value for name, value in scores(readings).items()}
        if modes.has_chat_modes(exported) and options.problems:
            for name in modes.CHAT_MODES:
                found |= sums(exported, config, name)
            for name in config.rl.tasks:
                if name not in ("read", "sums"):
                    found |= generated(exported, config, name)
    finally:
        model.train(was_training)
    return found, readings


def transcribe(
    exported: Exported, images: Sequence[Picture], options: EvaluationConfig
) -> list[Reading]:
    """Transcribe images by greedy decoding, in the form of pretraining's documents."""
    mode = modes.find(exported, "document")
    texts = []
    for start in range(0, len(images), options.batch_size):
        batch = [[one.image] for one in images[start : start + options.batch_size]]
        texts += [
            exported.tokenizer.decode(tokens).strip("\n")
            for tokens in modes.answer(
                exported, mode, [SHOWN] * len(batch), batch, _MAX_CAPTION_TOKENS
            )
        ]
    pngs = [_png(one) for one in images[:_MAX_PICTURES]] + [""] * (len(images) - _MAX_PICTURES)
    return [
        Reading(one.text, text, png) for one, text, png in zip(images, texts, pngs, strict=True)
    ]


def sums(exported: Exported, config: Config, name: str) -> dict[str, float | None]:
    """Share of held-out sums that a mode solves, and the mean length of its replies in tokens.

    Also of the shortest and the longest sums, if their numbers of operands differ.
    """
    options, mode = config.evaluation, modes.find(exported, name)
    solved = [  # operands, reward, tokens
        (len(task.data), _reward(exported, mode, task, reply), len(reply))
        for task, reply in _replies(exported, config, "sums", mode, options.max_tokens)
    ]
    shortest, longest = min(solved)[0], max(solved)[0]
    groups = {name: solved}
    if shortest < longest:
        groups[f"{name}_short"] = [one for one in solved if one[0] == shortest]
        groups[f"{name}_long"] = [one for one in solved if one[0] == longest]
    found: dict[str, float | None] = {}
    for group, some in groups.items():
        found[f"{group}_accuracy"] = mean(reward for _, reward, _ in some)
        found[f"{group}_tokens"] = mean(tokens for _, _, tokens in some)
    return found


def generated(exported: Exported, config: Config, name: str) -> dict[str, float | None]:
    """Mean reward of the replies to held-out problems of a task, and the share of full rewards."""
    if name in OF_IMAGES and not exported.has_images:
        return {}
    limit = config.rl.tasks[name].max_tokens
    if name in AGENTIC:
        with torch.random.fork_rng():
            torch.manual_seed(0)  # every evaluation samples alike, and leaves the training's state
            episodes = agentic.play(
                exported,
                exported.model,
                _held_out(config, name),
                max_tokens=limit,
                temperature=config.rl.temperature,
            )
        rewards = [episode.reward for episode in episodes]
    else:
        mode = modes.find(exported, "thinking")
        replies = _replies(exported, config, name, mode, limit)
        rewards = [_reward(exported, mode, task, reply) for task, reply in replies]
    return {
        f"held_out_{name}_reward": mean(rewards),
        f"held_out_{name}_accuracy": mean(reward == 1 for reward in rewards),
    }


def _replies(
    exported: Exported, config: Config, name: str, mode: modes.Mode, max_tokens: int
) -> Iterator[tuple[Task, list[int]]]:
    """Held-out problems of a task, and the replies of greedy decoding."""
    tasks, size = _held_out(config, name), config.evaluation.batch_size
    for start in range(0, len(tasks), size):
        batch = tasks[start : start + size]
        yield from zip(batch, modes.answer_tasks(exported, mode, batch, max_tokens), strict=True)


def _held_out(config: Config, name: str) -> list[Task]:
    seeds = range(config.evaluation.problems)
    return [generated_task(name, config.sums, seed, held_out=True) for seed in seeds]


def _reward(exported: Exported, mode: modes.Mode, task: Task, reply: Sequence[int]) -> float:
    return task.reward(modes.final_answer(exported, mode, reply), task.truth)


def _png(picture: Picture) -> str:
    return png_base64(np.asarray(picture.image), _PICTURE_SIZE)


def text_loss(model: Any, texts: Sequence[Row], options: EvaluationConfig) -> float | None:
    """Mean cross-entropy of labels by weight, in nats per token; None without any.

    Each document is read alone, from its first token.
    """
    total, count = 0.0, 0.0
    ordered = sorted(texts, key=lambda one: len(one[0]))
    for start in range(0, len(ordered), options.batch_size):
        batch = ordered[start : start + options.batch_size]
        total += float(weighted_loss(model, batch))
        count += sum(float(weights.sum()) for _, weights in batch)
    return total / count if count else None
