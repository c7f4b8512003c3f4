"""Latency histograms of requests, with the buckets of vLLM's dashboards."""

import bisect
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

FIRST_TOKEN_BUCKETS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
INTER_TOKEN_BUCKETS = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
REQUEST_BUCKETS = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
TOKEN_COUNT_BUCKETS = tuple(float(one * 10**power) for power in range(6) for one in (1, 2, 5))


class Histogram:
    """Counts of values by bucket."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        """Count a value that occurred `times` times."""
        self._counts[bisect.bisect_left(self._bounds, value)] += times
        self.total += value * times

    def buckets(self) -> list[tuple[str, float]]:
        """Each upper bound as text, and the number of values up to it."""
        names = [*map(str, self._bounds), "+Inf"]
        return list(zip(names, itertools.accumulate(list(self._counts)), strict=True))


@dataclass(frozen=True, slots=True)
class LatencyStats:
    """Histograms of all prompts that have ended, and of all tokens. Times are in seconds."""

    first_token: Histogram = field(default_factory=lambda: Histogram(FIRST_TOKEN_BUCKETS))
    between_tokens: Histogram = field(default_factory=lambda: Histogram(INTER_TOKEN_BUCKETS))
    per_token: Histogram = field(default_factory=lambda: Histogram(INTER_TOKEN_BUCKETS))
    whole: Histogram = field(default_factory=lambda: Histogram(REQUEST_BUCKETS))
    queue: Histogram = field(default_factory=lambda: Histogram(REQUEST_BUCKETS))
    prefill: Histogram = field(default_factory=lambda: Histogram(REQUEST_BUCKETS))
    decode: Histogram = field(default_factory=lambda: Histogram(REQUEST_BUCKETS))
    prompt_tokens: Histogram = field(default_factory=lambda: Histogram(TOKEN_COUNT_BUCKETS))
    generated_tokens: Histogram = field(default_factory=lambda: Histogram(TOKEN_COUNT_BUCKETS))

    def observe_gaps(self, gaps: Mapping[float, int]) -> None:
        """Count inter-token latencies: the number of tokens by the seconds since the one before."""
        for seconds, times in gaps.items():
            self.between_tokens.observe(seconds, times)

    def observe_end(
        self,
        *,
        num_prompt_tokens: int,
        num_generated: int,
        arrived_at: float,
        started_at: float | None,
        first_token_at: float | None,
        ended_at: float,
    ) -> None:
        """Count a prompt that has ended; `started_at` is when it got its slots."""
        self.whole.observe(ended_at - arrived_at)
        self.prompt_tokens.observe(num_prompt_tokens)
        self.generated_tokens.observe(num_generated)
        if started_at is not None:
            self.queue.observe(started_at - arrived_at)
        if first_token_at is not None:
            self.decode.observe(ended_at - first_token_at)
            if started_at is not None:
                self.prefill.observe(first_token_at - started_at)
            if num_generated > 1:
                self.per_token.observe((ended_at - first_token_at) / (num_generated - 1))
