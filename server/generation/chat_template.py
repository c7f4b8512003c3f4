"""Chat templates: from messages to the text of a prompt, and to that of a session's later turn.

Templates are rendered within a time limit. A turn of a session renders only its new messages:
`render_after` finds what a template writes after an assistant's message, and `ChatContinuation`
leaves out what the session already ends with.
"""

import contextlib
import ctypes
import io
import logging
import secrets
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Template

from cottention.engine.errors import ConfigurationError, ModelFolderError
from cottention.engine.text.files import ignore, read_side_json
from cottention.server.generation.control_tokens import (
    ControlTokens,
    Message,
    RenderedChat,
    UntrackableError,
    track,
)
from cottention.server.generation.template_environment import (
    compile_template,
    literals_of,
    variables_of,
)
from cottention.server.generation.template_files import choose_source, special_tokens
from cottention.server.generation.tools.formats import PLAIN_JSON, ToolFormat, format_of

if TYPE_CHECKING:
    from cottention.engine.text.base import BaseTokenizer


MAX_SECONDS = 2.0
MAX_CHARACTERS = 64 * 1024**2

DEFAULT_VARIABLES: Mapping[str, Any] = {
    "tools": None,
    "documents": None,
    "add_generation_prompt": False,
}
"""What transformers gives every template."""

logger = logging.getLogger("cottention")

PROBE_MESSAGES: Sequence[Message] = [
    {"role": role, "content": "?"} for role in ("user", "assistant", "user")
]
"""A conversation with which templates are tried out."""


class ChatTemplateError(Exception):
    """A template rejects these messages, or exceeds the limits on time or size."""


@dataclass(frozen=True, slots=True)
class UnusableTemplate:
    """A template that cannot be used, and why: chats are refused, everything else works."""

    reason: str


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """A compiled template.

    stop: stop strings, in addition to the client's own.
    variables: the special tokens, by name.
    opening: the token at the beginning of a conversation, unless every turn has it; else empty.
    literals: the texts that are written in the template.
    has_tools: whether it shows the functions that may be called, and calls.
    """

    template: Template
    stop: tuple[str, ...]
    variables: Mapping[str, str]
    opening: str = ""
    literals: str = ""
    has_tools: bool = False

    @property
    def tool_format(self) -> ToolFormat:
        """How the model that it is for writes calls."""
        return format_of(self.literals) if self.has_tools else PLAIN_JSON

    @property
    def end_texts(self) -> tuple[str, ...]:
        """Texts with which a response may end, and that its session then holds."""
        token = self.variables.get("eos_token")
        return (*self.stop, token) if token else self.stop

    def render(self, messages: Sequence[Message], variables: Mapping[str, Any]) -> str:
        """The prompt, rendered with more variables. Raises ChatTemplateError."""
        given = {**DEFAULT_VARIABLES, **self.variables, **variables, "messages": messages}
        text = io.StringIO()
        try:
            with time_limit(MAX_SECONDS):
                for part in self.template.generate(given):
                    text.write(part)
                    if text.tell() > MAX_CHARACTERS:
                        raise ChatTemplateError(
                            f"the chat template renders these messages to more than"
                            f" {MAX_CHARACTERS} characters"
                        )
        except TimeLimitExceeded:
            message = f"the chat template takes more than {MAX_SECONDS} seconds for these messages"
            raise ChatTemplateError(message) from None
        except ChatTemplateError:
            raise
        except Exception as error:  # expressions of the template may raise anything
            raise ChatTemplateError(f"the chat template rejects these messages: {error}") from None
        return text.getvalue()

    def track(
        self,
        messages: Sequence[Message],
        variables: Mapping[str, Any],
        control: ControlTokens | None,
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> RenderedChat:
        """The prompt, and which parts of it come from the client. Raises ChatTemplateError.

        tools: functions that the template shows; control tokens in them are text, too.
        """

        def rendered(parts: Sequence[Message]) -> str:
            if not tools:
                return self.render(parts, variables)
            *marked, last = parts
            return self.render(marked, {**variables, **last})

        def render_marked(marked: Sequence[Message]) -> str | None:
            try:
                return rendered(marked)
            except ChatTemplateError:
                return None

        parts = [*messages, {"tools": list(tools)}] if tools else messages
        try:
            return track(rendered(parts), render_marked, parts, control)
        except UntrackableError as error:
            raise ChatTemplateError(f"the chat template {error}") from None

    def up_to_last_content(
        self, chat: RenderedChat, messages: Sequence[Message], variables: Mapping[str, Any]
    ) -> RenderedChat:
        """The prompt up to the end of the last message's content, which an answer goes on with.

        chat: what `track` made of the messages. White space at the end of the content stays if the
        template keeps it. Raises ChatTemplateError.
        """
        mark = f"mark{secrets.token_hex(8)}"
        *others, last = messages
        marked = {**last, "content": f"{last['content']}{mark}"}
        begin, found, _ = self.render([*others, marked], variables).partition(mark)
        for kept in (begin, begin.rstrip()):
            if found and kept and chat.text.startswith(kept):
                return chat.until(len(kept))
        raise ChatTemplateError(
            "the chat template does not write the last message as it is, so that it cannot be"
            " continued"
        )


def find_template(choice: str | None, folder: Path) -> ChatTemplate | UnusableTemplate | None:
    """The chosen template, else the model folder's own, else None.

    choice: the name of a template in the folder or of a built-in one, or a file.
    A template that is damaged is logged; JSON that is damaged is reported by the engine.
    Raises ConfigurationError for a choice that is nothing.
    """
    config = read_side_json(folder / "tokenizer_config.json", ignore)  # the engine reports it
    where = str(folder)
    try:
        source, stop, where = choose_source(choice, folder, config)
        if source is None:
            return None
        compiled = compile_template(source)
        template = ChatTemplate(
            compiled,
            stop,
            special_tokens(folder, config),
            literals=literals_of(source),
            has_tools="tools" in variables_of(source),
        )
    except ConfigurationError:
        raise
    except ModelFolderError as error:
        reason = str(error)
    except Exception as error:  # Jinja and Python's compiler raise many kinds
        reason = f"{where} is not a valid template: {_one_line(error)}"
    else:
        return replace(template, opening=_opening(template))
    logger.warning("chats are refused: %s", reason)
    return UnusableTemplate(reason)


def _one_line(error: Exception) -> str:
    """An error's message without line breaks."""
    return " ".join(str(error).split()) or type(error).__name__


def _opening(template: ChatTemplate) -> str:
    """`bos_token`, unless the template begins a later turn with it, too."""
    token = template.variables.get("bos_token", "")
    if not token:
        return ""
    try:
        past, longer = (template.render(PROBE_MESSAGES[:num], {}) for num in (2, 3))
    except ChatTemplateError:  # the template rejects such a conversation
        return token
    return "" if longer.startswith(past + token) else token


# Continuing a session

MAX_SEAM = 1024
"""Characters of a seam that are compared; client variables may make it arbitrarily long."""


@dataclass(frozen=True, slots=True)
class ChatContinuation:
    """The prompt of a turn in a session that is not empty.

    ids: what the template writes after an assistant's message, the new messages included.
    seam: the beginning of its text that the template writes before the first new message.
    end_texts: texts with which a response may end; the session may already hold one.
    add_special_tokens: whether the tokenizer's special tokens are added around the prompt.
    """

    ids: list[int]
    seam: str = ""
    end_texts: tuple[str, ...] = ()
    add_special_tokens: bool = False

    def after(self, past: Sequence[int], tokenizer: "BaseTokenizer") -> list[int]:
        """The prompt after a session that ends with `past`, without what `past` has of the seam."""
        seam, written = self.seam[:MAX_SEAM].encode(), tokenizer.written_bytes
        head = [written[each] for each in self.ids[: len(seam)]]
        tail = b"".join(written[each] for each in past[-len(seam) :]) if seam else b""
        stops = [each.encode() for each in self.end_texts if tail.endswith(each.encode())]
        ids = self.ids[_num_present(seam, head, tail, stops) :]
        return tokenizer.framed(ids) if self.add_special_tokens else ids


def render_after(
    template: ChatTemplate,
    messages: Sequence[Message],
    variables: Mapping[str, Any],
    control: ControlTokens | None = None,
    tools: Sequence[Mapping[str, Any]] = (),
    *,
    continues_last: bool = False,
) -> tuple[RenderedChat, str] | None:
    """What a template writes after an assistant's message, and the seam with which that begins.

    continues_last: only up to the end of the last message's content.
    None if the template rejects `messages` at that place.
    """
    mark = f"mark{secrets.token_hex(8)}"
    past = [PROBE_MESSAGES[0], {"role": "assistant", "content": mark}]
    marked = [*past, {**messages[0], "content": mark}]
    try:
        whole = template.track([*past, *messages], variables, control, tools)
        if continues_last:
            whole = template.up_to_last_content(whole, [*past, *messages], variables)
        seams = template.render(marked, variables).split(mark)
    except ChatTemplateError:
        return None
    before, _, text = whole.text.partition(mark)
    if not text or mark in text or len(seams) != 3:
        return None
    seam = seams[1]
    later = whole.after(len(before) + len(mark))
    return later, seam if text.startswith(seam) else ""


def _num_present(seam: bytes, head: Sequence[bytes], tail: bytes, stops: Sequence[bytes]) -> int:
    """How many ids of `head` the session, which ends with the text `tail`, already holds.

    As many as possible; else those up to the first end of a response, before which a template may
    write white space that the model did not generate. Ids are never split, because a part of a
    special token is ordinary text.
    """
    ends = list(accumulate(map(len, head)))
    begins = [seam[:end] for end in ends if end <= len(seam)]
    present = [place for place, begin in enumerate(begins, 1) if tail.endswith(begin)]
    ended = (place for place, begin in enumerate(begins, 1) if begin.endswith(tuple(stops)))
    return present[-1] if present else next(ended, 0)


# Time limit


class TimeLimitExceeded(BaseException):
    """The time is over. A BaseException, so that the template's code cannot catch it."""


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeLimitExceeded in the block once its time is over.

    The exception is raised in the block's thread between two bytecodes, so that a single long call
    of C code is not interrupted.
    """
    thread = ctypes.c_ulong(threading.get_ident())
    lock, is_over = threading.Lock(), False

    def interrupt() -> None:
        with lock:
            if not is_over:
                error = ctypes.py_object(TimeLimitExceeded)
                ctypes.pythonapi.PyThreadState_SetAsyncExc(thread, error)

    timer = threading.Timer(seconds, interrupt)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        with lock:
            is_over = True
        time.sleep(0)  # a pending exception is raised here at the latest
