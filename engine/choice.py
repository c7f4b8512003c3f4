"""One continuation of a request's prompt. Knows no torch."""

from array import array
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from cottention.engine.detokenizer import Detokenizer
from cottention.engine.history import History
from cottention.engine.outputs import FinishReason

if TYPE_CHECKING:
    from cottention.engine.request import Request


@dataclass(slots=True, eq=False)
class Choice:
    """One continuation of a request's prompt.

    position counts the ids that have been fed; pending are those that were sampled and were not.
    drawn: all that were sampled, where a session is to hold them. rows: of the pool, the one that
    the choice runs in first, then its spare where there is one.
    """

    request: "Request"
    index: int
    detokenizer: Detokenizer
    history: History
    position: int
    rows: list[int] = field(default_factory=list)
    pending: list[int] = field(default_factory=list)
    drawn: "array[int]" = field(default_factory=lambda: array("i"))
    num_generated: int = 0
    finish_reason: FinishReason | None = None

    @property
    def row(self) -> int:
        """Where its state is; only an admitted request has rows."""
        return self.rows[0]

    @property
    def spare(self) -> int:
        """Where its state after the next renewal grows."""
        return self.rows[1]

    @property
    def ahead(self) -> int | None:
        """Where the context after this one begins, if what is fed next goes into the spare, too."""
        return self.request.grid.ahead(self.position, self.request.last)

    @property
    def context_start(self) -> int:
        """The oldest id that the next one is drawn with."""
        held = self.position + len(self.pending)
        return self.request.grid.start(held - 1) if held else 0

    def note(self, token_id: int) -> None:
        """An id has been drawn; it is not in the state yet."""
        self.pending.append(token_id)
        self.history.note(token_id)
        if self.request.start is not None:
            self.drawn.append(token_id)
        self.num_generated += 1
        if self.num_generated == self.request.params.min_tokens:
            self.detokenizer.watch(self.request.params.stop)

    def barred_ids(self) -> list[int]:
        """Ids that may not be drawn now: the end before its time, and the last of a bad word."""
        too_early = self.num_generated < self.request.params.min_tokens
        return [*(self.request.end_ids if too_early else ()), *self.history.barred_ids()]
