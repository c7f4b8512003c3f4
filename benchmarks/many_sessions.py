"""How much room 100,000 sessions take in PostgreSQL, and whether leasing one takes longer.

All sessions are forks of others, longer than the context window, and are then continued at random
by turns of 16 ids, as recipes with one checkpoint each. Beside them a thousand are in a database of
their own on the same server; leases of both take turns. PostgreSQL (fsync on) is started in a
temporary folder: `python -m benchmarks.many_sessions`, for which Debian's package is needed. What
it builds takes minutes; with --wait it measures when it has read a line from its input.
"""

import itertools
import random
import statistics
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import psycopg

from benchmarks.common import Report, parser, percentile, show, write_json
from cottention.engine import Engine, EngineConfig
from cottention.engine.sessions.snapshot import SnapshotCodec
from cottention.engine.sessions.store import NewSession
from cottention.engine.sessions.store.postgres.store import PostgresStore
from cottention.engine.state.session_state import SessionState
from tests.engine.postgres import PASSWORD, Postgres, running_postgres

NUM_FEW = 1_000
NUM_MANY = 100_000
TURNS_PER_SESSION = 2
IDS_PER_TURN = 16
NUM_BASES = 64
IDS = range(300, 1000)
"""9.5 bits each, as much as those of a text."""
BATCH = 100
NUM_THREADS = 8
NUM_ROUNDS = 9
LEASES_PER_ROUND = 1_000
# A build that is lost is begun again; the leases that are timed wait for the disk.
RELAXED = "?options=-c%20synchronous_commit%3Doff"


class Recipes:
    """Sessions as ids: what one is after any number of turns follows from its number."""

    def __init__(self, codec: SnapshotCodec, window: int) -> None:
        self._codec = codec
        self._window = window
        self._bases = [random.Random(n).choices(IDS, k=window) for n in range(NUM_BASES)]

    def encode(self, base: int, turns: int, seed: int) -> bytes:
        """The snapshot of a session after so many turns, the last of them with ids of `seed`."""
        new = random.Random(seed).choices(IDS, k=IDS_PER_TURN * turns)
        ids = (*self._bases[base], *new)
        recent = ids[-self._window :]
        counts = Counter(ids)
        state = SessionState((), len(ids) - len(recent), recent, recent, counts, b"", "renew")
        return self._codec.encode(state)


def build(server: Postgres, name: str, num: int, recipes: Recipes) -> tuple[str, list[str]]:
    """A database of so many sessions; its address and their ids."""
    with psycopg.connect(server.url, password=PASSWORD, autocommit=True) as db:
        db.execute(f"CREATE DATABASE {name}")
    url = server.url.removesuffix("postgres") + name
    rng = random.Random(num)
    with closing(PostgresStore(url + RELAXED, password=PASSWORD)) as store:
        bases = [NewSession("a", 1, recipes.encode(n, 0, n)) for n in range(NUM_BASES)]
        records = store.create(bases)
        ids = [record.id for record in records]
        while len(ids) < num:
            sources = [store.record(rng.choice(ids)) for _ in range(10)]
            forks = [
                NewSession("a", each.position, head=each.head, checkpoints=each.checkpoints)
                for each in itertools.islice(itertools.cycle(sources), min(BATCH, num - len(ids)))
            ]
            ids += [record.id for record in store.create(forks)]
        numbers = itertools.count()

        def turns(thread: int) -> None:
            mine = random.Random(thread)
            for _ in range(num * TURNS_PER_SESSION // NUM_THREADS):
                place = mine.randrange(len(ids) // NUM_THREADS) * NUM_THREADS + thread
                lease, record = store.acquire(ids[place], 60)
                raw = recipes.encode(place % NUM_BASES, record.version, next(numbers))
                store.commit(lease, lease.version, raw, record.position + IDS_PER_TURN, 1, "renew")

        with ThreadPoolExecutor(NUM_THREADS) as pool:
            [*pool.map(turns, range(NUM_THREADS))]
    return url, ids


def leases(store: PostgresStore, ids: list[str], rng: random.Random) -> list[float]:
    """Milliseconds of acquires, one after another, of random sessions."""
    taken = []
    for _ in range(LEASES_PER_ROUND):
        session_id = rng.choice(ids)
        begun = time.perf_counter()
        lease, _ = store.acquire(session_id, 60)
        taken.append(1000 * (time.perf_counter() - begun))
        store.release(lease)
    return taken


def room(url: str) -> Report:
    """Gigabytes of the tables with their indices, free places among them; WAL is not counted."""
    with psycopg.connect(url, password=PASSWORD, autocommit=True) as db:
        db.execute("CHECKPOINT")
        rows = db.execute(
            "SELECT relname, pg_total_relation_size(c.oid) FROM pg_class AS c"
            " JOIN pg_namespace AS n ON n.oid = c.relnamespace"
            " WHERE n.nspname = 'cottention' AND c.relkind = 'r'"
        ).fetchall()
        sizes = dict(rows)
        [[database]] = db.execute("SELECT pg_database_size(current_database())").fetchall()
    return {
        "sessions GB": sizes["sessions"] / 1e9,
        "blobs GB": sizes["blobs"] / 1e9,
        "database GB": database / 1e9,
    }


def measure(quick: bool, wait: Callable[[], object]) -> Report:
    """One table, with a row for each database."""
    engine = Engine(config=EngineConfig(max_slots=1))
    recipes = Recipes(engine.session_codec(writes_recipes=True), engine.policies.window)
    sizes = {"few": NUM_FEW, "many": NUM_FEW * 4 if quick else NUM_MANY}
    with running_postgres(is_durable=True) as server:
        built = {name: build(server, name, num, recipes) for name, num in sizes.items()}
        wait()
        rounds: dict[str, list[list[float]]] = {name: [] for name in built}
        rng = random.Random(1)
        for _ in range(NUM_ROUNDS):
            for name, (url, ids) in built.items():
                with closing(PostgresStore(url, password=PASSWORD)) as store:
                    rounds[name].append(leases(store, ids, rng))
        rows = [
            {
                "sessions": sizes[name],
                **room(url),
                "acquire ms p50": statistics.median(percentile(each, 50) for each in rounds[name]),
                "acquire ms p95": statistics.median(percentile(each, 95) for each in rounds[name]),
            }
            for name, (url, _) in built.items()
        ]
    ratio = statistics.median(
        percentile(many, 95) / percentile(few, 95)
        for few, many in zip(rounds["few"], rounds["many"], strict=True)
    )
    show("Many sessions", rows)
    show("Many sessions: acquire p95 beside that of few", [{"ratio": ratio}])
    return {"many_sessions": rows, "ratio": ratio}


def main() -> None:
    """Parse, measure, write JSON."""
    options = parser(__doc__)
    options.add_argument("--wait", action="store_true", help="measure after a line of input")
    arguments = options.parse_args()
    wait = (lambda: input("built: measuring after the next line\n")) if arguments.wait else str
    figures = measure(arguments.quick, wait)
    if arguments.json:
        write_json(arguments.json, figures)


if __name__ == "__main__":
    main()
