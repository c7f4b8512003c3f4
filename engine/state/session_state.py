"""What a session is between its turns: one immutable value, from which its next token follows.

Owns how ids are added to it. Does not know who holds it, where it is kept or what computes on it.

A session's last id is never in the row: it waits in `pending` and is fed first by the next turn,
so that the next token's logits need not be kept. Ids whose turn was cut wait there as well: a row
cannot be un-stepped, so the row from before the turn stays and the ids that were delivered follow.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Self

from cottention.engine.errors import ContextPolicyError
from cottention.engine.state.context_window import ContextPolicy
from cottention.engine.state.event_log import EventLog

if TYPE_CHECKING:  # who schedules sessions need not load torch
    from torch import Tensor

MAX_COUNT = 2**31 - 1
"""An id that was generated more often counts as so often: a snapshot has 32 bits for it."""


@dataclass(frozen=True, slots=True, eq=False)
class SessionState:
    """All that the next token of a session depends on, beside the model and the request.

    rows: float32 tensors on the host, in the pool's order: state [L, H, V, K] and, where the
    attention has one, denominator [L, H, K]; empty stands for zeros.
    position: ids that are in the rows. pending: ids after them.
    recent: the last ids of all, pending ones included, as many as renewal may need.
    counts: id → how often it was generated; 0 where it was only read.
    undecoded: bytes of a character that the last turn's text did not finish.
    context_policy: how the rows came to be, which is settled once they are full.
    outbox: what the last turn told, where it was to be kept; no token depends on it.
    """

    rows: "tuple[Tensor, ...]" = ()
    position: int = 0
    pending: tuple[int, ...] = ()
    recent: tuple[int, ...] = ()
    counts: Mapping[int, int] = field(default_factory=dict)
    undecoded: bytes = b""
    outbox: EventLog = EventLog()
    context_policy: ContextPolicy = "renew"

    @property
    def past(self) -> tuple[int, ...]:
        """The last ids that are known: all that a turn may have to read."""
        return max(self.recent, self.pending, key=len)

    @property
    def num_tokens(self) -> int:
        """Ids that the session holds: its age."""
        return self.position + len(self.pending)

    @property
    def nbytes(self) -> int:
        """Bytes of the rows."""
        return sum(row.nbytes for row in self.rows)

    def under(self, policy: ContextPolicy | None, window: int) -> Self:
        """The same ids under this policy; None: its own.

        ContextPolicyError: more than `window` are held, and what they left in the rows differs.
        """
        if policy is None or policy == self.context_policy:
            return self
        if self.num_tokens > window:
            raise ContextPolicyError(
                f"the session's context_policy is {self.context_policy!r} and cannot become"
                f" {policy!r}: it holds {self.num_tokens} tokens, more than {window}"
            )
        return replace(self, context_policy=policy)

    def extended(
        self, read: Sequence[int], generated: Sequence[int], window: int, undecoded: bytes = b""
    ) -> Self:
        """With a prompt and what was generated after it, none of it in the rows yet.

        window: how many recent ids are kept.
        """
        counts = dict(self.counts)
        for token_id in read:
            counts.setdefault(token_id, 0)
        for token_id in generated:
            counts[token_id] = min(counts.get(token_id, 0) + 1, MAX_COUNT)
        new = (*read, *generated)
        return replace(
            self,
            pending=self.pending + new,
            recent=(self.recent + new)[-window:],
            counts=counts,
            undecoded=undecoded,
        )

    def fed(self, rows: "Sequence[Tensor]", position: int) -> Self:
        """The same ids where `rows` hold the first `position` of them."""
        return replace(
            self,
            rows=tuple(rows),
            position=position,
            pending=self.pending[position - self.position :],
        )
