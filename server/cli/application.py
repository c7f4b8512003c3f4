"""The application around an engine: its queue, its sessions and its endpoints."""

import contextlib
from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

from fastapi import FastAPI

from cottention.engine.worker import EngineWorker
from cottention.server.api.app import create_app
from cottention.server.config import ServerConfig
from cottention.server.generation.admission import AdmissionQueue
from cottention.server.generation.async_engine import AsyncEngine
from cottention.server.generation.chat_template import ChatTemplate, UnusableTemplate
from cottention.server.limits.api_keys import ApiKey, session_quotas
from cottention.server.sessions.storage import sessions_of

if TYPE_CHECKING:  # they import torch
    from cottention.engine.encoder_engine import EncoderEngine
    from cottention.engine.engine import Engine


@contextlib.contextmanager
def application(
    engine: "Engine | EncoderEngine",
    config: ServerConfig,
    keys: Sequence[ApiKey],
    template: ChatTemplate | UnusableTemplate | None,
) -> Iterator[tuple[FastAPI, AsyncEngine, bool]]:
    """The application, its engine on the event loop, and whether it has sessions.

    These are closed at the end.
    """
    async_engine = AsyncEngine(
        engine, partial(EngineWorker, engine), AdmissionQueue.of(config), config.stream_buffer_bytes
    )
    with sessions_of(engine, config, session_quotas(keys, config)) as sessions:
        app = create_app(async_engine, config, keys, sessions, template)
        yield app, async_engine, sessions is not None
