"""The application of given settings: what is opened for it, and closed after it.

Modules that load torch are imported inside the functions: what is wrong with the settings is found
before.
"""

import contextlib
from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from fastapi import FastAPI

from cottention.engine.config import EngineConfig
from cottention.engine.models.model_folder import resolve_model
from cottention.server.api.app import create_app
from cottention.server.cli.progress import loaded
from cottention.server.config import ServerConfig
from cottention.server.generation.admission import AdmissionQueue
from cottention.server.generation.async_engine import AsyncEngine
from cottention.server.generation.chat_template import (
    ChatTemplate,
    UnusableTemplate,
    find_template,
)
from cottention.server.http.origin import check_access
from cottention.server.limits.api_keys import ApiKey, load_api_keys, session_quotas
from cottention.server.responses.values import quotas_with_responses
from cottention.server.sessions.storage import check_storage, sessions_of

if TYPE_CHECKING:
    from cottention.engine.encoder_engine import EncoderEngine
    from cottention.engine.engine import Engine


class Application(NamedTuple):
    """An application that starts and stops its engine. has_sessions: not those of encoders."""

    app: FastAPI
    engine: "Engine | EncoderEngine"
    async_engine: AsyncEngine
    has_sessions: bool


@contextlib.contextmanager
def loaded_application(
    model: str | None,
    engine_config: EngineConfig,
    config: ServerConfig,
    own_url: str | None = None,
) -> Iterator[Application]:
    """Check keys, folders and templates, load the model, and open the application around it.

    own_url: as in `application`. Raises ModelFolderError, ConfigurationError, OutOfMemoryError.
    """
    from cottention.engine.opening import open_engine

    keys = load_api_keys(config)
    check_access(config)
    check_storage(config)
    template = find_template(config.chat_template, resolve_model(model).folder)
    engine = loaded(open_engine, model, engine_config)
    with application(engine, config, keys, template, own_url) as opened:
        yield opened


@contextlib.contextmanager
def application(
    engine: "Engine | EncoderEngine",
    config: ServerConfig,
    keys: Sequence[ApiKey],
    template: ChatTemplate | UnusableTemplate | None,
    own_url: str | None = None,
) -> Iterator[Application]:
    """The application around an engine; its sessions are closed at the end of the block.

    own_url: where other servers of the same database reach this one; None: nowhere.
    """
    from cottention.engine.worker import EngineWorker

    async_engine = AsyncEngine(
        engine, partial(EngineWorker, engine), AdmissionQueue.of(config), config.stream_buffer_bytes
    )
    quotas = quotas_with_responses(session_quotas(keys, config), config.max_responses_per_key)
    with sessions_of(engine, config, quotas, own_url) as sessions:
        app = create_app(async_engine, config, keys, sessions, template)
        yield Application(app, engine, async_engine, sessions is not None)
