"""QK-Clip's weights: which of them are trained, and scaling their rows where they are."""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from muonclip.adapters import root
from muonclip.attention_layouts import AttentionLayout, HeadRows
from muonclip.distributed.sharding import is_dtensor, local_indices, local_tensor
from muonclip.precision import get_master, refresh_master

# Which of a layer's projections take the factor on its logits.
Share = Literal["both", "query", "key", "none"]


class Side(NamedTuple):
    """The query or key rows of one layer, as they are now.

    Attributes:
        tensors: tensor, dimension of its rows, rows [heads, r], index of the first factor, and
            whether it is frozen.
        obstacle: why they cannot be scaled; empty where they can.
        is_frozen: none of it is trained.
        is_adapted: an adapter trains it, or its weight is computed.
    """

    tensors: list[tuple[Tensor, int, Tensor, int, bool]]
    obstacle: str
    is_frozen: bool
    is_adapted: bool


class ScalingPlan:
    """Which tensors to scale, and which factor multiplies each of their rows.

    Factors are those of all query heads, all key groups, all rotary query heads, and a one.

    Args:
        layouts: of all layers.
        sides: as ``read_sides`` returned them.

    Attributes:
        key: ``plan_key(sides)``.
        rows: the tensors to scale.
        shares: per layer: which of its projections take the factor.
        skipped: layer -> why it is not scaled.

    Raises:
        ValueError: if layers share a trained weight, query and key share rows, or a layer is
            trained in a way that cannot be clipped exactly.
    """

    def __init__(
        self,
        layouts: Mapping[str, AttentionLayout],
        sides: "dict[str, tuple[Side, Side]] | None" = None,
    ) -> None:
        sides = read_sides(layouts) if sides is None else sides
        self.key = plan_key(sides)
        self.shares: dict[str, Share] = {}
        self.skipped: dict[str, str] = {}
        for name, (query, key) in sides.items():
            self.shares[name], reason = _share(name, layouts[name], query, key)
            if reason:
                self.skipped[name] = reason
        self.rows = self._rows(layouts, sides)

    def _rows(
        self, layouts: Mapping[str, AttentionLayout], sides: "dict[str, tuple[Side, Side]]"
    ) -> "list[Rows]":
        """Every trained tensor of the layers to scale, once: query and key may be fused in it."""
        one = sum(2 * x.num_heads + x.num_kv_groups for x in layouts.values())
        found: dict[int, Rows] = {}
        for name, pair in sides.items():
            if self.shares[name] == "none":
                continue
            for tensor, dim, rows, first, frozen in pair[0].tensors + pair[1].tensors:
                if frozen:  # its factors are one
                    continue
                if id(tensor) not in found:
                    found[id(tensor)] = Rows(name, tensor, dim, one)
                known = found[id(tensor)]
                if known.layer != name:
                    raise ValueError(
                        f"layers {known.layer!r} and {name!r} share a weight: "
                        "give QK-Clip one layout for it and observe both layers under its name"
                    )
                known.assign(rows, dim, first)
        return list(found.values())


class Rows:
    """A weight, bias or other tensor, and which factor multiplies each of its rows.

    Args:
        layer: name of its layer.
        tensor: the tensor.
        dim: the dimension of its rows.
        one: index of the factor one, which multiplies all rows that are not assigned.
    """

    def __init__(self, layer: str, tensor: Tensor, dim: int, one: int) -> None:
        self.layer, self.tensor, self.dim, self._one = layer, tensor, dim, one
        self.slots = torch.full((tensor.size(dim),), one, dtype=torch.int64, device="cpu")
        self.master_start: int | None = None
        self._local_slots: tuple[Any, Tensor] | None = None

    def assign(self, rows: Tensor, dim: int, first: int) -> None:
        """Let row i of ``rows``, [heads, r], take factor ``first`` + i."""
        rows = rows.cpu()
        if self.dim != dim or (self.slots[rows] != self._one).any():
            raise ValueError(f"layer {self.layer!r}: query and key share rows of a weight")
        self.slots[rows] = first + torch.arange(len(rows), device="cpu")[:, None]

    @property
    def is_master_sharded(self) -> bool:
        """Whether ranks have flat pieces of the tensor's master copy."""
        return bool(getattr(self.tensor, "main_param_sharded", False))

    @property
    def sources(self) -> list[Tensor]:
        """The tensors that an optimizer may know this one by: itself, or its master copy."""
        master = get_master(self.tensor)
        return [root(self.tensor), *([] if master is None else [master])]

    @property
    def has_gradient(self) -> bool:
        """Whether the last backward pass reached the tensor, as far as ``grad`` shows."""
        return any(source.grad is not None for source in self.sources)

    def check(self) -> None:
        """Make sure that the tensor can be scaled as it is placed now.

        Raises:
            ValueError: if it cannot.
        """
        tensor = self.tensor
        master: Any = get_master(tensor)
        if self.is_master_sharded:
            placed = _placements(tensor) is None and (master is None or master.ndim == 1)
        else:
            placed = master is None or (
                (master.shape, _placements(master)) == (tensor.shape, _placements(tensor))
            )
        if not placed:
            raise ValueError(
                f"layer {self.layer!r}: the master copy (main_param) of a weight of shape "
                f"{tuple(tensor.shape)} is {tuple(master.shape)}: it must be sharded as the weight "
                "is, or be a flat piece of it with main_param_sharded set"
            )
        self._slots_of(tensor)

    def scale(self, factors: Tensor) -> None:
        """Multiply each row by its factor, in the master copy where there is one."""
        tensor = self.tensor
        held = local_tensor(tensor)
        shape = [-1 if dim == self.dim else 1 for dim in range(held.ndim)]
        by_row = factors.to(held.device)[self._slots_of(tensor)].view(shape)
        master = get_master(tensor)
        if self.is_master_sharded:
            # Not refreshed from the master: copies on other ranks must stay the same.
            held.mul_(by_row)
            if master is not None:
                piece = by_row.expand_as(held).flatten()[self.master_start :]
                master.mul_(piece[: master.numel()])
        elif master is None:
            held.mul_(by_row)
        else:
            master = local_tensor(master)
            if held.element_size() == 2 and type(held) in (Tensor, nn.Parameter):
                refresh_master(master, held)  # weights that were loaded since the optimizer's step
            master.mul_(by_row)
            # Rows that were not scaled keep their bits, even where the copy was rounded otherwise.
            held.copy_(torch.where(by_row == 1, held, master))

    def _slots_of(self, tensor: Tensor) -> Tensor:
        """The slots of the rows that this rank holds, on the tensor's device."""
        key = (tensor.device, _placements(tensor))
        if self._local_slots is None or self._local_slots[0] != key:
            slots = self.slots
            if is_dtensor(tensor):
                slots = slots[local_indices(tensor, self.dim)]
            self._local_slots = key, slots.to(tensor.device)
        return self._local_slots[1]


def read_sides(layouts: Mapping[str, AttentionLayout]) -> dict[str, tuple[Side, Side]]:
    """Every layer's query and key rows, as they are now.

    Raises:
        ValueError: if a weight has other rows than its layout.
    """
    heads = sum(layout.num_heads for layout in layouts.values())
    groups = sum(layout.num_kv_groups for layout in layouts.values())
    head, group, sides = 0, heads, {}
    for name, layout in layouts.items():
        query = [(layout.query, head)]
        if layout.query_rope is not None:
            query.append((layout.query_rope, heads + groups + head))
        sides[name] = _side(name, query), _side(name, [(layout.key, group)])
        head, group = head + layout.num_heads, group + layout.num_kv_groups
    return sides


def plan_key(sides: Mapping[str, tuple[Side, Side]]) -> tuple[object, ...]:
    """A value that changes whenever another plan is needed."""
    return tuple(
        (id(tensor), frozen, side.obstacle, side.is_frozen)
        for pair in sides.values()
        for side in pair
        for tensor, _, _, _, frozen in side.tensors
    )


def _side(name: str, parts: list[tuple[HeadRows, int]]) -> Side:
    tensors, obstacle, trains, adapter = [], "", False, False
    for part, first in parts:
        found = part.effective()
        for row in found.tensors:
            dim, rows, count = part.rows_in(row)
            if row.tensor.ndim <= dim or row.tensor.size(dim) != count:
                raise ValueError(
                    f"layer {name!r}: a weight has become {tuple(row.tensor.shape)}, its layout "
                    f"has {count} rows: make the layout of the model as it is trained, and shard "
                    "with fully_shard (FSDP2), whose DTensors keep their shape"
                )
            frozen = found.is_frozen(row.tensor)
            tensors.append((row.tensor, dim, rows, first, frozen))
            trains |= not frozen
        trains |= any(p.requires_grad for p in found.others)
        adapter |= bool(found.adapter or found.obstacle)
        obstacle = obstacle or found.obstacle
        if not obstacle and any(frozen for *_, frozen in tensors):
            obstacle = (
                f"it is trained through {found.adapter} over a frozen weight, whose rows cannot be "
                "scaled exactly"
                if found.adapter
                else "its weights are frozen"
                if all(frozen for *_, frozen in tensors)
                else "a part of its weights and biases is frozen"
            )
    return Side(tensors, obstacle, not trains, adapter)


def _share(name: str, layout: AttentionLayout, query: Side, key: Side) -> tuple[Share, str]:
    """Which projections of a layer take the factor, and why none does.

    Raises:
        ValueError: if an adapter trains the layer and cannot be scaled.
    """
    if query.is_frozen and key.is_frozen:
        return "none", "its query and key weights are frozen"
    if not query.obstacle:
        return ("query" if key.obstacle else "both"), ""
    whose = f"query: {query.obstacle}"
    if not key.obstacle:
        # The key alone can take the factors of all its query heads only if it has just one.
        if layout.num_kv_groups == layout.num_heads and layout.query_rope is None:
            return "key", ""
        whose += ", and the key alone cannot take the factor, which differs by query head"
    else:
        whose += f"; key: {key.obstacle}"
    if (query.is_adapted and not query.is_frozen) or (key.is_adapted and not key.is_frozen):
        raise ValueError(
            f"layer {name!r} is trained, but QK-Clip cannot scale its logits exactly ({whose}). "
            "Train its query and key projections whole (modules_to_save in PEFT) or with DoRA "
            "(use_dora=True), or leave the layer out with exclude"
        )
    return "none", whose


def _placements(tensor: Tensor) -> Any:
    """How a DTensor lies on its ranks; None for any other tensor."""
    placements = getattr(tensor, "placements", None)
    return None if placements is None else (tensor.device_mesh, placements)  # type: ignore[attr-defined]
