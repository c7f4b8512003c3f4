"""What renewal costs: tokens per second of endless streams, and the pauses that it does not make.

Streams are brought to where a state is about to be renewed by prompts of that length, on the
shipped model; an engine under `exact` takes its steps by turns with one under `renew`, so that
whatever else the machine does falls on both. A step gives every stream a token: its time is the
time between two tokens. It is the processor's time of the one thread that computes, and the
shortest of a few for the same step, since nothing in a step waits and other processes should not
count. First it is checked that what is said has the bits of the plain definition.
"""

import statistics
import time
from dataclasses import dataclass, replace

import torch

from benchmarks.common import Report, percentile, run, show
from cottention.engine import Engine, EngineConfig, SamplingParams
from cottention.engine.state.context_window import ContextPolicy, RenewalSchedule

PARAMS = SamplingParams(max_tokens=100_000, temperature=0, ignore_eos=True)
PASSES = 2
FEW = 4
"""Ids of a stream that is far from being renewed."""


@dataclass(frozen=True, slots=True)
class Times:
    """Milliseconds of steps, by policy."""

    exact: list[float]
    renew: list[float]


def measure(quick: bool) -> Report:
    """Two tables: speed over a period of the grid, and the times between tokens in a renewal."""
    threads = torch.get_num_threads()
    try:
        return _measured(_checked(), quick)
    finally:
        torch.set_num_threads(threads)


def _measured(grid: RenewalSchedule, quick: bool) -> Report:
    num_steps = 32 if quick else grid.kept
    speeds, pauses = [], []
    for name, renewed, others in (("64 together", 64, 0), ("1 beside 63", 1, 63), ("1", 1, 0)):
        begin = grid.stride - num_steps
        before, growing = _halves(_steps(begin, renewed, others, 2 * num_steps))
        around = _steps(grid.window - num_steps // 2, renewed, others, num_steps)
        speeds.append(_speed(name, renewed + others, grid, before, growing))
        pauses.append(_pauses(name, growing, around))
    show(f"Endless streams, W = {grid.window}, R = {grid.kept}: medians of steps", speeds)
    show("Time between tokens of a stream that is being renewed", pauses)
    return {"renewal": speeds, "renewal_pauses": pauses}


def _checked() -> RenewalSchedule:
    """The grid. Refuses to measure where a token is drawn from anything but its own context."""
    engines = {policy: _engine(policy, 4) for policy in ("renew", "exact")}
    grid = engines["renew"].policies.context_schedules["renew"]
    assert isinstance(grid, RenewalSchedule)
    prompt = _ids(grid.window - 2)
    said = _told(engines["renew"], prompt, 4)
    ids = prompt + [token_id for token_id, _ in said]
    for index in range(len(prompt) - 1, len(ids) - 1):
        [(_, expected)] = _told(engines["exact"], ids[grid.start(index) : index + 1], 1)
        if said[index - len(prompt) + 1][1] != expected:
            raise SystemExit(f"token {index + 1} has other bits: nothing is reported")
    return grid


def _told(engine: Engine, ids: list[int], num: int) -> list[tuple[int, object]]:
    """Ids drawn, and the likeliest beside each."""
    engine.submit(ids, SamplingParams(max_tokens=num, temperature=0, logprobs=5, ignore_eos=True))
    outputs = [out for _ in iter(engine.has_work, False) for out in engine.step()]
    return [(out.token_ids[0], out.logprobs[0].top) for out in outputs]


def _ids(num: int) -> list[int]:
    return [300 + i * i % 3000 for i in range(num)]


def _engine(policy: ContextPolicy, max_slots: int) -> Engine:
    return Engine(config=EngineConfig(max_slots=max_slots, context_policy=policy, threads=1))


def _steps(begin: int, renewed: int, others: int, num_steps: int) -> Times:
    """The shortest of each step's times."""
    passes = [_pass(begin, renewed, others, num_steps) for _ in range(PASSES)]
    exact = zip(*(times.exact for times in passes), strict=True)
    renew = zip(*(times.renew for times in passes), strict=True)
    return Times([min(each) for each in exact], [min(each) for each in renew])


def _pass(begin: int, renewed: int, others: int, num_steps: int) -> Times:
    """Steps by turns: `renewed` streams from index `begin` on, beside `others` that are young."""
    times: dict[ContextPolicy, list[float]] = {"exact": [], "renew": []}
    engines = {policy: _engine_at(policy, begin, renewed, others) for policy in times}
    for _ in range(num_steps):
        for policy, engine in engines.items():
            begun = time.thread_time()
            engine.step()
            times[policy].append(1e3 * (time.thread_time() - begun))
    return Times(**times)


def _engine_at(policy: ContextPolicy, begin: int, renewed: int, others: int) -> Engine:
    """An engine whose streams decode from the next step on; a prompt is read once for its like."""
    engine = _engine(policy, renewed + others)
    for num, length in ((others, FEW), (renewed, begin)):
        if num:
            engine.submit(_ids(length), replace(PARAMS, n=num))
    engine.step()
    while engine._scheduler._prefilling:
        engine.step()
    return engine


def _halves(times: Times) -> tuple[Times, Times]:
    half = len(times.exact) // 2
    return (
        Times(times.exact[:half], times.renew[:half]),
        Times(times.exact[half:], times.renew[half:]),
    )


def _speed(name: str, streams: int, grid: RenewalSchedule, before: Times, growing: Times) -> Report:
    """Of R steps in every W − R the spare rows take part."""
    exact = statistics.median(before.exact + growing.exact)
    alone, both = statistics.median(before.renew), statistics.median(growing.renew)
    renew = alone + (both - alone) * grid.kept / grid.stride
    return {
        "streams": name,
        "exact ms a step": exact,
        "renew ms, without spares": alone,
        "with spares": both,
        "exact tokens/s": 1e3 * streams / exact,
        "renew tokens/s": 1e3 * streams / renew,
        "renew / exact": exact / renew,
    }


def _pauses(name: str, growing: Times, around: Times) -> Report:
    """Of steps in which spare rows grow, and of those in which they take over."""
    exact, renew = growing.exact + around.exact, growing.renew + around.renew
    middle, worst = statistics.median(renew), percentile(renew, 99)
    return {
        "streams": name,
        "p50 ms": middle,
        "p99 ms": worst,
        "p99 / p50": worst / middle,
        "exact, p99 / p50": percentile(exact, 99) / statistics.median(exact),
        "longest step at a boundary, ms": max(around.renew),
        "exact, longest then": max(around.exact),
    }


if __name__ == "__main__":
    run(__doc__, measure)
