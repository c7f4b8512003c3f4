"""A cache of states after the first ids of prompts: what prompts have in common is read once.

Known prompts are paths in trees of ids, and states hang at their nodes, so that the longest common
prefix with any of them is found id by id. States of contexts that begin at different ids are in
different trees. In float32 on a CPU a state has the same bits however its prompt was cut into
chunks, so that answers are the same with and without the cache.

States that a later prompt is likely to need last until they are the least recently used. Others are
kept only in case a prompt parts nearby: they have a part of the budget, until they are used.
"""

from array import array
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from cottention.engine.state.state_copy import num_bytes

if TYPE_CHECKING:  # the scheduler loads no torch
    from torch import Tensor

Rows = Sequence["Tensor"]
"""The tensors of one row of the pool."""

ID_BYTES = 4
"""Bytes of an id in `packed`."""

FIRST_STEP = 64
"""Ids that are compared first; most prompts part at once."""

NODE_BYTES = 512
"""What a node takes beside its ids and its state, approximately."""

PROBATION_PART = 4
"""States that have not been used have 1/4 of the budget."""


def packed(ids: Sequence[int]) -> bytes:
    """Ids as the cache compares them."""
    return array("i", ids).tobytes()


def num_common(a: bytes, b: bytes) -> int:
    """How many of their first ids two packed sequences have in common."""
    end = min(len(a), len(b)) // ID_BYTES
    low, step = 0, FIRST_STEP
    while low < end and _is_same(a, b, low, high := min(low + step, end)):
        low, step = high, 2 * step  # the cost is that of what they have in common
    if low == end:
        return end
    while high - low > 1:  # they agree up to `low` and not up to `high`
        middle = (low + high) // 2
        low, high = (middle, high) if _is_same(a, b, low, middle) else (low, middle)
    return low


def _is_same(a: bytes, b: bytes, begin: int, end: int) -> bool:
    return a[ID_BYTES * begin : ID_BYTES * end] == b[ID_BYTES * begin : ID_BYTES * end]


class Hit(NamedTuple):
    """A state after the first `length` ids of a prompt."""

    length: int
    rows: Rows


class Match(NamedTuple):
    """How many of a prompt's first ids are known, and the longest of their prefixes with a state.

    hit: it leaves at least one id of the prompt to prefill.
    """

    num_known: int
    hit: Hit | None


@dataclass(frozen=True, slots=True)
class CacheStats:
    """Prompt tokens looked up and found since the start, and bytes that are held now."""

    num_queried: int = 0
    num_hit: int = 0
    nbytes: int = 0


@dataclass(slots=True, eq=False)
class _Node:
    """A place in a tree: `edge` are the packed ids after the parent's, `length` all up to here.

    tree: the name of the tree, at its root.
    """

    parent: "_Node | None"
    edge: bytes
    length: int
    tree: str = ""
    children: dict[bytes, "_Node"] = field(default_factory=dict)
    rows: "Rows | None" = None

    @property
    def nbytes(self) -> int:
        """Without its state."""
        return NODE_BYTES + len(self.edge) + len(self.tree)


class PrefixCache:
    """The most recently used states, as many as fit into `max_bytes` with the ids before them."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._roots: dict[str, _Node] = {}
        self._lasting: OrderedDict[_Node, None] = OrderedDict()
        self._probation: OrderedDict[_Node, None] = OrderedDict()
        self._nbytes = self._probation_nbytes = 0
        self.num_queried = 0
        self.num_hit = 0

    def match(self, tree: str, ids: bytes) -> Match:
        """Look up packed ids in a tree; a state that is found counts as used."""
        node, found = self._roots.get(tree), None
        if node is None:
            return Match(0, None)
        while True:
            begin, end = ID_BYTES * node.length, len(ids)
            if node.rows is not None and begin < end:
                found = node
            child = node.children.get(ids[begin : begin + ID_BYTES])
            if child is None:
                return Match(node.length, self._used(found))
            shared = num_common(child.edge, ids[begin : ID_BYTES * child.length])
            if node.length + shared < child.length:
                return Match(node.length + shared, self._used(found))
            node = child

    def put(self, tree: str, ids: bytes, read: Callable[[], Rows], *, is_lasting: bool) -> None:
        """Keep the state after packed ids, at least one, which `read` returns; it may be known.

        is_lasting: whether a later prompt is likely to need it. Others are evicted before.
        """
        node = self._node_at(tree, ids)
        if node.rows is None:
            node.rows = read()
            self._nbytes += num_bytes(node.rows)
            self._probation[node] = None
            self._probation_nbytes += num_bytes(node.rows)
        if is_lasting or node in self._lasting:
            self._make_lasting(node)
        while self._nbytes > self._max_bytes and (self._lasting or self._probation):
            self._drop_one()

    def stats(self) -> CacheStats:
        """Counters and current size."""
        return CacheStats(self.num_queried, self.num_hit, self._nbytes)

    def _used(self, node: _Node | None) -> Hit | None:
        if node is None or node.rows is None:
            return None
        self._make_lasting(node)
        return Hit(node.length, node.rows)

    def _make_lasting(self, node: _Node) -> None:
        """The last one to be evicted."""
        if node in self._probation:
            assert node.rows is not None
            del self._probation[node]
            self._probation_nbytes -= num_bytes(node.rows)
        self._lasting[node] = None
        self._lasting.move_to_end(node)

    def _node_at(self, tree: str, ids: bytes) -> _Node:
        """The node after these ids, which is made if there is none."""
        if tree not in self._roots:
            self._roots[tree] = _Node(None, b"", 0, tree)
            self._nbytes += self._roots[tree].nbytes
        node = self._roots[tree]
        while (begin := ID_BYTES * node.length) < len(ids):
            rest = ids[begin:]
            child = node.children.get(rest[:ID_BYTES])
            if child is None:
                child = self._added(_Node(node, rest, len(ids) // ID_BYTES))
            elif (shared := num_common(child.edge, rest)) < len(child.edge) // ID_BYTES:
                child = self._split(child, shared)
            node = child
        return node

    def _added(self, node: _Node) -> _Node:
        assert node.parent is not None
        node.parent.children[node.edge[:ID_BYTES]] = node
        self._nbytes += node.nbytes
        return node

    def _split(self, node: _Node, num: int) -> _Node:
        """A new node after the first `num` ids of a node's edge."""
        assert node.parent is not None
        self._nbytes -= node.nbytes
        head, tail = node.edge[: ID_BYTES * num], node.edge[ID_BYTES * num :]
        middle = self._added(_Node(node.parent, head, node.length - len(tail) // ID_BYTES))
        node.parent, node.edge = middle, tail
        self._added(node)
        return middle

    def _drop_one(self) -> None:
        """Forget a state: the oldest that was never used, or the least recently used."""
        is_over = self._probation_nbytes > self._max_bytes // PROBATION_PART
        if self._probation and (is_over or not self._lasting):
            node, _ = self._probation.popitem(last=False)
            assert node.rows is not None
            self._probation_nbytes -= num_bytes(node.rows)
        else:
            node, _ = self._lasting.popitem(last=False)
            assert node.rows is not None
        self._nbytes -= num_bytes(node.rows)
        node.rows = None
        self._prune(node)

    def _prune(self, node: _Node) -> None:
        """Remove nodes that lead to no state, and join those that lead to one other node only."""
        while node.rows is None and not node.children:
            self._nbytes -= node.nbytes
            if node.parent is None:
                del self._roots[node.tree]
                return
            del node.parent.children[node.edge[:ID_BYTES]]
            node = node.parent
        if node.rows is None and node.parent is not None and len(node.children) == 1:
            [child] = node.children.values()
            self._nbytes -= node.nbytes + child.nbytes
            child.parent, child.edge = node.parent, node.edge + child.edge
            self._added(child)
