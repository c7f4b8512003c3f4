"""A replica that takes turns of shared sessions until it is killed; run as a script by tests.

Arguments: the database's address, this replica's name, "fenced" or "naive", session ids. A session
holds the names of its turns. A line is printed before a commit and after its answer.
"""

import random
import sys
import time
from contextlib import suppress
from itertools import count

from cottention.engine.errors import (
    ConfigurationError,
    SessionBusyError,
    SessionMovedError,
    SnapshotError,
    StoreUnavailableError,
)
from cottention.engine.sessions.store.postgres import connections
from cottention.engine.sessions.store.postgres.store import PostgresStore
from cottention.engine.sessions.store.protocol import Lease


def say(*words: object) -> None:
    print(*words, flush=True)


def take_turn(store: PostgresStore, session_id: str, name: str, *, is_naive: bool) -> None:
    """One turn, as long as a short generation. naive: as if late writes were not refused."""
    with suppress(SessionBusyError, StoreUnavailableError, SnapshotError):
        lease, record = store.acquire(session_id, 60)
        content = store.get(record.head) + f" {name}".encode()
        time.sleep(random.uniform(0, 0.03))
        say("trying", session_id, name)
        try:
            done = store.commit(lease, lease.version, content, record.position + 1, 1)
        except SessionMovedError:
            if not is_naive:
                say("refused", session_id, name)
                return
            lease = acquired_at_last(store, session_id)
            done = store.commit(lease, lease.version, content, record.position + 1, 1)
        say("done", session_id, name, done.position)


def acquired_at_last(store: PostgresStore, session_id: str) -> Lease:
    """Others have it most of the time: a late writer that gave up would seldom be late."""
    while True:
        with suppress(SessionBusyError):
            return store.acquire(session_id, 60)[0]


def opened(url: str) -> PostgresStore:
    while True:
        with suppress(ConfigurationError):  # the database is being restarted
            return PostgresStore(url)
        time.sleep(0.1)


def main(url: str, replica: str, mode: str, *session_ids: str) -> None:
    connections.ATTEMPT_SECONDS = 2.0  # for packets that are swallowed
    store = opened(url)
    for n in count():
        name = f"{replica}.{n}"
        take_turn(store, random.choice(session_ids), name, is_naive=mode == "naive")


if __name__ == "__main__":
    main(*sys.argv[1:])
