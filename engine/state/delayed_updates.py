"""Updates that decode steps have made to states of a pool and not yet written there.

A step that decodes reads a state once, and would write it once. With delayed updates it writes the
token's mapped key and value instead; the next steps add them to the state as they read it, and
every `capacity`-th writes the sum. Whoever else reads a row settles it first.

Letters: S rows of the pool, L layers, C capacity, H heads, V value width, K key width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from cottention.engine import ops


class DelayedUpdates:
    """Up to C − 1 updates of each row of a pool; after a step with the C-th it has none."""

    def __init__(self, state: Tensor, capacity: int) -> None:
        """state: the pool's, [S, L, H, V, K]."""
        rows, layers, heads, value, key = state.shape
        self.capacity = capacity
        self._state = state
        self._keys = state.new_zeros(rows, capacity, layers, heads, key)
        self._values = state.new_zeros(rows, capacity, layers, heads, value)
        # the last one is that of padding, so that rows of a step need not be told apart
        self._counts = torch.zeros(rows + 1, dtype=torch.int32, device=state.device)

    @property
    def nbytes(self) -> int:
        """Bytes of all rows' updates and of their counts."""
        return self._keys.nbytes + self._values.nbytes + self._counts[:-1].nbytes

    def layer(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        """Keys [S, C, H, K] and values [S, C, H, V] of one layer, and counts int32 [S + 1]."""
        return self._keys[:, :, index], self._values[:, :, index], self._counts

    def advance(self, state_indices: Tensor) -> None:
        """Count a token of each row of int32 [B], after its last layer. Can be captured."""
        rows = state_indices.long().remainder(len(self._counts))  # −1, padding, is the last
        self._counts[rows] = (self._counts[rows] + 1) % self.capacity

    def settle(self, rows: Sequence[int]) -> None:
        """Add the updates of these rows to their states; −1 is padding."""
        wanted = torch.tensor(rows, dtype=torch.int32, device=self._state.device)
        keys, values = self._keys.flatten(2, 3), self._values.flatten(2, 3)
        ops.fold_updates(self._state.flatten(1, 2), keys, values, self._counts, wanted)
        self._counts[wanted.long()] = 0

    def drop(self, row: int) -> None:
        """Forget the updates of a row that is overwritten."""
        self._counts[row] = 0
