"""Muon's step for whole parameters, or for the parts of them that a rank holds."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from muonclip.matrix_layouts import WHOLE, MatrixLayout
from muonclip.orthogonalize import (
    coefficient_steps,
    default_ns_dtype,
    orthogonalize_,
    update_scale,
    working_dtype,
)
from muonclip.precision import compute_dtype, write_back
from muonclip.update import (
    Scalar,
    decay_and_apply,
    look_ahead_,
    update_momentum,
)

# Matrices are worked on in batches of about this many elements (or one matrix): on a CPU what stays
# in its caches, elsewhere enough to keep a device busy. It also bounds the memory of a step.
_BATCH_ELEMENTS = {"cpu": 2**19}
_BATCH_ELEMENTS_ELSEWHERE = 2**26


class Item(NamedTuple):
    """A Muon parameter in a step: what this rank holds of everything that belongs to it.

    Attributes:
        handle: the parameter itself.
        param: its local tensor; ``target``: what is updated: it, or its master copy.
        gradient, buffer: local.
        group: its options.
        shape: of the whole parameter.
        seed: its own, for rounding.
    """

    handle: Tensor
    param: Tensor
    target: Tensor
    gradient: Tensor
    buffer: Tensor
    group: dict[str, Any]
    shape: tuple[int, ...]
    seed: tuple[int, ...]

    @property
    def layout(self) -> MatrixLayout:
        return self.group["layout"] or WHOLE

    @property
    def ns_dtype(self) -> torch.dtype:
        return self.group["ns_dtype"] or default_ns_dtype(self.param.device)

    @property
    def update_dtype(self) -> torch.dtype:
        """The dtype of the update until it is normalized, of which it needs the range."""
        if self.buffer.dtype == torch.float64:  # no other dtype has its range
            return torch.float64
        return working_dtype(self.ns_dtype)

    def narrow(self, view: Callable[[Tensor], Tensor], first: int) -> "Item":
        """The same for a part of its tensors; ``first`` tells parts apart."""
        param = view(self.param)
        return self._replace(
            seed=(*self.seed, first),
            param=param,
            target=param if self.target is self.param else view(self.target),
            gradient=view(self.gradient),
            buffer=view(self.buffer),
        )


def step_alone(items: Sequence[Item], found: Tensor | None) -> None:
    """Muon's step for parameters that this rank holds whole."""
    for batch in _batches(items):
        updates = pre_orthogonalize(batch, found)
        apply(batch, orthogonalize_parameters(batch, updates), found)


def _batches(items: Sequence[Item]) -> Iterator[list[Item]]:
    """Batches of like shapes where possible, for one device and dtype each; stacks are cut."""
    alike = defaultdict(list)
    for item in items:
        if item.param.numel():
            alike[item.param.device, item.update_dtype, item.shape[-2:]].append(item)
    batch: list[Item] = []
    elements, kind = 0, None
    for (device, dtype, _), members in alike.items():
        most = _BATCH_ELEMENTS.get(device.type, _BATCH_ELEMENTS_ELSEWHERE)
        for item in members:
            for part in _cut(item, most):
                size = part.param.numel()
                if batch and (elements + size > most or kind != (device, dtype)):
                    yield batch
                    batch, elements = [], 0
                kind = device, dtype
                batch.append(part)
                elements += size
    if batch:
        yield batch


def _cut(item: Item, most: int) -> Iterator[Item]:
    """A stack in runs of its matrices, of about so many elements; anything else as it is."""
    length = item.param.size(0)
    step = max(1, most * length // item.param.numel())
    if step >= length or item.layout.slices(item.shape) == 1:
        yield item
        return
    for first in range(0, length, step):
        count = min(step, length - first)
        yield item.narrow(partial(torch.narrow, dim=0, start=first, length=count), first)


def pre_orthogonalize(
    items: Sequence[Item], found: Tensor | None, *, ahead: bool = True
) -> list[Tensor]:
    """Update the momentum of parameters or parts of them.

    Args:
        items: of one device and update dtype.
        found: 1 if a gradient is not finite; None if all are known to be finite.
        ahead: whether the updates are wanted.

    Returns:
        The updates to orthogonalize, unless ``ahead`` is false: new tensors, consecutive in memory.
    """
    updates: list[Tensor] = []
    if ahead and items:
        sizes = [item.param.numel() for item in items]
        flat = torch.empty(sum(sizes), dtype=items[0].update_dtype, device=items[0].param.device)
        updates = [
            part.view(item.param.shape)
            for part, item in zip(flat.split_with_sizes(sizes), items, strict=True)
        ]
    for indices in _by_group(items).values():
        options = items[indices[0]].group
        momentum = momentum_now(options)
        buffers = [items[index].buffer for index in indices]
        gradients = [items[index].gradient for index in indices]
        if found is not None:  # a step that is skipped takes the momentum for the gradient
            gradients = [
                torch.where(found == 0, g.to(b.dtype), b)
                for g, b in zip(gradients, buffers, strict=True)
            ]
        update_momentum(buffers, gradients, momentum)
        if ahead:
            targets = [updates[index] for index in indices]
            look_ahead_(targets, buffers, gradients, momentum, options["nesterov"])
    return updates


def orthogonalize_parameters(items: Sequence[Item], updates: Sequence[Tensor]) -> list[Tensor]:
    """Orthogonalize and scale every matrix of the model in these updates.

    Args:
        items: their parameters; only options and layouts are read.
        updates: [n, m], [E, n, m] or as the layout says, each whole (stacks: any slices), in the
            working dtype of Newton-Schulz. Overwritten.

    Returns:
        The same shapes, in the dtype of Newton-Schulz.
    """
    matrices = [item.layout.split(update) for item, update in zip(items, updates, strict=True)]
    # Matrices of one shape go through Newton-Schulz together, whichever parameters they are in.
    alike: dict[Any, list[tuple[int, int]]] = defaultdict(list)
    for index, parts in enumerate(matrices):
        options = items[index].group
        for place, part in enumerate(parts):
            key = (
                part.shape[-2:], items[index].ns_dtype, part.device,
                repr(options["ns_coefficients"]), options["ns_steps"], options["eps"],
                options["adjust_lr"], options["update_rms"],
            )  # fmt: skip
            alike[key].append((index, place))
    for (shape, dtype, *_), places in alike.items():
        parts = [matrices[index][place] for index, place in places]
        options = items[places[0][0]].group
        results = orthogonalize_(
            _stack(parts),
            coefficient_steps(options["ns_coefficients"], options["ns_steps"]),
            eps=options["eps"],
            dtype=dtype,
            scale=update_scale(shape, options["adjust_lr"], options["update_rms"]),
        )
        sizes = [part.size(0) for part in parts]
        for (index, place), result in zip(places, results.split_with_sizes(sizes), strict=True):
            matrices[index][place] = result
    return [
        item.layout.join(parts, update.shape)
        for item, parts, update in zip(items, matrices, updates, strict=True)
    ]


def _stack(parts: Sequence[Tensor]) -> Tensor:
    """[b, n, m] tensors as one, without a copy where they follow one another in memory."""
    first = parts[0]
    if len(parts) == 1:
        return first
    place = first.storage_offset()
    for part in parts:
        if (
            not part.is_contiguous()
            or part.storage_offset() != place
            or part.untyped_storage()._cdata != first.untyped_storage()._cdata
        ):
            return torch.cat(list(parts))
        place += part.numel()
    n, m = first.shape[1:]
    # Not the first's own strides: in a dimension of one element they may be anything.
    return first.as_strided((sum(part.size(0) for part in parts), n, m), (n * m, m, 1))


def apply(items: Sequence[Item], updates: Sequence[Tensor], found: Tensor | None) -> None:
    """Decay the weights and move them, in their masters where they have some."""
    for indices in _by_group(items).values():
        options = items[indices[0]].group
        lr: Scalar = options["lr"]
        if found is not None:
            lr = lr * (1 - found)
        members = [items[index] for index in indices]
        # Lower precision is computed in float32 and rounded once.
        wide = [item.target.to(compute_dtype(item.target)) for item in members]
        decay_and_apply(
            wide,
            [updates[index] for index in indices],
            lr=lr,
            weight_decay=0.0 if options["weight_decay_mode"] == "l2" else options["weight_decay"],
            mode=options["weight_decay_mode"],
        )
        write_back(
            [(result, item.param, item.seed) for item, result in zip(members, wide, strict=True)],
            stochastic=options["stochastic_rounding"],
        )


def _by_group(items: Sequence[Item]) -> dict[Any, list[int]]:
    """Places of the items of each group and dtype."""
    places: dict[Any, list[int]] = defaultdict(list)
    for index, item in enumerate(items):
        places[id(item.group), item.target.dtype, item.buffer.dtype].append(index)
    return places


def momentum_now(group: Mapping[str, Any]) -> float:
    """The momentum at this update, of a group that counted it already."""
    steps = group["momentum_warmup_steps"]
    share = min(group["updates"] / steps, 1.0) if steps else 1.0
    start: float = group["momentum_warmup_start"]
    momentum: float = group["momentum"]
    return momentum if share == 1 else start + (momentum - start) * share
