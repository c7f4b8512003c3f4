"""How often ids came. Knows no torch."""

from array import array
from collections.abc import Iterable, Mapping


class Counts:
    """Ids that came and how often each did, side by side in memory: tensors view them as they are.

    ids int64, each once; times float32.
    """

    def __init__(
        self, read: Iterable[int] = (), generated: Mapping[int, int] | None = None
    ) -> None:
        """`read`: ids that came, 0 times so far; `generated`: how often each was generated."""
        times = {**dict.fromkeys(read, 0), **(generated or {})}
        self.ids = array("q", times)
        self.times = array("f", times.values())
        self._places = {token_id: place for place, token_id in enumerate(times)}

    def __len__(self) -> int:
        return len(self.ids)

    def note(self, token_id: int) -> None:
        """An id has been generated."""
        place = self._places.setdefault(token_id, len(self.ids))
        if place == len(self.ids):
            self.ids.append(token_id)
            self.times.append(0)
        self.times[place] += 1
