"""An answer's heading, and how a whole one is worded.

Owns the order of its parts. Does not know what a body may hold nor whose turn it is.

The best of several choices: those whose tokens the model held likeliest on average.

Owns the ranking. Knows no endpoint.
"""

import asyncio
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace

from fastapi.responses import JSONResponse

from cottention.engine.outputs import FinishReason
from cottention.server.generation.async_engine import Phase
from cottention.server.generation.choice_format import ChoiceFormatter
from cottention.server.generation.output_stream import OutputDelta, OutputStream, TokenDeltas
from cottention.server.generation.request import QUICK_IDS, GenerationRequest
from cottention.server.generation.sse import Heading
from cottention.server.http.errors import engine_failed, expired, unavailable
from cottention.server.schemas.responses import JsonObject


@dataclass(frozen=True, slots=True)
class EndpointFormat:
    """What sets an endpoint's answers apart."""

    prefix: str
    whole: str
    chunk: str
    choices: type[ChoiceFormatter]

    def heading(self, name: str, order: GenerationRequest, model_name: str) -> Heading:
        """What each part of an answer to this order begins with."""
        kind = self.chunk if order.is_stream else self.whole
        return Heading(name, kind, int(time.time()), model_name)


async def whole_pieces(reading: OutputStream) -> dict[int, OutputDelta]:
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
    pieces: Mapping[int, OutputDelta],
    heading: Heading,
    choices: ChoiceFormatter,
    order: GenerationRequest,
    usage: JsonObject,
    more: JsonObject,
) -> JSONResponse:
    """The whole answer, and `more` beside its choices."""

    def worded() -> JSONResponse:
        best = best_choices(pieces, order)
        told = [choices.whole(index, piece) for index, piece in best.items()]
        beside = choices.beside(best) | more
        return JSONResponse(asdict(heading) | {"choices": told, "usage": usage} | beside)

    return await asyncio.to_thread(worded) if usage["total_tokens"] > QUICK_IDS else worded()


def best_choices(
    pieces: Mapping[int, OutputDelta], order: GenerationRequest
) -> dict[int, OutputDelta]:
    """The `num_choices` best of each prompt, best first, numbered anew; all of them as they are."""
    tried, kept = order.params.n, order.num_choices
    if tried == kept:
        return dict(sorted(pieces.items()))
    found: dict[int, OutputDelta] = {}
    for place in range(len(order.prompts)):
        group = [pieces[place * tried + choice] for choice in range(tried)]
        best = sorted(group, key=mean_logprob, reverse=True)[:kept]
        best[0] = _with_prompt_of(group[0], best[0])
        found |= {place * kept + rank: piece for rank, piece in enumerate(best)}
    return found


def mean_logprob(piece: OutputDelta) -> float:
    """Of its ids; an empty choice is worse than any other."""
    entries = piece.tokens.logprobs if piece.tokens else []
    return sum(each.logprob for each in entries) / len(entries) if entries else float("-inf")


def _with_prompt_of(first: OutputDelta, piece: OutputDelta) -> OutputDelta:
    """The engine tells a prompt's log-probabilities with its first choice alone."""
    prompt = (first.tokens or TokenDeltas()).prompt_logprobs
    return replace(piece, tokens=replace(piece.tokens or TokenDeltas(), prompt_logprobs=prompt))
