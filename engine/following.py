"""Generating in the caller's own thread: step, and give each follower what is its own.

Owns the inboxes of those who follow requests without an engine thread. Does not know what a step
is.
"""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

from cottention.engine.outputs import Output
from cottention.engine.params import SamplingParams


class Stepping(Protocol):
    """What a follower asks of an engine."""

    def submit(
        self, prompt_ids: Sequence[int], params: SamplingParams, *, request_id: str
    ) -> str: ...
    def cancel(self, request_id: str) -> None: ...
    def step(self) -> list[Output]: ...
    def settle(self) -> None: ...


class Followers:
    """Several may follow in turn: what a step brings for another waits in its inbox."""

    def __init__(self, engine: Stepping) -> None:
        self._engine = engine
        self._inboxes: dict[str, deque[Output]] = {}

    def follow(
        self, prompts: Mapping[str, Sequence[int]], params: SamplingParams
    ) -> Iterator[Output]:
        """Outputs of prompts under these ids, stepping in this thread; leaving early cancels."""
        inbox: deque[Output] = deque()
        self._inboxes |= dict.fromkeys(prompts, inbox)
        try:
            for request_id, prompt_ids in prompts.items():
                self._engine.submit(prompt_ids, params, request_id=request_id)
            num_unfinished = len(prompts) * params.n
            while num_unfinished:
                self._engine.step()
                while inbox:  # also what others' steps bring while this one's reader is away
                    output = inbox.popleft()
                    num_unfinished -= output.finish_reason is not None
                    yield output
        finally:
            for request_id in prompts:
                del self._inboxes[request_id]
                self._engine.cancel(request_id)
            self._engine.settle()

    def post(self, outputs: list[Output]) -> list[Output]:
        """Put each output into the inbox of whoever follows its request."""
        for output in outputs:
            if output.request_id in self._inboxes:
                self._inboxes[output.request_id].append(output)
        return outputs
