"""How much of bodies and responses there may be at once, and how many are processed at a time.

A body counts from its announced length on until its request has ended, with the turn that may go on
after it; a response counts by its token ids and log-probabilities until it has been sent. What a
large body becomes while it is parsed and tokenized is many times its size, so those are processed
one at a time.
"""

import contextlib
from collections.abc import AsyncIterator

from starlette.requests import Request
from starlette.types import Scope

from cottention.server.http.errors import RETRY_AFTER_SECONDS, too_many
from cottention.server.http.shares import FairTurns, Shares

SHORT_BYTES = 16 * 1024
LARGE_BYTES = 256 * 1024
"""From here on bodies are processed one at a time."""

NUM_SMALL = 2
"""Smaller ones that are processed at once, beside a large one."""


class BodyMemory:
    """The bodies of all requests and responses."""

    def __init__(self, max_bytes: int, max_snapshot_bytes: int, max_response_items: int) -> None:
        """max_bytes: of all JSON bodies.

        Of snapshots and of responses there may be two of the maximum size.
        """
        self._bodies = Shares(max_bytes)
        self._snapshots = Shares(2 * max_snapshot_bytes)
        self._responses = Shares(2 * max_response_items)
        self._large, self._small = FairTurns(1), FairTurns(NUM_SMALL)

    def body(self, request: Request) -> "Held":
        """What the request's JSON body is counted by; it is released with the request."""
        return self._held(request.scope, self._bodies)

    def snapshot(self, request: Request) -> "Held":
        """The same for a snapshot."""
        return self._held(request.scope, self._snapshots)

    def response(self, request: Request) -> "Held":
        """What the response's token ids and log-probabilities are counted by, likewise."""
        unit, code = "token ids and log-probabilities", "too_many_items"
        return self._held(request.scope, self._responses, unit, code)

    @contextlib.asynccontextmanager
    async def turn(self, request: Request, num_bytes: int) -> AsyncIterator[None]:
        """Wait until a body of this size may be processed; owners (keys) have turns.

        There is no wait for those of up to SHORT_BYTES.
        """
        if num_bytes <= SHORT_BYTES:
            yield
            return
        turns = self._small if num_bytes < LARGE_BYTES else self._large
        async with turns.turn(_owner(request.scope)):
            yield

    def _held(
        self, scope: Scope, shares: Shares, unit: str = "bytes", code: str = "too_many_bytes"
    ) -> "Held":
        held: list[Held] = scope["state"].setdefault("held_bodies", [])
        held.append(Held(shares, _owner(scope), unit, code))
        return held[-1]


class Held:
    """The bytes of one body, or what one response counts by."""

    def __init__(self, shares: Shares, owner: str, unit: str, code: str) -> None:
        """unit, code: what is counted, and the error's code, where there is no room for more."""
        self._shares = shares
        self._owner = owner
        self._unit, self._code = unit, code
        self._amount = 0

    def at_least(self, amount: int) -> None:
        """Count so much, if not more has been. Raises ApiError 429."""
        more = amount - self._amount
        if more <= 0:
            return
        shares = self._shares
        if not shares.take(self._owner, more):
            raise too_many(
                f"requests under way hold {shares.num_held} {self._unit} together,"
                f" {shares.held_by(self._owner)} of them from this client, and there is no room for"
                " this one; retry when others have ended",
                RETRY_AFTER_SECONDS,
                self._code,
            )
        self._amount = amount

    def release(self) -> None:
        """Count nothing any more."""
        self._shares.give_back(self._owner, self._amount)
        self._amount = 0


def release_bodies(scope: Scope) -> None:
    """Count the bodies of a request no more: it has ended."""
    for held in scope["state"].get("held_bodies", ()):
        held.release()


def _owner(scope: Scope) -> str:
    owner: str = scope["state"].get("owner", "")
    return owner
