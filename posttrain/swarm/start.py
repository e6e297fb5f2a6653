"""The supervised start of a swarm: a model learns the syntax of the tools from text alone."""

import itertools
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import get_scheduler

from posttrain import model, modes, vocabulary
from posttrain.config import Config
from posttrain.data import replayed
from posttrain.environment.markup import TOKENS
from posttrain.losses import Row, weighted_loss
from posttrain.model import Exported
from posttrain.swarm.demonstrations import AGENT, SYSTEM_PROMPT, Demonstrations
from posttrain.trainer import freeze, make_optimizer, require_finite, schedule_name
from pretrain.data import Data, chat
from pretrain.runtime.progress import Progress

# Words of the markup, for which a small vocabulary has many tokens.
_WORDS = (
    *("functions.get:0", "functions.create_subagent:0", "functions.assign_task:", '{"key":"'),
    *('{"name":"', '","system_prompt":"', f'{{"agent":"{AGENT}","prompt":"', '"}'),
    *("## Return of functions.get:0\n", "## Return of functions.create_subagent:0\n"),
    *("## Return of functions.assign_task:", "created ", "user", "assistant", "tool"),
    *("system", SYSTEM_PROMPT),
)
_TOKENS_OF_A_WORD = 1
# Sequences of similar length share a forward pass.
_MICRO_BATCHES = 2


def train(
    config: Config, exported: Exported, demonstrations: Demonstrations, data: Data, out: Path
) -> None:
    """Extend a model's vocabulary by the markup, train it on demonstrations, and write the export.

    An interrupted start begins again.

    Args:
        config: its ``swarm`` has the settings of the start.
        data: of the pretraining; documents of text are mixed in, so that little is forgotten.
        out: folder of the trained export.
    """
    swarm = config.swarm
    exported.tokenizer.require_chat()
    torch.manual_seed(config.seed)  # of the new rows
    words = vocabulary.long_words(exported.tokenizer, _WORDS, _TOKENS_OF_A_WORD)
    untrained = out.with_name("extended")
    longest = max(swarm.context, swarm.sub_context)
    extended = vocabulary.extend(exported, untrained, TOKENS, words, max_length=longest)
    tokenizer = extended.tokenizer
    freeze(extended.model, swarm.start.frozen, "swarm.start.frozen")
    optimizer = make_optimizer(extended.model, swarm.start)
    size, steps = swarm.start_batch, swarm.start_steps
    schedule = get_scheduler(schedule_name(swarm.start), optimizer, swarm.start.warmup_steps, steps)
    replay = itertools.chain.from_iterable(replayed(data, "swarm.start_replay"))
    first = config.seed * size * steps
    with Progress("learning the syntax of the tools", steps, "steps") as progress:
        for step in range(steps):
            seeds = range(first + step * size, first + (step + 1) * size)
            documents = [chat.render(tokenizer, demonstrations.conversation(s)) for s in seeds]
            rows = [(torch.tensor(d.tokens), torch.tensor(d.weights)) for d in documents]
            loss = _backward(extended, [*rows, *itertools.islice(replay, swarm.start_replay)])
            parameters, limit = extended.model.parameters(), swarm.start.clip_grad_norm
            norm = torch.nn.utils.clip_grad_norm_(parameters, limit)
            require_finite(norm, f"step {step + 1} of the supervised start", "swarm.start.lr")
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            progress(step + 1)
            if (step + 1) % config.log_every == 0:
                print(f"supervised start: step {step + 1}/{steps} | loss {loss:.4f}", flush=True)
    model.require_finite_weights(
        extended.model, "after the supervised start", "lower swarm.start.lr"
    )
    model.save(extended, extended.model, out, modes.chat_template(extended))
    shutil.rmtree(untrained)


def _backward(exported: Exported, rows: Sequence[Row]) -> float:
    """Accumulate the gradient of the mean loss of all weighted tokens; returns the loss."""
    ordered = sorted(rows, key=lambda row: len(row[0]))
    total = sum(float(weights.sum()) for _, weights in rows)
    size, mean = -(-len(ordered) // _MICRO_BATCHES), 0.0
    for start in range(0, len(ordered), size):
        loss = weighted_loss(exported.model, ordered[start : start + size]) / total
        loss.backward()  # type: ignore[no-untyped-call]
        mean += float(loss.detach())
    return mean
