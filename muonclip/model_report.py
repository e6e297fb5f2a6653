"""The report of ``muonclip.for_model``: parameters, settings, clipped heads and warnings."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch.optim.optimizer import Optimizer

from muonclip.param_groups import Algorithm, common_name, without_numbers


@dataclass(frozen=True, eq=False)
class ModelReport:
    """The parameters and attention layers of a model, and what the optimizer does to them.

    ``str(report)`` is a table of parameters with reasons, in which the layers of a stack share a
    row, then the settings of Muon and AdamW, the heads that QK-Clip limits, and the warnings. It
    does not keep the parameters alive, which FSDP2 may replace.

    Attributes:
        model: class name of the model.
        table: of the parameters.
        assignments: parameter -> ("muon", "adamw" or None if it is frozen, reason).
        settings: a line about each algorithm.
        threshold: QK-Clip's; None if it is turned off.
        clipped: attention layer -> number of heads that QK-Clip limits.
        not_clipped: attention layer -> reason why it does not.
        warnings: each names its cause and a remedy.
    """

    model: str
    table: str
    assignments: Mapping[str, tuple[Algorithm | None, str]]
    settings: Sequence[str]
    threshold: float | None
    clipped: Mapping[str, int]
    not_clipped: Mapping[str, str]
    warnings: Sequence[str]

    def __str__(self) -> str:
        lines = [
            f"MuonClip for {self.model}",
            self.table,
            *self.settings,
            f"QK-Clip: {self._describe_clip()}",
            *(
                f"QK-Clip does not scale {names}: {reason}"
                for reason, names in _names_by_value(self.not_clipped).items()
                if not any(reason in warning for warning in self.warnings)
            ),
            *(f"warning: {warning}" for warning in self.warnings),
        ]
        return "\n".join(lines)

    def _describe_clip(self) -> str:
        if self.threshold is None:
            return "off"
        if not self.clipped:
            return "not attached, because it would have no effect"
        layers = ", ".join(
            f"{names} with {heads} heads each"
            for heads, names in _names_by_value(self.clipped).items()
        )
        return (
            f"limits the logits of {sum(self.clipped.values())} heads to {self.threshold:g} "
            f"({layers})"
        )


def describe_settings(optimizer: Optimizer) -> list[str]:
    """A line about the groups of each algorithm, without those of the same settings."""
    lines = {
        "muon": "Muon: learning rate {lr:g}, weight decay {weight_decay:g} "
        "({weight_decay_mode}), momentum {momentum:g}, {ns_steps} steps of {ns_coefficients}, "
        "scale {adjust_lr}",
        "adamw": "AdamW: learning rate {lr:g}, weight decay {weight_decay:g}, "
        "betas {momentum:g} and {adamw_beta2:g}",
    }
    texts = [lines[g["algorithm"]].format(**_printable(g)) for g in optimizer.param_groups]
    return list(dict.fromkeys(texts))


def _printable(group: Mapping[str, Any]) -> dict[str, Any]:
    """A group's options, with numbers for tensors."""
    return {
        option: float(value) if option in ("lr", "weight_decay") else value
        for option, value in group.items()
    }


def group_names(names: Iterable[str]) -> list[str]:
    """The names, with one entry and a count for those that differ only in numbers."""
    patterns: dict[str, list[str]] = {}
    for name in names:
        patterns.setdefault(without_numbers(name), []).append(name)
    return [
        (common_name(same) or "the model itself") + f" ({len(same)} layers)" * (len(same) > 1)
        for same in patterns.values()
    ]


def _names_by_value(values: Mapping[str, Any]) -> dict[Any, str]:
    """Each value with the names that have it."""
    return {
        value: ", ".join(group_names(name for name in values if values[name] == value))
        for value in dict.fromkeys(values.values())
    }
