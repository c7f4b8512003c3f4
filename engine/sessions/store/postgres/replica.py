"""This server among those that share the database: its row, and the heartbeats that keep it alive.

A lease names a replica and is valid while that lives by the database's clock. Nobody compares the
clocks of two machines.
"""

import contextlib
import logging
import threading
import time
from uuid import uuid4

from cottention.engine.sessions.store.postgres.connections import (
    BEGIN_RELAXED,
    UNREACHABLE,
    Connections,
    Db,
    reason_of,
)

logger = logging.getLogger(__name__)

BEAT_SECONDS = 0.4
LIFE_SECONDS = 2.0
"""After its last beat, until a replica counts as dead and its sessions may be taken over."""
MISSED_SECONDS = LIFE_SECONDS - 2.5 * BEAT_SECONDS
"""A replica that has less than this left of its life has missed beats."""
SECONDS_TO_FORGET = 3600.0
"""After which the row of a dead replica is removed."""

BEAT = """
INSERT INTO cottention.replicas (id, name, url, build, model, until)
VALUES (%(id)s, %(name)s, %(url)s, %(build)s, %(model)s,
    clock_timestamp() + make_interval(secs => %(life)s))
ON CONFLICT (id) DO UPDATE SET until = excluded.until
RETURNING extract(epoch FROM clock_timestamp())::float8
"""


class Replica:
    """A replica that lives from `start` to `stop`. id: of this process, never used again.

    life: grows when it beats again after it may have counted as dead.
    """

    def __init__(
        self, connections: Connections, *, name: str, url: str | None, build: str, model: str
    ) -> None:
        self.id = uuid4().hex
        self.name = name
        self._values = {
            "id": self.id,
            "name": name,
            "url": url,
            "build": build,
            "model": model,
            "life": LIFE_SECONDS,
        }
        self._connections = connections
        self._stopping = threading.Event()
        self._offset = 0.0
        self._last_beat = float("-inf")
        self._is_missing_beats = False
        self._alive_since = float("-inf")
        self.life = 0
        self._thread = threading.Thread(target=self._run, name="session-store-beat", daemon=True)

    def start(self) -> None:
        """Beat once, and go on in a thread. Raises psycopg's errors."""
        with self._connections.connect() as db:
            self._beat(db)
        self._thread.start()

    def stop(self) -> None:
        """Stop beating, and end the life of the replica: its leases end with it. Idempotent."""
        if self._stopping.is_set():
            return
        self._stopping.set()
        self._thread.join()
        with contextlib.suppress(*UNREACHABLE), self._connections.connect() as db:
            db.execute(
                "UPDATE cottention.replicas SET until = clock_timestamp(), draining = true"
                " WHERE id = %s",
                [self.id],
            )

    def now(self) -> float:
        """The database's time in unix seconds, as far as the last beat tells."""
        return time.monotonic() + self._offset

    @property
    def is_alive(self) -> bool:
        """Whether the others surely see this replica alive: its last beat is young enough."""
        return time.monotonic() - self._last_beat < LIFE_SECONDS

    @property
    def is_steady(self) -> bool:
        """Whether it has lived for LIFE_SECONDS: where nobody could beat, the others have beaten
        again since.
        """
        return self.is_alive and time.monotonic() - self._alive_since > LIFE_SECONDS

    def _run(self) -> None:
        """On a connection of its own: it never waits for those of turns."""
        while not self._stopping.is_set():
            try:
                with self._connections.connect() as db:
                    while not self._stopping.wait(BEAT_SECONDS):
                        self._beat(db)
            except UNREACHABLE as error:
                if not self._is_missing_beats:
                    logger.warning("no heartbeat reaches the database: %s", reason_of(error))
                self._is_missing_beats = True
                self._stopping.wait(BEAT_SECONDS)
            except Exception:
                logger.exception("a heartbeat failed; it is tried again")
                self._stopping.wait(BEAT_SECONDS)

    def _beat(self, db: Db) -> None:
        # the time before it was sent: others count from when it arrived
        sent = time.monotonic()
        with self._connections.watched(db, LIFE_SECONDS):
            db.execute(BEGIN_RELAXED.encode())
            [[now]] = db.execute(BEAT, self._values).fetchall()
            db.execute(
                "DELETE FROM cottention.replicas"
                " WHERE until < clock_timestamp() - make_interval(secs => %s)",
                [SECONDS_TO_FORGET],
            )
            db.execute("COMMIT")
        self._offset = now - time.monotonic()
        if sent - self._last_beat >= LIFE_SECONDS:
            self.life += 1
            self._alive_since = sent
        self._last_beat = sent
        if self._is_missing_beats:
            self._is_missing_beats = False
            logger.info("heartbeats reach the database again")
