"""What a turn costs the store of sessions: a folder and PostgreSQL, whole states and recipes.

Sessions of the default model, each longer than the context window. A turn is the lease, the
encoding of the state and the commit, from eight threads; one checkpoint is kept. The bare
transactions beside them are the least that a shared store can do with the same stored bytes, as
durably: in a table with the key of sessions, an UPDATE that leases and an UPDATE that puts them in
place. All take short turns one after another, and each figure is a median of its turns. Processor
time is compared at the same rate of turns as well, also at that which the store reaches, and beside
bare transactions whose clients encode a state for each of them: who takes more turns at a time
flushes the log once for several. How often it does is counted apart.
PostgreSQL (fsync on) is started in a temporary folder: `python -m benchmarks.stores`, where
Debian's package is installed; it is not among `python -m benchmarks`.
"""

import itertools
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import psutil
import psycopg

from benchmarks.common import Report, percentile, run, show
from cottention.engine import Engine, EngineConfig, SamplingParams
from cottention.engine.sessions.snapshot import SnapshotCodec
from cottention.engine.sessions.store import NewSession, SessionStore, SqliteStore
from cottention.engine.sessions.store.postgres.blobs import Blob
from cottention.engine.sessions.store.postgres.store import PostgresStore
from cottention.engine.state.session_state import SessionState
from tests.engine.postgres import PASSWORD, Postgres, running_postgres

NUM_THREADS = 8
NUM_SESSIONS = 64
NUM_ROUNDS = 7
SECONDS = 1.5
SECONDS_TO_REPORT = 10.6
"""After which PostgreSQL's processes that do nothing have told what they have counted."""
RATES = {"whole": 100.0, "recipe": 400.0}
"""Turns a second at which processor time is compared; all sides manage it."""

PLACES = f"generate_series(1, {NUM_SESSIONS}) AS n"

Turn = Callable[[int], None]
"""One turn of the session of this number."""


def measure(quick: bool) -> Report:
    """Three tables: turns, the database's time beside the bare one, and reading a state anew."""
    engine = Engine(config=EngineConfig(max_slots=4))
    state = long_session(engine)
    codecs = {
        "whole": engine.session_codec(),
        "recipe": engine.session_codec(writes_recipes=True),
    }
    num_rounds = 1 if quick else NUM_ROUNDS
    measured: dict[tuple[str, str], list[Report]] = {}
    paced: dict[tuple[str, str], list[Report]] = {}
    flushed: dict[tuple[str, str], float] = {}
    for form, codec in codecs.items():
        at_full_speed, at_rate, num_flushes = turns_of(form, codec, state, num_rounds)
        flushed |= {(name, form): num for name, num in num_flushes.items()}
        measured |= {(name, form): taken for name, taken in at_full_speed.items()}
        paced |= {(name, form): taken for name, taken in at_rate.items()}
    sizes = {form: Blob.of(codec.encode(state), b"", 1, "") for form, codec in codecs.items()}
    rows = [
        {"store": name, "states": form, "bytes": len(sizes[form].raw)} | medians(taken)
        for (name, form), taken in measured.items()
    ]
    ratios = [
        {
            "states": form,
            "bytes": len(blob.raw),
            "stored bytes": len(blob.deflated()),
            "turns/s": RATES[form],
            "CPU ms": medians(paced["PostgreSQL", form])["database CPU ms"],
            "bare": medians(paced["bare", form])["database CPU ms"],
            "ratio": cpu_ratio(paced["PostgreSQL", form], paced["bare", form]),
            "ratio at its speed": cpu_ratio(measured["PostgreSQL", form], paced["as fast", form]),
            "each at its own": cpu_ratio(measured["PostgreSQL", form], measured["bare", form]),
            "flushes": flushed["PostgreSQL", form],
            "bare flushes": flushed["bare", form],
            "encoded": cpu_ratio(measured["PostgreSQL", form], measured["bare, encoded", form]),
        }
        for form, blob in sizes.items()
    ]
    reads = [{"states": form} | first_token(engine, each, state) for form, each in codecs.items()]
    show("Stores: turns", rows)
    show("Stores: the database's processor time", ratios)
    show("Stores: first token of a session that is not in memory", reads)
    return {"turns": rows, "ratios": ratios, "reads": reads}


Taken = dict[str, list[Report]]
"""What each side has taken, round by round."""


def turns_of(
    form: str, codec: SnapshotCodec, state: SessionState, num_rounds: int
) -> tuple[Taken, Taken, dict[str, float]]:
    """Turns of one form of states at full speed and, those over PostgreSQL, at the same rate.

    "as fast": bare ones at the rate at which the store's were. Flushes of the log for each turn, at
    full speed, come last.

    Each form has a server of its own: what one writes is flushed while the next is measured.
    """
    with (
        running_postgres(is_durable=True) as server,
        tempfile.TemporaryDirectory() as folder,
        closing(SqliteStore(Path(folder) / form)) as sqlite,
        closing(PostgresStore(server.url, password=PASSWORD)) as postgres,
    ):
        bare = bare_turn(server, form, codec.encode(state))

        def encoded(n: int) -> None:
            codec.encode(state)
            bare(n)

        sides: dict[str, tuple[Turn, Postgres | None]] = {
            "folder": (turn_of(sqlite, codec, state), None),
            "PostgreSQL": (turn_of(postgres, codec, state), server),
            "bare": (bare, server),
            "bare, encoded": (encoded, server),
        }
        full: Taken = {name: [] for name in sides}
        paced: Taken = {name: [] for name in ("PostgreSQL", "bare", "as fast")}
        for _ in range(num_rounds):
            for name, (turn, database) in sides.items():
                full[name].append(timed(turn, SECONDS, database))
            reached = full["PostgreSQL"][-1]["turns/s"]
            paced["as fast"].append(timed(bare, SECONDS, server, reached))
            for name in ("PostgreSQL", "bare"):
                turn, database = sides[name]
                paced[name].append(timed(turn, SECONDS, database, RATES[form]))
        flushed = {name: flushes(sides[name][0], server) for name in ("PostgreSQL", "bare")}
    return full, paced, flushed


def flushes(turn: Turn, server: Postgres) -> float:
    """Flushes of the log for each turn at full speed."""
    time.sleep(SECONDS_TO_REPORT)
    before = num_flushes(server)
    num_turns = timed(turn, SECONDS, server)["turns/s"] * SECONDS
    time.sleep(SECONDS_TO_REPORT)
    return (num_flushes(server) - before) / num_turns


def num_flushes(server: Postgres) -> int:
    """Since the server was started."""
    with psycopg.connect(server.url, password=PASSWORD, autocommit=True) as db:
        [[num]] = db.execute("SELECT wal_sync FROM pg_stat_wal").fetchall()
    return int(num)


def cpu_ratio(mine: list[Report], least: list[Report]) -> float:
    """The database's processor time a turn, as the median over the rounds of what each costs."""
    return statistics.median(
        one["database CPU ms"] / other["database CPU ms"]
        for one, other in zip(mine, least, strict=True)
    )


def medians(taken: list[Report]) -> Report:
    """Of each figure, over the rounds."""
    return {name: statistics.median(each[name] for each in taken) for name in taken[0]}


def long_session(engine: Engine) -> SessionState:
    """A session that has renewed its state."""
    ids = [300 + n % 700 for n in range(2 * engine.policies.window + 100)]
    engine.submit(ids, SamplingParams(max_tokens=1), start=engine.policies.new_session("renew"))
    outputs = [out for _ in iter(engine.has_work, False) for out in engine.step()]
    assert outputs[-1].state is not None
    return outputs[-1].state


def turn_of(store: SessionStore, codec: SnapshotCodec, state: SessionState) -> Turn:
    """Turns of a store's sessions; every one writes another blob."""
    raw = codec.encode(state)
    made = store.create([NewSession("a", 1, raw + b"%d" % n) for n in range(NUM_SESSIONS)])
    numbers = itertools.count(1000)

    def turn(n: int) -> None:
        lease, _ = store.acquire(made[n].id, 60)
        store.commit(lease, lease.version, codec.encode(state) + b"%d" % next(numbers), 1, 1)

    return turn


def bare_turn(server: Postgres, form: str, raw: bytes) -> Turn:
    """Two transactions of one UPDATE each on one table."""
    table = f"bare_{form}"
    connections = threading.local()
    with psycopg.connect(server.url, password=PASSWORD, autocommit=True) as db:
        db.execute(
            f"CREATE TABLE {table} (id text PRIMARY KEY, fence bigint, version bigint, bytes bytea)"
            " WITH (fillfactor = 70)"
        )
        db.execute(f"ALTER TABLE {table} ALTER bytes SET STORAGE EXTERNAL")
        db.execute(f"INSERT INTO {table} SELECT 'sess-' || md5(n::text), 0, 1, '' FROM {PLACES}")
        rows = db.execute(f"SELECT id FROM {table} ORDER BY id").fetchall()
    ids = [session_id for (session_id,) in rows]
    numbers = itertools.count(1000)

    def turn(n: int) -> None:
        if not hasattr(connections, "db"):
            connections.db = psycopg.connect(
                server.url, password=PASSWORD, autocommit=True, prepare_threshold=None
            )
        stored = Blob.of(raw + b"%d" % next(numbers), b"", 1, "").deflated()
        connections.db.execute(
            f"UPDATE {table} SET fence = fence + 1 WHERE id = %s RETURNING fence, version", [ids[n]]
        ).fetchone()
        connections.db.execute(
            f"UPDATE {table} SET version = version + 1, bytes = %s WHERE id = %s", [stored, ids[n]]
        )

    return turn


def timed(
    turn: Turn, seconds: float, database: Postgres | None, rate: float | None = None
) -> Report:
    """Turns a second from NUM_THREADS threads, their median, and the database's processor time.

    rate: turns begun a second; None: each thread's as soon as its last one has ended.
    """
    taken: list[float] = []
    start = time.perf_counter()
    end = start + seconds
    before = cpu_seconds(database)

    def loop(first: int) -> None:
        for n in itertools.count(first, NUM_THREADS):
            if rate is not None:
                time.sleep(max(0.0, start + n / rate - time.perf_counter()))
            begun = time.perf_counter()
            if begun > end:
                return
            turn(n % NUM_SESSIONS)
            taken.append(1000 * (time.perf_counter() - begun))

    with ThreadPoolExecutor(NUM_THREADS) as pool:
        [*pool.map(loop, range(NUM_THREADS))]
    used = 1000 * (cpu_seconds(database) - before) / len(taken)
    return {
        "turns/s": len(taken) / seconds,
        "turn ms p50": percentile(taken, 50),
        "turn ms p95": percentile(taken, 95),
        "database CPU ms": used if database else 0.0,
    }


def cpu_seconds(database: Postgres | None) -> float:
    """Of the server's processes, those that have ended among them."""
    if database is None or database.process is None:
        return 0.0
    parent = psutil.Process(database.process.pid)
    used = sum(run_seconds(each.pid) for each in (parent, *parent.children(recursive=True)))
    times = parent.cpu_times()  # last: one that has just ended is in it
    return used + times.children_user + times.children_system


def run_seconds(pid: int) -> float:
    """Processor time of a process, to the nanosecond; psutil has it in hundredths of a second."""
    try:
        return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) / 1e9
    except OSError:  # it has ended
        return 0.0


def first_token(engine: Engine, codec: SnapshotCodec, state: SessionState) -> Report:
    """Decoding, and a turn of one token."""
    raw = codec.encode(state)
    taken = []
    for _ in range(10):
        begun = time.perf_counter()
        params = SamplingParams(max_tokens=1, temperature=0)
        engine.submit([300, 301], params, start=codec.decode(raw))
        while engine.has_work():
            engine.step()
        taken.append(1000 * (time.perf_counter() - begun))
    return {"bytes": len(raw), "first token ms p50": percentile(taken, 50)}


if __name__ == "__main__":
    run(__doc__ or "", measure)
