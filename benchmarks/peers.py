"""This server's model beside llama.cpp and `transformers` on the same machine, and their memory.

All have the 300M shape and random weights. Decode of some streams with a past of some tokens, and
prompts of one stream. Each side is a process of its own with as many threads; they work in short
turns, in an order that changes, and a turn's first step is not measured. Tokens per second are
medians of steps; ratios are medians of the ratios of a round, to the fastest of ours, which may be
int8 beside a quantized peer only.

A library that is not installed is left out by name, and so is a side whose key-value cache would
not fit into a third of the memory. Sides whose caches together do not are measured in groups.
"""

import argparse
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl
import psutil
import torch
from matplotlib import pyplot

from benchmarks.common import Report, machine, parser, show, write_json
from benchmarks.families import INSTALL, INSTALL_BENCH, Side
from benchmarks.peer_gguf import KINDS
from benchmarks.peer_sides import SHAPE, SPARE

CASES = tuple((streams, context) for context in (64, 1_024, 8_192) for streams in (1, 8, 64))
QUICK_CASES = ((1, 64), (8, 64), (1, 1_024))
PROMPTS = (512, 2_048)
STEPS = 3
"""Measured in a turn."""

PACKAGES = {"ours": "torch", "llama.cpp": "llama_cpp", "transformers": "transformers"}
DEFAULT_SIDES = (
    *(f"ours {kind}" for kind in ("float32", "bfloat16", "bfloat16+compressed", "int8")),
    *(f"llama.cpp {kind}{flash}" for kind in KINDS for flash in ("", "+fa")),
    *(f"transformers {kind}" for kind in ("float32", "bfloat16")),
)
CACHE_WIDTHS = {"llama.cpp": 2, "transformers float32": 4, "transformers bfloat16": 2}
"""Bytes of an element of a key-value cache."""

QUANTIZED = ("int8", "q8_0", "q4_K")

Rows = list[dict[str, object]]


class Case(NamedTuple):
    """Decode of `streams` with a past of `context` tokens, or a prompt of one stream."""

    streams: int
    context: int
    is_prompt: bool = False

    def __str__(self) -> str:
        if self.is_prompt:
            return f"prompt of {self.context:,}"
        return f"{self.streams} x {self.context:,}"

    @property
    def tokens(self) -> int:
        """Tokens that one unit of measured work yields."""
        return self.context if self.is_prompt else self.streams


def main() -> None:
    """Parse, measure, write JSON and the picture."""
    options = parser(__doc__)
    options.add_argument("--sides", nargs="*", default=DEFAULT_SIDES, help="such as 'ours float32'")
    options.add_argument("--cases", nargs="*", type=_case, help="such as 8x1024, or p512: a prompt")
    options.add_argument("--turns", type=int, help="rounds of each case")
    options.add_argument("--folder", type=Path, help="keeps the files for llama.cpp")
    options.add_argument("--picture", type=Path, metavar="FILE", help="tokens per second as bars")
    arguments = options.parse_args()
    decode = [Case(*case) for case in (QUICK_CASES if arguments.quick else CASES)]
    prompts = [Case(1, tokens, is_prompt=True) for tokens in PROMPTS[: 1 if arguments.quick else 2]]
    cases = arguments.cases or [*decode, *prompts]
    turns = arguments.turns or (3 if arguments.quick else 9)
    with tempfile.TemporaryDirectory(prefix="cottention-peers-") as folder:
        report = _measure(
            _installed(arguments.sides), cases, turns, arguments.folder or Path(folder)
        )
    if arguments.json:
        write_json(arguments.json, {"machine": machine(), **report})
    if arguments.picture:
        draw(report["peers"], arguments.picture)


def _case(text: str) -> Case:
    if text.startswith("p"):
        return Case(1, int(text[1:]), is_prompt=True)
    streams, found, context = text.partition("x")
    if not found:
        raise argparse.ArgumentTypeError(f"{text}: such as 8x1024 for decode, or p512")
    return Case(int(streams), int(context))


def _installed(names: Sequence[str]) -> list[str]:
    """The sides whose packages are there; says which are not."""
    for library, package in PACKAGES.items():
        if find_spec(package) is None and any(name.startswith(library) for name in names):
            print(f"{library} is not installed: {INSTALL.get(package, INSTALL_BENCH)}")
    return [name for name in names if find_spec(PACKAGES[name.split()[0]]) is not None]


def _measure(names: Sequence[str], cases: Sequence[Case], turns: int, folder: Path) -> Report:
    rows: Rows = []
    summary: Rows = []
    with ExitStack() as stack:
        sides = {name: stack.enter_context(_side(name, folder)) for name in names}
        for case in cases:
            groups = [{name: sides[name] for name in group} for group in _groups(names, case)]
            found = [row for group in groups for row in _beside(group, case, turns)]
            rows += found
            summary.append({"case": str(case), **_summary(found)})
            show(f"Peers, 300M shape, random weights, {case}", [_shown(row) for row in found])
    show("The fastest of ours compared with the fastest of others, by turns", summary)
    return {"peers": rows, "peers_summary": summary}


def _groups(names: Sequence[str], case: Case) -> list[list[str]]:
    """Sides that are measured together: all of ours, and peers whose caches fit into memory."""
    room = psutil.virtual_memory().total / 3
    ours = [name for name in names if name.startswith("ours")]
    groups: list[list[str]] = []
    used = room
    for name in names:
        size = _cache_bytes(name, case)
        if name in ours:
            continue
        if size > room:
            print(f"{name} is left out of {case}: its cache would take {size / 2**30:.0f} GiB")
            continue
        if used + size > room:
            groups.append(list(ours))
            used = 0.0
        groups[-1].append(name)
        used += size
    return groups or [ours]


def _cache_bytes(name: str, case: Case) -> int:
    width = next((each for side, each in CACHE_WIDTHS.items() if name.startswith(side)), 0)
    return 2 * width * SHAPE.n_layer * SHAPE.n_embd * case.streams * (case.context + SPARE)


def _beside(sides: Mapping[str, Side], case: Case, turns: int) -> Rows:
    """One row for each side; `seconds` are its medians of each turn."""
    took: dict[str, list[float]] = {name: [] for name in sides}
    if not case.is_prompt:
        for side in sides.values():
            side.ask(do="open", streams=case.streams, context=case.context)
    for turn in range(turns):
        for name in reversed(sides) if turn % 2 else sides:
            took[name].append(statistics.median(_turn(sides[name], case)))
    memory = {name: side.ask(do="memory")[0] for name, side in sides.items()}
    for side in sides.values():
        side.ask(do="close")
    return [
        {
            "case": str(case),
            "side": name,
            "tokens/s": case.tokens / statistics.median(took[name]),
            "ms": 1e3 * statistics.median(took[name]),
            "shortest ms": 1e3 * min(took[name]),
            "ours / this": _ratio(name, took),
            "resident MiB": memory[name] / 2**20,
            "seconds": took[name],
        }
        for name in sides
    ]


def _ratio(name: str, took: dict[str, list[float]]) -> str:
    """Tokens per second of the fastest of ours with as few bits, in turns; median and extremes."""
    ours = [
        own for own in took if own.startswith("ours") and _is_quantized(own) <= _is_quantized(name)
    ]
    if name.startswith("ours") or not ours:
        return "-"
    fastest = min(ours, key=lambda own: statistics.median(took[own]))
    each = [b / a for a, b in zip(took[fastest], took[name], strict=True)]
    return f"{statistics.median(each):.2f} ({min(each):.2f}-{max(each):.2f})"


def _side(name: str, folder: Path) -> Side:
    library, kind = name.split()
    return Side(library, kind, folder, torch.get_num_threads(), module="benchmarks.peer_sides")


def _turn(side: Side, case: Case) -> list[float]:
    if case.is_prompt:
        return side.ask(do="prompt", tokens=case.context)
    return side.ask(do="steps", steps=STEPS)


def _summary(rows: Rows) -> dict[str, object]:
    """The ratio beside the fastest side of each library."""
    ratios: dict[str, object] = {}
    for what, is_quantized in (("16 bits or more", False), ("quantized", True)):
        for library in ("llama.cpp", "transformers"):
            sides = [
                row
                for row in rows
                if str(row["side"]).startswith(library)
                and _is_quantized(str(row["side"])) == is_quantized
            ]
            if library != "transformers" or not is_quantized:
                fastest = min(sides, key=lambda row: float(str(row["ms"])), default=None)
                ratios[f"{library}, {what}"] = fastest["ours / this"] if fastest else "-"
    return ratios


def _is_quantized(name: str) -> bool:
    return any(kind in name for kind in QUANTIZED)


def _shown(row: dict[str, object]) -> dict[str, object]:
    return {key: value for key, value in row.items() if key not in ("case", "seconds")}


def draw(rows: Rows, path: Path) -> None:
    """Tokens per second of each side, a panel for each case."""
    mpl.use("Agg")
    cases = list(dict.fromkeys(str(row["case"]) for row in rows))
    columns = min(3, len(cases))
    height = -(-len(cases) // columns)
    size = 4.5 * columns, 3 * height
    figure, panels = pyplot.subplots(
        height, columns, figsize=size, squeeze=False, layout="constrained"
    )
    for panel in panels.flat[len(cases) :]:
        panel.set_visible(False)
    for panel, case in zip(panels.flat, cases, strict=False):
        own = [row for row in rows if row["case"] == case][::-1]
        names = [str(row["side"]) for row in own]
        colours = ["C1" if name.startswith("ours") else "C0" for name in names]
        panel.barh(names, [row["tokens/s"] for row in own], color=colours)
        panel.set_title(case, fontsize="medium")
        panel.tick_params(labelsize="x-small")
        panel.set_xlabel("tokens/s", fontsize="small")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    print(path)


if __name__ == "__main__":
    main()
