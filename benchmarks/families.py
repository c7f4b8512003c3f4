"""Decode of recurrent families beside the libraries that people run them with, and their memory.

Random weights in the shapes of Mamba-2 370M and RWKV-7 0.4B, float32, one token per stream and
step. Each side is a process of its own with as many threads, which wait in the same way, and they
decode in short turns, so that other load affects all alike; a turn's first step is not measured.
Before, they must agree on the logits of a prompt. A library that is not installed is left out:
`transformers`, `rwkv`, and llama.cpp (`llama_cpp` and `gguf`), with the same weights in float32.
Memory is that of one stream, from token 1,000 on: of two layers of the same widths to token 50,000,
and of the whole model to token 5,000.

With --one-thread each side has one thread and is timed in that thread's processor time: on a
machine that does other work, two threads wait for each other longer than they compute.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import psutil
import torch

from benchmarks import family_models, family_sides
from benchmarks.common import Report, machine, parser, show, write_json
from cottention.engine.models.registry import read_config
from cottention.engine.state.pool import StatePool

BATCHES = (1, 8)
FIRST = 1_000
LAST = {2: 50_000, None: 5_000}
"""Tokens by the number of layers; None: all."""
STEPS = 3
"""Measured in a turn."""

TOLERANCE = 1e-2
"""Of the logits' difference, in standard deviations: the rwkv package rounds a constant."""

INSTALL_BENCH = "pip install '.[bench]'"
INSTALL = {"llama_cpp": "pip install llama-cpp-python==0.3.36 gguf, which compiles for long"}

Rows = list[dict[str, object]]


class Family(NamedTuple):
    """What is compared: files of some layers and ids, and the packages that also run them."""

    name: str
    file_name: str
    make: Callable[..., Path]
    peers: tuple[str, ...]


FAMILIES = (
    Family("Mamba-2 370M", "mamba2", family_models.mamba2, ("transformers", "llama_cpp")),
    Family("RWKV-7 0.4B", "rwkv7.pth", family_models.rwkv7, ("rwkv", "llama_cpp")),
)


class Side:
    """A process of benchmarks/family_sides.py, or of another module that answers as it does."""

    def __init__(self, *arguments: object, module: str = "benchmarks.family_sides") -> None:
        self._name = " ".join(map(str, arguments[:2]))
        command = [sys.executable, "-m", module, *map(str, arguments)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.kill()
        self._process.wait()

    def ask(self, **command: object) -> list[float]:
        """The answer to one command."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(command), file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        if not answer:
            raise SystemExit(f"the process of {self._name} ended; its error is above")
        numbers: list[float] = json.loads(answer)
        return numbers


def main() -> None:
    """Parse, measure, write JSON."""
    options = parser(__doc__)
    options.add_argument("--one-thread", action="store_true", help="in processor time")
    arguments = options.parse_args()
    figures = measure(arguments.quick, one_thread=arguments.one_thread)
    if arguments.json:
        write_json(arguments.json, {"machine": machine(), **figures})


def measure(quick: bool, *, one_thread: bool = False) -> Report:
    """Tables of speed and of memory."""
    num_threads = 1 if one_thread else torch.get_num_threads()
    rows: Rows = []
    for family in FAMILIES:
        missing = [peer for peer in family.peers if find_spec(peer) is None]
        for peer in missing:
            print(f"{family.name}: {peer} is not installed: {INSTALL.get(peer, INSTALL_BENCH)}")
        peers = [peer for peer in family.peers if peer not in missing]
        if peers:
            rows += _beside_peers(family, peers, num_threads, num_turns=5 if quick else 25)
    if rows:
        where = "one thread, processor time" if one_thread else f"{num_threads} threads"
        show(f"Decode of recurrent families, random weights, float32, in turns, {where}", rows)
    lasts = {2: 5_000} if quick else LAST
    memory = [
        _memory(family, layers, last) for layers, last in lasts.items() for family in FAMILIES
    ]
    show("Memory of one stream", memory)
    return {"families": rows, "families_memory": memory}


def _beside_peers(family: Family, peers: Sequence[str], num_threads: int, num_turns: int) -> Rows:
    rows: Rows = []
    with tempfile.TemporaryDirectory(prefix="cottention-families-") as folder:
        model = family.make(Path(folder) / family.file_name)
        for name in peers:
            with Side("ours", model, num_threads) as ours, Side(name, model, num_threads) as peer:
                _check(f"{family.name}, {name}", ours, peer)
                for batch in BATCHES:
                    row = {"shape": family.name, "beside": name, "batch": batch}
                    rows.append(row | _turns(batch, ours, peer, num_turns))
    return rows


def _check(what: str, ours: Side, peer: Side) -> None:
    """Exit if the sides compute something else."""
    got, expected = (torch.tensor(side.ask(do="logits")) for side in (ours, peer))
    error = float((got - expected).abs().max() / expected.std())
    if not error <= TOLERANCE:
        raise SystemExit(f"{what}: logits differ by {error:.1e}: nothing is reported")


def _turns(batch: int, ours: Side, peer: Side, number: int) -> dict[str, object]:
    """Medians of steps, and of the ratios of two turns that follow each other."""
    mine: list[float] = []
    theirs: list[float] = []
    ratios: list[float] = []
    for turn in range(number):
        took = {}
        for side in (ours, peer) if turn % 2 else (peer, ours):
            took[side] = side.ask(do="steps", batch=batch, steps=STEPS)
        mine += took[ours]
        theirs += took[peer]
        ratios.append(statistics.median(took[peer]) / statistics.median(took[ours]))
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {
        "ms/step": 1e3 * statistics.median(mine),
        "peer ms/step": 1e3 * statistics.median(theirs),
        "peer / ours": middle,
        "quartiles": f"{low:.2f}-{high:.2f}",
        "shortest ms": 1e3 * min(mine),
        "peer's": 1e3 * min(theirs),
        "load": f"{os.getloadavg()[0]:.1f}",
    }


def _memory(family: Family, layers: int | None, last: int) -> dict[str, object]:
    """The bytes of a session, and how far resident memory was from that at token 1,000."""
    with tempfile.TemporaryDirectory(prefix="cottention-families-") as folder:
        sizes = {} if layers is None else {"num_layers": layers, "vocab_size": 256}
        model = family.make(Path(folder) / family.file_name, **sizes)
        spec = read_config(model).state_spec()
        start, num_threads = family_sides.ours(model), torch.get_num_threads()
        pool = StatePool(spec, 1, "cpu")
        if pool.nbytes != spec.bytes_per_slot:
            raise SystemExit(f"the pool has {pool.nbytes} bytes, not {spec.bytes_per_slot}")
        if layers is not None:  # few gain nothing from more, and wait for them under load
            torch.set_num_threads(1)
        with torch.inference_mode():
            stream = family_sides.Streams(start(1), 1)
            process, resident = psutil.Process(), {}
            for age in range(1, last + 1):
                stream()
                if age % FIRST == 0:
                    resident[age] = process.memory_info().rss
        torch.set_num_threads(num_threads)
    return {
        "shape": family.name,
        "layers": layers or "all",
        "bytes": spec.bytes_per_slot,
        "by tensor": ", ".join(f"{n} {b:,}" for n, b in spec.itemised_bytes().items() if b),
        "tokens": last,
        "growth MiB": (max(resident.values()) - resident[FIRST]) / 2**20,
    }


if __name__ == "__main__":
    main()
