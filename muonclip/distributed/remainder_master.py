"""A master copy that is stored as a bfloat16 parameter and a remainder, for ``main_param``."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

from muonclip.distributed.sharding import is_dtensor, local_tensor
from muonclip.remainders import join, split_


class RemainderMaster(Tensor):
    """The master copy of a bfloat16 parameter, stored in its weight and a remainder.

    Operations compute with its float32 values. Those that write in place, also through a view that
    is float32 too, round the result into the weight and the remainder.

    Attributes:
        weight: the parameter, or a view of it.
        remainder_bits: int16, as ``weight``.
    """

    weight: Tensor
    remainder_bits: Tensor

    @staticmethod
    def __new__(cls, weight: Tensor, remainder: Tensor) -> "RemainderMaster":
        tensor: RemainderMaster = Tensor._make_wrapper_subclass(
            cls, weight.shape, weight.stride(), dtype=torch.float32, device=weight.device
        )
        tensor.weight, tensor.remainder_bits = weight, remainder
        return tensor

    def float32(self) -> Tensor:
        """The values, a new tensor."""
        weight = self.weight
        values = join(local_tensor(weight.detach()), local_tensor(self.remainder_bits))
        if not is_dtensor(weight):
            return values
        from torch.distributed.tensor import DTensor

        placed = DTensor.from_local(
            values,
            weight.device_mesh,
            weight.placements,
            shape=weight.shape,
            stride=weight.stride(),
        )
        # torch moves it to the device of the mesh, which need not be this one.
        return placed.to(values.device)

    @torch.no_grad()
    def write(self, values: Tensor) -> None:
        """Replace the values by those of a float32 tensor."""
        weight = local_tensor(self.weight.detach())
        split_(local_tensor(values), weight, local_tensor(self.remainder_bits))

    @torch.no_grad()
    def scale_(self, factors: Tensor) -> None:
        """Multiply the local values by factors that broadcast to them."""
        weight = local_tensor(self.weight.detach())
        remainder = local_tensor(self.remainder_bits)
        split_(join(weight, remainder).mul_(factors), weight, remainder)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"RemainderMaster({self.float32()!r})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        copied: Tensor = memo.setdefault(id(self), self.float32())
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.float32().__reduce_ex__(protocol)  # type: ignore[no-untyped-call]

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.is_view and func is not torch.ops.aten.view.dtype:
            return _view(func, args, kwargs)
        values: dict[int, Tensor] = {}

        def read(x: Any) -> Any:
            if not isinstance(x, cls):
                return x
            if id(x) not in values:
                values[id(x)] = x.float32()
            return values[id(x)]

        result = func(*tree_map(read, args), **tree_map(read, kwargs))
        sources = {id(value): x for x in _masters((args, kwargs)) for value in [values[id(x)]]}
        for written in _written(func, args, kwargs):
            written.write(values[id(written)])
        return tree_map(lambda x: sources.get(id(x), x) if isinstance(x, Tensor) else x, result)


def _masters(tree: Any) -> list[RemainderMaster]:
    return [x for x in tree_flatten(tree)[0] if isinstance(x, RemainderMaster)]


def _written(func: Any, args: Any, kwargs: Any) -> Iterable[RemainderMaster]:
    """The arguments that an operation writes to."""
    for index, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = args[index] if index < len(args) else kwargs.get(argument.name)
            yield from _masters(given)


def _view(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """The same view of the weight and of the remainder."""
    source = args[0]
    with torch.no_grad():
        weights = func(source.weight.detach(), *args[1:], **kwargs)
        remainders = func(source.remainder_bits, *args[1:], **kwargs)
    if isinstance(weights, Tensor):
        return RemainderMaster(weights, remainders)
    return [RemainderMaster(*pair) for pair in zip(weights, remainders, strict=True)]


def local_remainder(state: Mapping[str, Any]) -> Tensor | None:
    """This rank's part of the remainder in a parameter's state; None if there is none."""
    master = state.get("master")
    return local_tensor(master.remainder_bits) if isinstance(master, RemainderMaster) else None
