"""Prometheus metrics, under vLLM's names where they mean the same, with the prefix `cottention:`.

Names and help texts are here; the histograms' buckets are in `generation/latency.py`. Values are
read when /metrics is.
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
from cottention.engine.sessions.store.protocol import KeyLedger
from cottention.server.generation.async_engine import AsyncEngine
from cottention.server.generation.latency import Histogram, LatencyStats

if TYPE_CHECKING:  # importing it at run time would load torch
    from cottention.engine.sessions.types import SessionCounts

# In these tables: a metric's name, the attribute with its value, a label if it has one, its help.

GAUGES = {
    "num_requests_running": ("num_running", "Requests in the running batch."),
    "num_requests_waiting": ("num_waiting", "Requests waiting for slots."),
    "num_requests_paused": (
        "num_paused",
        "Requests paused until their clients have read what was sent.",
    ),
    "num_states_paused": ("num_paused_states", "States of paused requests in host memory."),
    "num_states_preempted": (
        "num_preempted_states",
        "States in host memory of requests whose slots are another key's for a time.",
    ),
    "max_states_paused": ("max_paused_states", "Limit of num_states_paused."),
    "num_slots": ("num_slots", "Slots in the state pool."),
    "num_free_slots": ("num_free_slots", "Unused slots in the state pool."),
    "state_pool_bytes": ("pool_bytes", "Memory of the state pool, allocated at start-up."),
    "bytes_per_slot": (
        "bytes_per_slot",
        "Memory of one slot: a state and its spare for renewal, at any length of the session.",
    ),
}
SESSION_GAUGES = {
    "num_sessions_resident": ("num_resident", "Sessions with a running turn."),
    "num_sessions_parked": ("num_parked", "Idle sessions in host memory."),
    "num_sessions_stored": ("num_stored", "Idle sessions that are only on disk."),
    "sessions_parked_bytes": ("parked_bytes", "Host memory of idle sessions."),
    "sessions_stored_bytes": ("stored_bytes", "Disk space of all sessions."),
    "num_sessions_not_durable": (
        "num_unsaved",
        "Sessions whose last turns are only in memory because the disk was full.",
    ),
}
SESSION_SIZE_GAUGES = {
    "session_bytes": ("items", "item", "Maximum size of one session, by what it consists of."),
    "session_bytes_by_place": ("places", "place", "Maximum size of one session in each place."),
}
CACHE_GAUGES = {"prefix_cache_bytes": ("nbytes", "Memory of the prefix cache.")}
CACHE_COUNTERS = {
    "prefix_cache_queries": ("num_queried", "Prompt tokens looked up in the prefix cache."),
    "prefix_cache_hits": ("num_hit", "Prompt tokens found in the prefix cache."),
}
COUNTERS = {
    "prompt_tokens": ("num_prompt_tokens", "Prompt tokens processed."),
    "generation_tokens": ("num_generated_tokens", "Tokens generated."),
    "num_preemptions": (
        "num_preemptions",
        "Times that a request gave its slots to another key's.",
    ),
    "engine_steps": ("num_steps", "Steps of the engine."),
    "engine_faults": ("num_faults", "Requests that an error in the engine ended."),
    "sampling_failures": (
        "num_undrawn",
        "Choices ended because every token was masked or no logit was finite.",
    ),
}
QUEUE_GAUGES = {
    "num_requests_queued": ("num_requests", "Prompts that have no token yet."),
    "num_tokens_queued": ("num_tokens", "Tokens of the prompts that have no token yet."),
}
QUEUE_COUNTERS = {
    "requests_refused": ("num_refused", "Requests answered with 429 because the queue was full."),
}
HISTOGRAMS = {
    "time_to_first_token_seconds": (
        "first_token",
        "Time from a prompt's arrival to its first token.",
    ),
    "inter_token_latency_seconds": ("between_tokens", "Time between two tokens of a choice."),
    "request_time_per_output_token_seconds": (
        "per_token",
        "Mean time between the tokens of a request.",
    ),
    "e2e_request_latency_seconds": ("whole", "Time from a prompt's arrival to its last token."),
    "request_queue_time_seconds": ("queue", "Time from a prompt's arrival to its slots."),
    "request_prefill_time_seconds": ("prefill", "Time from the slots to the first token."),
    "request_decode_time_seconds": ("decode", "Time from the first token to the last."),
    "request_prompt_tokens": ("prompt_tokens", "Tokens of a prompt."),
    "request_generation_tokens": ("generated_tokens", "Tokens of all choices of a prompt."),
}


def make_registry(
    async_engine: AsyncEngine,
    session_counts: Callable[[], "SessionCounts"] | None,
    session_size: SessionBytes | None,
    model_name: str,
    ledger: KeyLedger | None = None,
) -> CollectorRegistry:
    """A registry for one application, with the metrics of its engine and of the process.

    session_counts, session_size: None where there are no sessions. ledger: of the servers that
    share them.
    """
    registry = CollectorRegistry()
    registry.register(
        EngineCollector(async_engine, session_counts, session_size, model_name, ledger)
    )
    ProcessCollector(registry=registry)
    return registry


class EngineCollector(Collector):
    """The metrics of an engine and its sessions; may be scraped in any thread."""

    def __init__(
        self,
        async_engine: AsyncEngine,
        session_counts: Callable[[], "SessionCounts"] | None,
        session_size: SessionBytes | None,
        model_name: str,
        ledger: KeyLedger | None,
    ) -> None:
        """session_size: of one session at most, by item and by place. None: no sessions."""
        self._async_engine = async_engine
        self._session_counts = session_counts
        self._session_size = session_size
        self._model_name = model_name
        self._ledger = ledger

    def describe(self) -> list[Metric]:
        """Nothing: registering must not read the values of an engine that has not started."""
        return []

    def collect(self) -> Iterator[Metric]:
        """All metrics, with one reading of the engine's counts."""
        engine = self._async_engine
        stats = engine.stats()
        yield from self._gauges(GAUGES, stats)
        if self._session_counts is not None:
            yield from self._gauges(SESSION_GAUGES, self._session_counts())
        if self._session_size is not None:
            yield from self._session_sizes(self._session_size)
        yield self._store_reachable()
        yield from self._gauges(CACHE_GAUGES, stats.prefix_cache)
        yield from self._counters(CACHE_COUNTERS, stats.prefix_cache)
        yield from self._counters(COUNTERS, stats)
        yield from self._gauges(QUEUE_GAUGES, engine.admission_queue)
        yield from self._counters(QUEUE_COUNTERS, engine.admission_queue)
        yield from self._histograms(engine.latency)
        yield self._finished(stats)

    def _gauges(self, table: Mapping[str, tuple[str, str]], values: Any) -> Iterator[Metric]:
        for name, (attribute, text) in table.items():
            gauge = GaugeMetricFamily(f"cottention:{name}", text, labels=["model_name"])
            gauge.add_metric([self._model_name], getattr(values, attribute))
            yield gauge

    def _store_reachable(self) -> Metric:
        gauge = GaugeMetricFamily(
            "cottention:store_reachable",
            "Whether the database of sessions hears from this server; 1 without a database.",
            labels=["model_name", "replica"],
        )
        ledger = self._ledger
        name, value = ("", 1) if ledger is None else (ledger.replica, int(ledger.is_alive))
        gauge.add_metric([self._model_name, name], value)
        return gauge

    def _session_sizes(self, sizes: SessionBytes) -> Iterator[Metric]:
        for name, (attribute, label, text) in SESSION_SIZE_GAUGES.items():
            gauge = GaugeMetricFamily(f"cottention:{name}", text, labels=["model_name", label])
            for each, nbytes in getattr(sizes, attribute).items():
                gauge.add_metric([self._model_name, each], nbytes)
            yield gauge
        per_gb = GaugeMetricFamily(
            "cottention:sessions_per_gb",
            "Minimum number of sessions that fit into 1 GB (10^9 bytes) of each place.",
            labels=["model_name", "place"],
        )
        for place, num in sizes.per_gb().items():
            per_gb.add_metric([self._model_name, place], num)
        yield per_gb

    def _counters(self, table: Mapping[str, tuple[str, str]], values: Any) -> Iterator[Metric]:
        for name, (attribute, text) in table.items():
            counter = CounterMetricFamily(f"cottention:{name}", text, labels=["model_name"])
            counter.add_metric([self._model_name], getattr(values, attribute))
            yield counter

    def _histograms(self, latencies: LatencyStats) -> Iterator[Metric]:
        for name, (attribute, text) in HISTOGRAMS.items():
            histogram: Histogram = getattr(latencies, attribute)
            family = HistogramMetricFamily(f"cottention:{name}", text, labels=["model_name"])
            family.add_metric([self._model_name], histogram.buckets(), histogram.total)
            yield family

    def _finished(self, stats: EngineStats) -> Metric:
        labels = ["model_name", "finished_reason"]
        family = CounterMetricFamily(
            "cottention:request_success", "Finished choices, by finish reason.", labels=labels
        )
        for reason in FinishReason:
            family.add_metric([self._model_name, reason], stats.num_finished.get(reason, 0))
        return family
