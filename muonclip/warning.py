"""Warnings that point to the user's code."""

import sys
import warnings
from types import FrameType


def warn(message: str) -> None:
    """Warn at the line that called this package, directly or through torch."""
    frame: FrameType | None = sys._getframe()
    level = 0
    while frame is not None and _package(frame) in ("muonclip", "torch"):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level + 1)


def _package(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__")).partition(".")[0]
