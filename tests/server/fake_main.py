"""A process that serves a fake engine as `cottention serve` serves a real one; for signals.

Arguments: seconds per step, seconds to drain.
"""

import sys
from functools import partial
from typing import Any, cast

from cottention.engine.engine import Engine
from cottention.engine.worker import EngineWorker
from cottention.server.admission import Line
from cottention.server.app import create_app
from cottention.server.bridge import Bridge
from cottention.server.key_files import api_keys
from cottention.server.lifecycle import bind_socket, run_server, url_of
from cottention.server.settings import ServerConfig

from tests.server.fake_engine import FakeEngine
from tests.server.fake_sessions import FakeSessions


def main() -> int:
    engine = cast(Engine, FakeEngine(step_seconds=float(sys.argv[1])))
    config = ServerConfig(port=0, drain_seconds=float(sys.argv[2]))
    bridge = Bridge(
        engine, partial(EngineWorker, engine), Line.of(config), config.stream_buffer_bytes
    )
    sock = bind_socket(config.host, config.port)
    url = url_of(sock)
    sessions: Any = FakeSessions()
    app = create_app(bridge, config, api_keys(config), sessions)
    return run_server(app, bridge, config, sock, lambda: print(url, flush=True))


if __name__ == "__main__":
    sys.exit(main())
