"""Responses that are sent whole: waiting for the outputs, the best of several choices, the JSON."""

import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import islice

from starlette.responses import Response

from cottention.engine.outputs import FinishReason
from cottention.server.generation.async_engine import Phase
from cottention.server.generation.choice_format import ChoiceFormatter
from cottention.server.generation.json_pieces import encode_unicode, json_pieces, json_response
from cottention.server.generation.output_stream import OutputDelta, OutputStream, TokenDeltas
from cottention.server.generation.request import (
    MAX_INLINE_ITEMS,
    MAX_INLINE_TOKENS,
    GenerationRequest,
)
from cottention.server.generation.sse import ResponseHeader
from cottention.server.http.errors import engine_failed, expired, unavailable
from cottention.server.schemas.responses import JsonObject

NULL_FIELDS = ("service_tier", "system_fingerprint", "kv_transfer_params")
"""Fields of OpenAI's and vLLM's whole responses for which this server has no value."""


@dataclass(frozen=True, slots=True)
class EndpointFormat:
    """How an endpoint formats its responses.

    id_prefix: of a response's id. whole, chunk: the `object` field of a whole response and of a
    chunk.
    """

    id_prefix: str
    whole: str
    chunk: str
    formatter: type[ChoiceFormatter]

    def header(self, name: str, model_name: str, *, is_stream: bool) -> ResponseHeader:
        """The first fields of a response, or of each of its chunks."""
        object_name = self.chunk if is_stream else self.whole
        return ResponseHeader(name, object_name, int(time.time()), model_name)


async def collect_outputs(stream: OutputStream) -> dict[int, OutputDelta]:
    """Wait until all choices have ended. The stream must not have been read before.

    Raises OutputStreamClosed; ApiError if the engine failed, or if the request timed out or was
    cancelled by shutdown before the first token. One that its client cancelled ends with what it
    has, be it nothing.
    """
    await stream.wait_ended()
    deltas = await stream.take()
    check_outcome(stream, deltas)
    return deltas


def check_outcome(stream: OutputStream, deltas: Mapping[int, OutputDelta]) -> None:
    """Raise ApiError as `collect_outputs` does, for outputs that have been read to their end."""
    reasons = {delta.finish_reason for delta in deltas.values()}
    if FinishReason.ERROR in reasons:
        raise engine_failed()
    if not stream.num_generated:
        if FinishReason.TIMEOUT in reasons:
            raise expired()
        if FinishReason.ABORT in reasons and not stream.was_cancelled:
            raise unavailable(Phase.DRAINING)


def format_response(
    deltas: Mapping[int, OutputDelta],
    header: ResponseHeader,
    choices: ChoiceFormatter,
    request: GenerationRequest,
    usage: JsonObject,
    extra: JsonObject,
    *,
    at_once: bool = False,
) -> Response:
    """The whole response; `extra` holds more of its top-level fields.

    at_once: also where it is long: the caller is a thread.
    """

    def pieces() -> Iterator[str]:
        best = best_choices(deltas, request)
        yield f"{encode_unicode(asdict(header))[:-1]},"
        separator = '"choices":['
        for index, delta in best.items():
            yield separator
            yield from json_pieces(choices.whole(index, delta), encode_unicode)
            separator = ","
        details = {"prompt_tokens_details": usage.get("prompt_tokens_details")}
        more = choices.top_level_fields(best) | extra
        end = {"usage": usage | details} | dict.fromkeys(NULL_FIELDS) | more
        yield "],"
        yield from islice(json_pieces(end, encode_unicode), 1, None)  # without its brace

    is_long = usage["total_tokens"] > MAX_INLINE_TOKENS or request.is_slow_to_format
    is_long = is_long or request.output.state_bytes > 0
    num_items = usage["completion_tokens"] * request.items_per_token
    is_long = not at_once and (is_long or num_items > MAX_INLINE_ITEMS)
    return json_response(pieces(), is_long=is_long)


def best_choices(
    deltas: Mapping[int, OutputDelta], request: GenerationRequest
) -> dict[int, OutputDelta]:
    """The `num_choices` best choices of each prompt, by mean log-probability, numbered anew.

    Without `best_of` all choices, as they are.
    """
    num_tried, num_kept = request.params.n, request.num_choices
    if num_tried == num_kept:
        return dict(sorted(deltas.items()))
    found: dict[int, OutputDelta] = {}
    for place in range(len(request.prompts)):
        group = [deltas[place * num_tried + choice] for choice in range(num_tried)]
        best = sorted(group, key=mean_logprob, reverse=True)[:num_kept]
        best[0] = _with_prompt_logprobs(best[0], group[0])
        found |= {place * num_kept + rank: delta for rank, delta in enumerate(best)}
    return found


def mean_logprob(delta: OutputDelta) -> float:
    """Mean log-probability of its tokens; minus infinity without any."""
    entries = delta.tokens.logprobs if delta.tokens else []
    return sum(each.logprob for each in entries) / len(entries) if entries else float("-inf")


def _with_prompt_logprobs(delta: OutputDelta, first: OutputDelta) -> OutputDelta:
    """The engine returns a prompt's log-probabilities with the prompt's first choice only."""
    prompt = (first.tokens or TokenDeltas()).prompt_logprobs
    return replace(delta, tokens=replace(delta.tokens or TokenDeltas(), prompt_logprobs=prompt))
