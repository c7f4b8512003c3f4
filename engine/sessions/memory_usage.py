"""What a session takes in the pool, in memory and on the disk, itemised. Loads no torch.

It follows from the model's state and the settings, and is known before there is a session.
"""

from dataclasses import dataclass
from typing import Self

from cottention.engine.state.spec import StateSpec

ID_BYTES, COUNT_BYTES = 40, 120
"""Bytes that CPython takes, about, for an int in a tuple, and for two ints in a dictionary."""

STORED_ID_BYTES, STORED_COUNT_BYTES = 4, 8
HEADER_BYTES = 2048
"""Upper bound of a snapshot's bytes beside its rows and lists: checksum, fingerprints, sizes."""

GB = 10**9


@dataclass(frozen=True, slots=True)
class SessionBytes:
    """Bytes of one session of any age; what depends on its text is at its upper bound.

    items: by content. places: of one session in the pool (resident), in memory (parked), on the
    disk (stored).
    """

    items: dict[str, int]
    places: dict[str, int]

    @classmethod
    def of(
        cls, spec: StateSpec, *, num_ids: int, window: int, max_checkpoints: int, max_outbox: int
    ) -> Self:
        """num_ids: of the tokenizer. window: ids that are kept. max_outbox: bytes of events."""
        slot = spec.itemised_bytes()
        rows = spec.bytes_per_row
        num_kept = window + 1  # the last id waits outside the state, for the next turn
        counts, ids = num_ids * COUNT_BYTES, num_kept * ID_BYTES
        lists = num_kept * STORED_ID_BYTES + num_ids * STORED_COUNT_BYTES
        snapshot = rows + lists + max_outbox + HEADER_BYTES
        items = {
            **slot,
            "logits": 0,
            "counts": counts,
            "ids": ids,
            "outbox": max_outbox,
            "turn_copy": rows,
            "checkpoints": max_checkpoints * snapshot,
        }
        places = {
            "resident": spec.bytes_per_slot,
            "parked": rows + counts + ids + max_outbox,
            "stored": (1 + max_checkpoints) * snapshot,
        }
        return cls(items, places)

    def per_gb(self) -> dict[str, int]:
        """Sessions that fit into 10⁹ bytes of each place, at least."""
        return {place: GB // nbytes for place, nbytes in self.places.items()}
