"""Sessions: time of a turn by age, restoring, forking, many sessions, and resent conversations.

In this process, with the default model in float32 and the exact recurrence: the first token of a
turn at two ages (position set, not generated); restoring a session from memory and from disk,
compared with a copy of the same bytes; a fork, compared with copies of rows; many open sessions of
which random ones continue; and the prompt tokens of a chat that is resent whole. Latencies are
medians.
"""

import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import psutil
import torch

from benchmarks.common import Report, percentile, run, show
from cottention.engine import Engine, EngineConfig, SamplingParams
from cottention.engine.scheduling.prefill_stops import CacheUse
from cottention.engine.sessions.manager import SessionManager
from cottention.engine.sessions.store import SqliteStore
from cottention.engine.state.session_state import SessionState

OWNER = "bench"
TURN = SamplingParams(max_tokens=1, temperature=0, ignore_eos=True)
PROMPT = list(range(300, 332))
NEW = SessionState(context_policy="exact")


def measure(quick: bool) -> Report:
    """Five tables."""
    engine = Engine(config=EngineConfig(max_slots=64, context_policy="exact"))
    rounds = 30 if quick else 300
    report: Report = {"age": _by_age(engine, rounds), "restore": _restoring(engine, rounds)}
    report["fork"] = _forking(engine, rounds // 10)
    report["many"] = _many(engine, *((500, 200) if quick else (100_000, 10_000)))
    report["prefix"] = _resent(engine)
    for title, rows in report.items():
        show(f"Sessions: {title}", rows)
    return report


@contextmanager
def sessions_in(engine: Engine, memory_bytes: int) -> Iterator[SessionManager]:
    """Durable sessions in a temporary folder."""
    with tempfile.TemporaryDirectory() as folder:
        sessions = SessionManager(
            SqliteStore(Path(folder)),
            engine.session_codec(),
            memory_bytes=memory_bytes,
            max_checkpoints=0,
            is_durable=True,
        )
        try:
            yield sessions
        finally:
            sessions.close()


def turn(engine: Engine, start: SessionState, prompt: list[int]) -> SessionState:
    """Generate one token; returns the state of the session after it."""
    engine.submit(prompt, TURN, start=start)
    outputs = [out for _ in iter(engine.has_work, False) for out in engine.step()]
    assert outputs[-1].state is not None
    return outputs[-1].state


def seconds(work: Callable[[], object]) -> float:
    """Seconds of one call."""
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def median_ms(work: Callable[[], object], rounds: int) -> float:
    """Median milliseconds of `rounds` calls."""
    return 1000 * statistics.median(seconds(work) for _ in range(rounds))


def _by_age(engine: Engine, rounds: int) -> list[Report]:
    """Time to first token of a follow-up, the ages in turn so that load affects both alike."""
    young = turn(engine, NEW, PROMPT)
    ages = {age: replace(young, position=age) for age in (1_000, 1_000_000)}
    taken: dict[int, list[float]] = {age: [] for age in ages}
    for _ in range(rounds):
        for age, state in ages.items():
            taken[age].append(1000 * seconds(lambda state=state: turn(engine, state, PROMPT)))
    first = statistics.median(taken[1_000])
    return [
        {
            "position": age,
            "first token ms": statistics.median(each),
            "ratio to position 1,000": statistics.median(each) / first,
        }
        for age, each in taken.items()
    ]


def _restoring(engine: Engine, rounds: int) -> list[Report]:
    """From a session id to a row in the pool, without generating."""
    state = turn(engine, NEW, PROMPT)
    row, target = state.rows[0], torch.empty_like(state.rows[0])
    copy = median_ms(lambda: target.copy_(row), rounds)
    rows = []
    for place, memory in (("memory", 2**30), ("disk", 0)):
        with sessions_in(engine, memory) as sessions:
            opened = sessions.open(OWNER, state, {}, None)

            def restore(sessions: SessionManager = sessions, name: str = opened.id) -> None:
                taken = sessions.begin(OWNER, name)
                engine.pool.write(0, taken.state.rows)
                sessions.abandon(taken)

            took = median_ms(restore, rounds)
            rows.append({"from": place, "p50 ms": took, "copy ms": copy})
    return rows


def _forking(engine: Engine, rounds: int) -> list[Report]:
    """64 durable forks, compared with 64 copies of a row."""
    state = turn(engine, NEW, PROMPT)
    row, target = state.rows[0], torch.empty_like(state.rows[0])
    with sessions_in(engine, 2**30) as sessions:
        opened = sessions.open(OWNER, state, {}, None)
        fork = median_ms(lambda: sessions.fork(OWNER, opened.id, 64), rounds)
    copies = median_ms(lambda: [target.copy_(row) for _ in range(64)], rounds)
    return [{"forks": 64, "ms": fork, "64 row copies ms": copies}]


def _many(engine: Engine, num_open: int, num_continued: int) -> list[Report]:
    """`num_open` sessions, or as many as half of the free disk holds."""
    each = engine.spec.bytes_per_slot
    free = psutil.disk_usage(tempfile.gettempdir()).free
    num_open = min(num_open, free // 2 // each)
    budget, process = 256 * 2**20, psutil.Process()
    base = turn(engine, NEW, PROMPT)
    with sessions_in(engine, budget) as sessions:
        before = process.memory_info().rss
        names = [_open_one(sessions, base, number) for number in range(num_open)]
        chosen = random.Random(0).choices(range(num_open), k=num_continued)
        taken = [1000 * seconds(lambda n=n: _continue(engine, sessions, names, n)) for n in chosen]
        lost = sum(sessions.find(OWNER, name).id != name for name in names)
        grown = process.memory_info().rss - before
    return [
        {
            "open": num_open,
            "continued": num_continued,
            "lost": lost,
            "turn p50 ms": statistics.median(taken),
            "turn p99 ms": percentile(taken, 99),
            "memory budget MiB": budget / 2**20,
            "resident growth MiB": grown / 2**20,
        }
    ]


def _open_one(sessions: SessionManager, base: SessionState, number: int) -> str:
    """A session with a state of its own, so that no two share bytes on disk."""
    rows = tuple(row + number for row in base.rows)
    return sessions.open(OWNER, replace(base, rows=rows), {"number": str(number)}, None).id


def _continue(engine: Engine, sessions: SessionManager, names: list[str], number: int) -> None:
    taken = sessions.begin(OWNER, names[number])
    assert taken.session.metadata == {"number": str(number)}
    sessions.commit(taken, turn(engine, taken.state, PROMPT[:4]))


def _resent(engine: Engine) -> list[Report]:
    """A chat of 20 turns and about 8,000 tokens from a client without sessions."""
    chance = random.Random(1)
    conversation: list[int] = []
    num_new, before = 0, engine.stats().num_prompt_tokens
    answer = replace(TURN, max_tokens=100)
    for _ in range(20):
        new = [chance.randrange(300, 3000) for _ in range(300)]
        conversation += new
        engine.submit(conversation, answer, cache=CacheUse(OWNER))
        outputs = [out for _ in iter(engine.has_work, False) for out in engine.step()]
        said = [token_id for out in outputs for token_id in out.token_ids]
        conversation += said
        num_new += len(new) + len(said)
    read = engine.stats().num_prompt_tokens - before
    return [
        {
            "turns": 20,
            "tokens at the end": len(conversation),
            "new tokens": num_new,
            "prefilled tokens": read,
            "ratio": read / num_new,
        }
    ]


if __name__ == "__main__":
    run(__doc__, measure)
