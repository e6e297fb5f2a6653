"""Metrics of post-training: meaning and format of each one."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from posttrain.config import TASK_NAMES
from pretrain.metrics import METRICS as OF_PRETRAINING
from pretrain.metrics import Metric, Record, step_records

METRICS = {
    "loss": Metric("loss", ".4f", "loss"),
    "reward": Metric("reward", ".3f", "mean reward of the responses"),
    "accuracy": Metric("correct", ".1%", "responses with the full reward"),
    "has_budget": Metric("budget", ".0%", "responses to which a token budget of Toggle applies"),
    "reward_spread": Metric("spread", ".3f", "standard deviation of rewards in a group, mean"),
    "response_tokens": Metric("tokens", ".1f", "tokens of a response, mean"),
    "cut_off": Metric("cut off", ".1%", "responses that reach the token limit"),
    "entropy": Metric("entropy", ".3f", "entropy of the policy, nats per token"),
    "out_of_range": Metric("out of range", ".1%", "tokens whose ratio gives no policy gradient"),
    "logit_bound": Metric("max logit <=", ".1f", "upper bound of the max logit"),
    "grad_norm": OF_PRETRAINING["grad_norm"],
    "lr": OF_PRETRAINING["lr"],
    "seconds": Metric("s/step", ".2f", "seconds of a step"),
    "held_out_text_loss": OF_PRETRAINING["held_out_text_loss"],
    "exact_match": OF_PRETRAINING["exact_match"],
    "character_error_rate": OF_PRETRAINING["character_error_rate"],
    "changed_exact_match": Metric(
        "changed images read exactly", ".1%", "held-out images of rl.tasks.read.images read exactly"
    ),
    "changed_character_error_rate": Metric(
        "changed images character error rate",
        ".1%",
        "character error rate on images of rl.tasks.read.images",
    ),
    "instant_accuracy": Metric("instant", ".1%", "held-out sums solved without reasoning"),
    "instant_tokens": Metric("tokens", ".1f", "tokens of a reply without reasoning"),
    "thinking_accuracy": Metric("thinking", ".1%", "held-out sums solved with reasoning"),
    "thinking_tokens": Metric("tokens", ".1f", "tokens of a reply with reasoning"),
}
_BY_LENGTH = {
    f"{mode}_{length}_{key}": Metric(
        f"{length} {METRICS[f'{mode}_{key}'].label}",
        form,
        f"{METRICS[f'{mode}_{key}'].description}, {'fewest' if length == 'short' else 'most'} "
        "operands",
    )
    for mode in ("instant", "thinking")
    for length in ("short", "long")
    for key, form in (("accuracy", ".1%"), ("tokens", ".1f"))
}
METRICS |= _BY_LENGTH
# Of each task of a run with several.
BY_TASK = {
    f"{task}_{key}": Metric(
        f"{task} {METRICS[key].label}", METRICS[key].format, f"{task}: {METRICS[key].description}"
    )
    for task in TASK_NAMES
    for key in ("reward", "accuracy", "response_tokens", "cut_off", "has_budget")
}
_HELD_OUT_TASKS = {
    f"held_out_{task}_{key}": Metric(
        f"held-out {BY_TASK[f'{task}_{key}'].label}",
        BY_TASK[f"{task}_{key}"].format,
        f"held-out problems of {BY_TASK[f'{task}_{key}'].description}",
    )
    for task in TASK_NAMES
    if task not in ("read", "sums")  # which have their own metrics
    for key in ("reward", "accuracy")
}
METRICS |= BY_TASK | _HELD_OUT_TASKS
# Names in TRL's logs.
_OF_TRL = {
    "loss": "loss",
    "reward": "reward",
    "accuracy": "accuracy",
    "has_budget": "has_budget",
    "reward_spread": "reward_spread",
    "completions/mean_length": "response_tokens",
    "completions/clipped_ratio": "cut_off",
    "response_tokens": "response_tokens",  # in place of the mean of the means of tasks
    "cut_off": "cut_off",
    "entropy": "entropy",
    "out_of_range": "out_of_range",
    "logit_bound": "logit_bound",
    "grad_norm": "grad_norm",
    "learning_rate": "lr",
}
# Of a swarm: means over the episodes of a rollout, and over held-out tasks.
SWARM = {
    "performance": Metric("performance", ".3f", "share of the records that are right"),
    "wide_performance": Metric("wide", ".3f", "share of the records of wide tasks that are right"),
    "deep_performance": Metric("deep", ".3f", "share of the records of deep tasks that are right"),
    "critical_steps": Metric("critical steps", ".1f", "critical steps of wide tasks"),
    "parallelism": Metric("parallelism", ".2f", "total over critical steps of wide tasks"),
    "wide_sub_agents": Metric("agents", ".2f", "sub-agents of a wide task"),
    "deep_sub_agents": Metric("spurious", ".2f", "sub-agents of a deep task"),
    "alone_performance": Metric("alone", ".3f", "wide, of orchestrators that assign nothing"),
    "assigning_performance": Metric("assigning", ".3f", "wide, of orchestrators that assign tasks"),
    "finished": Metric("finished", ".1%", "share of the sub-agents of wide tasks that answer"),
}
METRICS |= SWARM
METRICS |= {
    f"held_out_{name}": Metric(f"held-out {m.label}", m.format, f"held-out tasks: {m.description}")
    for name, m in SWARM.items()
}
_OF_TRL |= {name: name for name in (*SWARM, *BY_TASK)}
HELD_OUT = (
    *("held_out_text_loss", "exact_match", "character_error_rate"),
    *("changed_exact_match", "changed_character_error_rate"),
    *("instant_accuracy", "instant_tokens", "thinking_accuracy", "thinking_tokens"),
    *_BY_LENGTH,
    *_HELD_OUT_TASKS,
    *(f"held_out_{name}" for name in SWARM),
)


def from_trl(logs: Record) -> dict[str, float]:
    """The metrics in a log of TRL's trainer, under their names here."""
    return {name: logs[key] for key, name in _OF_TRL.items() if logs.get(key) is not None}


def formatted(record: Record, name: str) -> str:
    """The value of a metric as text; ``-`` if the record has none."""
    value = record.get(name)
    return "-" if value is None else format(value, METRICS[name].format)


def cells(record: Record, names: Iterable[str] = METRICS) -> list[str]:
    """Label and value of each metric that a record has."""
    return [
        f"{METRICS[name].label} {formatted(record, name)}"
        for name in names
        if record.get(name) is not None
    ]


def read(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl, one for each step, ordered by step.

    An evaluation adds to the record of its step. After resuming from a checkpoint, steps are
    recorded again, and later records of the interrupted run are dropped.

    Raises:
        PretrainError: see :func:`pretrain.metrics.step_records`.
    """
    records: list[dict[str, Any]] = []
    for record in step_records(path, METRICS):
        while records and records[-1]["step"] > record["step"]:
            records.pop()
        if records and records[-1]["step"] == record["step"]:
            record = {**records.pop(), **record}
        records.append(record)
    return records
