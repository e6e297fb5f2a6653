"""Rewards of texts: edit distance, equality, and numbers."""

import math
import re

MAX_CHARS = 1 << 16
"""Longer answers have a reward of 0: the time of a reward is bounded."""

_NUMBER = re.compile(r"[-+]?(?:\d+(?:,\d{3})*(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?")


def edit_distance(first: str, second: str) -> int:
    """Levenshtein distance: the fewest insertions, deletions and substitutions of characters.

    One bit of an integer per character of the shorter text, one step per character of the longer
    one (Hyyrö, 2003, "A bit-vector algorithm for computing Levenshtein and Damerau distances").
    """
    if len(first) > len(second):
        first, second = second, first
    if not first:
        return len(second)
    positions: dict[str, int] = {}
    for index, character in enumerate(first):
        positions[character] = positions.get(character, 0) | 1 << index
    last = 1 << len(first) - 1
    all_bits = 2 * last - 1
    # A column of the distance matrix: rows where it grows by one, and where it falls by one.
    grows, falls, distance = all_bits, 0, len(first)
    for character in second:
        equal = positions.get(character, 0)
        zero_diagonal = (((equal & grows) + grows) ^ grows) | equal | falls
        to_right_grows = falls | (all_bits & ~(zero_diagonal | grows))
        to_right_falls = grows & zero_diagonal
        distance += bool(to_right_grows & last) - bool(to_right_falls & last)
        to_right_grows = to_right_grows << 1 | 1
        grows = (to_right_falls << 1 | ~(zero_diagonal | to_right_grows)) & all_bits
        falls = to_right_grows & zero_diagonal & all_bits
    return distance


def edit_distance_reward(answer: str, truth: str) -> float:
    """1 - edit distance / length of the longer text, in [0, 1]; 1 for two empty texts."""
    longer = max(len(answer), len(truth))
    if len(answer) > MAX_CHARS:
        return 0.0
    return 1 - edit_distance(answer, truth) / longer if longer else 1.0


def exact_reward(answer: str, truth: str) -> float:
    """1 if the texts are equal but for white space and case, else 0."""
    if len(answer) > MAX_CHARS:
        return 0.0
    return float(_normalized(answer) == _normalized(truth))


def _normalized(text: str) -> str:
    return " ".join(text.casefold().split())


def read_number(answer: str) -> float | None:
    """The last finite number in an answer, such as ``-1,024.5`` or ``3e8``; None without one."""
    if len(answer) > MAX_CHARS:
        return None
    numbers = (float(text.replace(",", "")) for text in reversed(_NUMBER.findall(answer)))
    return next(filter(math.isfinite, numbers), None)


def numeric_reward(answer: str, truth: float, *, tolerance: float = 1e-6) -> float:
    """1 if the last number of an answer is the true one, else 0.

    Args:
        tolerance: largest difference, relative to the larger of 1 and the absolute truth.

    Raises:
        ValueError: ``truth`` is not finite.
    """
    require_finite(truth)
    number = read_number(answer)
    return float(number is not None and abs(number - truth) <= tolerance * max(1.0, abs(truth)))


def counting_reward(answer: str, truth: int, *, scale: float | None = None) -> float:
    """max(0, 1 - |count - truth| / scale), in [0, 1]; 0 for an answer without a number.

    The report rewards counting by the absolute difference and does not publish the scale.

    Args:
        answer: its last number is the count.
        scale: the difference from which the reward is 0; default: the truth, and at least 1.

    Raises:
        ValueError: ``truth`` is not finite, or ``scale`` is not positive.
    """
    require_finite(truth)
    scale = max(1.0, abs(truth)) if scale is None else scale
    if not scale > 0:
        raise ValueError(f"scale={scale}: must be positive")
    number = read_number(answer)
    return 0.0 if number is None else max(0.0, 1 - abs(number - truth) / scale)


def require_finite(truth: float) -> None:
    """
    Raises:
        ValueError: ``truth`` is not finite.
    """
    if not math.isfinite(truth):
        raise ValueError(f"truth={truth}: must be finite")
