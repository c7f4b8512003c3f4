"""What keys use at all servers of the database together: tokens of a minute, running requests.

Both are lost in a crash of the database, as they are in one of a server, and filled anew.
"""

from collections.abc import Mapping

from cottention.engine.sessions.store.postgres.connections import Connections
from cottention.engine.sessions.store.postgres.replica import Replica
from cottention.engine.sessions.store.protocol import KeyLedger, Loan

LEVEL = (
    "least(%(per_minute)s, b.tokens"
    " + extract(epoch FROM clock_timestamp() - b.filled_at)::float8 * %(per_minute)s / 60)"
)
"""Of a bucket that was filled since, and before the loan."""


def _lent(level: str) -> str:
    return f"least(%(portion)s, greatest(0, {level} - %(owed)s))"


def _left(level: str) -> str:
    return f"{level} - %(owed)s - {_lent(level)}"


FULL = "%(per_minute)s::float8"
BORROW = (
    "INSERT INTO cottention.budgets AS b (owner, tokens, lent, filled_at)"
    f" VALUES (%(owner)s, {_left(FULL)}, {_lent(FULL)}, clock_timestamp())"
    f" ON CONFLICT (owner) DO UPDATE SET tokens = {_left(LEVEL)}, lent = {_lent(LEVEL)},"
    " filled_at = clock_timestamp() RETURNING tokens, lent"
)
EXCHANGE = (
    "WITH ended AS (DELETE FROM cottention.key_use"
    "  WHERE replica = %(replica)s AND owner <> ALL(%(owners)s::text[])),"
    " running AS (INSERT INTO cottention.key_use AS u (owner, replica, running)"
    "  SELECT owner, %(replica)s, running FROM unnest(%(owners)s::text[], %(running)s::bigint[])"
    "   AS each (owner, running)"
    "  ON CONFLICT (owner, replica) DO UPDATE SET running = excluded.running"
    "   WHERE u.running <> excluded.running)"
    " SELECT u.owner, sum(u.running)::bigint FROM cottention.key_use AS u"
    " JOIN cottention.replicas AS r ON r.id = u.replica AND r.until > clock_timestamp()"
    " WHERE u.replica <> %(replica)s GROUP BY u.owner"
)


class PostgresKeyLedger(KeyLedger):
    """See KeyLedger."""

    def __init__(self, connections: Connections, replica: Replica) -> None:
        self._connections = connections
        self._replica = replica
        self.replica = replica.name

    @property
    def is_alive(self) -> bool:
        return self._replica.is_alive

    def borrow(self, owner: str, owed: float, portion: float, per_minute: int) -> Loan:
        values = {"owner": owner, "owed": owed, "portion": portion, "per_minute": per_minute}
        [[tokens, lent]] = self._connections.write(
            lambda db: db.execute(BORROW, values).fetchall(), relaxed=True, seconds=0.0
        )
        return Loan(lent, max(0.0, 60 * (1 - tokens) / per_minute))

    def exchange(self, running: Mapping[str, int]) -> Mapping[str, int]:
        values = {
            "replica": self._replica.id,
            "owners": [*running],
            "running": [*running.values()],
        }
        return dict(
            self._connections.write(
                lambda db: db.execute(EXCHANGE, values).fetchall(), relaxed=True, seconds=0.0
            )
        )
