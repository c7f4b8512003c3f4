"""The list of runs, in the order in which they are done."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from benchmarks.papers.carried import Carried
from benchmarks.papers.causal import Causal
from benchmarks.papers.lengths import LENGTHS, WAYS, Length
from benchmarks.papers.listops import ListOps
from benchmarks.papers.masked import Masked
from benchmarks.papers.recall import Recall
from benchmarks.papers.results import Result

LEARNING_RATES = {"causal": (3e-3, 6e-3, 1.2e-2, 2.4e-2, 4.8e-2), "masked": (3e-3, 6e-3, 1.2e-2)}
TRIAL_SEED = 0
TRIAL_STEPS = 200
"""Each rate is tried once for every kind of attention, in a shorter run with a seed of its own."""

SEEDS = (1, 2, 3)
RATE = 1.2e-2
"""Of all causal runs but the trials. In trials 0.024 is better for some kinds; over a whole run of
softmax and of Cottention it is not (LONGER_RATE)."""

LONGER_RATE = 2.4e-2

RECALL_TRIALS = {64: {6e-3: "bfloat16", 1.2e-2: "float32"}, 128: {6e-3: "bfloat16"}}
"""Learning rates by width, and the type of the products. Not every CPU multiplies bfloat16 fast;
the larger width takes four times as long."""

KINDS = ("softmax", "cottention", "cosformer", "linear", "performer", "rfa")


CHANGES: dict[str, dict[str, Any]] = {
    "sigma of the paper, 0.62": {"first_sigma": 0.6225, "last_sigma": 0.6225},
    "sigma 0.02 to 0.35": {"first_sigma": 0.02, "last_sigma": 0.35},
    "sigma 0.3 to 0.9": {"first_sigma": 0.3, "last_sigma": 0.9},
    "queries begin as keys": {"equal_query_key": True},
    "queries and keys begin 4 times as long": {"query_key_scale": 4.0},
    "values begin 4 times as long": {"value_scale": 4.0},
    "rate of m 10 times as high": {"map_rate": 10.0},
    "weight decay of m 0.3": {"map_weight_decay": 0.3},
    "no rotary": {"rotary_dim": 0},
    "rotary on half of a head": {"rotary_dim": 16},
    "2 heads of 64": {"heads": 2},
    "1 head of 128": {"heads": 1},
    "8 heads of 16": {"heads": 8},
    "warm-up 150 steps": {"warmup_steps": 150},
}
"""What is changed, one thing at a time, in a Cottention twin. Its base is the twin of the seed."""


OTHER_KINDS = KINDS[2:]
LINEAR_KINDS = KINDS[:4]
"""Kinds that are compared by recall and ListOps."""

MASKED_KINDS = KINDS[:2]


TOGETHER: dict[str, Any] = {"heads": 1, "equal_query_key": True}
"""The changes that helped most with the first seed, in runs as long as the causal twins."""


class Experiment(Protocol):
    """One run: it trains or measures, and returns its figures."""

    def run(self, folder: Path, shared: Path, /) -> Result:
        """folder: the run's own checkpoints; shared: what several runs use."""
        ...


@dataclass(frozen=True, slots=True)
class Run:
    """name: key in docs/papers.json. experiment: from the results so far; None: not ready yet."""

    name: str
    experiment: Callable[[Mapping[str, Result]], Experiment | None]


def all_runs() -> list[Run]:
    """Every run. What says most stands first, so that a list that is half done is worth reading."""
    first, *others = SEEDS
    return [
        *_causal_trials(),
        *_causal(("softmax", "cottention"), SEEDS),
        *_longer_trials(first),
        *_changes(),
        *_causal(OTHER_KINDS, [first]),
        *_together([first]),
        *_recall(64, 6e-3),
        *_masked_trials(),
        *_masked([first]),
        *_listops_short(),
        *_carried([first]),
        *_together(others),
        *_causal(OTHER_KINDS, others),
        *_masked(others),
        *_carried(others),
        *_listops_long(),
        *_recall(128, 6e-3),
        *_lengths(),
        *_recall(64, 1.2e-2),
    ]


def _fixed(name: str, experiment: Experiment) -> Run:
    return Run(name, lambda _: experiment)


def best_rate(
    results: Mapping[str, Result], prefix: str, figure: str = "bits_per_byte"
) -> float | None:
    """The learning rate of the best of the trials PREFIX/lr=…; None until all are done."""
    rates = LEARNING_RATES[prefix.partition("/")[0]]
    trials = {rate: results.get(f"{prefix}/lr={rate:g}") for rate in rates}
    scores = {rate: trial[figure] for rate, trial in trials.items() if trial}
    if len(scores) < len(rates):
        return None
    return min(scores, key=scores.__getitem__)


def _tuned(name: str, prefix: str, base: Masked) -> Run:
    """A run with the best learning rate of the trials PREFIX."""

    def experiment(results: Mapping[str, Result]) -> Experiment | None:
        rate = best_rate(results, prefix, "bits_per_token")
        return None if rate is None else replace(base, learning_rate=rate)

    return Run(name, experiment)


def _causal_trials() -> Iterator[Run]:
    for rate in LEARNING_RATES["causal"]:
        for kind in KINDS:
            trial = Causal(kind, TRIAL_SEED, rate, steps=TRIAL_STEPS)
            yield _fixed(f"causal/{kind}/lr={rate:g}", trial)


def _causal(kinds: Sequence[str], seeds: Sequence[int]) -> Iterator[Run]:
    for seed in seeds:
        for kind in kinds:
            yield _fixed(f"causal/{kind}/seed={seed}", Causal(kind, seed, RATE))


def _longer_trials(seed: int) -> Iterator[Run]:
    """Twins of a whole run at the rate that is best in trials."""
    for kind in ("softmax", "cottention"):
        yield _fixed(f"longer/{kind}/lr={LONGER_RATE:g}", Causal(kind, seed, LONGER_RATE))


def _changes() -> Iterator[Run]:
    """The twin without a change, its changes, and softmax, in runs as long as the trials."""
    seed = SEEDS[0]
    softmax = Causal("softmax", seed, RATE, steps=TRIAL_STEPS)
    base = replace(softmax, attention="cottention")
    yield _fixed(f"change/softmax/seed={seed}", softmax)
    yield _fixed(f"change/none/seed={seed}", base)
    for change, fields in CHANGES.items():
        yield _fixed(f"change/{change}/seed={seed}", replace(base, **fields))


def _together(seeds: Sequence[int]) -> Iterator[Run]:
    for seed in seeds:
        twin = Causal("cottention", seed, RATE, **TOGETHER)
        yield _fixed(f"together/cottention/seed={seed}", twin)


def _masked_trials() -> Iterator[Run]:
    for rate in LEARNING_RATES["masked"]:
        for kind in MASKED_KINDS:
            trial = Masked(kind, TRIAL_SEED, rate, steps=TRIAL_STEPS)
            yield _fixed(f"masked/{kind}/lr={rate:g}", trial)


def _masked(seeds: Sequence[int]) -> Iterator[Run]:
    for seed in seeds:
        for kind in MASKED_KINDS:
            yield _tuned(f"masked/{kind}/seed={seed}", f"masked/{kind}", Masked(kind, seed, 0))


def _recall(width: int, rate: float) -> Iterator[Run]:
    products = RECALL_TRIALS[width][rate]
    for kind in LINEAR_KINDS:
        name = f"recall/{kind}/width={width}/lr={rate:g}"
        yield _fixed(name, Recall(kind, width, rate, products=products))


def _listops_short() -> Iterator[Run]:
    for kind in LINEAR_KINDS:
        yield _fixed(f"listops/{kind}/length=128", ListOps(kind, 10, 128, 4, 800, 32))


def _listops_long() -> Iterator[Run]:
    for kind in LINEAR_KINDS:
        yield _fixed(f"listops/{kind}/length=2000", ListOps(kind, 500, 2000, 10, 150, 8))


def _carried(seeds: Sequence[int]) -> Iterator[Run]:
    """Half of the steps with carried states, beside none; both beside renewal."""
    for seed in seeds:
        for name, plain_steps in (("plain", 500), ("carried", 250)):
            run = Carried(seed, RATE, plain_steps)
            yield _fixed(f"carried/{name}/seed={seed}", run)


def _lengths() -> Iterator[Run]:
    for length in LENGTHS:
        for way in WAYS:
            for name, is_training in (("training", True), ("inference", False)):
                measured = Length(way, length, is_training)
                yield _fixed(f"length/{name}/{way}/{length}", measured)
