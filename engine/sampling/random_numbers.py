"""Random numbers in [0, 1) that are a function of (seed, choice index, absolute token index) alone.

Three rounds of SplitMix64, one for each argument. The first two are the same for all tokens of a
choice: they are its key, and a step computes the last round for all rows of its batch together.

Letters: R rows.
"""

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

_MASK = 2**64 - 1
_GAMMA = 0x9E3779B97F4A7C15
_FIRST = 0xBF58476D1CE4E5B9
_SECOND = 0x94D049BB133111EB


def random_key(seed: int, choice: int) -> int:
    """The key of a choice, 0 to 2⁶⁴ − 1. seed: any int64. choice: its index in its request."""
    mixed = 0
    for word in (seed, choice):
        mixed = (mixed + word + _GAMMA) & _MASK
        mixed = ((mixed ^ (mixed >> 30)) * _FIRST) & _MASK
        mixed = ((mixed ^ (mixed >> 27)) * _SECOND) & _MASK
        mixed ^= mixed >> 31
    return mixed


def uniform(
    keys: "NDArray[np.uint64]", token_indices: "NDArray[np.uint64]"
) -> "NDArray[np.float64]":
    """A number in [0, 1) for each row: float64 [R].

    keys: uint64 [R]. token_indices: uint64 [R], indices of the tokens to be sampled, counted from
    the start of the sequence, prompt included.
    """
    mixed = keys + token_indices  # sums and products of arrays wrap around
    mixed += np.uint64(_GAMMA)
    mixed ^= mixed >> np.uint64(30)
    mixed *= np.uint64(_FIRST)
    mixed ^= mixed >> np.uint64(27)
    mixed *= np.uint64(_SECOND)
    mixed ^= mixed >> np.uint64(31)
    mixed >>= np.uint64(11)
    return mixed.astype(np.float64) * 2.0**-53
