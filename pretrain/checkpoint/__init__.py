"""Checkpoints: saving a run, resuming it, and reading the model of another run.

``checkpoint.save(run, …)`` and ``checkpoint.restore(run, …)`` say what a checkpoint contains
(:mod:`~pretrain.checkpoint.run`); :mod:`~pretrain.checkpoint.storage` writes and reads its tensors
and manifest.
"""

from pretrain.checkpoint.run import (
    SavedRun,
    find,
    folder,
    keep_tokenizer,
    restore,
    roll_back,
    save,
    saver,
)
from pretrain.checkpoint.tokenizer import tokenizer_file, write_tokenizer

__all__ = [
    "SavedRun",
    "find",
    "folder",
    "keep_tokenizer",
    "restore",
    "roll_back",
    "save",
    "saver",
    "tokenizer_file",
    "write_tokenizer",
]
