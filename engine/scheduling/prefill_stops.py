"""How a request uses the prefix cache, and where its prefill stops for states to be kept.

A state costs memory and a stop costs a step, so both are few: where the prompt parts from a known
one, at the ends of messages, at some places between, in case that a later prompt parts there, and
at the end. Loads no torch.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from cottention.engine.state.context_window import PrefillSpan
from cottention.engine.state.prefix_cache import ID_BYTES, packed

BLOCK = 64
"""The state after the last multiple of this many ids is kept, if there is one before a prompt's
end: where a conversation is tokenised again, its last few ids may differ from those before."""

NUM_BETWEEN = 12
"""About how many states are kept of a long prompt that parts from no other. A prompt that parts
from it later reads again what lies between two of them, once."""

MIN_GAIN = 16
"""A state that saves fewer ids than this is not kept."""

MAX_ANSWER_IDS = 65_536
"""The state at the end of a longer answer is not kept: that would take its ids, too."""


@dataclass(frozen=True, slots=True)
class CacheUse:
    """How a prompt uses the prefix cache.

    scope: prompts share states within one scope. reads: known states are used. writes: states are
    kept. boundaries: how many ids there are before each message after the first, ascending, as far
    as that is known.
    """

    scope: str
    reads: bool = True
    writes: bool = True
    boundaries: tuple[int, ...] = ()


@dataclass(slots=True, eq=False)
class CachedPrompt:
    """A request's prompt as the cache knows it.

    ids: packed. policy: the name of its context schedule, on which states depend. stops: by the
    start of a span, indices at which its prefill stops, and whether the state there is likely to be
    needed.
    """

    use: CacheUse
    policy: str
    ids: bytes
    stops: dict[int, dict[int, bool]] = field(default_factory=dict)

    @classmethod
    def of(cls, use: CacheUse, policy: str, ids: Sequence[int]) -> "CachedPrompt":
        """A prompt without stops."""
        return cls(use, policy, packed(ids))

    @property
    def scope(self) -> str:
        """Only prompts of equal scopes have states in common."""
        return f"{self.policy} {self.use.scope}"

    def tree(self, start: int) -> str:
        """The tree of the states whose context begins at index `start`."""
        return f"{start} {self.scope}"

    def ids_from(self, start: int, stop: int | None = None) -> bytes:
        """Packed ids at indices start:stop."""
        return self.ids[ID_BYTES * start : None if stop is None else ID_BYTES * stop]

    def next_stop(self, span: PrefillSpan, index: int) -> int:
        """Where the prefill of a span stops after `index`."""
        later = (each for each in self.stops.get(span.start, ()) if index < each < span.stop)
        return min(later, default=span.stop)

    def add_stop(self, start: int, index: int) -> None:
        """Stop at `index` in the span that begins at `start`, for other prompts that part there."""
        if self.use.writes:
            self.stops.setdefault(start, {})[index] = True

    def plan(self, span: PrefillSpan, begin: int, known: int) -> None:
        """Set the stops of a span, of which ids up to `begin` are in the row; wanted ones stay.

        known: index at which it parts from what is known.
        """
        if self.use.writes:
            wanted, hints = self.stops.get(span.start, {}), self.use.boundaries
            self.stops[span.start] = planned_stops(span.start, begin, known, span.stop, hints)
            self.stops[span.start] |= {index: True for index in wanted if wanted[index]}


def planned_stops(
    start: int, begin: int, known: int, stop: int, hints: Sequence[int]
) -> dict[int, bool]:
    """Where to stop in a span start:stop, between `begin` and `stop`; arguments as in `plan`.

    hints: the ends of messages, of which the first may be a system message, with which other
    conversations begin. True for those where a later prompt is likely to part.
    """
    stops: dict[int, bool] = {}
    if known - begin >= MIN_GAIN and known < stop:
        stops[known] = True
    fresh = max(begin, known)
    new = [index for index in hints if fresh < index < stop]
    if new and new[0] == hints[0]:
        stops[new[0]] = True
    for index in (*_between(start, stop, new), *new[-1:]):
        if index > fresh:
            stops.setdefault(index, False)
    stops = _spaced(stops, begin)
    last_block = start + (stop - 1 - start) // BLOCK * BLOCK
    if last_block > fresh:
        stops.setdefault(last_block, False)
    return stops


def _between(start: int, stop: int, hints: Sequence[int]) -> Iterable[int]:
    """An index for each of about NUM_BETWEEN parts of a span: its last hint, or its end."""
    length = BLOCK * max(2, -(-(stop - start) // (BLOCK * NUM_BETWEEN)))
    for end in range(start + length, stop, length):
        yield max((each for each in hints if end - length < each <= end), default=end)


def _spaced(stops: dict[int, bool], begin: int) -> dict[int, bool]:
    """Those that save at least MIN_GAIN ids each; of neighbours, those likely to be needed."""
    kept: dict[int, bool] = {}
    last = begin
    for index in sorted(stops):
        if index - last >= MIN_GAIN:
            kept[index] = stops[index]
            last = index
        elif stops[index] and last in kept and not kept[last]:
            del kept[last]
            kept[index] = True
            last = index
    return kept
