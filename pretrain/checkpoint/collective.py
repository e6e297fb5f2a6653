"""Actions of rank 0, or of all ranks, that fail on all ranks if they fail on one."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from pretrain.errors import first_line

T = TypeVar("T")


class FailedError(Exception):
    """An action failed on some rank; the message is the reason, on one line."""


def on_rank_0(action: Callable[[], T], group: dist.ProcessGroup | None) -> T:
    """Call a function on rank 0, and return its result on every rank.

    Raises:
        FailedError: on all ranks, if it fails.
    """
    outcome: list[Any] = [None]
    if dist.get_rank() == 0:
        outcome = [_outcome(action)]
    dist.broadcast_object_list(outcome, src=0, group=group)
    result, reason = outcome[0]
    if reason is not None:
        raise FailedError(reason)
    return result  # type: ignore[no-any-return]


def on_all_ranks(action: Callable[[], T], group: dist.ProcessGroup | None) -> list[T]:
    """Call a function on every rank, and return all results on rank 0; elsewhere an empty list.

    Raises:
        FailedError: on all ranks, if it fails on any.
    """
    outcomes: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(_outcome(action), outcomes, dst=0, group=group)

    def check() -> None:
        for _, reason in outcomes or ():
            if reason is not None:
                raise RuntimeError(reason)

    on_rank_0(check, group)
    return [result for result, _ in outcomes or ()]


def _outcome(action: Callable[[], T]) -> tuple[T | None, str | None]:
    """The result of a function, or the first line of its error."""
    try:
        return action(), None
    except Exception as error:
        return None, first_line(error)
