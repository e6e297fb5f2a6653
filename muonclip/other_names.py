"""Names that other libraries give to MuonClip's options.

Sources: NVIDIA-NeMo/Emerging-Optimizers at fd77292 (``orthogonalized_optimizers/muon.py`` and
``muon_utils.py``), megatron-core 0.19.2 (``optimizer/optimizer_config.py``), torch 2.14
(``torch.optim.Muon``).
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch

# Other libraries' values that no option of MuonClip has with another meaning.
ALIASES: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        "ns_coefficients": {"simple": "quintic", "deepseekv4": "deepseek_v4", "cubic5": "cubic"},
        "adjust_lr": {
            "shape_scaling": "original",
            "unit_rms_norm": "spectral",
            "spectral_unclamped": "spectral",  # of torch
        },
    }
)
# Emerging-Optimizers' values with their meanings here, where the same word may mean something else.
_COEFFICIENTS = {
    **ALIASES["ns_coefficients"],
    "quintic": "you",
    "polar_express": "polar_express",
    "cans": "cans",
}
_SCALES = {"spectral": "match_rms_adamw", "shape_scaling": "original", "unit_rms_norm": "spectral"}
_DECAYS = {name: name for name in ("decoupled", "independent", "l2")}
_NS_DTYPES = {"medium": torch.bfloat16, "high": torch.float32, "highest": torch.float32}
_NO_EQUIVALENT = {
    "aol": "its triples are for another normalization; 'you' and 'polar_express' are as fast",
    "custom": "pass the triples themselves as ns_coefficients",
    "palm": "'decoupled' is proportional to lr rather than its square",
}
_DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {
        "lr": 3e-4,
        "momentum": 0.95,
        "weight_decay": 0.01,
        "nesterov": False,
        "weight_decay_method": "decoupled",
        "fp32_matmul_prec": "medium",
        "coefficient_type": "quintic",
        "num_ns_steps": 5,
        "scale_mode": "spectral",
        "extra_scale_factor": 1.0,
    }
)
# megatron-core's OptimizerConfig: its name -> Emerging-Optimizers' name.
_MEGATRON = {
    "lr": "lr",
    "weight_decay": "weight_decay",
    "muon_momentum": "momentum",
    "muon_nesterov": "nesterov",
    "muon_use_nesterov": "nesterov",  # before 0.19
    "muon_scale_mode": "scale_mode",
    "muon_extra_scale_factor": "extra_scale_factor",
    "muon_coefficient_type": "coefficient_type",
    "muon_num_ns_steps": "num_ns_steps",
    "muon_fp32_matmul_prec": "fp32_matmul_prec",
}
_NOT_NEEDED = {
    "muon_split_qkv": "matrix_layouts of muonclip.integrations.megatron_core splits fused matrices",
    "muon_tp_mode": "shardings of muonclip.integrations.megatron_core gathers whole matrices",
    "use_syrk": "kernels are chosen by device and shape",
}


def canonical(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of MuonClip with its names for values that have another one elsewhere.

    Raises:
        ValueError: for another library's value without an equivalent here.
    """
    named = dict(options)
    for option, aliases in ALIASES.items():
        if isinstance(value := named.get(option), str):
            named[option] = aliases.get(value, value)
    for option in ("ns_coefficients", "weight_decay_mode"):
        value = named.get(option)
        if isinstance(value, str) and value in _NO_EQUIVALENT:
            raise ValueError(
                f"{option}={value!r} of Emerging-Optimizers has no equivalent: "
                f"{_NO_EQUIVALENT[value]}"
            )
    return named


def from_emerging_optimizers(**options: Any) -> dict[str, Any]:
    """MuonClip's options for the updates of ``emerging_optimizers``' ``Muon``.

    >>> options = from_emerging_optimizers(lr=3e-4, extra_scale_factor=0.2)
    >>> options["ns_coefficients"], options["adjust_lr"], options["update_rms"]
    ('you', 'match_rms_adamw', 0.2)

    The result contains its defaults for options that are not given. Beyond the fifth step of
    ``quintic``, Emerging-Optimizers starts again with the first triple and MuonClip repeats the
    last one; that case is refused. ``cans`` and ``cubic5`` have a margin of 1 % here.

    Args:
        options: of its constructor: ``lr``, ``momentum``, ``weight_decay``, ``nesterov``,
            ``weight_decay_method``, ``fp32_matmul_prec``, ``coefficient_type``, ``num_ns_steps``,
            ``scale_mode``, ``extra_scale_factor``.

    Returns:
        Keyword arguments of ``MuonClip`` and ``for_model``.

    Raises:
        ValueError: for an option or value without an equivalent; the message names the remedy.
    """
    for name in options:
        if name not in _DEFAULTS:
            reason = _NOT_NEEDED.get(name, f"known are {', '.join(_DEFAULTS)}")
            raise ValueError(f"MuonClip has no equivalent of {name}: {reason}")
    given = {**_DEFAULTS, **options}
    coefficients = _translate("coefficient_type", given, _COEFFICIENTS)
    scale = _translate("scale_mode", given, _SCALES)
    if coefficients == "you" and given["num_ns_steps"] > 5:
        raise ValueError(
            f"num_ns_steps={given['num_ns_steps']} repeats the triples of 'quintic' from the first "
            "one there, and the last one here: use 5 steps, or pass the triples as ns_coefficients"
        )
    factor = given["extra_scale_factor"]
    translated = {
        "lr": given["lr"],
        "momentum": given["momentum"],
        "weight_decay": given["weight_decay"],
        "nesterov": given["nesterov"],
        "weight_decay_mode": _translate("weight_decay_method", given, _DECAYS),
        "ns_coefficients": coefficients,
        "ns_steps": given["num_ns_steps"],
        "ns_dtype": _translate("fp32_matmul_prec", given, _NS_DTYPES),
        "adjust_lr": scale,
    }
    if scale == "match_rms_adamw":
        translated["update_rms"] = factor
    elif factor != 1:
        raise ValueError(
            f"extra_scale_factor={factor} has an equivalent only with scale_mode='spectral': leave "
            f"it out, multiply lr by {factor}, and divide weight_decay by it"
        )
    return translated


def from_megatron(**options: Any) -> dict[str, Any]:
    """MuonClip's options for the Muon of megatron-core's ``OptimizerConfig``.

    >>> from_megatron(lr=3e-4, weight_decay=0.1, muon_scale_mode="unit_rms_norm")["adjust_lr"]
    'spectral'

    Args:
        options: ``lr``, ``weight_decay``, and those that begin with ``muon_``.

    Returns, Raises:
        as ``from_emerging_optimizers``.
    """
    translated = {}
    for name, value in options.items():
        if name not in _MEGATRON:
            reason = _NOT_NEEDED.get(name, f"known are {', '.join(_MEGATRON)}")
            raise ValueError(f"MuonClip has no equivalent of {name}: {reason}")
        translated[_MEGATRON[name]] = value
    return from_emerging_optimizers(**translated)


def _translate(option: str, options: Mapping[str, Any], meanings: Mapping[str, Any]) -> Any:
    value = options[option]
    if not isinstance(value, str) or value not in meanings:
        reason = _NO_EQUIVALENT.get(str(value), f"known are {', '.join(meanings)}")
        raise ValueError(f"MuonClip has no equivalent of {option}={value!r}: {reason}")
    return meanings[value]
