"""Checkpoints: saving a run, resuming it, and reading the model of another run.

``checkpoint.save(run, …)`` and ``checkpoint.restore(run, …)`` say what a checkpoint contains
(:mod:`~pretrain.checkpoint.run`); :mod:`~pretrain.checkpoint.storage` writes and reads its tensors
and manifest.
"""

from pretrain.checkpoint.run import find as find
from pretrain.checkpoint.run import flush_local_tier as flush_local_tier
from pretrain.checkpoint.run import folder as folder
from pretrain.checkpoint.run import keep_tokenizer as keep_tokenizer
from pretrain.checkpoint.run import newest_step as newest_step
from pretrain.checkpoint.run import restore as restore
from pretrain.checkpoint.run import roll_back as roll_back
from pretrain.checkpoint.run import save as save
from pretrain.checkpoint.run import saver as saver
from pretrain.checkpoint.run import tokenizer_file as tokenizer_file
from pretrain.checkpoint.run import write_tokenizer as write_tokenizer
