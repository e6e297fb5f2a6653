"""transformers' Trainer with MuonClip and QK-Clip, without a subclass."""

from collections.abc import Callable
from typing import Any, TypeAlias

from torch import nn

from muonclip.model_optimizer import for_model
from muonclip.optimizer import MuonClip

OptimizerFactory: TypeAlias = Callable[..., Any]


def for_trainer(arguments: Any, **options: Any) -> tuple[OptimizerFactory, dict[str, Any]]:
    """MuonClip for ``Trainer(..., optimizer_cls_and_kwargs=for_trainer(arguments))``.

    >>> trainer = Trainer(  # doctest: +SKIP
    ...     model,
    ...     arguments,
    ...     train_dataset=dataset,
    ...     optimizer_cls_and_kwargs=muonclip.for_trainer(arguments, qk_clip_threshold=100.0),
    ... )

    The Trainer's settings of its optimizer are used: ``learning_rate``, ``weight_decay``, and for
    AdamW's groups ``adam_beta1``, ``adam_beta2`` and ``adam_epsilon``. As with the Trainer's own
    optimizers, weight decay leaves out biases and gains (``decay_vectors=False``). Its schedule,
    accumulation, gradient clipping, precision and checkpoints work as with any optimizer; the clip
    has no state to save.

    Args:
        arguments: the ``TrainingArguments`` that the Trainer is given.
        options: of ``for_model``; they override those of ``arguments``.

    Returns:
        A factory and its keyword arguments.

    Raises:
        TypeError: for anything but ``TrainingArguments``.
    """
    if not hasattr(arguments, "adam_beta1"):
        raise TypeError(
            f"for_trainer needs the TrainingArguments, got {type(arguments).__name__}: write "
            "for_trainer(arguments, qk_clip_threshold=100.0)"
        )
    given = {
        "lr": arguments.learning_rate,
        "weight_decay": arguments.weight_decay,
        "adamw_betas": (arguments.adam_beta1, arguments.adam_beta2),
        "adamw_eps": arguments.adam_epsilon,
        "decay_vectors": False,
    }
    return optimizer_factory, {**given, **options}


def optimizer_factory(model: Any = None, **options: Any) -> OptimizerFactory | MuonClip:
    """``for_model``, as transformers' Trainer calls it.

    From transformers 5 on it calls ``optimizer_factory()(model, **options)``. Earlier versions call
    ``optimizer_factory(groups, **options)``, with ``options["model"]`` in place of groups if given.

    Raises:
        TypeError: for groups, which have neither names nor modules.
    """
    if model is None:
        return for_model
    if not isinstance(model, nn.Module):
        raise TypeError(
            "MuonClip needs the model, but this version of transformers passes parameter groups: "
            "give for_trainer the model too (model=model), or install transformers >= 5"
        )
    return for_model(model, **options)
