"""Decode steps of a whole engine: sampling and the host's work included, beside the model alone.

Streams decode in an engine with random weights, in bfloat16 and in 512 slots where the device is a
GPU. The model alone is what the engine's step computes on the device, as it repeats it. Times are
medians.
"""

import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks.common import Report, run_on_device, show
from benchmarks.devices import Cpu, Device, seconds
from benchmarks.shapes import SHAPES, random_model
from cottention.engine import Engine, EngineConfig, SamplingParams
from cottention.engine.models.gptj.config import GPTJConfig
from cottention.engine.models.model_folder import DEFAULT_MODEL

SHAPE_OF = {"cpu": "default", "cuda": "300M"}
STREAMS = {"cpu": (1, 64), "cuda": (1, 64, 512)}
KINDS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "by chance": {},
    "top_p 0.9": {"top_p": 0.9},
}
WARM_STEPS = 8


def measure(quick: bool, device: Device | None = None) -> Report:
    """One row for each number of streams and way of sampling."""
    device = device or Cpu()
    with tempfile.TemporaryDirectory(prefix="cottention-bench-") as name:
        folder = _random_folder(Path(name), SHAPES[SHAPE_OF[device.name]])
        engine = Engine(
            folder,
            EngineConfig(
                device=device.name,  # type: ignore[arg-type]  # one of those of EngineConfig
                dtype="bfloat16" if device.name == "cuda" else "float32",
                max_slots=max(STREAMS[device.name]),
                context_policy="exact",
            ),
        )
        rows = [
            _row(device, engine, kind, streams, 40 if quick else 200)
            for streams in STREAMS[device.name]
            for kind in KINDS
        ]
        engine.close()
    show(f"Steps of an engine, {SHAPE_OF[device.name]}, random weights", rows)
    return {"engine_steps": rows, "memory_gb": _memory(device)}


def _random_folder(folder: Path, config: GPTJConfig) -> Path:
    """A model folder of this shape, with the tokenizer of the shipped model."""
    shipped = DEFAULT_MODEL
    for file in shipped.glob("*token*.json"):
        shutil.copy(file, folder)
    stated = json.loads((shipped / "config.json").read_text(encoding="utf-8"))
    for name in stated:
        if hasattr(config, name):
            stated[name] = getattr(config, name)
    stated["torch_dtype"] = "bfloat16"
    (folder / "config.json").write_text(json.dumps(stated, default=list), encoding="utf-8")
    model = random_model(config, torch.bfloat16)
    weights = {name: x.contiguous() for name, x in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors")
    return folder


def _row(
    device: Device, engine: Engine, kind: str, streams: int, num_steps: int
) -> dict[str, object]:
    names = [
        engine.submit(
            [1 + stream % 4000, 2, 3],
            SamplingParams(seed=stream, max_tokens=100_000, ignore_eos=True, **KINDS[kind]),
        )
        for stream in range(streams)
    ]
    told = 0
    while engine.num_to_prefill or told < streams:
        told = len(engine.step())
    for _ in range(WARM_STEPS):
        engine.step()
    times = []
    for _ in range(num_steps):
        start = time.perf_counter()
        engine.step()
        times.append(time.perf_counter() - start)
    for name in names:
        engine.cancel(name)
    while engine.has_work():
        engine.step()
    took, alone = statistics.median(times), _alone(device, engine, streams)
    return {
        "streams": streams,
        "sampling": kind,
        "ms/step": 1e3 * took,
        "tokens/s": streams / took,
        "model alone ms": 1e3 * alone,
        "step / model": took / alone,
    }


@torch.inference_mode()
def _alone(device: Device, engine: Engine, streams: int) -> float:
    """Seconds of the model's step for as many streams, on states that nobody uses."""
    ids = torch.ones(streams, dtype=torch.int64, device=device.name)
    positions = torch.full((streams,), 1000, device=device.name)
    slots = torch.arange(streams, dtype=torch.int32, device=device.name)
    step = device.repeatable(lambda: engine._runner._decode(ids, positions, slots))
    return statistics.median(seconds(device, step, at_least=0.3))


def _memory(device: Device) -> dict[str, float]:
    """Of torch on a GPU."""
    if device.name != "cuda":
        return {}
    return {
        "allocated": 1e-9 * torch.cuda.max_memory_allocated(),
        "reserved": 1e-9 * torch.cuda.memory_reserved(),
    }


if __name__ == "__main__":
    run_on_device(__doc__, measure)
