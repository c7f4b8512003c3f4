"""`cottention` with an engine whose steps take at least STEP_SECONDS: turns last for seconds.

LIFE_SECONDS, where it is given: for so long after its last beat a server counts as alive.
"""

import os
import time
from typing import Any

from cottention.engine.engine import Engine
from cottention.engine.sessions.store.postgres import queries, replica
from cottention.server.cli.main import run

_step = Engine.step


def _slow_step(self: Engine) -> Any:
    time.sleep(float(os.environ["STEP_SECONDS"]))
    return _step(self)


setattr(Engine, "step", _slow_step)  # noqa: B010

if "LIFE_SECONDS" in os.environ:
    replica.LIFE_SECONDS = float(os.environ["LIFE_SECONDS"])
    missed = replica.LIFE_SECONDS - 2.5 * replica.BEAT_SECONDS
    setattr(queries, "MISSED_SECONDS", missed)  # noqa: B010

if __name__ == "__main__":
    run()
