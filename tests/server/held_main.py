"""A process in which every request comes to a stop where it waits for something; for signals.

The tokenizer, the chat template and the sessions wait at a text or a call that is to be held, and
the engine makes no step. Each prints a line where it begins to wait. SIGUSR1 lets all go on.
"""

import asyncio
import signal
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from cottention.engine.models.model_folder import DEFAULT_MODEL
from cottention.engine.worker import EngineWorker
from cottention.server.api.app import create_app
from cottention.server.cli.open_files import connection_table, raise_open_files_limit
from cottention.server.cli.serve import bind_socket, run_server, url_of
from cottention.server.config import ServerConfig
from cottention.server.generation.admission import AdmissionQueue
from cottention.server.generation.async_engine import AsyncEngine
from cottention.server.generation.chat_template import ChatTemplate, find_template
from tests.server.fake_engine import FakeEngine, FakeTokenizer
from tests.server.fake_sessions import FakeSessions

if TYPE_CHECKING:  # it imports torch, which takes longer than all else here
    from cottention.engine.engine import Engine

HELD_TEXT = "hold the tokenizer"
HELD_CHAT = "hold the template"
FREE = threading.Event()


def hold() -> None:
    """Say that a request waits, and wait."""
    print("held", flush=True)
    FREE.wait()


class HeldTokenizer(FakeTokenizer):
    def encode(self, text: str) -> list[int]:
        if HELD_TEXT in text:
            hold()
        return super().encode(text)


class HeldTemplate(ChatTemplate):
    def render(self, messages: Any, variables: Any) -> str:
        if HELD_CHAT in str(messages):
            hold()
        return ChatTemplate.render(self, messages, variables)


class HeldSessions(FakeSessions):
    """`open` is held where there is metadata."""

    def open(
        self, owner: str, state: Any, metadata: Any, ttl_seconds: float | None, **more: Any
    ) -> Any:
        if metadata:
            hold()
        return super().open(owner, state, metadata, ttl_seconds, **more)

    def fork(self, *arguments: Any) -> Any:
        hold()
        return super().fork(*arguments)

    def rewind(self, *arguments: Any) -> Any:
        hold()
        return super().rewind(*arguments)

    def import_(self, *arguments: Any) -> Any:
        hold()
        return super().import_(*arguments)


class HeldEngine(FakeEngine):
    def __init__(self) -> None:
        super().__init__()
        self.tokenizer = HeldTokenizer()
        self.may_step = FREE

    def submit(self, *arguments: Any, **more: Any) -> str:
        name = super().submit(*arguments, **more)
        print("held", flush=True)
        return name


def main() -> int:
    signal.signal(signal.SIGUSR1, lambda *_: FREE.set())
    fake = HeldEngine()
    engine = cast("Engine", fake)
    config = ServerConfig(port=0, drain_seconds=float(sys.argv[1]))
    async_engine = AsyncEngine(
        engine, partial(EngineWorker, engine), AdmissionQueue.of(config), config.stream_buffer_bytes
    )
    plain = find_template("plain", DEFAULT_MODEL)
    assert isinstance(plain, ChatTemplate)
    template = HeldTemplate(plain.template, plain.stop, plain.variables)
    table = connection_table(config, raise_open_files_limit())
    sock = bind_socket(config.host, config.port)
    sessions: Any = HeldSessions()
    app = create_app(async_engine, config, (), sessions, template)

    def announce() -> None:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(64))
        print(url_of(sock), flush=True)

    return run_server(app, async_engine, config, sock, table, announce)


if __name__ == "__main__":
    sys.exit(main())
