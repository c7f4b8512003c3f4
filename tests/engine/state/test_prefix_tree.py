"""The cache's trees by themselves: what is found, and what is evicted."""

from collections.abc import Sequence
from itertools import takewhile

import torch
from hypothesis import given
from hypothesis import strategies as st

from cottention.engine.state.prefix_cache import NODE_BYTES, PrefixCache, num_common, packed


def put(
    cache: PrefixCache, ids: Sequence[int], *, is_lasting: bool = True, num: int = 1000
) -> None:
    """Keep a state of `num` numbers that tells how many ids it is of."""
    rows = (torch.full((num,), float(len(ids))),)
    cache.put("a", packed(ids), lambda: rows, is_lasting=is_lasting)


def found(cache: PrefixCache, ids: Sequence[int], tree: str = "a") -> int | None:
    """Of how many ids the state is that is found."""
    hit = cache.match(tree, packed(ids)).hit
    assert hit is None or hit.rows[0][0] == hit.length
    return hit and hit.length


def test_those_used_last_stay() -> None:
    cache = PrefixCache(3 * (4000 + NODE_BYTES) + 2 * NODE_BYTES)
    for first in range(3):
        put(cache, [first, 1])
    assert found(cache, [0, 1, 5]) == 2
    put(cache, [3, 1, 2])
    assert found(cache, [1, 1, 5]) is None
    assert found(cache, [0, 1, 5]) == 2


def test_those_that_were_never_used_have_a_part_of_the_memory() -> None:
    """They neither push out the others, nor do the others push them out at once."""
    cache = PrefixCache(16 * (4000 + 2 * NODE_BYTES))
    for first in range(8):
        put(cache, [first, 1])
    for first in range(100, 150):
        put(cache, [first, 1], is_lasting=False)
    assert all(found(cache, [first, 1, 5]) == 2 for first in range(8))
    assert [found(cache, [first, 1, 5]) for first in (100, 149)] == [None, 2]
    for first in range(200, 230):
        put(cache, [first, 1])
        assert found(cache, [149, 1, 5]) == 2


def test_the_longest_prefix_that_leaves_an_id() -> None:
    cache = PrefixCache(10**6)
    for length in (1, 3, 4):
        put(cache, [7] * length)
    for num, expected in ((1, None), (2, 1), (3, 1), (4, 3), (5, 4), (50, 4)):
        assert found(cache, [7] * num) == expected


def test_a_state_larger_than_the_budget_is_not_kept() -> None:
    cache = PrefixCache(8)
    put(cache, [1])
    assert found(cache, [1, 2]) is None
    assert cache.stats().nbytes == 0


SEQUENCES = st.lists(st.integers(0, 2), min_size=1, max_size=8)


@given(st.lists(st.tuples(SEQUENCES, st.booleans()), max_size=30), st.lists(SEQUENCES, max_size=8))
def test_a_tree_finds_what_a_search_finds(
    kept: list[tuple[list[int], bool]], asked: list[list[int]]
) -> None:
    """Where nothing is evicted; and where all is, nothing is left of the tree."""
    cache = PrefixCache(10**7)
    for ids, is_lasting in kept:
        put(cache, ids, is_lasting=is_lasting, num=1)
    paths = [ids for ids, _ in kept]
    for ids in asked:
        match = cache.match("a", packed(ids))
        assert match.num_known == max((shared(ids, path) for path in paths), default=0)
        known = [len(path) for path in paths if ids[: len(path)] == path and len(path) < len(ids)]
        assert (match.hit and match.hit.length) == max(known, default=None)
    assert cache.match("b", packed([0])).num_known == 0
    cache._max_bytes = 0
    put(cache, [9])
    assert cache.stats().nbytes == 0
    assert not cache._roots


def shared(a: list[int], b: list[int]) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))


@given(SEQUENCES, SEQUENCES, st.integers(0, 300))
def test_common_beginnings(a: list[int], b: list[int], num: int) -> None:
    a, b = [*range(num), *a], [*range(num), *b]
    assert num_common(packed(a), packed(b)) == shared(a, b)
