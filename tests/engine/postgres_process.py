"""A replica in a process of its own, to be stopped or killed; run as a script by tests.

Its arguments: the database's address, a verb, a session's id. It reads a line before each step.
"""

import sys

from cottention.engine.errors import SessionMovedError
from cottention.engine.sessions.store.postgres.store import PostgresStore


def main(url: str, session_id: str) -> None:
    """Lease the session, and commit it when told to."""
    store = PostgresStore(url)
    lease, _ = store.acquire(session_id, 60)
    print("leased", store.is_alive, flush=True)
    for line in sys.stdin:
        if line == "alive\n":
            print(store.is_alive, flush=True)
            continue
        try:
            record = store.commit(lease, lease.version, b"late", 4, 2)
            print("committed", record.version, flush=True)
        except SessionMovedError:
            print("moved", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
