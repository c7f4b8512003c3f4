"""Decode of whole models with random weights, compared with memory bandwidth and softmax attention.

The floor is the time to read all weights once and to read and write the states of the batch, at the
best bandwidth measured during the run: bandwidth varies, and a low reading would give a floor that
a step can go below. The baseline is the GPT-J of `transformers` with its KV cache, dynamic and
static, if that is installed.

On a GPU steps run as captured graphs, and a second table has steps that read a prompt beside 63
streams, which are not captured, by the longest piece of it that is stepped token by token.
"""

import itertools
import statistics
from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec

import torch

from benchmarks import softmax
from benchmarks.common import Report, run_on_device, show
from benchmarks.devices import Cpu, Device, Work, seconds, speed
from benchmarks.shapes import SHAPES, random_model
from cottention.engine import ops
from cottention.engine.models.gptj.config import GPTJConfig
from cottention.engine.models.gptj.inference import ServedGPTJ
from cottention.engine.models.recurrence import Features, Recurrence
from cottention.engine.ops import reference
from cottention.engine.state.pool import StatePool

BATCHES = {"cpu": (1, 8, 64), "cuda": (1, 8, 64, 512)}
TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TOLERANCES = {"float32": 1e-4, "bfloat16": 0.05}
BESIDE = 63
PROMPTS = (32, 128, 512)
PIECES = (32, 64, 128, 512)
CHECKED_STREAMS, CHECKED_STEPS = 3, 12
PEERS = ((1, 1024), (8, 1024), (1, 8192), (8, 8192))
"""Batch size and context length of the softmax model."""

Rows = list[dict[str, object]]


class Memory:
    """The highest bandwidths, in bytes per second, of all readings so far."""

    def __init__(self, device: Device, at_least: float) -> None:
        self._device = device
        self._at_least = at_least
        self._moved = device.stream(torch.ones(2**27, device=device.name))
        self.read = self.stream = 0.0

    def take(self) -> None:
        """Take one more reading."""
        self.read = max(self.read, self._device.read_speed(self._at_least))
        streamed = speed(self._device, self._moved, at_least=self._at_least)
        self.stream = max(self.stream, streamed)

    def floor(self, weight_bytes: int, moved_bytes: int) -> float:
        """Seconds to read the weights and to read and write the states."""
        return weight_bytes / self.read + moved_bytes / self.stream


class Decoder:
    """A model and its state pool, for up to `batch` streams."""

    def __init__(self, config: GPTJConfig, dtype: torch.dtype, batch: int, device: Device) -> None:
        model = random_model(config, dtype)
        self.weight_bytes = sum(x.nbytes for x in model.parameters()) - _unread(model)
        self.state_bytes = config.state_spec().bytes_per_slot
        self._model = ServedGPTJ(model, device.name)
        self._pool = StatePool(config.state_spec(), batch, device.name)
        self._device = device

    def streams(self, batch: int) -> Work:
        """A step of the first `batch` slots, as the engine repeats it."""
        return self._device.repeatable(Streams(self._model, self._pool, batch, self._device.name))


class Streams:
    """Each call is one greedy step of all streams. `ids`: what they are fed next, int64 [batch]."""

    def __init__(
        self, model: ServedGPTJ, pool: StatePool, batch: int, device: str, position: int = 1000
    ) -> None:
        self._model = model
        self._pool = pool
        self._first = position
        self.ids = torch.arange(batch, device=device)
        self._positions = torch.full((batch,), position, device=device)
        slots = torch.arange(batch, dtype=torch.int32, device=device)
        self._recurrence = Recurrence(pool.tensors, ops.Segments(slots))

    @torch.inference_mode()
    def __call__(self) -> torch.Tensor:
        """Logits of the step."""
        hidden = self._model.hidden(self.ids, self._positions, self._recurrence)
        logits = self._model.logits(hidden)
        self.ids.copy_(logits.argmax(-1))
        self._positions += 1
        return logits

    @torch.inference_mode()
    def begin_again(self) -> None:
        """As new: capturing a step has run it."""
        self.ids.copy_(torch.arange(len(self.ids)))
        self._positions.fill_(self._first)
        for row in range(len(self.ids)):
            self._pool.clear(row)


def measure(quick: bool, device: Device | None = None) -> Report:
    """Tables of decode and of the baseline; all times are medians of steps."""
    device = device or Cpu()
    check(device)
    at_least = 1.0 if quick else 6.0
    memory = Memory(device, at_least / 8)
    cases = [(name, kind) for name in ("300M", "1.2B") for kind in TYPES]
    rows = [
        row
        for name, kind in cases[: 2 if quick else 4]
        for row in _decode(device, name, kind, memory, at_least)
    ]
    show("Decode, random weights, one token per stream and step", rows)
    mixed = _mixed(device, at_least) if device.name == "cuda" else []
    if mixed:
        show(f"A prompt beside {BESIDE} streams, 300M in bfloat16, not captured", mixed)
    smaller = [row for row in rows if row["shape"] == "300M"]
    peers = _peers(device, smaller, at_least, PEERS[:2] if quick else PEERS)
    if peers:
        show("transformers GPT-J (softmax), 300M shape, float32", peers)
    summary = [_many_and_one(smaller)]
    show("64 streams in bfloat16 compared with 1 in float32, 300M", summary)
    speeds = {"read": 1e-9 * memory.read, "stream": 1e-9 * memory.stream}
    show("Memory bandwidth, best reading, GB/s", [speeds])
    return {"decode": rows, "mixed": mixed, "softmax": peers, "many": summary, **speeds}


def check(device: Device) -> None:
    """Exit if the logits of what is timed differ from float64: a model of two layers."""
    config = GPTJConfig(640, 1024, 2, 16, 64, rotary_dim=64, n_inner=3072)
    for kind, dtype in TYPES.items():
        ids, logits = _stepped(config, dtype, device)
        model = random_model(config, dtype).double()
        for stream in range(CHECKED_STREAMS):
            with torch.inference_mode():
                expected = model(ids[:, stream], torch.arange(CHECKED_STEPS), _attend)
            error = float((logits[:, stream] - expected).abs().max() / expected.std())
            if not error <= TOLERANCES[kind]:
                raise SystemExit(f"{kind} has a relative error of {error:.1e}: nothing is reported")


def _stepped(
    config: GPTJConfig, dtype: torch.dtype, device: Device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids [T, B] that streams from position 0 are fed, and the logits [T, B, N] of their steps."""
    served = ServedGPTJ(random_model(config, dtype), device.name)
    pool = StatePool(config.state_spec(), CHECKED_STREAMS, device.name)
    streams = Streams(served, pool, CHECKED_STREAMS, device.name, position=0)
    step = device.repeatable(streams)
    streams.begin_again()
    ids, logits = [], []
    for _ in range(CHECKED_STEPS):
        ids.append(streams.ids.cpu().clone())
        found = step()
        assert isinstance(found, torch.Tensor)
        logits.append(found.cpu().clone())
    return torch.stack(ids), torch.stack(logits)


def _attend(_: int, features: Features) -> torch.Tensor:
    return reference.parallel(*(x.transpose(0, 1) for x in features[:3])).transpose(0, 1)


def _unread(model: torch.nn.Module) -> int:
    """Bytes of the embedding table, of which a step reads only one row per stream."""
    return sum(x.nbytes for name, x in model.named_parameters() if "wte" in name)


def _decode(device: Device, name: str, kind: str, memory: Memory, at_least: float) -> Rows:
    """One row per batch size; bandwidth is measured before the first and after each."""
    batches = BATCHES[device.name]
    decoder = Decoder(SHAPES[name], TYPES[kind], max(batches), device)
    took: dict[int, float] = {}
    kernels: dict[int, dict[str, object]] = {}
    memory.take()
    for batch in batches:
        step = decoder.streams(batch)
        took[batch] = statistics.median(seconds(device, step, at_least=at_least))
        num_kernels = device.num_kernels(step)
        kernels[batch] = {} if num_kernels is None else {"kernels": num_kernels}
        memory.take()
    shape = {"shape": name, "weights": kind}
    return [
        shape | _with_floor(decoder, batch, took[batch], memory) | kernels[batch]
        for batch in batches
    ]


def _mixed(device: Device, at_least: float) -> Rows:
    """Steps of `BESIDE` streams and one prompt, by the tokens of a piece."""
    config, name = SHAPES["300M"], device.name
    model = ServedGPTJ(random_model(config, torch.bfloat16), name)
    pool = StatePool(config.state_spec(), BESIDE + 1, name)
    form = ops.segment_form(name, config.head_dim, config.head_dim)
    rows: Rows = []
    for prompt, piece in itertools.product(PROMPTS, PIECES):
        lengths = [1] * BESIDE + [prompt]
        segments = ops.Segments.of(
            range(BESIDE + 1), lengths, pool.num_rows, name, form=form, piece_tokens=piece
        )
        step = partial(
            model.hidden,
            torch.zeros(sum(lengths), dtype=torch.int64, device=name),
            torch.full((sum(lengths),), 100, device=name),
            Recurrence(pool.tensors, segments),
        )
        with torch.inference_mode():
            took = statistics.median(seconds(device, step, at_least=at_least / 20))
            num_kernels = device.num_kernels(step)
        rows.append(
            {"prompt": prompt, "piece": piece, "ms/step": 1e3 * took, "kernels": num_kernels}
        )
    return rows


def _with_floor(decoder: Decoder, batch: int, took: float, memory: Memory) -> dict[str, object]:
    moved = 2 * batch * decoder.state_bytes
    floor = memory.floor(decoder.weight_bytes, moved)
    return {
        "batch": batch,
        "ms/step": 1e3 * took,
        "tokens/s": batch / took,
        "GB/step": 1e-9 * (decoder.weight_bytes + moved),
        "floor ms": 1e3 * floor,
        "floor / step": floor / took,
    }


def _peers(device: Device, rows: Rows, at_least: float, cases: Sequence[tuple[int, int]]) -> Rows:
    """Steps of the softmax model, and the ratio of their time to ours in float32."""
    if device.name != "cpu" or find_spec("transformers") is None:
        return []
    ours = {row["batch"]: row["ms/step"] for row in rows if row["weights"] == "float32"}
    model = softmax.build(SHAPES["300M"], max(context for _, context in cases))
    peers: Rows = []
    for (batch, context), kind in itertools.product(cases, softmax.CACHES):
        stream = softmax.Stream(model, kind, batch, context)
        took = 1e3 * statistics.median(seconds(device, stream, at_least=at_least / 3, most=10))
        peer = {"cache": kind, "batch": batch, "context": context, "ms/step": took}
        peers.append(peer | {"ours ms/step": ours[batch], "peer / ours": took / ours[batch]})
        del stream  # frees its cache before the next is allocated
    return peers


def _many_and_one(rows: Rows) -> dict[str, object]:
    speed = {(row["weights"], row["batch"]): row["tokens/s"] for row in rows}
    many, one = speed["bfloat16", 64], speed["float32", 1]
    return {"64 in bfloat16, tokens/s": many, "1 in float32, tokens/s": one, "ratio": many / one}


if __name__ == "__main__":
    run_on_device(__doc__, measure)
