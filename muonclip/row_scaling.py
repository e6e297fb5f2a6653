"""Scales the rows of query and key weights by per-head factors, where these weights are trained."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from muonclip.adapters import root
from muonclip.attention_layouts import AttentionLayout, HeadRows
from muonclip.distributed.groups import order_of
from muonclip.distributed.remainder_master import RemainderMaster
from muonclip.distributed.sharded_state import ShardedState
from muonclip.distributed.sharding import is_dtensor, local_indices, local_tensor
from muonclip.precision import get_master, refresh_master

# The reason why a layer is not scaled that cannot let its logits grow.
FROZEN = "its query and key weights are frozen"

# The sides of a layer that take the factor on its logits.
ScaledSides = Literal["both", "query", "key", "none"]


class _HeadRows(NamedTuple):
    """The rows of a weight, bias or adapter vector that belong to the heads of a layer."""

    tensor: Tensor
    dim: int  # of the rows
    rows: Tensor  # [heads, r]
    first_factor: int  # index of the first head's factor
    is_frozen: bool


class _Side(NamedTuple):
    """The queries or the keys of one layer."""

    tensors: list[_HeadRows]
    obstacle: str  # the reason why they cannot be scaled; empty if they can
    is_frozen: bool  # nothing is trained
    is_adapted: bool  # an adapter trains it, or its weight is computed


class ScalingPlan:
    """The tensors to scale, and the factor of each of their rows.

    Factors are one vector: of all query heads, all key groups, all rotary query heads, and a one.

    Args:
        layouts: layer -> layout.

    Attributes:
        layouts: as given.
        tensors: the tensors to scale.
        sides: layer -> the sides that take the factor.
        skipped: layer -> the reason why it is not scaled.

    Raises:
        ValueError: if layers share a trained weight, query and key share rows, a weight has another
            number of rows than its layout, or a layer is trained in a way that cannot be clipped
            exactly.
    """

    def __init__(self, layouts: Mapping[str, AttentionLayout]) -> None:
        self.layouts = layouts
        sides = _read_sides(layouts)
        self._fingerprint = _fingerprint(sides)
        self.sides: dict[str, ScaledSides] = {}
        self.skipped: dict[str, str] = {}
        for name, (query, key) in sides.items():
            self.sides[name], reason = _scaled_sides(name, layouts[name], query, key)
            if reason:
                self.skipped[name] = reason
        self.tensors = self._collect(sides)

    def is_current(self) -> bool:
        """Whether no parameter was replaced, frozen or unfrozen since the plan was made."""
        return self._fingerprint == _fingerprint(_read_sides(self.layouts))

    def _collect(self, sides: Mapping[str, tuple[_Side, _Side]]) -> "list[ScaledTensor]":
        """Every trained tensor of the layers to scale, once even if query and key are fused."""
        one = sum(2 * x.num_heads + x.num_kv_groups for x in self.layouts.values())
        scaled: dict[int, ScaledTensor] = {}
        for name, (query, key) in sides.items():
            if self.sides[name] == "none":
                continue
            for tensor, dim, rows, first_factor, is_frozen in query.tensors + key.tensors:
                if is_frozen:  # its factors are one
                    continue
                entry = scaled.setdefault(id(tensor), ScaledTensor(name, tensor, dim, one))
                if entry.layer != name:
                    raise ValueError(
                        f"layers {entry.layer!r} and {name!r} share a weight: "
                        "give QK-Clip one layout for it and observe both layers under its name"
                    )
                entry.assign(rows, dim, first_factor)
        return list(scaled.values())


class ScaledTensor:
    """A weight, bias or adapter vector, and the factor of each of its rows.

    Args:
        layer: name of its layer.
        tensor: the tensor.
        dim: the dimension of its rows.
        one: index of the factor one, for rows that are not assigned.

    Attributes:
        master_start: index of the first element of this rank's shard of a sharded master copy;
            None before ``locate_master_shards``.
    """

    def __init__(self, layer: str, tensor: Tensor, dim: int, one: int) -> None:
        self.layer, self.tensor, self.dim, self._one = layer, tensor, dim, one
        self._factor_indices = torch.full((tensor.size(dim),), one, dtype=torch.int64, device="cpu")
        self.master_start: int | None = None
        self._local_indices: tuple[Any, Tensor] | None = None

    def assign(self, rows: Tensor, dim: int, first_factor: int) -> None:
        """Give the rows of head i, ``rows[i]``, the factor ``first_factor`` + i."""
        rows = rows.cpu()
        if self.dim != dim or (self._factor_indices[rows] != self._one).any():
            raise ValueError(f"layer {self.layer!r}: query and key share rows of a weight")
        heads = torch.arange(len(rows), device="cpu")
        self._factor_indices[rows] = first_factor + heads[:, None]

    @property
    def has_sharded_master(self) -> bool:
        """Whether each rank has a flat shard of the tensor's master copy."""
        return bool(getattr(self.tensor, "main_param_sharded", False))

    @property
    def has_master_on_owners(self) -> bool:
        """Whether ranks store different parts of the tensor's master copy (``shard_state``)."""
        return isinstance(get_master(self.tensor), ShardedState)

    @property
    def optimizer_tensors(self) -> list[Tensor]:
        """The tensors that an optimizer may update: the tensor itself or its master copy."""
        master = get_master(self.tensor)
        return [root(self.tensor), *([] if master is None else [master])]

    @property
    def has_gradient(self) -> bool:
        """Whether ``grad`` shows that the last backward pass reached the tensor."""
        return any(tensor.grad is not None for tensor in self.optimizer_tensors)

    def check(self) -> None:
        """Check that the tensor and its master copy can be scaled.

        Raises:
            ValueError: if they cannot.
        """
        tensor = self.tensor
        master: Any = get_master(tensor)
        if self.has_master_on_owners or isinstance(master, RemainderMaster):
            is_valid = True
        elif self.has_sharded_master:
            is_valid = _placements(tensor) is None and (master is None or master.ndim == 1)
        else:
            is_valid = master is None or (
                (master.shape, _placements(master)) == (tensor.shape, _placements(tensor))
            )
        if not is_valid:
            raise ValueError(
                f"layer {self.layer!r}: the master copy (main_param) of a weight of shape "
                f"{tuple(tensor.shape)} is {tuple(master.shape)}: it must be sharded as the weight "
                "is, or be a flat shard of it with main_param_sharded set"
            )
        self._indices()

    def local_factors(self, factors: Tensor) -> Tensor:
        """The factor of each row on this rank, broadcastable to the local tensor."""
        shape = [-1 if dim == self.dim else 1 for dim in range(self.tensor.ndim)]
        return factors.to(self.tensor.device)[self._indices()].view(shape)

    def scale(self, factors: Tensor) -> None:
        """Multiply each row by its factor, in the master copy if there is one."""
        weight = local_tensor(self.tensor)
        by_row = self.local_factors(factors)
        master = get_master(self.tensor)
        if self.has_sharded_master:
            # Not refreshed from the master: copies on other ranks must stay the same.
            weight.mul_(by_row)
            if master is not None:
                by_element = by_row.expand_as(weight).flatten()[self.master_start :]
                master.mul_(by_element[: master.numel()])
        elif master is None:
            weight.mul_(by_row)
        elif isinstance(master, RemainderMaster):
            master.scale_(by_row)
        else:
            master = local_tensor(master)
            scaled = master.to(weight.device)  # it may be on the CPU (``state_device``)
            if weight.element_size() == 2 and type(weight) in (Tensor, nn.Parameter):
                refresh_master(scaled, weight)  # it may have been loaded since the optimizer's step
            scaled.mul_(by_row)
            # Rows with factor one keep their bits, even if they are not the rounded master's.
            weight.copy_(torch.where(by_row == 1, weight, scaled))
            if scaled is not master:
                master.copy_(scaled)

    def _indices(self) -> Tensor:
        """The factor index of each row on this rank, on the tensor's device."""
        key = (self.tensor.device, _placements(self.tensor))
        if self._local_indices is None or self._local_indices[0] != key:
            indices = self._factor_indices
            if is_dtensor(self.tensor):
                indices = indices[local_indices(self.tensor, self.dim)]
            self._local_indices = key, indices.to(self.tensor.device)
        return self._local_indices[1]


def scale_on_owners(
    tensors: Iterable[ScaledTensor], factors: Tensor, *, is_clipped: bool | None
) -> None:
    """Scale the tensors whose master copies are stored in parts by ranks (``shard_state``).

    A collective call of the ranks that share the tensors. The owners scale their parts and send the
    rounded weights to all ranks.

    Args:
        tensors: all of a plan; the others are ignored.
        factors: as for ``ScaledTensor.scale``.
        is_clipped: whether a factor of this rank is below one; None if that is not known on the
            host. Nothing is sent where it is False on all ranks.
    """
    by_group: dict[int, list[tuple[ScaledTensor, ShardedState]]] = {}
    for x in tensors:
        master = get_master(x.tensor)
        if isinstance(master, ShardedState):
            by_group.setdefault(id(master.state_layout.group), []).append((x, master))
    for members in sorted(
        by_group.values(), key=lambda members: order_of(members[0][1].state_layout.group)
    ):
        layout = members[0][1].state_layout
        if is_clipped is not None:
            flag = torch.tensor(int(is_clipped), device=factors.device)
            dist.all_reduce(flag, dist.ReduceOp.MAX, group=layout.group)
            if not flag:
                continue
        layout.owners.scale({x.tensor: x.local_factors(factors) for x, _ in members})


def locate_master_shards(
    tensors: Iterable[ScaledTensor],
    process_group: "dist.ProcessGroup | None",
    device: torch.device,
) -> None:
    """Find where this rank's flat shards of sharded master copies begin.

    A collective call of the process group, whose ranks have the shards in their order, unless all
    shards are located already.

    Raises:
        ValueError: if the shards of a tensor do not add up to it.
    """
    sharded = [x for x in tensors if x.has_sharded_master]
    if all(x.master_start is not None for x in sharded):
        return
    masters = [get_master(x.tensor) for x in sharded]
    sizes = torch.tensor([0 if x is None else x.numel() for x in masters], device=device)
    gathered, rank = [sizes], 0
    if dist.is_available() and dist.is_initialized():
        rank = dist.get_rank(process_group)
        gathered = [sizes.clone() for _ in range(dist.get_world_size(process_group))]
        dist.all_gather(gathered, sizes, group=process_group)
    for x, sizes_by_rank in zip(sharded, torch.stack(gathered, 1).tolist(), strict=True):
        if sum(sizes_by_rank) != x.tensor.numel():
            raise ValueError(
                f"layer {x.layer!r}: the sharded master copies (main_param) of a weight of "
                f"{x.tensor.numel()} elements have {sum(sizes_by_rank)} elements over the process "
                "group: give QKClip the group that the optimizer shards over"
            )
        x.master_start = sum(sizes_by_rank[:rank])


def _read_sides(layouts: Mapping[str, AttentionLayout]) -> dict[str, tuple[_Side, _Side]]:
    """Queries and keys of every layer, with the parameters that the model has now.

    Raises:
        ValueError: if a weight has another number of rows than its layout.
    """
    heads = sum(layout.num_heads for layout in layouts.values())
    groups = sum(layout.num_kv_groups for layout in layouts.values())
    head, group, sides = 0, heads, {}
    for name, layout in layouts.items():
        query = [(layout.query, head)]
        if layout.query_rope is not None:
            query.append((layout.query_rope, heads + groups + head))
        sides[name] = _read_side(name, query), _read_side(name, [(layout.key, group)])
        head, group = head + layout.num_heads, group + layout.num_kv_groups
    return sides


def _fingerprint(sides: Mapping[str, tuple[_Side, _Side]]) -> tuple[object, ...]:
    """A value that changes whenever another plan is needed."""
    return tuple(
        (id(tensor), is_frozen, side.obstacle, side.is_frozen)
        for pair in sides.values()
        for side in pair
        for tensor, _, _, _, is_frozen in side.tensors
    )


def _read_side(name: str, rows_and_factors: Sequence[tuple[HeadRows, int]]) -> _Side:
    tensors: list[_HeadRows] = []
    obstacle, is_trained, is_adapted = "", False, False
    for head_rows, first_factor in rows_and_factors:
        effective = head_rows.effective()
        for row in effective.tensors:
            dim, rows, num_rows = head_rows.rows_in(row)
            is_frozen = effective.is_frozen(row.tensor)
            # A frozen tensor is not scaled, and may be packed by a quantization.
            if not is_frozen and (row.tensor.ndim <= dim or row.tensor.size(dim) != num_rows):
                raise ValueError(
                    f"layer {name!r}: a weight now has shape {tuple(row.tensor.shape)}, but its "
                    f"layout has {num_rows} rows: make the layout of the model as it is trained, "
                    "and shard with fully_shard (FSDP2), whose DTensors keep their shape"
                )
            tensors.append(_HeadRows(row.tensor, dim, rows, first_factor, is_frozen))
            is_trained |= not is_frozen
        is_trained |= any(p.requires_grad for p in effective.others)
        is_adapted |= bool(effective.adapter or effective.obstacle)
        obstacle = obstacle or effective.obstacle
        if not obstacle and any(x.is_frozen for x in tensors):
            if effective.adapter:
                obstacle = (
                    f"it is trained through {effective.adapter} over a frozen weight, whose rows "
                    "cannot be scaled exactly"
                )
            elif all(x.is_frozen for x in tensors):
                obstacle = "its weights are frozen"
            else:
                obstacle = "a part of its weights and biases is frozen"
    return _Side(tensors, obstacle, not is_trained, is_adapted)


def _scaled_sides(
    name: str, layout: AttentionLayout, query: _Side, key: _Side
) -> tuple[ScaledSides, str]:
    """The sides of a layer that take the factor, and the reason if none does.

    Raises:
        ValueError: if an adapter trains the layer and cannot be scaled.
    """
    if query.is_frozen and key.is_frozen:
        return "none", FROZEN
    if not query.obstacle:
        return ("query" if key.obstacle else "both"), ""
    reason = f"query: {query.obstacle}"
    if not key.obstacle:
        # A key can take the factors of its query heads only if it has a single query head.
        if layout.num_kv_groups == layout.num_heads and layout.query_rope is None:
            return "key", ""
        reason += ", and the key alone cannot take the factor, which differs by query head"
    else:
        reason += f"; key: {key.obstacle}"
    if (query.is_adapted and not query.is_frozen) or (key.is_adapted and not key.is_frozen):
        raise ValueError(
            f"layer {name!r} is trained, but QK-Clip cannot scale its logits exactly ({reason}). "
            "Train its query and key projections whole (modules_to_save in PEFT) or with DoRA "
            "(use_dora=True, lora_dropout=0), or leave the layer out (exclude; qk_clip_exclude of "
            "for_model)"
        )
    return "none", reason


def _placements(tensor: Tensor) -> object:
    """The mesh and placements of a DTensor; None for any other tensor."""
    return (tensor.device_mesh, tensor.placements) if is_dtensor(tensor) else None
