"""Supervised finetuning on text alone: it teaches a model the modes of the chat format.

Kimi K2.5's report calls it zero-vision SFT: text teaches the form of the answers, and images keep
working. Documents of the pretraining are mixed in, so that little is forgotten.
"""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import TrainingArguments

from posttrain import model, modes, tasks, vocabulary
from posttrain.config import Config
from posttrain.data import open_pretraining_data, replayed
from posttrain.model import Exported
from posttrain.run import Run, locked
from posttrain.trainer import OwnTrainer, common_arguments, freeze
from pretrain.data import chat
from pretrain.errors import PretrainError

_EXTENDED = "extended"
_IGNORED = -100
_TOKENS_OF_A_WORD = 8
# Of a document: about the length of a conversation, so that little of a batch is padding.
_REPLAYED_TOKENS = 48
_PARTS = 3


def train(config: Config) -> Path:
    """Finetune a model, or resume; returns the folder of the trained model.

    Tokens of the modes that the tokenizer lacks are added to it, and rows to the embedding.

    Raises:
        PretrainError: the model, the data or a setting is unusable.
    """
    config.require_fit("sft")
    with locked(config, "sft") as (lock, termination):
        exported = _with_markup(config)
        data = open_pretraining_data(config.pretraining, exported.folder)
        run = Run("sft", config, exported, data, lock, termination)
        trainer = SftTrainer(
            config,
            model=exported.model,
            args=TrainingArguments(
                **common_arguments(config, run.checkpoints),
                per_device_train_batch_size=config.sft.batch_size,
                # Rows are random already. In this order, they do not depend on the number of steps.
                train_sampling_strategy="sequential",
                remove_unused_columns=False,
            ),
            train_dataset=Rows(config, exported),
            data_collator=_Collate(exported.tokenizer.pad),
        )
        return run.train(trainer, modes.chat_template(exported))


def _with_markup(config: Config) -> Exported:
    """The model to start from, with the tokens of the modes."""
    exported = model.load(Path(config.model))
    exported.tokenizer.require_chat()
    torch.manual_seed(config.seed)  # of the new rows
    words = vocabulary.long_words(exported.tokenizer, tasks.WORDS, _TOKENS_OF_A_WORD)
    return vocabulary.extend(exported, Path(config.run_dir) / _EXTENDED, chat.MARKUP, words)


class Rows(Dataset[tuple[Tensor, Tensor]]):
    """Tokens and labels of each row, which are functions of the seed and the number of the row."""

    def __init__(self, config: Config, exported: Exported) -> None:
        self._config, self._tokenizer = config, exported.tokenizer
        self._data = open_pretraining_data(config.pretraining, exported.folder, text_alone=True)
        self._max_length = max_length = exported.max_length
        longest = max(len(self._conversation(number)[0]) for number in range(200))
        if longest > max_length:
            raise PretrainError(
                f"demonstrations of sums have up to {longest} tokens, and the model reads "
                f"{max_length}: lower sums.max_operands or sums.largest, or set sft.agent_share=0 "
                "to leave out those with tool calls, which are the longest"
            )
        if config.sft.replay_share:
            self._document(0)  # there is one, or this raises

    def __len__(self) -> int:
        return self._config.steps * self._config.sft.batch_size

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        rng = random.Random(f"{self._config.seed} {number}")
        if rng.random() < self._config.sft.replay_share:
            return self._document(number)
        tokens, labels = self._conversation(number)
        return tokens[: self._max_length], labels[: self._max_length]

    def _conversation(self, number: int) -> tuple[Tensor, Tensor]:
        config = self._config
        rng = random.Random(f"{config.seed} {number} mode")
        others = 1 - config.sft.instant_share - config.sft.agent_share
        shares = [config.sft.instant_share, config.sft.agent_share, others]
        (mode,) = rng.choices(("instant", "agent", "thinking"), shares)
        messages = tasks.demonstration(config.sums, rng.getrandbits(60), mode)
        tools = tasks.TOOLS if mode == "agent" else ()
        document = chat.render(self._tokenizer, messages, tools)
        return _labeled(torch.tensor(document.tokens), torch.tensor(document.weights))

    def _document(self, number: int) -> tuple[Tensor, Tensor]:
        # With this stride, two rows of a batch never have the same document.
        stride = self._config.sft.batch_size
        found = next(replayed(self._data, "sft.replay_share", number, stride))
        tokens, weights = max(found, key=lambda text: len(text[0]))
        return _labeled(tokens[:_REPLAYED_TOKENS], weights[:_REPLAYED_TOKENS])


def _labeled(tokens: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    return tokens, tokens.masked_fill(weights == 0, _IGNORED)


class _Collate:
    def __init__(self, pad: int) -> None:
        self._pad = pad

    def __call__(self, rows: Sequence[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        def padded(index: int, value: int) -> Tensor:
            values = [row[index] for row in rows]
            return nn.utils.rnn.pad_sequence(values, batch_first=True, padding_value=value)

        labels = padded(1, _IGNORED)
        lengths = torch.tensor([len(row[0]) for row in rows])
        mask = torch.arange(labels.shape[1]) < lengths[:, None]
        return {"input_ids": padded(0, self._pad), "attention_mask": mask.long(), "labels": labels}


class SftTrainer(OwnTrainer):
    """``Trainer`` with this project's optimizer."""

    def __init__(self, config: Config, **arguments: Any) -> None:
        self.optimizer_options = config.optimizer
        freeze(arguments["model"], config.optimizer.frozen)
        super().__init__(**arguments)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], **_: Any) -> Tensor:
        """The mean loss of the labels; rows of similar length pass through the model together, so
        that little of them is padding."""
        lengths = inputs["attention_mask"].sum(1)
        count = (inputs["labels"][:, 1:] != _IGNORED).sum().clamp(min=1)
        total = inputs["labels"].new_zeros((), dtype=torch.float32)
        for rows in lengths.argsort().tensor_split(min(_PARTS, len(lengths))):
            width = int(lengths[rows].max())
            part = {name: values[rows, :width] for name, values in inputs.items()}
            labels = part.pop("labels")[:, 1:]
            logits = model(**part, use_cache=False).logits[:, :-1].float()
            total = total + nn.functional.cross_entropy(
                logits.transpose(1, 2), labels, ignore_index=_IGNORED, reduction="sum"
            )
        return total / count
