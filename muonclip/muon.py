"""Muon's step for parameters, or for the shards of them that a rank stores."""

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from muonclip.matrix_layouts import WHOLE, MatrixLayout
from muonclip.offload import copy_back, fetch, streamed
from muonclip.orthogonalize import (
    Triple,
    coefficient_steps,
    orthogonalize_,
    update_scale,
    working_dtype,
)
from muonclip.precision import Result, refresh_master, write_back
from muonclip.quantization import dequantize, quantize_
from muonclip.remainders import join
from muonclip.update import (
    Scalar,
    cast,
    decay_and_apply,
    look_ahead_,
    update_momentum,
)
from muonclip.variants import State, variant_of

# A batch has about this many elements (or one matrix): as many as fit a CPU's caches, or keep an
# accelerator busy. This also bounds the memory of a step.
_BATCH_ELEMENTS = {"cpu": 2**19}
BATCH_ELEMENTS_ELSEWHERE = 2**26


class MuonParam(NamedTuple):
    """A Muon parameter in a step, with this rank's part of every tensor that belongs to it.

    Attributes:
        param: the parameter itself.
        local: its local tensor.
        to_update: the tensor to update: the local part of the master copy, or ``local``.
        gradient, momentum_buffer: local.
        momentum_scale: of each row of an int8 ``momentum_buffer`` (see ``quantization``).
        remainder: local; the master copy is ``local`` with it (see ``remainders``).
        compute: where the step computes with tensors that may be elsewhere (see ``offload``); None:
            all are on one device.
        group: the options.
        shape: of the whole parameter.
        seed: for stochastic rounding.
        ns_dtype: of Newton-Schulz.
        is_sharded: whether the owners of its matrices keep the state (``shard_state``):
            ``momentum_buffer`` and ``master`` are then ``ShardedState``.
        master: the master copy, if ``is_sharded`` and there is one.
        neurons: state of the group's variant by name: local, or ``ShardedState`` if ``is_sharded``.
    """

    param: Tensor
    local: Tensor
    to_update: Tensor
    gradient: Tensor
    momentum_buffer: Tensor
    group: dict[str, Any]
    shape: tuple[int, ...]
    seed: tuple[int, ...]
    ns_dtype: torch.dtype
    is_sharded: bool = False
    master: Tensor | None = None
    momentum_scale: Tensor | None = None
    remainder: Tensor | None = None
    compute: torch.device | None = None
    neurons: Mapping[str, Tensor] = MappingProxyType({})

    @property
    def device(self) -> torch.device:
        """The device of the step's computations."""
        return self.compute or self.local.device

    @property
    def layout(self) -> MatrixLayout:
        return self.group["layout"] or WHOLE

    @property
    def num_slices(self) -> int:
        """Number of slices [n, m] of a stack that can be orthogonalized independently."""
        return self.layout.slices(self.shape)

    @property
    def update_dtype(self) -> torch.dtype:
        """Dtype of the update until its normalization, which must have the momentum's range."""
        if self.momentum_buffer.dtype == torch.float64:  # no other dtype has its range
            return torch.float64
        return working_dtype(self.ns_dtype)

    @property
    def unit(self) -> float:
        """Divisor of orthogonalized updates until they are applied: a power of two.

        In float16 it is about ``update_rms``, which could otherwise leave its range.
        """
        group = self.group
        if self.ns_dtype != torch.float16 or group["adjust_lr"] != "match_rms_adamw":
            return 1.0
        _, exponent = math.frexp(group["update_rms"])
        return math.ldexp(1.0, exponent - 1)

    def narrow(self, start: int, length: int, first: int) -> "MuonParam":
        """The same for some slices of the local tensors.

        Args:
            start, length: of the slices, in the local tensors.
            first: the number of the first of them in a larger unit, to tell their seeds apart.
        """

        def view(tensor: Tensor) -> Tensor:
            return tensor[start : start + length]

        def view_state(tensor: Tensor) -> Tensor:
            return tensor if self.is_sharded else view(tensor)

        scale, remainder = self.momentum_scale, self.remainder
        local = view(self.local)
        return self._replace(
            local=local,
            to_update=local if self.to_update is self.local else view(self.to_update),
            gradient=view(self.gradient),
            momentum_buffer=view_state(self.momentum_buffer),
            momentum_scale=None if scale is None else view_state(scale),
            remainder=None if remainder is None else view_state(remainder),
            seed=(*self.seed, first),
            neurons=(
                self.neurons
                if self.num_slices == 1
                else {name: view_state(value) for name, value in self.neurons.items()}
            ),
        )


_STATE = ("momentum_buffer", "momentum_scale")
_WEIGHTS = ("local", "to_update", "remainder")


@contextmanager
def state_on_device(params: Sequence[MuonParam]) -> Iterator[Sequence[MuonParam]]:
    """The parameters, with momentum and gradient where the step computes; copied back at exit."""
    with _on_device(params, (*_STATE, "gradient")) as moved:
        yield moved


@contextmanager
def weights_on_device(params: Sequence[MuonParam]) -> Iterator[Sequence[MuonParam]]:
    """The parameters, with weights where the step computes; copied back at exit."""
    with _on_device(params, _WEIGHTS) as moved:
        _refresh(moved)
        yield moved


@contextmanager
def _on_device(params: Sequence[MuonParam], fields: Sequence[str]) -> Iterator[Sequence[MuonParam]]:
    if not params or params[0].compute is None:
        yield params
        return
    moved, _ = _fetch(params, fields)
    yield moved
    _copy_back(params, moved)


def _fetch(
    params: Sequence[MuonParam], fields: Sequence[str] = (*_STATE, "gradient", *_WEIGHTS)
) -> tuple[list[MuonParam], list[Tensor]]:
    """Start to copy fields to where the step computes.

    Returns:
        The parameters with the copies; the copies.
    """
    moved, copies = [], []
    for param in params:
        found: dict[int, Tensor] = {}  # ``local`` and ``to_update`` may be one tensor
        for name in fields:
            tensor = getattr(param, name)
            if tensor is not None and id(tensor) not in found:
                found[id(tensor)] = fetch(tensor, param.device)
                if found[id(tensor)] is not tensor:
                    copies.append(found[id(tensor)])
        values: dict[str, Any] = {name: found.get(id(getattr(param, name))) for name in fields}
        moved.append(param._replace(**values))
    return moved, copies


def _refresh(params: Sequence[MuonParam]) -> None:
    """Copy weights that were written since the last step into their master copies."""
    for param in params:
        if param.compute is not None and param.to_update is not param.local:
            refresh_master(param.to_update, param.local)


def _copy_back(params: Sequence[MuonParam], moved: Sequence[MuonParam]) -> None:
    """Copy to where they came from the fields that a step writes to."""
    for param, other in zip(params, moved, strict=True):
        pairs = [(getattr(param, name), getattr(other, name)) for name in (*_STATE, *_WEIGHTS)]
        # ``local`` and ``to_update`` may be one tensor.
        for target, source in {id(pair[0]): pair for pair in pairs}.values():
            if target is not None:
                copy_back(target, source)


class Arrangement:
    """The division of a batch of parameters into groups and kinds, made at its first use."""

    def __init__(self) -> None:
        self._groups: list[list[int]] | None = None
        self._kinds: list[_Kind] | None = None

    def groups(self, params: Sequence[MuonParam]) -> list[list[int]]:
        """Indices of the parameters of each group, dtype and unit."""
        if self._groups is None:
            indices: dict[Any, list[int]] = defaultdict(list)
            for index, param in enumerate(params):
                dtypes = param.to_update.dtype, param.momentum_buffer.dtype
                indices[id(param.group), param.unit, dtypes].append(index)
            self._groups = list(indices.values())
        return self._groups

    def kinds(
        self, params: Sequence[MuonParam], matrices: Sequence[Sequence[Tensor]]
    ) -> "list[_Kind]":
        """The matrices that go through Newton-Schulz together, whichever parameters they are in.

        Args:
            params: the parameters.
            matrices: [b, n, m] of each, block by block.
        """
        if self._kinds is None:
            groups = {id(param.group): param.group for param in params}
            options = {key: _options_of_updates(group) for key, group in groups.items()}
            by_kind: dict[Any, list[tuple[int, int]]] = defaultdict(list)
            for index, (param, stacks) in enumerate(zip(params, matrices, strict=True)):
                common = param.ns_dtype, _neuron_dtypes(param), options[id(param.group)]
                for position, stack in enumerate(stacks):
                    by_kind[stack.shape[-2:], stack.device, common].append((index, position))
            kinds = []
            for (shape, *_), positions in by_kind.items():
                param = params[positions[0][0]]
                group = param.group
                scale = update_scale(shape, group["adjust_lr"], group["update_rms"]) / param.unit
                sizes = [matrices[index][position].size(0) for index, position in positions]
                schedule = coefficient_steps(group["ns_coefficients"], group["ns_steps"])
                kinds.append(_Kind(positions, sizes, schedule, scale))
            self._kinds = kinds
        return self._kinds


class _Kind(NamedTuple):
    """Matrices of a batch that have one shape, dtype and options.

    Attributes:
        positions: the index of the parameter of each stack, and of its block there.
        sizes: number of matrices of each stack.
        schedule: of Newton-Schulz.
        scale: factor on the results.
    """

    positions: list[tuple[int, int]]
    sizes: list[int]
    schedule: list[Triple]
    scale: float


def _neuron_dtypes(param: MuonParam) -> tuple[torch.dtype, ...]:
    return tuple(state.dtype for state in param.neurons.values()) if param.neurons else ()


def pre_orthogonalize(
    params: Sequence[MuonParam],
    found_inf: Tensor | None,
    arrangement: Arrangement | None = None,
) -> list[Tensor]:
    """Update the momentum and return the updates to orthogonalize.

    Args:
        params: of one device and update dtype.
        found_inf: as for ``LocalMuon.step``.
        arrangement: of the parameters, if there is one already.

    Returns:
        New tensors, consecutive in memory, in the update dtype.
    """
    if not params:
        return []
    sizes = [param.local.numel() for param in params]
    flat = torch.empty(sum(sizes), dtype=params[0].update_dtype, device=params[0].device)
    updates = [
        part.view_as(param.local)  # view(shape) takes three times as long
        for part, param in zip(flat.split_with_sizes(sizes), params, strict=True)
    ]
    arrangement = arrangement or Arrangement()
    gradients, momenta = update_momenta(params, found_inf, arrangement)
    for indices in arrangement.groups(params):
        group = params[indices[0]].group
        look_ahead_(
            [updates[index] for index in indices],
            [momenta[index] for index in indices],
            [gradients[index] for index in indices],
            momentum_now(group),
            group["nesterov"],
        )
    return updates


def update_momenta(
    params: Sequence[MuonParam],
    found_inf: Tensor | None,
    arrangement: Arrangement | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """Update the momentum.

    Returns:
        The gradients; in a step that is skipped, the momentum instead, which does not change it.
        The new momentum; before it is rounded, if it is stored in int8.
    """
    gradients = [param.gradient for param in params]
    momenta = [_read_momentum(param) for param in params]
    if found_inf is not None:
        gradients = [
            torch.where(found_inf == 0, gradient.to(momentum.dtype), momentum)
            for gradient, momentum in zip(gradients, momenta, strict=True)
        ]
    for indices in (arrangement or Arrangement()).groups(params):
        update_momentum(
            [momenta[index] for index in indices],
            [gradients[index] for index in indices],
            momentum_now(params[indices[0]].group),
        )
    for param, momentum in zip(params, momenta, strict=True):
        if param.momentum_scale is not None:
            quantize_(param.momentum_buffer, param.momentum_scale, momentum)
    return gradients, momenta


def _read_momentum(param: MuonParam) -> Tensor:
    """The momentum to compute with: the buffer itself, or its decoded values."""
    if param.momentum_scale is None:
        return param.momentum_buffer
    dtype = torch.promote_types(param.gradient.dtype, torch.float32)
    return dequantize(param.momentum_buffer, param.momentum_scale, dtype)


def orthogonalize_updates(
    params: Sequence[MuonParam],
    updates: Sequence[Tensor],
    found_inf: Tensor | None,
    arrangement: Arrangement | None = None,
) -> list[Tensor]:
    """Orthogonalize and scale every matrix of the model in these updates.

    Args:
        params: the parameters of the updates; only options and layouts are read, and the state of
            variants is updated.
        updates: [n, m], [E, n, m] or as the layout says, each whole (stacks: any slices), in the
            working dtype of Newton-Schulz. Overwritten.
        found_inf: as for ``LocalMuon.step``.
        arrangement: of the parameters, if there is one already.

    Returns:
        The same shapes, in the dtype of Newton-Schulz, divided by ``MuonParam.unit``.
    """
    layouts = [param.layout for param in params]
    matrices = [layout.split(update) for layout, update in zip(layouts, updates, strict=True)]
    states = [_split_state(param) if param.neurons else [] for param in params]
    for kind in (arrangement or Arrangement()).kinds(params, matrices):
        stacks = [matrices[index][position] for index, position in kind.positions]
        param = params[kind.positions[0][0]]
        group = param.group
        variant = variant_of(group)
        results = orthogonalize_(
            _concatenate(stacks),
            kind.schedule,
            eps=group["eps"],
            dtype=param.ns_dtype,
            scale=kind.scale if variant.factor is None else 1.0,
        )
        if variant.factor is not None:
            blocks = [states[index][position] for index, position in kind.positions]
            results.mul_(_variant_factor(results, blocks, kind.sizes, group) * kind.scale)
        parts = results.split_with_sizes(kind.sizes) if len(stacks) > 1 else (results,)
        for (index, position), part in zip(kind.positions, parts, strict=True):
            matrices[index][position] = part
    for param, blocks in zip(params, states, strict=True):
        if blocks:
            _store_state(param, blocks, found_inf)
    return [
        layout.join(stacks, update.shape)
        for layout, stacks, update in zip(layouts, matrices, updates, strict=True)
    ]


def _options_of_updates(group: Mapping[str, Any]) -> tuple[Any, ...]:
    """The options that a matrix's update depends on; hashable."""
    names = ("ns_steps", "eps", "adjust_lr", "update_rms", "variant", *variant_of(group).options)
    return repr(group["ns_coefficients"]), *(group[name] for name in names)


def _split_state(param: MuonParam) -> list[dict[str, Tensor]]:
    """The state of the variant for each block of matrices, [b, n, 1] by name."""
    count = 1 if param.layout.blocks is None else len(param.layout.blocks)
    layout = param.layout.of_neurons
    by_name = {name: layout.split(value) for name, value in param.neurons.items()}
    return [{name: parts[block] for name, parts in by_name.items()} for block in range(count)]


def _variant_factor(
    matrices: Tensor, blocks: Sequence[State], sizes: Sequence[int], options: Mapping[str, Any]
) -> Tensor:
    """The factor of a group's variant.

    Args:
        matrices: orthogonalized, [b, n, m].
        blocks: state of some of the matrices, one block after another; replaced by the new state.
        sizes: number of matrices of each block.
        options: of the group.
    """
    variant = variant_of(options)
    assert variant.factor is not None
    state = {name: torch.cat([block[name] for block in blocks]) for name in variant.state}
    factor, state = variant.factor(matrices, state, options)
    for name, values in state.items():
        for block, part in zip(blocks, values.split_with_sizes(list(sizes)), strict=True):
            block[name] = part
    return factor


def _store_state(param: MuonParam, blocks: Sequence[State], found_inf: Tensor | None) -> None:
    """Write the state of each block of matrices into the parameter's, unless nothing may change."""
    for name, value in param.neurons.items():
        new = param.layout.of_neurons.join([block[name] for block in blocks], value.shape)
        value.copy_(new if found_inf is None else torch.where(found_inf == 0, new, value))


def _concatenate(stacks: Sequence[Tensor]) -> Tensor:
    """[b, n, m] tensors as one, without a copy if they follow one another in memory."""
    first = stacks[0]
    if len(stacks) == 1:
        return first
    offset = first.storage_offset()
    for stack in stacks:
        if (
            not stack.is_contiguous()
            or stack.storage_offset() != offset
            or stack.untyped_storage()._cdata != first.untyped_storage()._cdata
        ):
            return torch.cat(list(stacks))
        offset += stack.numel()
    n, m = first.shape[1:]
    # Not the first's own strides: in a dimension of one element they may be anything.
    return first.as_strided((sum(stack.size(0) for stack in stacks), n, m), (n * m, m, 1))


def apply_updates(
    params: Sequence[MuonParam],
    updates: Sequence[Tensor],
    found_inf: Tensor | None,
    arrangement: Arrangement | None = None,
) -> None:
    """Decay the weights, add the updates, and round the results into the parameters."""
    for indices in (arrangement or Arrangement()).groups(params):
        members = [params[index] for index in indices]
        options = members[0].group
        lr: Scalar = options["lr"]
        if found_inf is not None:
            lr = lr * (1 - found_inf)
        # Lower precision is computed in float32 and rounded once.
        wide = [_read_weights(param) for param in members]
        decay_and_apply(
            wide,
            [updates[index] for index in indices],
            lr=lr,
            weight_decay=0.0 if options["weight_decay_mode"] == "l2" else options["weight_decay"],
            mode=options["weight_decay_mode"],
            unit=members[0].unit,
        )
        write_back(
            [
                Result(result, param.local, param.remainder, param.seed)
                for param, result in zip(members, wide, strict=True)
                if result is not param.local
            ],
            stochastic=options["stochastic_rounding"],
        )


def _read_weights(param: MuonParam) -> Tensor:
    """The weights in float32, or wider; the tensor to update itself if it is."""
    if param.remainder is not None:
        return join(param.local, param.remainder)
    return cast(param.to_update, torch.promote_types(param.to_update.dtype, torch.float32))


def momentum_now(group: Mapping[str, Any]) -> float:
    """The momentum at this update, which is already counted in ``group["updates"]``."""
    steps = group["momentum_warmup_steps"]
    progress = min(group["updates"] / steps, 1.0) if steps else 1.0
    start: float = group["momentum_warmup_start"]
    momentum: float = group["momentum"]
    return momentum if progress == 1 else start + (momentum - start) * progress


class LocalMuon:
    """Muon's step for parameters that this rank has whole.

    The division into batches is kept until shapes, dtypes or options change: for small matrices it
    would be up to a fifth of a step.
    """

    def __init__(self) -> None:
        self._described: Any = None
        self._batches: list[_Batch] = []

    def step(self, params: Sequence[MuonParam], found_inf: Tensor | None) -> None:
        """Update the parameters.

        Args:
            params: with a gradient.
            found_inf: 1 if a gradient is not finite, and nothing must change; None if all are
                finite.
        """
        if not params:
            return
        described = _describe(params)
        if described != self._described:
            self._described, self._batches = described, list(_batches(params))
        batches, compute = self._batches, params[0].compute
        if compute is None:
            for batch in batches:
                _step_batch(batch.members(params), found_inf, batch.arrangement)
            return
        members = (batch.members(params) for batch in batches)
        arrangements = iter([batch.arrangement for batch in batches])
        for given, moved in streamed(members, _fetch, compute):
            _refresh(moved)
            _step_batch(moved, found_inf, next(arrangements))
            _copy_back(given, moved)
            del moved  # before a third one is copied


class _Part(NamedTuple):
    """A parameter, or some slices of a large stack, in a batch."""

    number: int  # of the parameter in the step
    start: int = 0
    length: int | None = None  # all of them


class _Batch(NamedTuple):
    """Parts of parameters of one device and update dtype."""

    parts: list[_Part]
    arrangement: Arrangement

    def members(self, params: Sequence[MuonParam]) -> list[MuonParam]:
        return [
            params[number] if length is None else params[number].narrow(start, length, start)
            for number, start, length in self.parts
        ]


def _batches(params: Sequence[MuonParam]) -> Iterator[_Batch]:
    """Batches of one device and dtype, equal shapes next to each other; large stacks are split."""
    by_kind = defaultdict(list)
    for number, param in enumerate(params):
        if param.local.numel():
            by_kind[param.device, param.update_dtype, param.shape[-2:]].append(number)
    parts: list[_Part] = []
    elements, batch_kind = 0, None
    for (device, dtype, _), numbers in by_kind.items():
        limit = _BATCH_ELEMENTS.get(device.type, BATCH_ELEMENTS_ELSEWHERE)
        for number in numbers:
            for part, size in _split_stack(params[number], number, limit):
                if parts and (elements + size > limit or batch_kind != (device, dtype)):
                    yield _Batch(parts, Arrangement())
                    parts, elements = [], 0
                batch_kind = device, dtype
                parts.append(part)
                elements += size
    if parts:
        yield _Batch(parts, Arrangement())


def _split_stack(param: MuonParam, number: int, elements: int) -> Iterator[tuple[_Part, int]]:
    """Split a stack into parts of about this many elements, each with its number of elements."""
    length, total = param.local.size(0), param.local.numel()
    step = max(1, elements * length // total)
    if step >= length or param.num_slices == 1:
        yield _Part(number), total
        return
    for start in range(0, length, step):
        slices = min(step, length - start)
        yield _Part(number, start, slices), slices * (total // length)


def _step_batch(
    batch: Sequence[MuonParam], found_inf: Tensor | None, arrangement: Arrangement
) -> None:
    updates = pre_orthogonalize(batch, found_inf, arrangement)
    updates = orthogonalize_updates(batch, updates, found_inf, arrangement)
    apply_updates(batch, updates, found_inf, arrangement)


def _describe(params: Sequence[MuonParam]) -> Any:
    """Everything that batches and arrangements of these parameters depend on."""
    groups = {id(param.group): param.group for param in params}
    return (
        [(key, group["layout"], _options_of_updates(group)) for key, group in groups.items()],
        [
            (
                id(p.group), p.shape, p.local.shape, p.device, p.to_update.dtype,
                p.momentum_buffer.dtype, p.ns_dtype, _neuron_dtypes(p),
            )
            for p in params
        ],
    )  # fmt: skip
