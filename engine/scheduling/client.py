"""On whose behalf a request runs. Loads no torch: servers name their clients by it."""

from typing import NamedTuple


class Client(NamedTuple):
    """A party among which the engine's time is shared, in proportion to the weights.

    id: requests of one id are of one client. weight: from 1.
    """

    id: str = ""
    weight: int = 1


DEFAULT_CLIENT = Client()
"""Of requests that name none."""
