"""The tables of docs/quality.md that come from docs/papers.json, and the plots beside them.

`make report` writes each table between its two marks in the page. A row tells how many runs it
has; means have the standard error of the mean behind ±.
"""

import fnmatch
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from benchmarks.papers.lengths import LENGTHS, WAYS
from benchmarks.papers.recall import NUM_PAIRS
from benchmarks.papers.results import RESULTS, Result, read_results
from benchmarks.papers.runs import (
    CHANGES,
    KINDS,
    LEARNING_RATES,
    LINEAR_KINDS,
    RECALL_TRIALS,
    SEEDS,
    all_runs,
    best_rate,
)

PAGE = Path("docs/quality.md")

TOGETHER = "cottention, 1 head of 128, queries begin as keys"

Results = Mapping[str, Result]
Rows = Sequence[Sequence[str]]


def update(page: Path = PAGE, results: Path = RESULTS) -> None:
    """Write the tables into the page."""
    page.write_text(with_tables(page.read_text(encoding="utf-8"), read_results(results)), "utf-8")


def with_tables(text: str, results: Results) -> str:
    """The text with what stands between the marks of each table replaced."""
    for name, (rows_of, patterns) in TABLES.items():
        begin, end = f"<!-- table {name} -->\n", f"<!-- end of {name} -->"
        pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
        table = _markdown(rows_of(results)) + _still_missing(results, patterns)
        text = pattern.sub(lambda _, new=begin + table + end: new, text)
    return text


def _markdown(rows: Rows) -> str:
    head, *lines = (f"| {' | '.join(row)} |" for row in rows)
    return "\n".join([head, "|" + "---|" * len(rows[0]), *lines]) + "\n"


def _causal(results: Results) -> Rows:
    """Twins by kind: mean over seeds, and by how much more than softmax."""
    head = ["attention", "learning rate", "runs", "bits per byte", "relative to softmax"]
    places = ["0–128", "128–256"]
    rows = [[*head, *places, "parameters", "CPU s per run"]]
    softmax = _of_seeds(results, "causal/softmax")
    for kind in (*KINDS, TOGETHER):
        runs = _of_seeds(results, f"causal/{kind}" if kind in KINDS else "together/cottention")
        if not runs:
            continue
        bits = [run["bits_per_byte"] for run in runs.values()]
        by_place = [
            f"{statistics.mean(run['by_position'][place] for run in runs.values()):.3f}"
            for place in ("0-128", "128-256")
        ]
        rows.append(
            [
                kind,
                f"{next(iter(runs.values()))['settings']['learning_rate']:g}",
                str(len(runs)),
                mean_error(bits),
                relative(runs, softmax),
                *by_place,
                f"{next(iter(runs.values()))['parameters']:,}",
                f"{statistics.mean(run['cpu_seconds'] for run in runs.values()):.0f}",
            ]
        )
    return rows


def _trials(results: Results) -> Rows:
    """Learning rates that were tried, for the causal twins and for the encoders."""
    rates = LEARNING_RATES["causal"]
    rows = [["trials (200 steps, one seed)", *(f"{rate:g}" for rate in rates)]]
    prefixes = [f"causal/{kind}" for kind in KINDS]
    prefixes += ["masked/softmax", "masked/cottention"]
    for prefix in prefixes:
        trials = [results.get(f"{prefix}/lr={rate:g}") for rate in rates]
        rows.append([prefix.replace("/", ", "), *(_figure(trial) for trial in trials)])
    return rows


def _figure(trial: Result | None) -> str:
    if trial is None:
        return "–"
    return f"{trial.get('bits_per_byte', trial.get('bits_per_token')):.3f}"


def _masked(results: Results) -> Rows:
    rows = [["attention", "learning rate", "runs", "bits per masked token", "relative to softmax"]]
    softmax = _of_seeds(results, "masked/softmax")
    for kind in ("softmax", "cottention"):
        runs = _of_seeds(results, f"masked/{kind}")
        bits = [run["bits_per_token"] for run in runs.values()]
        if runs:
            own = [kind, _rate(results, f"masked/{kind}", "bits_per_token"), str(len(runs))]
            rows.append([*own, mean_error(bits), relative(runs, softmax, "bits_per_token")])
    return rows


def _changes(results: Results) -> Rows:
    """Each change beside the unchanged twin of the same seeds, and softmax."""
    rows = [["change", "runs", "bits per byte", "difference, same seeds"]]
    base = {seed: results.get(f"change/none/seed={seed}") for seed in SEEDS}
    for change in ("none", "softmax", *CHANGES):
        runs = _of_seeds(results, f"change/{change}")
        pairs = [(runs[seed], one) for seed, one in base.items() if one and seed in runs]
        if not pairs:
            continue
        differences = [run["bits_per_byte"] - one["bits_per_byte"] for run, one in pairs]
        name = {"none": "(none)", "softmax": "(softmax)"}.get(change, change)
        bits = mean_error([run["bits_per_byte"] for run in runs.values()])
        difference = "" if change == "none" else mean_error(differences, sign="+")
        rows.append([name, str(len(runs)), bits, difference])
    return rows


def _recall(results: Results) -> Rows:
    """The better of the rates of each kind and width."""
    pairs = [str(number) for number in NUM_PAIRS]
    rows = [["attention", "width", "state", "runs", *(f"{number} pairs" for number in pairs)]]
    for width, rates in RECALL_TRIALS.items():
        for kind in LINEAR_KINDS:
            names = [f"recall/{kind}/width={width}/lr={rate:g}" for rate in rates]
            runs = [results[name] for name in names if name in results]
            if not runs:
                continue
            best = max(runs, key=lambda run: sum(run["accuracy"].values()))
            state = best["state_bytes"]
            rows.append(
                [
                    kind,
                    str(width),
                    "grows" if state is None else f"{state:,} bytes",
                    str(len(runs)),
                    *(f"{100 * best['accuracy'][number]:.1f} %" for number in pairs),
                ]
            )
    return rows


def _listops(results: Results) -> Rows:
    head = ["lengths up to", "attention", "accuracy", "most frequent value"]
    rows = [[*head, "expressions", "tokens", "CPU s"]]
    for length in (128, 2000):
        for kind in LINEAR_KINDS:
            run = results.get(f"listops/{kind}/length={length}")
            if run is not None:
                figures = (f"{100 * run[key]:.1f} %" for key in ("accuracy", "most_frequent_value"))
                counts = (f"{run[key]:,}" for key in ("expressions", "tokens"))
                own = [str(length), kind, *figures]
                rows.append([*own, *counts, f"{run['cpu_seconds']:.0f}"])
    return rows


def _carried(results: Results) -> Rows:
    """Bits per byte by position, of both ways of training and of reading on."""
    some = next((run for name, run in results.items() if name.startswith("carried/")), None)
    places = list(some["renewed"]) if some else []
    rows = [["trained", "read", "runs", *places]]
    for name in ("plain", "carried"):
        runs = list(_of_seeds(results, f"carried/{name}").values())
        for how in ("renewed", "exact"):
            if runs:
                cells = [mean_error([run[how][place] for run in runs]) for place in places]
                rows.append([name, how, str(len(runs)), *cells])
    return rows


def _lengths(results: Results) -> Rows:
    head = [f"{what}, {way}" for what in ("training", "inference") for way in WAYS]
    rows = [["tokens", *head]]
    for length in LENGTHS:
        names = [
            f"length/{what}/{way}/{length}" for what in ("training", "inference") for way in WAYS
        ]
        rows.append([f"{length:,}", *(_cost(results.get(name)) for name in names)])
    return rows


def _cost(run: Result | None) -> str:
    if run is None:
        return "–"
    if "skipped" in run:
        return str(run["skipped"])
    return f"{run['bytes'] / 2**20:,.0f} MiB, {run['seconds']:.3g} s"


TABLES: dict[str, tuple[Callable[[Results], Rows], tuple[str, ...]]] = {
    "causal twins": (_causal, ("causal/*/seed=*", "together/*")),
    "trials": (_trials, ("causal/*/lr=*", "masked/*/lr=*")),
    "masked twins": (_masked, ("masked/*/seed=*",)),
    "changes": (_changes, ("change/*",)),
    "recall": (_recall, ("recall/*",)),
    "listops": (_listops, ("listops/*",)),
    "carried": (_carried, ("carried/*",)),
    "lengths": (_lengths, ("length/*",)),
}
"""By name: its rows, and which runs they come from."""


def _still_missing(results: Results, patterns: Sequence[str]) -> str:
    """A line that says how many runs of a table are not done yet; nothing where all are."""
    names = [run.name for run in all_runs()]
    wanted = [name for name in names if any(fnmatch.fnmatchcase(name, each) for each in patterns)]
    done = sum(name in results for name in wanted)
    return (
        "" if done == len(wanted) else f"\n{done} of this table's {len(wanted)} runs are done.\n\n"
    )


def _of_seeds(results: Results, prefix: str) -> dict[int, Result]:
    """Finished runs by seed."""
    found = {seed: results.get(f"{prefix}/seed={seed}") for seed in SEEDS}
    return {seed: run for seed, run in found.items() if run is not None}


def _rate(results: Results, prefix: str, figure: str = "bits_per_byte") -> str:
    rate = best_rate(results, prefix, figure)
    return "–" if rate is None else f"{rate:g}"


def mean_error(values: Iterable[float], sign: str = "") -> str:
    """Mean ± standard error of the mean; of one value, the value."""
    values = list(values)
    mean = f"{statistics.mean(values):{sign}.3f}"
    if len(values) < 2:
        return mean
    return f"{mean} ± {statistics.stdev(values) / len(values) ** 0.5:.3f}"


def relative(
    runs: Mapping[int, Result], base: Mapping[int, Result], figure: str = "bits_per_byte"
) -> str:
    """By how many percent the figure is above that of the same seeds of the base, with error."""
    ratios = [100 * (runs[s][figure] / base[s][figure] - 1) for s in runs if s in base]
    if not ratios:
        return "–"
    mean = f"{statistics.mean(ratios):+.1f}"
    if len(ratios) < 2 or runs is base or not any(ratios):
        return f"{mean} %"
    return f"{mean} ± {statistics.stdev(ratios) / len(ratios) ** 0.5:.1f} %"


if __name__ == "__main__":
    update()
