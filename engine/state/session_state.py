"""The state of a session between its turns: an immutable value that determines its next token.

A session's last id is never in the rows: it is in `pending` and is fed first by the next turn, so
that the next token's logits need not be stored. The ids of a turn that was cut are there as well:
a row cannot be un-stepped, so the rows from before the turn stay and the delivered ids follow.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Self

from cottention.engine.errors import ContextPolicyError
from cottention.engine.state.context_window import ContextPolicy
from cottention.engine.state.state_copy import num_bytes

if TYPE_CHECKING:  # the scheduler imports this module without torch
    from torch import Tensor

MAX_COUNT = 2**31 - 1
"""Counts stop here: a snapshot has 32 bits for each."""

MAX_UNDECODED = 3
"""Bytes of a UTF-8 character that is not complete."""

MAX_PENDING = 2**20
"""Most ids that a session keeps outside its rows, since the next turn reads them all again. A turn
that is cut and would leave more is undone."""


@dataclass(frozen=True, slots=True, eq=False)
class SessionState:
    """All that the next token of a session depends on, besides the model and the request.

    rows: float32 tensors on the host, in the pool's order: state [L, H, V, K] and, where the
    attention has one, denominator [L, H, K]; perhaps a StateCopy, on which readers wait. Empty:
    zeros, or, where `position` is not 0, a state that no token will be computed in, because the
    next one's context begins among the recent ids.
    position: number of ids that are in the rows. pending: ids that follow them.
    recent: the last ids of all, pending ones included, as many as renewal may need.
    counts: id → how often it was generated; 0 for an id that was only in a prompt.
    undecoded: bytes of a character that the last turn's text did not complete.
    context_policy: how the rows were computed; fixed once the session is longer than the window.
    """

    rows: "Sequence[Tensor]" = ()
    position: int = 0
    pending: tuple[int, ...] = ()
    recent: tuple[int, ...] = ()
    counts: Mapping[int, int] = field(default_factory=dict)
    undecoded: bytes = b""
    context_policy: ContextPolicy = "renew"

    @property
    def past(self) -> tuple[int, ...]:
        """The last ids that are known: all that a turn may have to prefill."""
        return max(self.recent, self.pending, key=len)

    @property
    def num_tokens(self) -> int:
        """Number of ids that the session holds: its position, as clients see it."""
        return self.position + len(self.pending)

    @property
    def nbytes(self) -> int:
        """Bytes of the rows."""
        return num_bytes(self.rows)

    def recipe(self) -> Self | None:
        """The same session without rows: the next turn computes them again from its recent ids.

        None where they depend on more ids than are kept. Equal bits need one arithmetic.
        """
        position = self.num_tokens - len(self.recent)
        if position and self.context_policy == "exact":
            return None
        return replace(self, rows=(), position=position, pending=self.recent)

    def under(self, policy: ContextPolicy | None, window: int) -> Self:
        """The same ids under this policy; None: unchanged.

        ContextPolicyError: the session holds more than `window` ids, so its rows depend on its
        policy.
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
        """The state with a prompt and the ids generated after it appended to `pending`.

        window: number of recent ids to keep.
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
        """The same ids with `rows` that hold the first `position` of them."""
        return replace(
            self,
            rows=rows,
            position=position,
            pending=self.pending[position - self.position :],
        )
