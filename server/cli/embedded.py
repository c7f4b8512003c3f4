"""A server within this process, for commands that load a model themselves and speak HTTP to it.

It listens on a unix socket in a folder that only this user can enter.
"""

import contextlib
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import uvicorn

from cottention.engine.config import EngineConfig
from cottention.engine.errors import ConfigurationError
from cottention.engine.models.model_folder import resolve_model
from cottention.server.cli.application import application
from cottention.server.cli.open_files import connection_table
from cottention.server.cli.progress import loaded
from cottention.server.cli.serve import bounded, listening
from cottention.server.config import ServerConfig
from cottention.server.generation.chat_template import find_template
from cottention.server.http.listener import BoundedServer

CHECKPOINTS = 64
"""Turns that a conversation can be rewound by; states of one conversation take little disk."""


class Embedded(NamedTuple):
    """A server's URL, and how many tokens of prompts its engine has not read yet."""

    url: str
    num_to_prefill: Callable[[], int]


@contextlib.contextmanager
def embedded_server(
    model: str | None,
    engine_config: EngineConfig,
    chat_template: str | None = None,
    *,
    served_model_name: str | None = None,
    may_be_encoder: bool = False,
) -> Iterator[Embedded]:
    """Load a model, and serve it until the end of the block.

    Raises ModelFolderError, ConfigurationError or OutOfMemoryError.
    """
    from cottention.engine.opening import open_engine

    with tempfile.TemporaryDirectory(prefix="cottention-") as folder:
        config = ServerConfig(
            uds=str(Path(folder, "server")),
            ui=False,
            chat_template=chat_template,
            served_model_name=served_model_name,
            session_checkpoints=CHECKPOINTS,
        )
        template = find_template(config.chat_template, resolve_model(model).folder)
        engine = loaded(open_engine, model, engine_config)
        if not may_be_encoder and "completions" not in engine.capabilities:
            raise ConfigurationError(f"{engine.name} is an encoder: it generates no text")
        with (
            listening(config) as sock,
            application(engine, config, (), template) as served,
        ):
            table = connection_table(config, -1)
            settings = uvicorn.Config(
                served.app,
                log_config=None,
                log_level="warning",
                access_log=False,
                ws="none",
                http=bounded(config, table),
                timeout_graceful_shutdown=1,
            )
            server = BoundedServer(settings, table)
            thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)
            thread.start()
            try:
                yield Embedded(f"unix:{config.uds}", lambda: getattr(engine, "num_to_prefill", 0))
            finally:
                served.async_engine.stop()
                server.should_exit = True
                thread.join()
