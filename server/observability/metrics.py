"""The engine's figures for Prometheus, under vLLM's names where they mean the same.

Owns names and help texts; buckets are `timings.py`'s. Figures are taken when they are asked for.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from cottention.engine.outputs import EngineStats, FinishReason
from cottention.engine.sessions.memory_usage import SessionBytes
from cottention.server.generation.async_engine import AsyncEngine
from cottention.server.generation.latency import Histogram, LatencyStats

if TYPE_CHECKING:  # it brings torch with it, which the server does not know
    from cottention.engine.sessions.types import SessionCounts

GAUGES = {
    "num_requests_running": ("num_running", "Requests in the running batch."),
    "num_requests_waiting": ("num_waiting", "Requests that wait for slots."),
    "num_requests_paused": ("num_paused", "Requests that wait for their readers."),
    "num_states_paused": ("num_paused_states", "States on the host, for their readers."),
    "max_states_paused": ("max_paused_states", "How many of them there may be."),
    "num_slots": ("num_slots", "States in the pool."),
    "num_free_slots": ("num_free_slots", "States in the pool that nobody uses."),
    "state_pool_bytes": ("pool_bytes", "Memory of the pool, allocated at start."),
    "bytes_per_session": ("bytes_per_slot", "Memory of a state and its spare, whatever the age."),
}
SESSION_GAUGES = {
    "num_sessions_resident": ("num_resident", "Sessions whose turn runs."),
    "num_sessions_parked": ("num_parked", "Sessions that wait in memory."),
    "num_sessions_stored": ("num_stored", "Sessions that are on the disk alone."),
    "sessions_parked_bytes": ("parked_bytes", "Memory of the sessions that wait there."),
    "sessions_stored_bytes": ("stored_bytes", "What all sessions take on the disk."),
    "num_sessions_not_durable": ("num_unsaved", "Sessions ahead of what a full disk took."),
}
COST_GAUGES = {
    "session_bytes": ("items", "item", "What one session takes, by what it holds; at most."),
    "session_bytes_in": ("places", "place", "What one session takes in each place; at most."),
}
CACHE_GAUGES = {"prefix_cache_bytes": ("nbytes", "Memory of states after prompts.")}
CACHE_COUNTERS = {
    "prefix_cache_queries": ("num_queried", "Prompt tokens that may have been read before."),
    "prefix_cache_hits": ("num_hit", "Prompt tokens that were, and were not read again."),
}
COUNTERS = {
    "prompt_tokens": ("num_prompt_tokens", "Prompt tokens read."),
    "generation_tokens": ("num_generated_tokens", "Tokens generated."),
    "engine_steps": ("num_steps", "Steps of the engine."),
    "engine_faults": ("num_faults", "Requests that ended with a fault of the engine."),
    "undrawn_choices": ("num_undrawn", "Choices with all tokens forbidden, or no finite logit."),
}
LINE_GAUGES = {
    "num_prompts_in_line": ("num_requests", "Prompts without their first token."),
    "num_tokens_in_line": ("num_tokens", "Tokens of such prompts."),
}
LINE_COUNTERS = {"requests_refused": ("num_refused", "Requests that a full line refused.")}
HISTOGRAMS = {
    "time_to_first_token_seconds": ("first_token", "From a prompt's arrival to its first token."),
    "inter_token_latency_seconds": ("between_tokens", "Between two tokens of a choice."),
    "request_time_per_output_token_seconds": ("per_token", "Mean of a request, after the first."),
    "e2e_request_latency_seconds": ("whole", "From a prompt's arrival to its last token."),
    "request_queue_time_seconds": ("queue", "From a prompt's arrival to its slots."),
    "request_prefill_time_seconds": ("prefill", "From the slots to the first token."),
    "request_decode_time_seconds": ("decode", "From the first token to the last."),
    "request_prompt_tokens": ("prompt_tokens", "Tokens of a prompt."),
    "request_generation_tokens": ("generated_tokens", "Tokens of all choices of a prompt."),
}


def make_registry(
    bridge: AsyncEngine, sizes: Callable[[], "SessionCounts"], cost: SessionBytes, model_name: str
) -> CollectorRegistry:
    """A registry of the application's own."""
    registry = CollectorRegistry()
    registry.register(EngineCollector(bridge, sizes, cost, model_name))
    ProcessCollector(registry=registry)
    return registry


class EngineCollector(Collector):
    """Reads everything once per scrape, in whatever thread."""

    def __init__(
        self,
        bridge: AsyncEngine,
        sizes: Callable[[], "SessionCounts"],
        cost: SessionBytes,
        model_name: str,
    ) -> None:
        self._bridge = bridge
        self._sizes = sizes
        self._cost = cost
        self._model_name = model_name

    def describe(self) -> list[Metric]:
        """Nothing, so that registering does not read the figures of an engine not yet started."""
        return []

    def collect(self) -> Iterator[Metric]:
        """All families of one moment."""
        bridge = self._bridge
        stats = bridge.stats()
        yield from self._gauges(GAUGES, stats)
        yield from self._gauges(SESSION_GAUGES, self._sizes())
        yield from self._costs()
        yield from self._gauges(CACHE_GAUGES, stats.prefix_cache)
        yield from self._counters(CACHE_COUNTERS, stats.prefix_cache)
        yield from self._counters(COUNTERS, stats)
        yield from self._gauges(LINE_GAUGES, bridge.admission_queue)
        yield from self._counters(LINE_COUNTERS, bridge.admission_queue)
        yield from self._histograms(bridge.latency)
        yield self._finished(stats)

    def _gauges(self, names: Mapping[str, tuple[str, str]], figures: Any) -> Iterator[Metric]:
        for name, (attribute, text) in names.items():
            gauge = GaugeMetricFamily(f"cottention:{name}", text, labels=["model_name"])
            gauge.add_metric([self._model_name], getattr(figures, attribute))
            yield gauge

    def _costs(self) -> Iterator[Metric]:
        for name, (attribute, label, text) in COST_GAUGES.items():
            gauge = GaugeMetricFamily(f"cottention:{name}", text, labels=["model_name", label])
            for each, nbytes in getattr(self._cost, attribute).items():
                gauge.add_metric([self._model_name, each], nbytes)
            yield gauge
        per_gb = GaugeMetricFamily(
            "cottention:sessions_per_gb",
            "How many fit into a billion bytes of each place, at least.",
            labels=["model_name", "place"],
        )
        for place, num in self._cost.per_gb().items():
            per_gb.add_metric([self._model_name, place], num)
        yield per_gb

    def _counters(self, names: Mapping[str, tuple[str, str]], figures: Any) -> Iterator[Metric]:
        for name, (attribute, text) in names.items():
            counter = CounterMetricFamily(f"cottention:{name}", text, labels=["model_name"])
            counter.add_metric([self._model_name], getattr(figures, attribute))
            yield counter

    def _histograms(self, timings: LatencyStats) -> Iterator[Metric]:
        for name, (attribute, text) in HISTOGRAMS.items():
            histogram: Histogram = getattr(timings, attribute)
            family = HistogramMetricFamily(f"cottention:{name}", text, labels=["model_name"])
            family.add_metric([self._model_name], histogram.buckets(), histogram.total)
            yield family

    def _finished(self, stats: EngineStats) -> Metric:
        labels = ["model_name", "finished_reason"]
        family = CounterMetricFamily(
            "cottention:request_success", "Choices that ended, by how they did.", labels=labels
        )
        for reason in FinishReason:
            family.add_metric([self._model_name, reason], stats.num_finished.get(reason, 0))
        return family
