"""What a session takes in the pool, in memory and on disk, at most, by item. Loads no torch.

It follows from the model's state and the settings, and is known before there is a session.
"""

from dataclasses import dataclass
from typing import Self

from cottention.engine.state.session_state import MAX_UNDECODED
from cottention.engine.state.spec import StateSpec

ID_BYTES, COUNT_BYTES = 40, 120
"""Approximate bytes in CPython of an int in a tuple, and of an int pair in a dictionary."""

VALUE_BYTES, EVENT_BYTES = 4096, 48
"""Of a session's value in memory besides its lists: the objects and their places in the cache; of
an event besides its text, which is at least as long."""

STORED_ID_BYTES, STORED_COUNT_BYTES = 4, 8
HEADER_BYTES = 2048
"""At most, of a blob besides rows, lists and events: checksum, fingerprints, sizes."""

GB = 10**9


@dataclass(frozen=True, slots=True)
class SessionBytes:
    """The most bytes that one session takes at any age, after turns that ended by themselves.

    The ids of a turn that was cut come on top, at most MAX_PENDING of them.

    items: by content. places: of one session in the pool (resident), in memory (parked), on the
    disk (stored).
    """

    items: dict[str, int]
    places: dict[str, int]

    @classmethod
    def of(
        cls,
        spec: StateSpec,
        *,
        num_ids: int,
        window: int,
        max_checkpoints: int,
        max_event_log_bytes: int,
    ) -> Self:
        """num_ids: of the tokenizer. window: recent ids kept.

        max_event_log_bytes: bytes of events.
        """
        slot = spec.itemised_bytes()
        rows = spec.bytes_per_row
        num_kept = window + 1  # the last id waits outside the state, for the next turn
        counts, ids = num_ids * COUNT_BYTES, num_kept * ID_BYTES
        lists = num_kept * STORED_ID_BYTES + num_ids * STORED_COUNT_BYTES
        snapshot = rows + lists + max_event_log_bytes + HEADER_BYTES
        items = {
            **slot,
            "logits": 0,
            "counts": counts,
            "ids": ids,
            "event_log": max_event_log_bytes,
            "turn_copy": rows,
            "checkpoints": max_checkpoints * snapshot,
        }
        places = {
            "resident": spec.bytes_per_slot,
            "parked": VALUE_BYTES + MAX_UNDECODED + rows + counts + ids + 2 * max_event_log_bytes,
            "stored": (1 + max_checkpoints) * snapshot,
        }
        return cls(items, places)

    def per_gb(self) -> dict[str, int]:
        """Sessions that fit into 10⁹ bytes of each place, at least."""
        return {place: GB // nbytes for place, nbytes in self.places.items()}
