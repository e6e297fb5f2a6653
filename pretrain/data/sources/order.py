"""The order of documents: a permutation for each epoch, computed by a function.

An array of the permutation would need 8 bytes for each document in every process, and would have to
be made again for every epoch.
"""

import math
from functools import lru_cache

import numpy as np
import numpy.typing as npt

Integers = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]

# Rounds that change each of the two coordinates. With three, places of ten documents are uneven.
_ROUNDS = 4
_EPOCH = np.uint64(0x9E3779B97F4A7C15)


def shuffled(places: Integers, count: int, seed: int, source: int) -> Integers:
    """Document numbers at places of an endless sequence, in which every epoch is a permutation.

    A Feistel network permutes a rectangle of at least ``count`` cells: a round adds a hash of one
    coordinate to the other one, which can be undone whatever the hash is. A result that is not
    below ``count`` is permuted again until it is (cycle walking; Black and Rogaway, "Ciphers with
    arbitrary finite domains", 2002), which leaves a permutation of the others. The rectangle has
    less than ``sqrt(count) + 1`` cells too many, so that this is rare.

    Args:
        places: int64 [n], at least 0. Place ``epoch * count + index`` is in epoch ``epoch``.
        count: number of documents, at least 1.
        seed, source: decide the permutations, together with the epoch.

    Returns:
        int64 [n], numbers in 0..count-1.
    """
    epochs, numbers = np.divmod(places, count)
    rows = math.isqrt(count - 1) + 1
    columns = -(-count // rows)
    constants = _round_constants(seed, source)
    keys = mixed(epochs.astype(np.uint64) * _EPOCH + constants[-1])
    outside = np.arange(len(numbers))
    while len(outside):
        row, column = np.divmod(numbers[outside].astype(np.uint64), np.uint64(columns))
        key = keys[outside]
        for first, second in constants[:-1].reshape(_ROUNDS, 2):
            row = _added(row, column + (key + first), rows)
            column = _added(column, row + (key + second), columns)
        numbers[outside] = (row * np.uint64(columns) + column).astype(np.int64)
        outside = outside[numbers[outside] >= count]
    return numbers


@lru_cache(maxsize=1024)
def _round_constants(seed: int, source: int) -> Words:
    state = np.random.SeedSequence([seed, source]).generate_state(2 * _ROUNDS + 1, np.uint64)
    return state.astype(np.uint64)


def _added(coordinate: Words, word: Words, size: int) -> Words:
    """The coordinate plus a hash of the word, modulo the size."""
    # 63 bits of the hash, so that the sum does not wrap around.
    return (coordinate + (mixed(word) >> np.uint64(1))) % np.uint64(size)


def mixed(words: Words) -> Words:
    """The finalizer of SplitMix64 (Steele et al., "Fast splittable pseudorandom number generators",
    2014)."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))
