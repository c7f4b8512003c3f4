"""Outputs on their way to those who iterate over them in the engine's own thread."""

from collections import deque
from collections.abc import Iterable

from cottention.engine.outputs import Output


class OutputInboxes:
    """Outputs that wait for the iterators of `stream` and `generate`, which may take turns."""

    def __init__(self) -> None:
        self._inboxes: dict[str, deque[Output]] = {}

    def open(self, request_ids: Iterable[str]) -> deque[Output]:
        """One inbox for the outputs of these requests."""
        inbox: deque[Output] = deque()
        self._inboxes |= dict.fromkeys(request_ids, inbox)
        return inbox

    def close(self, request_ids: Iterable[str]) -> None:
        """Drop outputs of these requests from now on."""
        for request_id in request_ids:
            del self._inboxes[request_id]

    def post(self, outputs: list[Output]) -> list[Output]:
        """Put each output into its request's inbox, if there is one; returns all of them."""
        if self._inboxes:
            for output in outputs:
                if output.request_id in self._inboxes:
                    self._inboxes[output.request_id].append(output)
        return outputs
