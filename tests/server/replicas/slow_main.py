"""`cottention` with an engine whose steps take at least STEP_SECONDS: turns last for seconds."""

import os
import time
from typing import Any

from cottention.engine.engine import Engine
from cottention.server.cli.main import run

_step = Engine.step


def _slow_step(self: Engine) -> Any:
    time.sleep(float(os.environ["STEP_SECONDS"]))
    return _step(self)


setattr(Engine, "step", _slow_step)  # noqa: B010

if __name__ == "__main__":
    run()
