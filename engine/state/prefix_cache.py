"""States after prompts that may come again: of a resent conversation only what is new is read.

Owns which states are kept, within a budget of bytes, and which is the longest that fits a prompt.
Does not know requests, slots or the model. A prefix is known by a digest of its ids, so that a
state of any age costs its bytes and a few more.

On a CPU in float32 a state has the same bits however its prompt was cut: warm and cold answers are
equal.
"""

import hashlib
from array import array
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:  # who schedules need not load torch
    from torch import Tensor

BLOCK = 64
"""Prompts are read up to a multiple of this, where there is one, before their end: a conversation
that is tokenised anew may differ in its last few ids, and seldom before."""


class Prefix:
    """Ids from the start of a sequence, as a digest that grows with them.

    scope: whose they are; nobody else's prompt meets them.
    """

    def __init__(self, scope: str) -> None:
        self.scope = scope
        self._hash = hashlib.blake2b(scope.encode(), digest_size=24)
        self._hash.update(b"\0")
        self.length = 0

    def add(self, ids: Sequence[int]) -> None:
        """More ids follow."""
        self._hash.update(array("i", ids).tobytes())
        self.length += len(ids)

    @property
    def key(self) -> bytes:
        """The digest of all of them."""
        return self._hash.digest()


class Hit(NamedTuple):
    """A state after the first `length` ids of a prompt."""

    length: int
    rows: "tuple[Tensor, ...]"


@dataclass(frozen=True, slots=True)
class CacheStats:
    """Counters since the start, in tokens of prompts, and the bytes that are held now."""

    num_queried: int = 0
    num_hit: int = 0
    nbytes: int = 0


class PrefixCache:
    """The states used last, as many as fit into `max_bytes`."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._kept: OrderedDict[bytes, Hit] = OrderedDict()
        self._lengths: Counter[int] = Counter()
        self._nbytes = 0
        self._num_queried = 0
        self._num_hit = 0

    def find(
        self, scope: str, ids: Sequence[int], fits: Callable[[int], bool] = lambda _: True
    ) -> Hit | None:
        """The longest prefix of `ids` that is kept, leaving at least one of them to be read.

        fits: whether a state after so many ids is of use.
        """
        self._num_queried += len(ids)
        prefix, key = Prefix(scope), None
        for length in sorted(length for length in self._lengths if length < len(ids)):
            if not fits(length):
                continue
            prefix.add(ids[prefix.length : length])
            key = prefix.key if prefix.key in self._kept else key
        if key is None:
            return None
        self._kept.move_to_end(key)
        self._num_hit += self._kept[key].length
        return self._kept[key]

    def put(self, prefix: Prefix, rows: "tuple[Tensor, ...]") -> None:
        """Keep the state after a prefix; those not used for longest make room."""
        if prefix.key in self._kept:
            self._kept.move_to_end(prefix.key)
            return
        self._kept[prefix.key] = Hit(prefix.length, rows)
        self._lengths[prefix.length] += 1
        self._nbytes += _nbytes(rows)
        while self._nbytes > self._max_bytes:
            self._drop_oldest()

    def stats(self) -> CacheStats:
        """Figures of this moment."""
        return CacheStats(self._num_queried, self._num_hit, self._nbytes)

    def _drop_oldest(self) -> None:
        _, hit = self._kept.popitem(last=False)
        self._nbytes -= _nbytes(hit.rows)
        self._lengths[hit.length] -= 1
        if not self._lengths[hit.length]:
            del self._lengths[hit.length]


def _nbytes(rows: "tuple[Tensor, ...]") -> int:
    return sum(row.nbytes for row in rows)
