"""Every option of MuonClip is a setting of the trainer, or is left out for a reason."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import nn

from muonclip import MuonClip
from pretrain import config
from pretrain.config import OptimizerConfig, optimizer_options, rules
from pretrain.config.optimizer_options import NOT_SETTINGS
from pretrain.config.rules import Settings
from pretrain.errors import PretrainError

# A value other than the default, and the settings that it needs.
CHANGED: dict[str, tuple[Any, dict[str, Any]]] = {
    "nesterov": (False, {}),
    "ns_coefficients": ("you", {}),
    "ns_dtype": ("float32", {}),
    "eps": (1e-5, {}),
    "adjust_lr": ("spectral", {}),
    "update_rms": (0.3, {}),
    "weight_decay_mode": ("cautious", {}),
    "momentum_warmup_steps": (10, {}),
    "momentum_warmup_start": (0.5, {"momentum_warmup_steps": 10}),
    "momentum_dtype": ("bfloat16", {}),
    "adamw_eps": (1e-6, {}),
    "adamw_weight_decay": (0.0, {}),
}


def test_every_option_is_a_setting_or_has_a_reason() -> None:
    options, settings = set(optimizer_options.signature()), set(rules.field_types(OptimizerConfig))
    assert options == (options & settings) | set(NOT_SETTINGS)
    assert not settings & set(NOT_SETTINGS)
    assert all(NOT_SETTINGS.values())


def test_a_new_option_becomes_a_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    def parameter(name: str, annotation: Any, default: Any) -> inspect.Parameter:
        return inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation
        )

    new = {
        "mode": parameter("mode", Literal["a", "b"], "a"),
        "device": parameter("device", torch.device | str | None, None),
        "betas": parameter("betas", Sequence[float] | None, None),
    }
    monkeypatch.setattr(optimizer_options, "signature", lambda: new)

    @dataclass(frozen=True)
    @optimizer_options.with_options
    class Section(Settings):
        """Has only those."""

    section: Any = Section()
    assert (section.mode, section.device, section.betas) == ("a", None, None)
    types = rules.field_types(Section)
    assert types == {
        "mode": Literal["a", "b"], "device": str | None, "betas": tuple[float, ...] | None
    }  # fmt: skip
    new["hook"] = parameter("hook", bytes, b"")
    with pytest.raises(TypeError, match="option hook has the type"):
        optimizer_options.with_options(type("Other", (Settings,), {"__annotations__": {}}))


@pytest.mark.parametrize("name", CHANGED)
def test_values_reach_the_optimizer(tmp_path: Path, name: str) -> None:
    """Through a file, as plain values, and from a checkpoint's."""
    value, others = CHANGED[name]
    file = tmp_path / "run.yaml"
    lines = [f"  {key}: {setting}" for key, setting in {**others, name: value}.items()]
    file.write_text("\n".join(["optimizer:", *lines]).replace("False", "false"))
    loaded = config.load(file)
    assert config.from_dict(config.to_dict(loaded)) == loaded
    model = nn.Linear(2, 2)
    optimizer = MuonClip(model.named_parameters(), **loaded.optimizer.muonclip_options())
    expected = getattr(torch, value) if name.endswith("dtype") else value
    option = {"adamw_weight_decay": "weight_decay"}.get(name, name)
    group = next(g for g in optimizer.param_groups if g["algorithm"] == "adamw")
    assert group[option] == expected


def test_triples_can_be_given(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("optimizer: {ns_coefficients: [[2, -1.5, 0.5], [1.875, -1.25, 0.375]]}")
    options = config.load(file).optimizer.muonclip_options()
    assert options["ns_coefficients"] == ((2.0, -1.5, 0.5), (1.875, -1.25, 0.375))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.eps=2", "optimizer.eps must be below 1"),
        ("optimizer.adjust_lr=spectrl", "optimizer.adjust_lr must be one of 'match_rms_adamw'"),
        ("optimizer.momentum_dtype=float16", "optimizer.momentum_dtype must be one of"),
        ("optimizer.adamw_eps=-1", "optimizer.adamw_eps must be at least 0"),
        ("optimizer.adamw_eps=0", "optimizer.adamw_eps=0 must be above 0"),
        ("optimizer.ns_coefficients=[1, 2]", "optimizer.ns_coefficients must be three finite"),
        ("optimizer.momentum_warmup_start=0.5", "has no effect with momentum_warmup_steps=0"),
        (
            "{optimizer: {momentum: 0.5, momentum_warmup_steps: 9}}",
            "optimizer.momentum_warmup_start=0.85 is more than momentum=0.5, to which it rises",
        ),
        ("{optimizer: {adjust_lr: none, update_rms: 0.3}}", "has no effect with adjust_lr=none"),
        ("optimizer.master_weights=true", "'optimizer.master_weights' is not a setting: with prec"),
        ("optimizer.qk_clip=true", "'optimizer.qk_clip' is not a setting: set qk_clip_threshold"),
    ],
)
def test_bad_values_are_refused_in_one_line(tmp_path: Path, override: str, message: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(override if override.startswith("{") else "")
    with pytest.raises(PretrainError, match=message) as error:
        config.load(file, [] if override.startswith("{") else [override])
    assert "\n" not in str(error.value)


def test_settings_are_explained() -> None:
    lines = {line.split("=")[0]: line for line in rules.describe(OptimizerConfig)}
    for name in CHANGED:
        assert "  " in lines[name] and len(lines[name].split("  ")[1]) > 10, name
    assert lines["adamw_weight_decay"].endswith("(float or null)")
    assert "math:" not in "".join(lines.values()) and "``match" not in "".join(lines.values())
