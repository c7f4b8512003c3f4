"""Requests that begin where an earlier one with the same prompt stood.

Owns when states go into the prefix cache and out of it into slots. Does not know how they are kept
there, nor who runs when. Requests without a scope are left alone.
"""

from collections import deque
from dataclasses import replace

from cottention.engine.scheduling.batch import PrefillChunk
from cottention.engine.scheduling.request import Choice, Request
from cottention.engine.state.pool import StatePool
from cottention.engine.state.prefix_cache import BLOCK, PrefixCache


class PrefixReuse:
    """Between a pool and a cache; called in the order of a request's life."""

    def __init__(self, pool: StatePool, cache: PrefixCache) -> None:
        self._pool = pool
        self._cache = cache

    def begin(self, request: Request) -> None:
        """The request has its rows: spare it what has been read before.

        Only a state of the context in which the prompt ends will do.
        """
        if request.prefix is None:
            return
        *ahead, main = request.reads
        scope, start = request.prefix.scope, request.grid.start
        hit = self._cache.find(scope, request.ids, lambda n: start(n - 1) == main.start)
        if hit is not None:
            self._pool.write(request.choices[0].row, hit.rows)
            request.num_cached = hit.length - main.start
            main = replace(main, begin=hit.length)
            request.read(deque([*ahead, main]))
        request.prefix.add(request.ids_at(0, main.begin))

    def after_chunk(self, chunk: PrefillChunk) -> None:
        """More of a prompt is in its state; its end and whole blocks are worth keeping."""
        request = chunk.request
        if request.prefix is None or chunk.read.is_spare:
            return
        request.prefix.add(request.ids_at(chunk.start, chunk.stop))
        if chunk.is_last or chunk.stop % BLOCK == 0:
            self._cache.put(request.prefix, self._pool.read(chunk.row))

    @staticmethod
    def before_token(choice: Choice) -> None:
        """The ids that wait are in the state now; choices beside each other have no one future."""
        prefix = choice.request.prefix
        if prefix is not None and choice.request.params.n == 1:
            prefix.add(choice.pending)

    def at_end(self, choice: Choice) -> None:
        """A choice ends as it should, and still has its slot."""
        prefix = choice.request.prefix
        if prefix is not None and prefix.length == choice.position:
            self._cache.put(prefix, self._pool.read(choice.row))
