"""What another server needs to go on with a turn or a response, and how it begins again there."""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from secrets import randbits, token_hex
from typing import TYPE_CHECKING

from starlette.types import Scope

from cottention.engine.errors import SessionMovedError, StoreUnreachableError
from cottention.engine.sampling_params import SamplingParams
from cottention.engine.sessions.store.journal import JournaledTurn
from cottention.server.api.dependencies import Context
from cottention.server.generation.output_stream import OutputStreamClosed
from cottention.server.generation.request import GenerationRequest
from cottention.server.idempotency.keys import KeyedRequest
from cottention.server.sessions.journal import Leave, TurnJournal
from cottention.server.sessions.live_events import LiveEvents

if TYPE_CHECKING:  # it imports torch, which the server must not load
    from cottention.engine.sessions.types import AdoptedTurn


def can_go_on(context: Context, params: SamplingParams) -> bool:
    """Whether another server can go on with what these parameters generate.

    What was computed beside the ids it must compute again, with the same bits.
    """
    journal = context.journal
    return journal is not None and (not journal.gates or params.logprobs is None)


@asynccontextmanager
async def left_to_others(
    journal: TurnJournal | None, leave: Leave, live: LiveEvents, keyed: KeyedRequest | None
) -> AsyncIterator[None]:
    """Where another server goes on with what runs within, nothing is told of its end.

    leave: ends it here. keyed: who goes on keeps its answer.
    """
    try:
        yield
    except (SessionMovedError, StoreUnreachableError, OutputStreamClosed) as error:
        is_over = isinstance(error, OutputStreamClosed)
        if journal is None or (is_over and not journal.is_leaving):
            raise
        if keyed is not None:
            keyed.is_kept = True
        await journal.left(leave)
        live.cut()


def new_journaled(
    scope: Scope,
    context: Context,
    owner: str,
    name: str,
    deadline: float | None,
    seed: int | None,
    keyed: KeyedRequest | None,
) -> JournaledTurn:
    """What another server needs to go on with the request of a scope, whose body has been read.

    name: the id of its answer. deadline: by the event loop's clock. seed: None for a new one.
    """
    if deadline is not None:
        deadline += context.sessions.now() - asyncio.get_running_loop().time()
    return JournaledTurn(
        owner=owner,
        turn=token_hex(8),
        name=name,
        path=scope["path"],
        body=scope["state"]["raw_body"],
        seed=randbits(63) if seed is None else seed,
        created=int(time.time()),
        deadline=deadline,
        key=None if keyed is None else keyed.claim.key,
        token=None if keyed is None else keyed.claim.token,
    )


def repeatable(
    request: GenerationRequest, entry: JournaledTurn, known: "AdoptedTurn | None"
) -> tuple[GenerationRequest, Sequence[int]]:
    """The request with the journal's seed, and the ids that need not be generated again.

    known: what another server has done of it. Log-probabilities are computed again, with their ids.
    """
    seeded = replace(request, params=replace(request.params, seed=entry.seed))
    if known is None or request.params.logprobs is not None:
        return seeded, ()
    return seeded, known.ids
