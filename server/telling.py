"""An answer's heading, and how a whole one is worded.

Owns the order of its parts. Does not know what a body may hold nor whose turn it is.
"""

import asyncio
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from cottention.engine.outputs import FinishReason
from cottention.server.answers import Shape
from cottention.server.best import best_choices
from cottention.server.bridge import Phase
from cottention.server.choices import Choices
from cottention.server.errors import engine_failed, expired, unavailable
from cottention.server.orders import QUICK_IDS, Order
from cottention.server.reading import Piece, Reading
from cottention.server.streaming import Heading
from fastapi.responses import JSONResponse


@dataclass(frozen=True, slots=True)
class Kind:
    """What sets an endpoint's answers apart."""

    prefix: str
    whole: str
    chunk: str
    choices: type[Choices]

    def heading(self, name: str, order: Order, model_name: str) -> Heading:
        """What each part of an answer to this order begins with."""
        kind = self.chunk if order.is_stream else self.whole
        return Heading(name, kind, int(time.time()), model_name)


async def whole_pieces(reading: Reading) -> dict[int, Piece]:
    """Wait for the end, which is the first time a whole answer is read.

    Raises ReadingClosed, ApiError.
    """
    await reading.wait_ended()
    pieces = await reading.take()
    reasons = {piece.finish_reason for piece in pieces.values()}
    if FinishReason.ERROR in reasons:
        raise engine_failed()
    if not reading.num_generated:
        if FinishReason.TIMEOUT in reasons:
            raise expired()
        if FinishReason.CANCELLED in reasons:
            raise unavailable(Phase.DRAINING)
    return pieces


async def told_whole(
    pieces: Mapping[int, Piece],
    heading: Heading,
    choices: Choices,
    order: Order,
    usage: Shape,
    more: Shape,
) -> JSONResponse:
    """The whole answer, and `more` beside its choices."""

    def worded() -> JSONResponse:
        best = best_choices(pieces, order)
        told = [choices.whole(index, piece) for index, piece in best.items()]
        beside = choices.beside(best) | more
        return JSONResponse(asdict(heading) | {"choices": told, "usage": usage} | beside)

    return await asyncio.to_thread(worded) if usage["total_tokens"] > QUICK_IDS else worded()
