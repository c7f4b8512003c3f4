"""Does the runs that have no result yet, in the order of the list, and writes docs/papers.json.

A run that is stopped continues from its last checkpoint. Several of these processes share the list.
"""

import argparse
import fnmatch
import time
from collections.abc import Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path

import torch

from benchmarks.papers.results import RESULTS, add_result, claim, read_results
from benchmarks.papers.runs import Run, all_runs
from cottention.engine.training.trainer import keep_freed_memory

CHECKPOINTS = Path("checkpoints/papers")


def main() -> None:
    """Do the runs whose names match."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("patterns", nargs="*", default=["*"], help="names of runs, such as mlm/*")
    options.add_argument("--list", action="store_true", help="say what is done and what is not")
    arguments = options.parse_args()
    runs = [run for run in all_runs() if _is_wanted(run, arguments.patterns)]
    if arguments.list:
        done = read_results()
        for run in runs:
            print("done" if run.name in done else "    ", run.name)
        return
    torch.set_num_threads(1)
    keep_freed_memory()
    while do_next(runs, RESULTS, CHECKPOINTS):
        pass


def _is_wanted(run: Run, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(run.name, pattern) for pattern in patterns)


def do_next(runs: Sequence[Run], path: Path, checkpoints: Path) -> bool:
    """Do the first run that has no result, whose inputs are there, and that no one else does.

    path: the file of results. Returns whether there was such a run.
    """
    for run in runs:
        results = read_results(path)
        experiment = None if run.name in results else run.experiment(results)
        if experiment is None:
            continue
        folder = checkpoints / run.name
        with claim(folder / "lock") as is_free:
            if is_free and run.name not in read_results(path):
                began = time.monotonic()
                result = experiment.run(folder, checkpoints)
                settings = asdict(experiment) if is_dataclass(experiment) else {}
                add_result(run.name, {**result, "settings": settings}, path)
                print(f"{run.name}: {time.monotonic() - began:.0f} s: {result}", flush=True)
                return True
    return False


if __name__ == "__main__":
    main()
