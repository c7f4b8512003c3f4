"""How much room 100,000 sessions take in PostgreSQL, and whether leasing one takes longer.

All sessions are forks of others, longer than the context window, and are then continued at random
by turns of 16 ids, as recipes with one checkpoint each. What a client would compute for each turn
takes too long for so many: the database runs the store's own two statements of a turn in a loop,
with bytes of real recipes of which eight are changed. Beside them a thousand are in a database of
their own on the same server; leases of both take turns, through the store. PostgreSQL (fsync on) is
started in a temporary folder: `python -m benchmarks.many_sessions`, for which Debian's package is
needed. With --wait it measures when it has read a line from its input.
"""

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
from cottention.engine.sessions.store.postgres.blobs import Blob
from cottention.engine.sessions.store.postgres.store import PostgresStore
from cottention.engine.state.session_state import SessionState
from tests.engine.postgres import PASSWORD, Postgres, running_postgres

NUM_FEW = 1_000
NUM_MANY = 100_000
TURNS_PER_SESSION = 2
IDS_PER_TURN = 16
NUM_BASES = 64
NUM_CONNECTIONS = 4
NUM_ROUNDS = 9
LEASES_PER_ROUND = 500
IDS = range(300, 1000)
"""9.5 bits each, as much as those of a text."""

FORK = """
INSERT INTO cottention.sessions (id, owner, created, nbytes, metadata, states)
SELECT 'sess-' || md5(n::text), s.owner, s.created, s.nbytes, s.metadata, s.states
FROM generate_series(1, %(num)s::int) AS n
JOIN (SELECT *, row_number() OVER () - 1 AS place FROM cottention.sessions) AS s
    ON s.place = n %% %(num_bases)s
"""
COUNT = """
UPDATE cottention.blobs AS b SET refs = found.refs FROM (
    SELECT decode(states->-1->>0, 'hex') AS digest, count(*) AS refs
    FROM cottention.sessions GROUP BY 1) AS found
WHERE b.digest = found.digest
"""
TAKE_TURNS = """
CREATE PROCEDURE take_turns(first int, step int, num_sessions int, num_turns int, recipes bytea[])
LANGUAGE plpgsql AS $$
DECLARE
    place text;
    leased json;
    states json;
    dropped bytea[];
    raw bytea;
    digest bytea;
BEGIN
    FOR n IN 1..num_turns LOOP
        place = 'sess-' || md5((first + step * floor(random() * num_sessions / step)::int)::text);
        leased = cottention.acquire_v1(place, NULL, 'a replica', n, 60);
        states = leased->8;
        raw = overlay(recipes[1 + n % cardinality(recipes)] PLACING int8send(n * step + first)
            FROM 100);
        digest = sha256(raw);
        dropped = '{}';
        IF json_array_length(states) > 1 THEN
            dropped = ARRAY[decode(states->0->>0, 'hex')];
        END IF;
        PERFORM cottention.commit_v1(place, (leased->>0)::bigint, 'a replica',
            (leased->>4)::bigint, n, false,
            json_build_array(states->-1, json_build_array(encode(digest, 'hex'),
                (states->-1->>1)::bigint + 16, 13280, 'renew 256/1024', 0)),
            26560, ARRAY(SELECT unnest(dropped || digest) ORDER BY 1), digest,
            (states->-1->>1)::bigint + 16, 13280, 'renew 256/1024', 0, raw,
            dropped[1]);
        COMMIT;
    END LOOP;
END $$
"""


def recipes_of(codec: SnapshotCodec, window: int) -> list[bytes]:
    """Snapshots of sessions that are longer than the window."""
    found = []
    for n in range(NUM_BASES):
        ids = random.Random(n).choices(IDS, k=window + IDS_PER_TURN)
        recent = tuple(ids[-window:])
        state = SessionState((), IDS_PER_TURN, recent, recent, Counter(ids), b"", "renew")
        found.append(codec.encode(state))
    return found


def build(server: Postgres, name: str, num: int, recipes: list[bytes]) -> tuple[str, list[str]]:
    """A database of so many sessions; its address and their ids."""
    with psycopg.connect(server.url, password=PASSWORD, autocommit=True) as db:
        db.execute(f"CREATE DATABASE {name}".encode())
    url = server.url.removesuffix("postgres") + name
    with closing(PostgresStore(url, password=PASSWORD)) as store:
        store.create([NewSession("a", 1040, raw, context_policy="renew") for raw in recipes])
    stored = [Blob.of(raw, b"", 1, "renew").deflated() for raw in recipes]

    def turns(first: int) -> None:
        with psycopg.connect(url, password=PASSWORD, autocommit=True) as db:
            db.execute("SET synchronous_commit = off")  # the leases that are timed wait for it
            db.execute(
                "CALL take_turns(%s, %s, %s, %s, %s)",
                [
                    *(first, NUM_CONNECTIONS, num),
                    *(num * TURNS_PER_SESSION // NUM_CONNECTIONS, stored),
                ],
            )

    with psycopg.connect(url, password=PASSWORD, autocommit=True) as db:
        db.execute(FORK, {"num": num, "num_bases": NUM_BASES})
        db.execute(COUNT)
        db.execute(TAKE_TURNS)
        with ThreadPoolExecutor(NUM_CONNECTIONS) as pool:
            [*pool.map(turns, range(1, NUM_CONNECTIONS + 1))]
        rows = db.execute("SELECT id FROM cottention.sessions WHERE version > 1").fetchall()
    return url, [session_id for (session_id,) in rows]


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
    recipes = recipes_of(engine.session_codec(writes_recipes=True), engine.policies.window)
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
