"""`cottention chat` and `generate -i`: a conversation at a terminal, or one answer.

The model is served within this process, or by the server of --url: either way what is said here is
a request to the same endpoints.
"""

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from cottention.engine.config import EngineConfig
from cottention.engine.errors import ConfigurationError, CottentionError
from cottention.engine.standard_streams import OutputError
from cottention.server.cli.progress import progress
from cottention.server.cli.terminal import (
    RED,
    LineReader,
    is_terminal,
    note,
    show,
    standard_input,
)
from cottention.server.client.client import Client, RemoteError
from cottention.server.client.conversation import (
    Conversation,
    ConversationError,
    choices_of,
    request_of,
    text_of,
)
from cottention.server.client.settings import ChatConfig, ClientConfig
from cottention.server.config import GENERATE_MAX_TOKENS, GenerateConfig

NumLeft = Callable[[], int]

EXIT_FAILURE = 1
EXIT_HANGUP = 129

NO_TEMPLATE = (
    "{model} has no chat template, so it cannot be asked: {start} --chat-template plain, or with"
    " --chat-template FILE, or let it continue text (cottention generate)"
)


class Model(NamedTuple):
    """What a server says of its model; of another's server nothing is known."""

    name: str
    has_template: bool
    has_sessions: bool


def chat(
    message: str | None,
    client_config: ClientConfig,
    config: ChatConfig,
    generation: GenerateConfig,
    engine_config: EngineConfig,
    *,
    is_plain: bool = False,
    first: str | None = None,
) -> int:
    """Answer one message, or those of a person at a terminal; returns the exit status.

    message: None is a conversation where standard input is a terminal, else what is read from it.
    is_plain: texts are continued, without a chat's template. first: begins the conversation.
    """
    is_interactive = message is None and is_terminal(sys.stdin)
    if not is_interactive:
        message = first or (standard_input() if message in (None, "-") else message)
        if not message:
            raise ConfigurationError("there is no text; give it as an argument, a file or a pipe")
    template = config.chat_template
    with opened(client_config, generation.model, engine_config, template) as (client, num_left):
        model = _model_of(client)
        if not is_plain and not model.has_template:
            if not is_interactive:
                raise ConversationError(_no_template(model, client_config))
            if not _accepts_continuation(_no_template(model, client_config)):
                return EXIT_FAILURE
            is_plain = True
        parameters = _parameters(generation, model, client_config, is_plain=is_plain)
        if message is not None and not is_interactive:
            request = request_of(message, not is_plain, config.system, parameters)
            return _answer_once(client, request, num_left)
        if not model.has_sessions:
            raise ConversationError(
                f"{client.url} has no sessions, which a conversation needs; give one MESSAGE"
            )
        system = None if is_plain else config.system
        conversation = Conversation(
            client, is_chat=not is_plain, parameters=parameters, system=system
        )
        with contextlib.closing(conversation):
            Dialogue(conversation, model, num_left, is_plain=is_plain).run(first)
    return 0


@contextlib.contextmanager
def opened(
    config: ClientConfig, model: str | None, engine_config: EngineConfig, template: str | None
) -> Iterator[tuple[Client, NumLeft | None]]:
    """A client of the server of --url, else of one within this process.

    With that comes how many tokens of prompts it has still to read, which another does not tell.
    """
    if config.url is not None:
        with contextlib.closing(Client.of(config)) as client:
            yield client, None
        return
    from cottention.server.cli.embedded import embedded_server
    from cottention.server.log_config import configure_logging

    configure_logging("warning", "text")
    with (
        embedded_server(model, engine_config, template) as embedded,
        contextlib.closing(Client(embedded.url)) as client,
    ):
        yield client, embedded.num_to_prefill


def _model_of(client: Client) -> Model:
    models = client.get("/v1/models").get("data")
    found = models[0] if isinstance(models, list) and models else None
    if not isinstance(found, dict):
        raise RemoteError(f"{client.url} lists no models, as OpenAI's API does")
    is_ours = "capabilities" in found
    return Model(
        found.get("id", ""),
        has_template=found.get("chat_template", True) if is_ours else True,
        has_sessions=is_ours and "sessions" in found["capabilities"],
    )


def _parameters(
    config: GenerateConfig, model: Model, client: ClientConfig, *, is_plain: bool
) -> dict[str, Any]:
    """The flags' values; the server knows the model's own."""
    names = ("max_tokens", "temperature", "top_p", "top_k", "min_p", "seed")
    values: dict[str, Any] = {name: getattr(config, name) for name in names}
    values["stop"] = list(config.stop) or None
    if is_plain and values["max_tokens"] is None:  # the endpoint's own is a line
        values["max_tokens"] = GENERATE_MAX_TOKENS
    values["model"] = (config.model if client.url else None) or model.name
    return {name: value for name, value in values.items() if value is not None}


def _no_template(model: Model, config: ClientConfig) -> str:
    start = "chat with" if config.url is None else "start its server with"
    return NO_TEMPLATE.format(model=model.name, start=start)


def _accepts_continuation(reason: str) -> bool:
    note(reason)
    with _interruptible():
        answer = LineReader(()).read("Continue your text instead? [Y/n] ")
    return answer is not None and answer.strip().lower() in ("", "y", "yes")


def _answer_once(
    client: Client, request: tuple[str, dict[str, Any]], num_left: NumLeft | None
) -> int:
    chunks = client.events(*request)
    pieces = Noted(text_of(each) for chunk in chunks for each in choices_of(chunk))
    _show_all(pieces, num_left)
    if not pieces.last.endswith("\n"):
        show("\n")
    return 0


def _show_all(pieces: Iterator[str], num_left: NumLeft | None) -> None:
    """Show pieces as they come, after a bar while the first is waited for."""
    with contextlib.ExitStack() as waiting:
        waiting.enter_context(progress("reading", num_left))
        for piece in pieces:
            if piece:
                waiting.close()
                show(piece)


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt once within the block, and is ignored after it."""

    def interrupt(*_: object) -> NoReturn:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def _stopping(stop: Callable[[], None]) -> Iterator[None]:
    """The first Ctrl-C within the block calls `stop`, the second raises KeyboardInterrupt."""

    def first(*_: object) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        stop()

    before = signal.signal(signal.SIGINT, first)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


class Noted(Iterator[str]):
    """Pieces of text; `last` is the last of those that have come and are not empty."""

    def __init__(self, pieces: Iterator[str]) -> None:
        self._pieces = pieces
        self.last = ""

    def __next__(self) -> str:
        piece = next(self._pieces)
        self.last = piece or self.last
        return piece


class Dialogue:
    """Reads lines of a person, and answers them until the end of input or /quit."""

    def __init__(
        self,
        conversation: Conversation,
        model: Model,
        num_left: NumLeft | None,
        *,
        is_plain: bool,
    ) -> None:
        """num_left: tokens of prompts that the server has still to read, where that is known."""
        self._conversation = conversation
        self._num_left = num_left
        self._model = model
        self._is_plain = is_plain
        self._is_ended = False
        self._ends_line = True
        self._commands: dict[str, tuple[Callable[[str], None], str, str]] = {
            "/fork": (self._fork, "[NAME]", "go on in a copy of this branch"),
            "/switch": (self._switch, "NAME", "go on in another branch"),
            "/branches": (self._branches, "", "list the branches and their tokens"),
            "/rewind": (self._rewind, "[N]", "undo the last turn, or the last N"),
            "/save": (self._save, "FILE", "write this branch to a file"),
            "/load": (self._load, "FILE", "go on from a file"),
            "/help": (self._help, "", "show this"),
            "/quit": (self._quit, "", "leave; so does Ctrl-D"),
        }

    def run(self, first: str | None = None) -> None:
        """Until the person leaves; `first` is said before anything is read."""
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # but for the blocks that take it
        signal.signal(signal.SIGHUP, _hang_up)
        what = "text to continue" if self._is_plain else "a message"
        note(f"{self._model.name}: type {what}; /help lists commands, Ctrl-D leaves")
        try:
            with LineReader([*self._commands]) as self._reader:
                if first is not None:
                    show(first)
                    self._take(first)
                while not self._is_ended:
                    self._take_next()
        finally:
            signal.signal(signal.SIGINT, before)

    def _take_next(self) -> None:
        try:
            with _interruptible():
                text = self._read()
        except KeyboardInterrupt:
            note("\n(Ctrl-D leaves)")
            return
        if text is None:
            note("")
            self._is_ended = True
        else:
            self._take(text)

    def _read(self) -> str | None:
        """What the person types; a backslash at the end of a line adds another."""
        name = self._conversation.name if len(self._conversation.branches) > 1 else ""
        lines = [self._reader.read(f"{name}> ")]
        while lines[-1] is not None and lines[-1].endswith("\\"):
            lines[-1] = lines[-1].removesuffix("\\")
            lines.append(self._reader.read(". "))
        return None if lines[-1] is None else "\n".join(line or "" for line in lines)

    def _take(self, text: str) -> None:
        """Do what a text says; what goes wrong is a note, and the conversation goes on."""
        word, _, rest = text.strip().partition(" ")
        try:
            if not text.startswith("/"):
                self._answer(text)
            elif word in self._commands:
                with _interruptible():
                    self._commands[word][0](rest.strip())
            else:
                note(f"there is no command {word}; /help lists them, a space before it sends it")
        except OutputError:
            raise
        except CottentionError as error:
            note(" ".join(str(error).split()), RED)
        except KeyboardInterrupt:
            note("\n(interrupted)")

    def _answer(self, text: str) -> None:
        conversation = self._conversation
        before = conversation.branch.context_start
        if self._is_plain:  # what the terminal shows on a new line is one
            text = text if self._ends_line or not text else f"\n{text}"
        if not text.strip() and not (self._is_plain and conversation.branch.position):
            return
        pieces = Noted(conversation.ask(text))
        try:
            with _stopping(conversation.stop):
                _show_all(pieces, self._num_left)
        finally:
            if pieces.last:
                self._ends_line = pieces.last.endswith("\n")
                show("" if self._ends_line else "\n")
        self._tell_end(before)

    def _tell_end(self, context_start_before: int) -> None:
        reason, branch = self._conversation.finish_reason, self._conversation.branch
        told = {"abort": "stopped", "length": "stopped at --max-tokens", "timeout": "timed out"}
        if reason in told and not (reason == "length" and self._is_plain):
            note(f"({told[reason]})")
        if branch.context_start > context_start_before:
            start = f"{branch.context_start:,}"
            note(f"(of {branch.position:,} tokens those before {start} are forgotten)")

    def _fork(self, name: str) -> None:
        note(f"this is {self._conversation.fork(name or None)}")

    def _switch(self, name: str) -> None:
        self._conversation.switch(name)
        self._tell_position()

    def _branches(self, _: str) -> None:
        for name, branch in self._conversation.branches.items():
            mark = "*" if name == self._conversation.name else " "
            note(f"{mark} {name}  {branch.position:,} tokens")

    def _rewind(self, count: str) -> None:
        if count and not (count.isdecimal() and int(count)):
            raise ConversationError(f"/rewind {count}: N must be a whole number from 1")
        try:
            self._conversation.rewind(int(count or 1))
        finally:
            self._ends_line = True
            self._tell_position()

    def _save(self, name: str) -> None:
        path = self._path(name, "/save")
        if path.exists():
            answer = self._reader.read(f"{path} exists; overwrite it? [y/N] ") or ""
            if answer.strip().lower() not in ("y", "yes"):
                return
        size = self._conversation.save(path)
        note(f"wrote {size:,} bytes")

    def _load(self, name: str) -> None:
        self._conversation.load(self._path(name, "/load"))
        self._ends_line = True
        self._tell_position()

    @staticmethod
    def _path(name: str, command: str) -> Path:
        if not name:
            raise ConversationError(f"{command} needs a file's name, as in {command} talk.session")
        return Path(os.path.expanduser(name))

    def _tell_position(self) -> None:
        note(f"{self._conversation.name} holds {self._conversation.branch.position:,} tokens")

    def _help(self, _: str) -> None:
        for name, (_command, argument, meaning) in self._commands.items():
            note(f"{f'{name} {argument}':<16} {meaning}")
        if self._is_plain:
            note(f"{'an empty line':<16} go on from where the text is")
        note(f"{'Ctrl-C':<16} stop the answer; what there is of it is kept")
        last = "a final \\"
        note(f"{last:<16} another line of the same message")

    def _quit(self, _: str) -> None:
        self._is_ended = True


def _hang_up(*_: object) -> NoReturn:
    """The terminal is gone: leave in order, with the sessions deleted and the history kept."""
    raise SystemExit(EXIT_HANGUP)
