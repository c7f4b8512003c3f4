"""A cache of states after prompts: of a conversation that is sent again only new ids are prefilled.

The least recently used states are evicted when their bytes exceed the budget. A prefix is
identified by a digest of its ids, so that an entry takes its state's bytes and a few more. In
float32 on a CPU a state has the same bits however its prompt was cut into chunks, so that answers
are the same with and without the cache.
"""

import hashlib
from array import array
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:  # the scheduler loads no torch
    from torch import Tensor

BLOCK = 64
"""A prompt's state is cached at the last multiple of this many ids, if there is one before its end:
where a conversation is tokenised again, its last few ids may differ from those before."""


class Prefix:
    """A digest of a sequence's first ids, extended by `add`.

    scope: only prompts of the same scope match.
    """

    def __init__(self, scope: str) -> None:
        self.scope = scope
        self._hash = hashlib.blake2b(scope.encode(), digest_size=24)
        self._hash.update(b"\0")
        self.length = 0

    def add(self, ids: Sequence[int]) -> None:
        """Append ids."""
        self._hash.update(array("i", ids).tobytes())
        self.length += len(ids)

    @property
    def key(self) -> bytes:
        """The digest of all ids so far."""
        return self._hash.digest()


class Hit(NamedTuple):
    """A state after the first `length` ids of a prompt."""

    length: int
    rows: "tuple[Tensor, ...]"


@dataclass(frozen=True, slots=True)
class CacheStats:
    """Prompt tokens looked up and found since the start, and bytes that are held now."""

    num_queried: int = 0
    num_hit: int = 0
    nbytes: int = 0


class PrefixCache:
    """The most recently used states, as many as fit into `max_bytes`."""

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
        """The longest cached prefix that leaves at least one of `ids` to prefill, or None.

        fits: whether a state after this many ids can be used.
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
        """Cache the state after a prefix; the least recently used are evicted where it is full."""
        if prefix.key in self._kept:
            self._kept.move_to_end(prefix.key)
            return
        self._kept[prefix.key] = Hit(prefix.length, rows)
        self._lengths[prefix.length] += 1
        self._nbytes += _nbytes(rows)
        while self._nbytes > self._max_bytes:
            self._drop_oldest()

    def stats(self) -> CacheStats:
        """Counters and current size."""
        return CacheStats(self._num_queried, self._num_hit, self._nbytes)

    def _drop_oldest(self) -> None:
        _, hit = self._kept.popitem(last=False)
        self._nbytes -= _nbytes(hit.rows)
        self._lengths[hit.length] -= 1
        if not self._lengths[hit.length]:
            del self._lengths[hit.length]


def _nbytes(rows: "tuple[Tensor, ...]") -> int:
    return sum(row.nbytes for row in rows)
