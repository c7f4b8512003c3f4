"""Shared parts of the benchmarks: command line, description of the machine, tables and JSON."""

import argparse
import json
import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.devices import DEVICES, Device
from cottention.engine import ops

Report = dict[str, Any]


def parser(description: str | None) -> argparse.ArgumentParser:
    """Options of all benchmarks: --quick, --json FILE."""
    options = argparse.ArgumentParser(description=description)
    options.add_argument("--quick", action="store_true", help="fewer repetitions, under a minute")
    options.add_argument("--json", type=Path, metavar="FILE", help="also write the figures as JSON")
    return options


def run(description: str, measure: Callable[[bool], Report]) -> None:
    """Main function of a benchmark: parse, measure, write JSON."""
    arguments = parser(description).parse_args()
    _write(arguments, measure(arguments.quick))


def run_on_device(description: str, measure: Callable[[bool, Device], Report]) -> None:
    """As `run`, for a benchmark that can run on a GPU: --device."""
    options = parser(description)
    options.add_argument("--device", choices=DEVICES, default="cpu", help="default: cpu")
    arguments = options.parse_args()
    _write(arguments, measure(arguments.quick, DEVICES[arguments.device]))


def _write(arguments: argparse.Namespace, figures: Report) -> None:
    if arguments.json:
        write_json(arguments.json, {"machine": machine(), **figures})


def write_json(path: Path, report: Report) -> None:
    """Write figures as indented JSON."""
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def machine() -> Report:
    """The hardware and software of the measurement."""
    return {
        "cpu": _cpu_name(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cores": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "ops": ops.backend(),
    }


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def show(title: str, rows: Sequence[Mapping[str, object]]) -> None:
    """Print a table with the keys of the first row as headings, and the machine below it.

    No table library is used: gpu-check runs where only torch and a few packages are installed.
    """
    cells = [list(rows[0]), *([_cell(x) for x in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    head, *lines = (
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        for line in cells
    )
    rule = "-" * len(head)
    print("", title, rule, head, rule, *lines, rule, _where(), sep="\n", flush=True)


def _cell(x: object) -> str:
    return f"{x:,.4g}" if isinstance(x, float) else f"{x:,}" if isinstance(x, int) else str(x)


def _where() -> str:
    on = machine()
    names = " and ".join(name for name in (on["gpu"], on["cpu"]) if name)
    return f"{names}, {on['cores']} threads, torch {on['torch']}, {on['ops']} ops"


def percentile(values: Sequence[float], percent: int) -> float:
    """The given percentile of the values, 1 to 99, by linear interpolation."""
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]
