"""Decode of recurrent families beside the libraries that people run them with, and their memory.

Random weights in the shapes of Mamba-2 370M and RWKV-7 0.4B, float32, one token per stream and
step. Each side is a process of its own with as many threads, which wait in the same way, and they
decode in short turns, so that other load affects all alike; a turn's first step is not measured.
Before, they must agree on the logits of a prompt. A library that is not installed is left out:
`transformers`, `rwkv`, and llama.cpp (`llama_cpp` and `gguf`), with the same weights in float32,
and in bfloat16 where the model's own file is, as RWKV-7's: then also beside ours in bfloat16.
Memory, and the time of a token, are those of one stream from token 1,000 to token 50,000, nine
tenths of which it reads a hundred at a time, as a prompt, and the others one by one.

--family, --beside and --batch choose what is measured, the first two by a part of a name, as in
`--family RWKV --beside llama_cpp_bf --batch 8`; `--beside memory` measures memory alone. --folder
keeps the models' files for the next run.

With --one-thread each side has one thread and is timed in that thread's processor time: on a
machine that does other work, two threads wait for each other longer than they compute.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
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
LAST = 50_000
"""Tokens between which memory is flat; it is looked at after every FIRST."""
READ = 100
"""Tokens at once."""

MEMORY = "memory"
STEPS = 3
"""Measured in a turn."""

TOLERANCE = 1e-2
"""Of the logits' difference, in standard deviations: the rwkv package rounds a constant."""

BFLOAT16 = "_bfloat16"
"""Ends the name of a side whose arithmetic is in bfloat16."""

BFLOAT16_TOLERANCE = 0.2

INSTALL_BENCH = "pip install '.[bench]'"
INSTALL = {"llama_cpp": "pip install llama-cpp-python==0.3.36 gguf, which compiles for long"}

Rows = list[dict[str, object]]


class Family(NamedTuple):
    """What is compared: files of some layers and ids, and the packages that also run them."""

    name: str
    file_name: str
    make: Callable[..., Path]
    peers: tuple[str, ...]


LLAMA_CPP = "llama_cpp", f"llama_cpp{BFLOAT16}"
MAMBA_2 = Family("Mamba-2 370M", "mamba2", family_models.mamba2, ("transformers", "llama_cpp"))
RWKV_7 = Family("RWKV-7 0.4B", "rwkv7.pth", family_models.rwkv7, ("rwkv", *LLAMA_CPP))
FAMILIES = (
    MAMBA_2,
    Family(
        "Mamba-2 370M in bfloat16",
        "mamba2-bfloat16",
        partial(family_models.mamba2, dtype=torch.bfloat16),
        LLAMA_CPP,
    ),
    RWKV_7,
)


class Chosen(NamedTuple):
    """Parts of the names of families and of peers, and a batch; empty and None: all.

    folder: of the models' files, which stay there; None: they are made for the run.
    """

    family: str = ""
    beside: str = ""
    batch: int | None = None
    folder: Path | None = None


EVERYTHING = Chosen()


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
    options.add_argument("--family", default="", help="a part of the model's name")
    options.add_argument("--beside", default="", help=f"a part of a library's name, or {MEMORY}")
    options.add_argument("--batch", type=int, choices=BATCHES)
    options.add_argument("--folder", type=Path, help="of the models' files")
    arguments = options.parse_args()
    chosen = Chosen(arguments.family, arguments.beside, arguments.batch, arguments.folder)
    figures = measure(arguments.quick, one_thread=arguments.one_thread, chosen=chosen)
    if arguments.json:
        write_json(arguments.json, {"machine": machine(), **figures})


def measure(quick: bool, *, one_thread: bool = False, chosen: Chosen = EVERYTHING) -> Report:
    """Tables of speed and of memory."""
    num_threads = 1 if one_thread else torch.get_num_threads()
    rows: Rows = []
    for family in FAMILIES:
        peers = []
        for peer in family.peers:
            package = peer.removesuffix(BFLOAT16)
            if chosen.family not in family.name or chosen.beside not in peer:
                continue
            if find_spec(package) is None:
                how = INSTALL.get(package, INSTALL_BENCH)
                print(f"{family.name}: {package} is not installed: {how}")
            else:
                peers.append(peer)
        batches = BATCHES if chosen.batch is None else (chosen.batch,)
        if peers:
            num_turns = 5 if quick else 25
            with _made(family, chosen.folder) as model:
                rows += _beside_peers(family, model, peers, batches, num_threads, num_turns)
    if rows:
        where = "one thread, processor time" if one_thread else f"{num_threads} threads"
        show(f"Decode of recurrent families, random weights, in turns, {where}", rows)
    memory = [
        _memory(family, LAST // 10 if quick else LAST, chosen.folder, num_threads)
        for family in (MAMBA_2, RWKV_7)
        if chosen.family in family.name and chosen.beside in MEMORY and chosen.batch is None
    ]
    if memory:
        show("Memory and time of one stream", memory)
    return {"families": rows, "families_memory": memory}


@contextmanager
def _made(family: Family, folder: Path | None) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="cottention-families-") as made:
        model = (folder or Path(made)) / family.file_name
        yield model if model.exists() else family.make(model)


def _beside_peers(
    family: Family,
    model: Path,
    peers: Sequence[str],
    batches: Sequence[int],
    num_threads: int,
    num_turns: int,
) -> Rows:
    rows: Rows = []
    pairs = [("ours", name) for name in peers]
    pairs += [(f"ours{BFLOAT16}", name) for name in peers if name.endswith(BFLOAT16)]
    for mine, name in pairs:
        with Side(mine, model, num_threads) as ours, Side(name, model, num_threads) as peer:
            tolerance = BFLOAT16_TOLERANCE if name.endswith(BFLOAT16) else TOLERANCE
            _check(f"{family.name}, {mine}, {name}", ours, peer, tolerance)
            for batch in batches:
                row = {"shape": family.name, "ours": mine, "beside": name, "batch": batch}
                rows.append(row | _turns(batch, ours, peer, num_turns))
    return rows


def _check(what: str, ours: Side, peer: Side, tolerance: float) -> None:
    """Exit if the sides compute something else."""
    got, expected = (torch.tensor(side.ask(do="logits")) for side in (ours, peer))
    error = float((got - expected).abs().max() / expected.std())
    print(f"{what}: logits differ by at most {error:.1e} of their standard deviation")
    if not error <= tolerance:
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


class At(NamedTuple):
    """Of a stream at some token: resident bytes, and seconds of a token, a median of READ."""

    resident: int
    second: float


def _memory(family: Family, last: int, folder: Path | None, num_threads: int) -> dict[str, object]:
    """The bytes of a session; how far memory and the time of a token were from token 1,000 on."""
    torch.set_num_threads(num_threads)
    with _made(family, folder) as model:
        spec = read_config(model).state_spec()
        start = family_sides.ours(model)
        if (nbytes := StatePool(spec, 1, "cpu").nbytes) != spec.bytes_per_slot:
            raise SystemExit(f"the pool has {nbytes} bytes, not {spec.bytes_per_slot}")
        with torch.inference_mode():
            ages = dict(_ages(start(1), last))
    first, others = ages.pop(FIRST), ages.values()
    return {
        "shape": family.name,
        "bytes": spec.bytes_per_slot,
        "by tensor": ", ".join(f"{n} {b:,}" for n, b in spec.itemised_bytes().items() if b),
        "tokens": last,
        "resident MiB": first.resident / 2**20,
        "growth MiB": (max(each.resident for each in others) - first.resident) / 2**20,
        "ms/token first": 1e3 * first.second,
        "ms/token median": 1e3 * statistics.median(each.second for each in others),
        "ms/token last": 1e3 * ages[last].second,
    }


def _ages(step: family_sides.Step, last: int) -> Iterator[tuple[int, At]]:
    """Every FIRST tokens of a stream, their number and what it takes there."""
    process, ids = psutil.Process(), torch.arange(READ) + family_sides.IDS[0]
    for age in range(FIRST, last + 1, FIRST):
        for _ in range(FIRST // READ - 1):
            token = step(ids).argmax(-1)
        took = []
        for _ in range(READ):
            start = family_sides.now()
            token = step(token).argmax(-1)
            took.append(family_sides.now() - start)
        yield age, At(process.memory_info().rss, statistics.median(took))


if __name__ == "__main__":
    main()
