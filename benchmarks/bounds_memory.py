"""The sum of docs/operations.md: what a server's memory can come to, by setting."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

MB = 1 << 20


@dataclass(frozen=True, slots=True)
class Settings:
    """The settings on which the sum depends; smaller than the defaults, so that it is reached."""

    model: tuple[str, ...] = ()
    max_body_bytes: int = 4 * MB
    max_slots: int = 16
    session_memory: int = 64 * MB
    prefix_cache_bytes: int = 32 * MB
    max_snapshot_bytes: int = 16 * MB
    max_connections: int = 256
    max_queued_tokens: int = 500_000

    def flags(self) -> list[str]:
        """As `cottention serve` takes them."""
        names = [name for name in self.__dataclass_fields__ if name != "model"]
        return [f"--{name.replace('_', '-')}={getattr(self, name)}" for name in names]


def memory_sum(settings: Settings, capacity: Mapping[str, Any], at_rest: int) -> dict[str, int]:
    """Bytes by row of the table in docs/operations.md.

    capacity: what /v1/capacity answers. at_rest: resident bytes after the start.
    """
    per_state = capacity["bytes_per_session"]["state"]
    return {
        "at rest": at_rest,
        "pool": settings.max_slots * 2 * per_state,
        "parked": settings.session_memory,
        "running turns": settings.max_slots * per_state,
        "paused": settings.max_slots * 2 * per_state,
        "prefix cache": settings.prefix_cache_bytes,
        "connections": settings.max_connections * 256 * 1024,
        "queue": settings.max_queued_tokens * 40,
    }
