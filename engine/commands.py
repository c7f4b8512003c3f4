"""What other threads ask of an engine: commands that its next step executes."""

import queue
import threading
from collections.abc import Callable

from cottention.engine.errors import EngineStoppedError
from cottention.engine.outputs import Output

Command = Callable[[], list[Output]]
"""Returns the outputs that it has caused."""


class CommandQueue:
    """Commands in the order of `put`. All but `run` may be called from any thread."""

    def __init__(self) -> None:
        self._commands: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._is_closed = False

    def __bool__(self) -> bool:
        """Whether there is one to run."""
        return not self._commands.empty()

    def put(self, command: Command) -> None:
        """Leave a command, also of a queue that is closed."""
        self._commands.put(command)

    def submit(self, reserve: Callable[[], None], add: Command) -> None:
        """Leave the command that adds a request, after `reserve`, during which no other submits.

        Raises EngineStoppedError after `close`, and what `reserve` raises.
        """
        with self._lock:
            if self._is_closed:
                raise EngineStoppedError("the engine has stopped and takes no more requests")
            reserve()
            self._commands.put(add)

    def run(self) -> list[Output]:
        """Execute all; returns their outputs."""
        outputs: list[Output] = []
        while self:
            outputs += self._commands.get()()
        return outputs

    def close(self) -> None:
        """Refuse new requests."""
        with self._lock:
            self._is_closed = True


def failure(error: Exception) -> str:
    """The message of a request that a fault ended: a client learns only the exception's type."""
    return f"the engine failed on this request ({type(error).__name__})"
