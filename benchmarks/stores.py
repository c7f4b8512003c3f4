"""What a turn costs the store of sessions: a folder and PostgreSQL, whole states and recipes.

Sessions of the default model, each longer than the context window. A turn is the lease, the
encoding of the state and the commit, from eight threads. The bare transactions beside them are the
least that a shared store can do: an UPDATE that leases, and one that puts as many bytes in place.
PostgreSQL (fsync on) is started in a temporary folder: `python -m benchmarks.stores`, where
Debian's package is installed; it is not among `python -m benchmarks`.
"""

import itertools
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
from cottention.engine.sessions.store.postgres.store import PostgresStore
from cottention.engine.state.session_state import SessionState
from tests.engine.postgres import PASSWORD, Postgres, running_postgres

NUM_THREADS = 8
NUM_SESSIONS = 64
SECONDS = 8.0


def measure(quick: bool) -> Report:
    """Two tables: turns, and reading a state that is not in memory."""
    engine = Engine(config=EngineConfig(max_slots=4))
    state = long_session(engine)
    codecs = {
        "whole": engine.session_codec(),
        "recipe": engine.session_codec(writes_recipes=True),
    }
    seconds = SECONDS / 8 if quick else SECONDS
    rows, reads = [], []
    with running_postgres(is_durable=True) as server, tempfile.TemporaryDirectory() as folder:
        for form, codec in codecs.items():
            stores: dict[str, SessionStore] = {
                "folder": SqliteStore(Path(folder) / form),
                "PostgreSQL": PostgresStore(server.url, password=PASSWORD),
            }
            for name, store in stores.items():
                with closing(store):
                    database = server if name == "PostgreSQL" else None
                    row = turns(store, codec, state, seconds, database)
                    rows.append({"store": name, "states": form} | row)
        rows += [
            {"store": "bare", "states": form} | bare(server, len(codec.encode(state)), seconds)
            for form, codec in codecs.items()
        ]
    for form, codec in codecs.items():
        reads.append({"states": form} | first_token(engine, codec, state))
    show("Stores: turns", rows)
    show("Stores: first token of a session that is not in memory", reads)
    return {"turns": rows, "reads": reads}


def long_session(engine: Engine) -> SessionState:
    """A session that has renewed its state."""
    ids = [300 + n % 700 for n in range(2 * engine.policies.window + 100)]
    engine.submit(ids, SamplingParams(max_tokens=1), start=engine.policies.new_session("renew"))
    outputs = [out for _ in iter(engine.has_work, False) for out in engine.step()]
    assert outputs[-1].state is not None
    return outputs[-1].state


def turns(
    store: SessionStore,
    codec: SnapshotCodec,
    state: SessionState,
    seconds: float,
    database: Postgres | None,
) -> Report:
    """Turns of random sessions; every one writes another blob."""
    raw = codec.encode(state)
    made = store.create([NewSession("a", 1, raw + b"%d" % n) for n in range(NUM_SESSIONS)])
    numbers = itertools.count(1000)

    def turn(n: int) -> None:
        lease, _ = store.acquire(made[n % NUM_SESSIONS].id, 60)
        store.commit(lease, lease.version, codec.encode(state) + b"%d" % next(numbers), 1, 1)

    return {"bytes": len(raw)} | timed(turn, seconds, database)


def bare(server: Postgres, nbytes: int, seconds: float) -> Report:
    """Two transactions of one UPDATE each on one table."""
    raw = bytes(range(256)) * (nbytes // 256)
    connections = threading.local()
    with psycopg.connect(server.url, password=PASSWORD, autocommit=True) as db:
        db.execute("CREATE TABLE IF NOT EXISTS bare (id int PRIMARY KEY, fence int, bytes bytea)")
        db.execute("ALTER TABLE bare ALTER bytes SET STORAGE EXTERNAL")
        db.execute("TRUNCATE bare")
        db.execute("INSERT INTO bare SELECT n, 0, '' FROM generate_series(0, 63) AS n")

    def turn(n: int) -> None:
        if not hasattr(connections, "db"):
            connections.db = psycopg.connect(
                server.url, password=PASSWORD, autocommit=True, prepare_threshold=None
            )
        place = n % NUM_SESSIONS
        connections.db.execute("UPDATE bare SET fence = fence + 1 WHERE id = %s", [place])
        connections.db.execute("UPDATE bare SET bytes = %s WHERE id = %s", [raw, place])

    return {"bytes": nbytes} | timed(turn, seconds, server)


def timed(turn: Callable[[int], None], seconds: float, database: Postgres | None) -> Report:
    """Turns a second from NUM_THREADS threads, their median, and the database's processor time."""
    taken: list[float] = []
    end = time.perf_counter() + seconds
    before = cpu_seconds(database)

    def loop(first: int) -> None:
        for n in itertools.count(first, NUM_THREADS):
            begun = time.perf_counter()
            if begun > end:
                return
            turn(n)
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
    """Of the server's processes. Those that have ended in between are not in it."""
    if database is None or database.process is None:
        return 0.0
    parent = psutil.Process(database.process.pid)
    times = [each.cpu_times() for each in (parent, *parent.children(recursive=True))]
    return sum(each.user + each.system for each in times)


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
