"""The server as an application of Ray Serve, which keeps its replicas alive.

    serve run cottention.server.cluster.ray:app replicas=3 \
        session_store=postgresql://user@host/database

docs/cluster/ray.md says what differs from `cottention serve`.
"""

import contextlib
import os
from collections.abc import Mapping
from typing import Any

from ray import serve
from ray.serve.config import RequestRouterConfig
from starlette.types import ASGIApp

from cottention.engine.config import EngineConfig
from cottention.engine.errors import ConfigurationError
from cottention.engine.settings.sources import Sources, variable_of
from cottention.server.cli.options import NAMES
from cottention.server.config import ModelArgument, ServerConfig
from cottention.server.log_config import configure_logging

MAX_ONGOING_REQUESTS = 1024
"""Of a replica, whose own queue says what it refuses."""

SECONDS_TO_CLOSE = 15.0
"""After the drain, for the last turns and the database."""

ROUTER = "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"


def sources_of(arguments: Mapping[str, Any]) -> Sources:
    """Settings by their names, before the variables `COTTENTION_*` of this process.

    Raises ConfigurationError.
    """
    for name in arguments:
        if name not in NAMES:
            raise ConfigurationError(
                f"there is no setting {name!r}; `cottention serve --help` lists them, with dashes"
            )
    given = {variable_of(name): str(value) for name, value in arguments.items()}
    return Sources({}, os.environ | given)


@serve.ingress()
class Server:
    """One replica: an engine and the application around it, in an actor of Ray."""

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        """arguments: settings by their names. Raises ConfigurationError."""
        from cottention.server.cli.application import loaded_application

        sources = sources_of(arguments)
        config = sources.read(ServerConfig).value
        configure_logging(config.log_level, config.log_format)
        model = sources.read(ModelArgument).value.model
        self._opened = contextlib.ExitStack()
        self._application = self._opened.enter_context(
            loaded_application(model, sources.read(EngineConfig).value, config)
        )
        if self._application.has_sessions and config.session_store is None:
            self._opened.close()
            raise ConfigurationError(
                "replicas of Ray Serve share their sessions: give session_store=postgresql://..."
            )

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """Ray starts and stops the application, and with it the engine's thread."""
        return self._application.app

    def check_health(self) -> None:
        """Ray replaces a replica whose engine has stopped."""
        if not self._application.async_engine.is_alive:
            raise RuntimeError("the engine has stopped")

    def __del__(self) -> None:
        """After the application's shutdown: end the leases, close the database."""
        if hasattr(self, "_opened"):
            self._opened.close()


def app(arguments: Mapping[str, Any]) -> serve.Application:
    """What `serve run` starts.

    arguments: `replicas` (1), `cpus` (1) and `gpus` (0) of each replica, and settings of
    `cottention serve` by their names. Raises ConfigurationError.
    """
    settings = dict(arguments)
    replicas = int(settings.pop("replicas", 1))
    resources = {
        "num_cpus": float(settings.pop("cpus", 1)),
        "num_gpus": float(settings.pop("gpus", 0)),
    }
    drain = sources_of(settings).read(ServerConfig).value.drain_seconds
    deployed = serve.deployment(
        Server,
        name="cottention",
        num_replicas=replicas,
        ray_actor_options=resources,
        max_ongoing_requests=MAX_ONGOING_REQUESTS,
        health_check_period_s=5.0,
        health_check_timeout_s=10.0,
        graceful_shutdown_wait_loop_s=1.0,
        graceful_shutdown_timeout_s=drain + SECONDS_TO_CLOSE,
        request_router_config=RequestRouterConfig(request_router_class=ROUTER),
    )
    return deployed.bind(settings)
