"""Outputs on their way from the engine's thread to the event loop, several steps at a time.

Waking the loop costs more than a step of a small model, in which both threads need the same cores
and the interpreter. So where steps come fast, the loop looks by itself for what has come, and is
woken only for what cannot wait: the first output of a prompt, and the last of a choice.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence

from cottention.engine.outputs import Output
from cottention.server.generation.dispatch import Step

HOLD_SECONDS = 0.004
"""How long an output waits for others at most, on a loop that has time."""

GIVE_WAY_SECONDS = 0.00001
"""Sleep of the engine's thread after the first output of a prompt: without it the loop gets neither
interpreter nor core before the next step is over.
"""

Dispatch = Callable[[Sequence[Step]], None]
"""Takes steps in order, with when they ended by time.monotonic."""


class Handover:
    """Hands steps over in order. `post` is called by the engine's thread, all else by the loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop, dispatch: Dispatch) -> None:
        self._loop = loop
        self._dispatch = dispatch
        self._steps: deque[Step] = deque()
        self._begun: set[str] = set()
        self._is_expected = False
        self._last_at = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def post(self, outputs: Sequence[Output]) -> None:
        """Leave the outputs of a step. Raises RuntimeError where the loop is closed."""
        is_first, is_last = self._note(outputs)
        self._steps.append((outputs, time.monotonic()))
        if is_first or is_last or not self._is_expected:
            self._is_expected = True
            self._loop.call_soon_threadsafe(self.dispatch)
        if is_first:
            time.sleep(GIVE_WAY_SECONDS)

    def _note(self, outputs: Sequence[Output]) -> tuple[bool, bool]:
        """Whether the first output of a prompt is among these, and the last of a choice."""
        is_first, is_last, begun = False, False, self._begun
        for output in outputs:
            if output.finish_reason is not None:
                begun.discard(output.request_id)
                is_last = True
            elif output.request_id not in begun:
                begun.add(output.request_id)
                is_first = True
        return is_first, is_last

    def dispatch(self) -> None:
        """Dispatch what there is, and look again soon where steps come fast."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._is_expected = False  # before looking: what is posted from now on wakes the loop
        steps = [self._steps.popleft() for _ in range(len(self._steps))]
        if not steps:
            return
        before = steps[-2][1] if len(steps) > 1 else self._last_at
        self._last_at = steps[-1][1]
        if self._last_at - before < HOLD_SECONDS / 2:
            self._is_expected = True
            self._timer = self._loop.call_later(HOLD_SECONDS, self.dispatch)
        self._dispatch(steps)
