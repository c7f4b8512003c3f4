"""The engine's figures for Prometheus, under vLLM's names where they mean the same.

Owns names and help texts. Figures are taken when they are asked for; nothing is counted here.
"""

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from engine.outputs import EngineStats, FinishReason

GAUGES = {
    "num_requests_running": ("num_running", "Requests in the running batch."),
    "num_requests_waiting": ("num_waiting", "Requests that wait for slots."),
    "num_slots": ("num_slots", "States in the pool."),
    "num_free_slots": ("num_free_slots", "States in the pool that nobody uses."),
    "state_pool_bytes": ("pool_bytes", "Memory of the pool, allocated at start."),
    "bytes_per_session": ("bytes_per_slot", "Memory of one state, whatever its age."),
}
COUNTERS = {
    "prompt_tokens": ("num_prompt_tokens", "Prompt tokens read."),
    "generation_tokens": ("num_generated_tokens", "Tokens generated."),
    "engine_steps": ("num_steps", "Steps of the engine."),
}


def make_registry(stats: Callable[[], EngineStats], model_name: str) -> CollectorRegistry:
    """A registry of the application's own."""
    registry = CollectorRegistry()
    registry.register(EngineCollector(stats, model_name))
    ProcessCollector(registry=registry)
    return registry


class EngineCollector(Collector):
    """Reads `stats` once per scrape."""

    def __init__(self, stats: Callable[[], EngineStats], model_name: str) -> None:
        self._stats = stats
        self._model_name = model_name

    def describe(self) -> list[Metric]:
        """Nothing, so that registering does not read the figures of an engine not yet started."""
        return []

    def collect(self) -> Iterator[Metric]:
        """All families of one moment."""
        stats = self._stats()
        for name, (attribute, text) in GAUGES.items():
            gauge = GaugeMetricFamily(f"cottention:{name}", text, labels=["model_name"])
            gauge.add_metric([self._model_name], getattr(stats, attribute))
            yield gauge
        for name, (attribute, text) in COUNTERS.items():
            counter = CounterMetricFamily(f"cottention:{name}", text, labels=["model_name"])
            counter.add_metric([self._model_name], getattr(stats, attribute))
            yield counter
        yield self._finished(stats)

    def _finished(self, stats: EngineStats) -> Metric:
        labels = ["model_name", "finished_reason"]
        family = CounterMetricFamily(
            "cottention:request_success", "Choices that ended, by how they did.", labels=labels
        )
        for reason in FinishReason:
            family.add_metric([self._model_name, reason], stats.num_finished.get(reason, 0))
        return family
