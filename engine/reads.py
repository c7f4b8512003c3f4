"""What of a prompt is read into which row, and in which order. Arithmetic alone; knows no torch.

Ids are named by their absolute index. A prompt reads no more than what survives in the state of its
last id, unless all of it is to be scored.
"""

from collections import deque
from dataclasses import dataclass

from cottention.engine.renewal import Grid


@dataclass(frozen=True, slots=True)
class Read:
    """Ids begin:stop into a row that holds start:begin; a row that holds none is cleared first.

    is_spare: into the spare row, for after the next renewal. scored_from: how likely the followers
    of ids from here on were can be told.
    """

    start: int
    begin: int
    stop: int
    is_spare: bool = False
    scored_from: int = 0


def reads_of(grid: Grid, held: int, stop: int, last: int, *, is_scored: bool) -> deque[Read]:
    """In order, to bring a row that holds ids up to `held` to where it holds them up to `stop`.

    last: index of the last id that the sequence can come to. Empty where the row is there already.
    """
    if held == stop:
        return deque()
    if is_scored:
        main = [Read(w.start, w.start, w.stop, scored_from=w.first) for w in grid.windows(stop)]
    else:
        start = grid.start(stop - 1)
        goes_on = held > 0 and grid.start(held - 1) == start
        main = [Read(start, held if goes_on else start, stop)]
    begin = grid.ahead(stop - 1, last)
    spare = [] if begin is None else [Read(begin, begin, stop, is_spare=True)]
    return deque([*spare, *main])
