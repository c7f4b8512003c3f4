"""How long things took, as histograms with the buckets of vLLM's dashboards.

Owns the buckets and the counts. Does not know when anything happens, nor how it is published.
"""

import bisect
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

FIRST_TOKEN = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
BETWEEN_TOKENS = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
WHOLE = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
TOKENS = tuple(float(one * 10**power) for power in range(6) for one in (1, 2, 5))


class Histogram:
    """Counts by bucket; each value may come many times at once."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        """Count a value."""
        self._counts[bisect.bisect_left(self._bounds, value)] += times
        self.total += value * times

    def buckets(self) -> list[tuple[str, float]]:
        """Each upper bound as text, and how many were not above it."""
        names = [*map(str, self._bounds), "+Inf"]
        return list(zip(names, itertools.accumulate(list(self._counts)), strict=True))


@dataclass(frozen=True, slots=True)
class LatencyStats:
    """Of all prompts that have ended, and of all tokens."""

    first_token: Histogram = field(default_factory=lambda: Histogram(FIRST_TOKEN))
    between_tokens: Histogram = field(default_factory=lambda: Histogram(BETWEEN_TOKENS))
    per_token: Histogram = field(default_factory=lambda: Histogram(BETWEEN_TOKENS))
    whole: Histogram = field(default_factory=lambda: Histogram(WHOLE))
    queue: Histogram = field(default_factory=lambda: Histogram(WHOLE))
    prefill: Histogram = field(default_factory=lambda: Histogram(WHOLE))
    decode: Histogram = field(default_factory=lambda: Histogram(WHOLE))
    prompt_tokens: Histogram = field(default_factory=lambda: Histogram(TOKENS))
    generated_tokens: Histogram = field(default_factory=lambda: Histogram(TOKENS))

    def observe_gaps(self, gaps: Mapping[float, int]) -> None:
        """Seconds since each choice's token before, and of how many choices: once a step."""
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
        """A prompt has ended: when it came, had its slots, had its first token, and was over."""
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
