"""Cost of renewal: throughput of endless streams, and time between tokens at renewals.

Streams of the default model start just before a renewal, with prompts of that length. An engine
with the `exact` policy and one with `renew` take steps in turn, so that other load affects both
alike. A step gives every stream a token, so its time is the time between two tokens. It is measured
as CPU time of the computing thread, the shortest of several passes for the same step, since nothing
in a step waits. Before that, the tokens under renewal are compared with the definition, bit for
bit.
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
CASES = (("64 renewed", 64, 0), ("1 renewed of 64", 1, 63), ("1 renewed", 1, 0))
"""Name, streams at a renewal, and other streams."""

SHORT = 4
"""Prompt length of a stream that is far from its first renewal."""


@dataclass(frozen=True, slots=True)
class Times:
    """Milliseconds of steps, by policy."""

    exact: list[float]
    renew: list[float]


def measure(quick: bool) -> Report:
    """Two tables: throughput over one period of renewals, and times between tokens at renewals."""
    threads = torch.get_num_threads()
    try:
        return _measured(_checked(), quick)
    finally:
        torch.set_num_threads(threads)


def _measured(schedule: RenewalSchedule, quick: bool) -> Report:
    num_steps = 32 if quick else schedule.kept
    speeds, pauses = [], []
    for name, renewed, others in CASES:
        begin = schedule.stride - num_steps
        before, growing = _halves(_steps(begin, renewed, others, 2 * num_steps))
        around = _steps(schedule.window - num_steps // 2, renewed, others, num_steps)
        speeds.append(_speed(name, renewed + others, schedule, before, growing))
        pauses.append(_pauses(name, growing, around))
    lengths = f"W = {schedule.window}, R = {schedule.kept}"
    show(f"Throughput with renewal, {lengths}, medians of steps", speeds)
    show("Time between tokens at renewals", pauses)
    return {"renewal": speeds, "renewal_pauses": pauses}


def _checked() -> RenewalSchedule:
    """The renewal schedule. Exits if a token depends on more than its own context."""
    engines = {policy: _engine(policy, 4) for policy in ("renew", "exact")}
    schedule = engines["renew"].policies.context_schedules["renew"]
    assert isinstance(schedule, RenewalSchedule)
    prompt = _ids(schedule.window - 2)
    outputs = _generated(engines["renew"], prompt, 4)
    ids = prompt + [token_id for token_id, _ in outputs]
    for index in range(len(prompt) - 1, len(ids) - 1):
        [(_, expected)] = _generated(engines["exact"], ids[schedule.start(index) : index + 1], 1)
        if outputs[index - len(prompt) + 1][1] != expected:
            raise SystemExit(f"token {index + 1} differs from its definition: nothing is reported")
    return schedule


def _generated(engine: Engine, ids: list[int], num: int) -> list[tuple[int, object]]:
    """Generated ids, and the likeliest ids with each."""
    engine.submit(ids, SamplingParams(max_tokens=num, temperature=0, logprobs=5, ignore_eos=True))
    outputs = [out for _ in iter(engine.has_work, False) for out in engine.step()]
    return [(out.token_ids[0], out.logprobs[0].top) for out in outputs]


def _ids(num: int) -> list[int]:
    return [300 + i * i % 3000 for i in range(num)]


def _engine(policy: ContextPolicy, max_slots: int) -> Engine:
    return Engine(config=EngineConfig(max_slots=max_slots, context_policy=policy, threads=1))


def _steps(begin: int, renewed: int, others: int, num_steps: int) -> Times:
    """The shortest time of each step."""
    passes = [_pass(begin, renewed, others, num_steps) for _ in range(PASSES)]
    exact = zip(*(times.exact for times in passes), strict=True)
    renew = zip(*(times.renew for times in passes), strict=True)
    return Times([min(each) for each in exact], [min(each) for each in renew])


def _pass(begin: int, renewed: int, others: int, num_steps: int) -> Times:
    """Steps in turn: `renewed` streams from index `begin`, and `others` that have just begun."""
    times: dict[ContextPolicy, list[float]] = {"exact": [], "renew": []}
    engines = {policy: _engine_at(policy, begin, renewed, others) for policy in times}
    for _ in range(num_steps):
        for policy, engine in engines.items():
            begun = time.thread_time()
            engine.step()
            times[policy].append(1e3 * (time.thread_time() - begun))
    return Times(**times)


def _engine_at(policy: ContextPolicy, begin: int, renewed: int, others: int) -> Engine:
    """An engine whose streams decode from the next step on; each prompt is prefilled once."""
    engine = _engine(policy, renewed + others)
    for num, length in ((others, SHORT), (renewed, begin)):
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


def _speed(
    name: str, streams: int, schedule: RenewalSchedule, before: Times, growing: Times
) -> Report:
    """Spare rows take part in R of every W − R steps."""
    exact = statistics.median(before.exact + growing.exact)
    alone, both = statistics.median(before.renew), statistics.median(growing.renew)
    renew = alone + (both - alone) * schedule.kept / schedule.stride
    return {
        "streams": name,
        "exact ms/step": exact,
        "renew ms/step, no spares": alone,
        "renew ms/step, spares": both,
        "exact tokens/s": 1e3 * streams / exact,
        "renew tokens/s": 1e3 * streams / renew,
        "renew / exact": exact / renew,
    }


def _pauses(name: str, growing: Times, around: Times) -> Report:
    """Steps in which spare rows are filled, and those in which they replace the state."""
    exact, renew = growing.exact + around.exact, growing.renew + around.renew
    middle, worst = statistics.median(renew), percentile(renew, 99)
    return {
        "streams": name,
        "p50 ms": middle,
        "p99 ms": worst,
        "p99 / p50": worst / middle,
        "exact p99 / p50": percentile(exact, 99) / statistics.median(exact),
        "max ms at a renewal": max(around.renew),
        "exact max ms there": max(around.exact),
    }


if __name__ == "__main__":
    run(__doc__, measure)
