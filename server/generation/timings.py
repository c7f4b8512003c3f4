"""The times of a request in its response, in the shape of llama.cpp's `timings`."""

from cottention.server.generation.output_stream import OutputStream
from cottention.server.generation.request import GenerationRequest
from cottention.server.schemas.responses import JsonObject


def timings_of(request: GenerationRequest, stream: OutputStream) -> JsonObject:
    """What there is to tell so far: zeros before a request has slots, or its first token."""
    prompt_ms = _milliseconds(stream.started, stream.first_token)
    predicted_ms = _milliseconds(stream.first_token, stream.last_token)
    num_prompt = request.num_prompt_tokens - stream.num_cached
    return {
        "cache_n": request.num_held + stream.num_cached,
        **_rates("prompt", num_prompt, prompt_ms),
        **_rates("predicted", stream.num_generated, predicted_ms),
    }


def _milliseconds(begin: float | None, end: float | None) -> float:
    return 0.0 if begin is None or end is None else max(0.0, 1000 * (end - begin))


def _rates(what: str, num_tokens: int, milliseconds: float) -> JsonObject:
    return {
        f"{what}_n": num_tokens,
        f"{what}_ms": milliseconds,
        f"{what}_per_token_ms": milliseconds / num_tokens if num_tokens else 0.0,
        f"{what}_per_second": 1000 * num_tokens / milliseconds if milliseconds else 0.0,
    }
