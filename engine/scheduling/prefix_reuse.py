"""Restoring and saving states of prompt prefixes, between the pool and the prefix cache."""

from collections import deque
from dataclasses import replace

from cottention.engine.scheduling.batch import PrefillChunk
from cottention.engine.scheduling.request import Choice, Request
from cottention.engine.state.pool import StatePool
from cottention.engine.state.prefix_cache import BLOCK, PrefixCache


class PrefixReuse:
    """Does nothing for requests without a `prefix`."""

    def __init__(self, pool: StatePool, cache: PrefixCache) -> None:
        self._pool = pool
        self._cache = cache

    def restore(self, request: Request) -> None:
        """Restore the longest cached prefix of a request that has just been given its slots.

        Only states of the context in which the prompt ends are of use.
        """
        if request.prefix is None:
            return
        *lookahead, main = request.prefill_spans
        scope, start = request.prefix.scope, request.context_schedule.start
        hit = self._cache.find(scope, request.ids, lambda n: start(n - 1) == main.start)
        if hit is not None:
            self._pool.write(request.choices[0].row, hit.rows)
            request.num_cached = hit.length - main.start
            main = replace(main, begin=hit.length)
            request.set_prefill_spans(deque([*lookahead, main]))
        request.prefix.add(request.ids_at(0, main.begin))

    def save_after_chunk(self, chunk: PrefillChunk) -> None:
        """Cache the state after a prefilled chunk, at whole blocks and at the prompt's end."""
        request = chunk.request
        if request.prefix is None or chunk.span.is_spare:
            return
        request.prefix.add(request.ids_at(chunk.start, chunk.stop))
        if chunk.is_last or chunk.stop % BLOCK == 0:
            self._cache.put(request.prefix, self._pool.read(chunk.row))

    @staticmethod
    def extend(choice: Choice) -> None:
        """Note that the pending ids are in the state now; only where there is a single choice."""
        prefix = choice.request.prefix
        if prefix is not None and choice.request.params.n == 1:
            prefix.add(choice.pending)

    def save_at_end(self, choice: Choice) -> None:
        """Cache the state of a choice that has ended by itself and still has its slot."""
        prefix = choice.request.prefix
        if prefix is not None and prefix.length == choice.position:
            self._cache.put(prefix, self._pool.read(choice.row))
