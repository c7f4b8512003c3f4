"""What a step costs on the host: 512 streams and a model that costs nothing.

A graph of the decode step is stood in for by the tensors of its first run, so that what is left is
the engine's own work: scheduling, the inputs of a step, random numbers, and telling each stream its
token. On a GPU that work is beside the step, and has to be shorter than it. One thread, one core.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from benchmarks.common import Report, run, show
from cottention.engine import Engine, EngineConfig, SamplingParams
from cottention.engine.execution.cuda_graphs import CapturedDecode
from cottention.engine.models.recurrence import Recurrence

T = TypeVar("T")

STREAMS = (1, 64, 512)
GREEDY: dict[str, Any] = {"temperature": 0}
KINDS: dict[str, list[dict[str, Any]]] = {
    "greedy": [GREEDY],
    "temperature 1": [{}],
    "top_p 0.9": [{"top_p": 0.9}],
    "greedy, by chance, top_p": [GREEDY, {}, {"top_p": 0.9, "top_k": 50}],
    "by chance, one with a penalty": [{}] * 511 + [{"repetition_penalty": 1.1}],
}
"""Parameters that the streams have in turn."""

WARM_STEPS = 8


def measure(quick: bool) -> Report:
    """Microseconds of a step for each token, by the number of streams and their parameters."""
    torch.set_num_threads(1)
    num_steps = 30 if quick else 200
    rows = [_row(kind, streams, num_steps) for kind in KINDS for streams in STREAMS]
    show("The engine's own work in a decode step, with a model that costs nothing", rows)
    return {"host_loop": rows}


def _row(kind: str, streams: int, num_steps: int) -> dict[str, object]:
    engine = _engine(streams)
    for stream in range(streams):
        params = KINDS[kind][-1 - stream % len(KINDS[kind])]
        more = {"seed": stream, "max_tokens": 100_000, "ignore_eos": True, **params}
        engine.submit([1 + stream, 2, 3], SamplingParams(**more))
    while engine.num_to_prefill or (engine.has_work() and not engine.stats().num_generated_tokens):
        engine.step()
    for _ in range(WARM_STEPS):
        engine.step()
    steps = [_step(engine) for _ in range(num_steps)]
    return {
        "parameters": kind,
        "streams": streams,
        "ms/step": 1e3 * statistics.median(took for took, _ in steps),
        "us/token": 1e6 * statistics.median(took / num for took, num in steps),
    }


def _step(engine: Engine) -> tuple[float, int]:
    """Seconds of a step and how many tokens it gave: some streams may sit a step out."""
    start = time.perf_counter()
    outputs = engine.step()
    return time.perf_counter() - start, max(1, len(outputs))


class Free:
    """A model whose logits are the same in every step."""

    def __init__(self, vocab_size: int) -> None:
        self._logits = torch.zeros(1, vocab_size)
        self._logits[:, 1000] = 1.0

    def hidden(self, ids: Tensor, _positions: Tensor, _recurrence: Recurrence) -> Tensor:
        """No hidden states: [N, 0]."""
        return torch.empty(len(ids), 0)

    def logits(self, hidden: Tensor) -> Tensor:
        """Equal rows: [R, N]."""
        return self._logits.expand(len(hidden), -1).contiguous()


def captured_once(function: Callable[[], T]) -> Callable[[], T]:
    """Stands for a capture: what the function returned once is returned again."""
    outputs = function()
    return lambda: outputs


def _engine(streams: int) -> Engine:
    engine = Engine(config=EngineConfig(max_slots=streams, device="cpu", context_policy="exact"))
    runner = engine._runner
    runner._model = Free(engine.model_config.vocab_size)
    runner._captured = CapturedDecode(
        runner._decode, runner._sampler, engine.pool.num_rows, "cpu", captured_once
    )
    return engine


if __name__ == "__main__":
    run(__doc__, measure)
