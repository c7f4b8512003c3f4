"""The sum of docs/operations.md: what a server's memory can come to, by setting."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from cottention.server.http.body_memory import LARGE_BYTES, NUM_SMALL

KIB, MIB = 1 << 10, 1 << 20

PROCESSED, UNDER_WAY, IMPORTED = 240, 40, 10
"""Bytes for each byte of a body: while it is tokenized, until its request ends; of a snapshot."""

CONNECTION, READ, ITEM = 256 * KIB, 384 * KIB, 300
"""Bytes of a connection, of a read of a snapshot or an event log, of an item of a response."""


@dataclass(frozen=True, slots=True)
class Settings:
    """The settings on which the sum depends; smaller than the defaults, so that it means much."""

    model: tuple[str, ...] = ()
    max_body_bytes: int = 4 * MIB
    max_received_bytes: int = 16 * MIB
    max_slots: int = 8
    session_memory: int = 64 * MIB
    prefix_cache_bytes: int = 32 * MIB
    max_snapshot_bytes: int = 4 * MIB
    max_session_reads: int = 32
    max_connections: int = 256
    max_response_items: int = 50_000

    def flags(self) -> list[str]:
        """As `cottention serve` takes them."""
        names = [each.name for each in fields(self) if each.name != "model"]
        return [f"--{name.replace('_', '-')}={getattr(self, name)}" for name in names]


def memory_sum(settings: Settings, capacity: Mapping[str, Any], at_rest: int) -> dict[str, int]:
    """Bytes by row of the table in docs/operations.md.

    capacity: what /v1/capacity answers. at_rest: resident bytes after the start.
    """
    state = settings.max_slots * capacity["bytes_per_session"]["state"]
    small = NUM_SMALL * min(settings.max_body_bytes, LARGE_BYTES)
    return {
        "at rest": at_rest,
        "pool": 2 * state,
        "parked": settings.session_memory,
        "turns": state,
        "paused": 2 * state,
        "preempted": 6 * state,
        "prefix cache": settings.prefix_cache_bytes,
        "processed": PROCESSED * (settings.max_body_bytes + small),
        "under way": UNDER_WAY * settings.max_received_bytes,
        "imports": IMPORTED * 2 * settings.max_snapshot_bytes,
        "reads": READ * settings.max_session_reads,
        "connections": CONNECTION * settings.max_connections,
        "responses": ITEM * 2 * settings.max_response_items,
    }
