"""A process that uses a store until it is killed; run as a script by the tests of the store.

It prints a line for everything that the store has answered: what is printed must be there after.
"""

import random
import resource
import sys
from pathlib import Path

from cottention.engine.errors import StoreFullError
from cottention.engine.sessions.store import NewSession, SqliteStore

NUM_SESSIONS = 4


def content(session_id: str, version: int) -> bytes:
    """A snapshot that can be told from every other; sizes from a few bytes to 100 KB."""
    seed = f"{session_id} {version} ".encode()
    return seed * random.Random(seed).randint(1, 2000)


def events(version: int) -> bytes:
    """What is stored beside a snapshot: every other turn has events."""
    return b"event %d " % version * 100 if version % 2 else b""


def say(*words: object) -> None:
    print(*words, flush=True)


def put_forever(folder: Path) -> None:
    """One turn after the other on sessions of its own, two checkpoints each."""
    store = SqliteStore(folder)
    made = store.create([NewSession("a", 0, snapshot=b"%d" % n) for n in range(NUM_SESSIONS)])
    for record in made:
        say("made", record.id, 1)
    while True:
        session_id = random.choice(made).id
        lease, _ = store.acquire(session_id, 1000, "a")
        say("begun", session_id, lease.version)
        version = lease.version + 1
        new = content(session_id, version)
        record = store.commit(lease, lease.version, new, version, 2, events=events(version))
        say("put", session_id, record.version)


def hold(folder: Path) -> None:
    """Have the folder until it is killed."""
    SqliteStore(folder)
    say("held")
    sys.stdin.read()


def fill(folder: Path) -> None:
    """Put ever larger snapshots under a limit of a file's size, and go on after it is reached."""
    store = SqliteStore(folder)
    [record] = store.create([NewSession("a", 1, snapshot=b"small")])
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, resource.RLIM_INFINITY))
    lease, _ = store.acquire(record.id, 1000)
    try:
        store.commit(lease, 1, bytes(2 << 20), 2, 2)
    except StoreFullError:
        say("full")
    say("is", store.record(record.id).version, store.get(record.head).decode())
    say("put", store.commit(lease, 1, b"smaller", 2, 2).version)


if __name__ == "__main__":
    {"put": put_forever, "hold": hold, "fill": fill}[sys.argv[1]](Path(sys.argv[2]))
