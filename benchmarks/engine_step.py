"""A whole step of the engine beside the work of the GPU in it: 300M, random weights, bfloat16.

The GPU's time is that of the captured graph alone, replayed. What a step takes beyond it is the
host's: scheduling, inputs, copies and outputs, as far as they are not hidden behind the next graph.
Runs on a GPU only; `host_loop.py` measures the host's part without one.
"""

import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from benchmarks.common import Report, run_on_device, show
from benchmarks.devices import Device, seconds
from benchmarks.shapes import SHAPES, random_model
from cottention.engine import Engine, EngineConfig, SamplingParams
from cottention.engine.execution.cuda_graphs import DecodeRows
from cottention.engine.models.model_folder import DEFAULT_MODEL
from cottention.engine.sampling.topk_topp import SamplingRow
from cottention.engine.training.export import config_json

SHAPE = "300M"
STREAMS = (1, 64, 512)
KINDS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "temperature 1": {},
    "top_p 0.9": {"top_p": 0.9},
}


def measure(quick: bool, device: Device) -> Report:
    """Milliseconds of a step and of its graph, by parameters and number of streams."""
    if device.name == "cpu":
        raise SystemExit("this benchmark is of a GPU: give --device cuda")
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder))
        slots = max(STREAMS)
        config = EngineConfig(max_slots=slots, max_batch_tokens=2 * slots, device="cuda")
        engine = Engine(folder, config)
    reserved = torch.cuda.memory_reserved()
    rows = [
        _row(engine, device, kind, streams, 20 if quick else 100)
        for kind in KINDS
        for streams in STREAMS
    ]
    show(f"A step of the engine and the GPU's part of it, {SHAPE}, bfloat16", rows)
    return {"engine_step": rows, "reserved_bytes": reserved}


def write_model(folder: Path) -> None:
    """A folder of random weights, with the tokenizer that ships."""
    config = SHAPES[SHAPE]
    weights = random_model(config, torch.bfloat16).state_dict()
    save_file(
        {name: weight.contiguous() for name, weight in weights.items()},
        folder / "model.safetensors",
    )
    (folder / "config.json").write_text(json.dumps(config_json(config, "bfloat16", 0)))
    shutil.copy(DEFAULT_MODEL / "tokenizer.json", folder)


def _row(
    engine: Engine, device: Device, kind: str, streams: int, num_steps: int
) -> dict[str, object]:
    params = SamplingParams(
        **{"max_tokens": 100_000, "ignore_eos": True, "seed": 1, "n": streams, **KINDS[kind]}
    )
    name = engine.submit([1, 2, 3], params)
    for _ in range(5):
        engine.step()
    times = []
    for _ in range(num_steps):
        start = time.perf_counter()
        outputs = engine.step()
        times.append(time.perf_counter() - start)
        assert len(outputs) == streams, "a stream sat out"
    engine.cancel(name)
    while engine.has_work():
        engine.step()
    step, graph = statistics.median(times), _graph_seconds(engine, device, params, streams)
    return {
        "parameters": kind,
        "streams": streams,
        "ms/step": 1e3 * step,
        "graph ms": 1e3 * graph,
        "step / graph": step / graph,
        "tokens/s": streams / step,
    }


def _graph_seconds(engine: Engine, device: Device, params: SamplingParams, streams: int) -> float:
    """Seconds of the graph that decodes so many streams; the rows are free."""
    captured = engine._runner._captured
    assert captured is not None, "nothing is captured"
    row = SamplingRow.of(params, 0.5)
    rows = DecodeRows([1] * streams, [5] * streams, range(streams))
    with torch.inference_mode():
        captured.run(rows, np.array([row] * streams), row.mode).token_ids.tolist()
        graphs = captured.graphs(row.mode)
        return statistics.median(seconds(device, graphs.replay_of(streams), at_least=0.2))


if __name__ == "__main__":
    run_on_device(__doc__, measure)
