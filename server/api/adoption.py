"""Going on with a turn or a response that another server has begun: from journal to events."""

import asyncio
import time
from typing import TYPE_CHECKING

from cottention.server.api.chat import CHAT, parse_chat
from cottention.server.api.completions import COMPLETION, parse_completion
from cottention.server.api.dependencies import Context
from cottention.server.api.exception_handlers import CLIENT_CLOSED_REQUEST
from cottention.server.api.responses import background
from cottention.server.api.responses.creation import parse_response
from cottention.server.api.turn_response import TurnResponse
from cottention.server.http.json_body import parse_object
from cottention.server.observability.access_log import RequestHead
from cottention.server.sessions.turn_queue import Caller

if TYPE_CHECKING:  # it imports torch, which the server must not load
    from cottention.engine.sessions.types import AdoptedTurn

ENDPOINTS = {
    "/v1/completions": (parse_completion, COMPLETION),
    "/v1/chat/completions": (parse_chat, CHAT),
}
"""Of turns, by path: how a body is parsed, and how its response is formatted."""

RESPONSES = "/v1/responses"

OVERDUE_SECONDS = 1.0
"""For a turn whose time was over before it was adopted, to end with what it has told."""


async def go_on(context: Context, adopted: "AdoptedTurn") -> None:
    """Run the turn to its end; returns when its events can be followed.

    Raises what a request of the same body raises, and KeyError for another path.
    """
    entry, began = adopted.journaled, time.monotonic()
    record = context.access_log.record_of(entry.owner)
    fields = parse_object(entry.body)
    request_id = entry.name.partition("-")[2].removeprefix(f"{adopted.turn.session.id}.")
    cancellation = context.running.open(entry.owner, entry.name, request_id, is_chosen=False)
    deadline = entry.deadline
    if deadline is not None:
        now = asyncio.get_running_loop().time()
        deadline = max(deadline + now - context.sessions.now(), now + OVERDUE_SECONDS)
    try:
        if entry.path == RESPONSES:
            response = await asyncio.to_thread(parse_response, fields, context)
            await background.go_on(context, response, adopted, deadline, cancellation, record)
        else:
            parse, endpoint = ENDPOINTS[entry.path]
            parsed = await asyncio.to_thread(parse, fields, context)
            caller = Caller(entry.owner, None)
            turn = TurnResponse(
                context, parsed, endpoint, entry.name, caller, deadline, cancellation
            )
            await turn.go_on(adopted, record)
    except BaseException:
        cancellation.end()
        raise
    was_begun = entry.path == RESPONSES or bool(fields.get("stream"))
    status = 200 if was_begun else CLIENT_CLOSED_REQUEST  # as where its client alone has left
    head = RequestHead(request_id, "POST", entry.path, began)
    record.on_end(lambda: context.access_log.write(record, head, status))
