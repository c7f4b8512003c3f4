"""A process that serves a fake engine as `cottention serve` serves a real one; for signals.

Arguments: seconds per step, seconds to drain. After SIGUSR1 a step takes no time.
"""

import signal
import sys
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from cottention.engine.worker import EngineWorker
from cottention.server.api.app import create_app
from cottention.server.cli import serve
from cottention.server.cli.open_files import connection_table, raise_open_files_limit
from cottention.server.cli.serve import bind_socket, run_server, url_of
from cottention.server.config import ServerConfig
from cottention.server.generation.admission import AdmissionQueue
from cottention.server.generation.async_engine import AsyncEngine
from cottention.server.limits.api_keys import load_api_keys
from tests.server.fake_engine import FakeEngine
from tests.server.fake_sessions import FakeSessions

if TYPE_CHECKING:  # it imports torch, which takes longer than all else here
    from cottention.engine.engine import Engine

serve.FAILURE_SECONDS = 3.0  # a busy machine may need more than a second to ask


def main() -> int:
    fake = FakeEngine(step_seconds=float(sys.argv[1]))
    signal.signal(signal.SIGUSR1, lambda *_: setattr(fake, "step_seconds", 0.0))
    engine = cast("Engine", fake)
    config = ServerConfig(port=0, drain_seconds=float(sys.argv[2]))
    async_engine = AsyncEngine(
        engine, partial(EngineWorker, engine), AdmissionQueue.of(config), config.stream_buffer_bytes
    )
    table = connection_table(config, raise_open_files_limit())
    sock = bind_socket(config.host, config.port)
    url = url_of(sock)
    sessions: Any = FakeSessions()
    app = create_app(async_engine, config, load_api_keys(config), sessions)
    return run_server(app, async_engine, config, sock, table, lambda: print(url, flush=True))


if __name__ == "__main__":
    sys.exit(main())
