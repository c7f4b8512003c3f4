"""`cottention bench URL`: a load test, told as a table and a histogram, or as JSON."""

import json
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing

from cottention.engine.errors import CottentionError
from cottention.engine.standard_streams import write_output
from cottention.server.cli.progress import progress, silent
from cottention.server.cli.terminal import note
from cottention.server.client.client import Client, RemoteError, key_of
from cottention.server.client.load_test import Level, Load, LoadTest, Percentiles
from cottention.server.client.settings import BenchConfig, ClientConfig

NUM_BINS = 12
BAR_WIDTH = 40
REQUESTS_PER_STREAM = 4
MIN_REQUESTS = 8


def bench(client_config: ClientConfig, config: BenchConfig, *, as_json: bool) -> int:
    """Test the server of --url at each level; returns the exit status."""
    assert client_config.url is not None
    key = key_of(client_config)
    with closing(Client.of(client_config)) as client:
        model = config.model or _first_model(client)
    load = Load(model, config.chat, config.prompt_words, config.max_tokens)
    test = LoadTest(client_config.url, key, load)
    _check(test.run(1, 1, silent))
    levels = [_run(test, level, config.requests) for level in config.levels]
    if as_json:
        found = {"url": client_config.url, "model": model, "levels": [e.as_json() for e in levels]}
        write_output(json.dumps(found, indent=2) + "\n")
    else:
        write_output(report(model, levels))
    for level in levels:
        if level.error is not None:
            note(f"{level.num_failed} requests failed at {level.concurrency}: {level.error}")
    return 1 if any(level.num_failed for level in levels) else 0


def _first_model(client: Client) -> str:
    models = client.get("/v1/models").get("data")
    if not (isinstance(models, list) and models and isinstance(models[0], dict)):
        raise RemoteError(f"{client.url} lists no models; give --model")
    return str(models[0].get("id"))


def _check(level: Level) -> None:
    """One request before all others warms the server up, and tells what cannot work."""
    if level.error is not None:
        raise RemoteError(level.error)
    if not level.num_tokens:
        raise CottentionError("the server generates nothing that could be measured")


def _run(test: LoadTest, concurrency: int, num_requests: int | None) -> Level:
    num = num_requests or max(MIN_REQUESTS, REQUESTS_PER_STREAM * concurrency)
    with progress(f"{concurrency} at a time") as show:
        return test.run(concurrency, num, show)


def report(model: str, levels: Sequence[Level]) -> str:
    """The table of all levels, and the histograms of the last."""
    num = sum(level.num_requests - level.num_failed for level in levels)
    prompt = sum(level.num_prompt_tokens for level in levels) / max(1, num)
    answer = sum(level.num_tokens for level in levels) / max(1, num)
    lines = [
        f"{model}: on average {prompt:.0f} tokens of prompt and {answer:.0f} of answer per request",
        "",
        *_table(levels),
    ]
    last = levels[-1]
    for what, times in (
        ("time to first token", last.first_tokens),
        ("time per token", last.gaps),
    ):
        lines += ["", f"{what}, {last.concurrency} at a time", *histogram(times)]
    return "\n".join(lines) + "\n"


def _table(levels: Sequence[Level]) -> Iterator[str]:
    columns = "{:>8} {:>8} {:>6} {:>9} | {:>8} {:>8} {:>8} | {:>8} {:>8} {:>8}"
    yield columns.format("", "", "", "", "first", "token,", "ms", "per", "token,", "ms")
    yield columns.format("streams", "requests", "failed", "tokens/s", *(2 * ("p50", "p95", "p99")))
    for level in levels:
        yield columns.format(
            level.concurrency,
            level.num_requests,
            level.num_failed,
            f"{level.tokens_per_second:,.1f}",
            *_milliseconds(level.first_token),
            *_milliseconds(level.per_token),
        )


def _milliseconds(times: Percentiles) -> list[str]:
    values = (times.p50, times.p95, times.p99)
    return ["-" if each is None else f"{1000 * each:,.2f}" for each in values]


def histogram(times: Sequence[float]) -> Iterator[str]:
    """Bars of how many times lie in each bin; the bins grow by a constant factor."""
    if not times:
        yield "  none"
        return
    low, high = max(min(times), 1e-6), max(*times, 1e-6)
    factor = (high / low) ** (1 / NUM_BINS) if high > low else 1.0
    counts = [0] * NUM_BINS
    for each in times:
        place = int(math.log(max(each, low) / low) / math.log(factor)) if factor > 1 else 0
        counts[min(place, NUM_BINS - 1)] += 1
    block = "█" if _takes_blocks() else "#"
    for place, count in enumerate(counts):
        bar = block * math.ceil(BAR_WIDTH * count / max(counts))
        yield f"  from {1000 * low * factor**place:>10,.2f} ms {count:>7} {bar}".rstrip()


def _takes_blocks() -> bool:
    try:
        "█".encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return False
    return True
