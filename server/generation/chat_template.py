"""Chat templates: from a list of messages to the text of a prompt.

Owns where templates are found, the sandbox they run in, and the bounds on what they make. Knows
transformers' habits, for which published templates are written; knows no HTTP.

How a chat goes on in a session: what its template writes after an assistant's message.

Owns how that is found, and what of it is not read again, since the session ends with it.

Somebody else's Python that must end: an exception is raised in its thread when its time is over.

Owns the timer and that it cannot strike after the end. Does not help against a single call of C
that takes long.
"""

import contextlib
import ctypes
import io
import json
import secrets
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from jinja2 import Template, TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from cottention.engine.errors import ConfigurationError

if TYPE_CHECKING:
    from cottention.engine.text.tokenizer import Tokenizer


MAX_SECONDS = 2.0
MAX_CHARACTERS = 64 * 1024**2

PLAIN = """\
{%- for message in messages %}
{{- message.role | capitalize }}: {{ message.content | trim }}

{% endfor %}
{%- if add_generation_prompt %}Assistant:{% endif -%}
"""
"""For models that were trained on text alone: "User: ...", "Assistant: ..."."""

BUILT_IN: Mapping[str, tuple[str, tuple[str, ...]]] = {"plain": (PLAIN, ("\nUser:",))}
"""Templates that come with the server by name, each with what ends the assistant's turn."""

Message = Mapping[str, Any]

TURNS: Sequence[Message] = [
    {"role": role, "content": "?"} for role in ("user", "assistant", "user")
]
"""What a template is tried with."""


class ChatTemplateError(Exception):
    """A template does not take these messages, or takes too long over them."""


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """A compiled template.

    stop: strings that end an answer, beside the client's own. variables: the special tokens.
    opening: the token that begins a conversation and no later turn of it; may be empty.
    """

    template: Template
    stop: tuple[str, ...]
    variables: Mapping[str, str]
    opening: str = ""

    @property
    def ends(self) -> tuple[str, ...]:
        """Texts that may end an answer, and that a session holds then."""
        token = self.variables.get("eos_token")
        return (*self.stop, token) if token else self.stop

    def render(self, messages: Sequence[Message], more: Mapping[str, Any]) -> str:
        """The prompt, with `more` variables. Raises ChatTemplateError."""
        given = {**self.variables, **more, "messages": messages}
        text = io.StringIO()
        try:
            with at_most(MAX_SECONDS):
                for part in self.template.generate(given):
                    text.write(part)
                    if text.tell() > MAX_CHARACTERS:
                        raise OvertimeError
        except OvertimeError:
            message = "the chat template makes too much of these messages"
            raise ChatTemplateError(message) from None
        except Exception as error:  # whatever these messages make of its expressions
            raise ChatTemplateError(f"the chat template refuses these messages: {error}") from None
        return text.getvalue()


def find_template(choice: str | None, folder: Path) -> ChatTemplate | None:
    """The chosen template, else the model folder's own, else none.

    `choice` is the name of a template in the folder, of one that comes with the server, or a file.
    Raises ConfigurationError.
    """
    config = _read_json(folder / "tokenizer_config.json")
    own = _own_templates(folder, config)
    source, stop = _chosen(choice, own)
    if source is None:
        return None
    compiled = _compiled(source, choice or str(folder))
    template = ChatTemplate(compiled, stop, _special_tokens(config))
    return replace(template, opening=_opening(template))


def _opening(template: ChatTemplate) -> str:
    """`bos_token`, unless the template begins a later turn with it, too."""
    token = template.variables.get("bos_token", "")
    if not token:
        return ""
    try:
        past, longer = (template.render(TURNS[:num], {}) for num in (2, 3))
    except ChatTemplateError:  # it takes no such conversation
        return token
    return "" if longer.startswith(past + token) else token


def _chosen(choice: str | None, own: Mapping[str, str]) -> tuple[str | None, tuple[str, ...]]:
    if choice is None:
        return own.get("default"), ()
    if choice in own:
        return own[choice], ()
    if choice in BUILT_IN:
        return BUILT_IN[choice]
    try:
        return Path(choice).read_text(encoding="utf-8"), ()
    except (OSError, ValueError):
        names = ", ".join([*own, *BUILT_IN])
        message = f"--chat-template {choice} is neither a file of text nor one of: {names}"
        raise ConfigurationError(message) from None


def _own_templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Of chat_template.jinja, else tokenizer_config.json: one, or a list of named ones."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return {"default": file.read_text(encoding="utf-8")}
    match config.get("chat_template"):
        case str() as source:
            return {"default": source}
        case list() as named:
            return {str(each["name"]): str(each["template"]) for each in named}
    return {}


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """`bos_token` and its like, which tokenizer_config.json has as text or as an object."""
    found = {}
    for name, value in config.items():
        text = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(text, str):
            found[name] = text
    return found


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # the tokenizer is what complains about a file it needs
        return {}
    return content if isinstance(content, dict) else {}


def _compiled(source: str, where: str) -> Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    try:
        return environment.from_string(source)
    except TemplateError as error:
        raise ConfigurationError(f"the chat template of {where} is no Jinja: {error}") from None


def _tojson(value: Any, indent: int | None = None, **_: Any) -> str:
    """Not Jinja's own, which escapes for HTML."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


MAX_SEAM = 1024
"""Characters in which the end of an answer is looked for: a client's variables may be in them."""


@dataclass(frozen=True, slots=True)
class ChatContinuation:
    """The prompt of a turn, if its session holds something.

    seam: the beginning of the text of `ids` that is the template's own, before any message.
    stops: texts that end an answer; a session may hold one that was drawn.
    is_framed: whether the tokenizer's special ids are put around it.
    """

    ids: list[int]
    seam: str = ""
    stops: tuple[str, ...] = ()
    is_framed: bool = False

    def after(self, past: Sequence[int], tokenizer: "Tokenizer") -> list[int]:
        """What is to be read after these ids: of the seam, no id twice."""
        seam, written = self.seam[:MAX_SEAM].encode(), tokenizer.written_bytes
        head = [written[each] for each in self.ids[: len(seam)]]
        tail = b"".join(written[each] for each in past[-len(seam) :]) if seam else b""
        stops = [each.encode() for each in self.stops if tail.endswith(each.encode())]
        ids = self.ids[_num_said(seam, head, tail, stops) :]
        return tokenizer.framed(ids) if self.is_framed else ids


def render_after(
    template: ChatTemplate, messages: Sequence[Message], more: Mapping[str, Any]
) -> tuple[str, str] | None:
    """What follows an assistant's message, and its beginning before the first of `messages`.

    more: other variables. None where the template does not take `messages` there.
    """
    mark = f"mark{secrets.token_hex(8)}"
    past = [TURNS[0], {"role": "assistant", "content": mark}]
    marked = [*past, {**messages[0], "content": mark}]
    try:
        texts = template.render([*past, *messages], more).split(mark)
        seams = template.render(marked, more).split(mark)
    except ChatTemplateError:
        return None
    if (len(texts), len(seams)) != (2, 3) or not texts[1]:
        return None
    text, seam = texts[1], seams[1]
    return text, seam if text.startswith(seam) else ""


def _num_said(seam: bytes, head: Sequence[bytes], tail: bytes, stops: Sequence[bytes]) -> int:
    """How many ids of `head` the text `tail` ends with.

    As many as possible; else to the first end of an answer, before which a template may want space
    that the model did not draw. Ids are never split: a special one would become letters.
    """
    ends = list(accumulate(map(len, head)))
    begins = [seam[:end] for end in ends if end <= len(seam)]
    said = [place for place, begin in enumerate(begins, 1) if tail.endswith(begin)]
    ended = (place for place, begin in enumerate(begins, 1) if begin.endswith(tuple(stops)))
    return said[-1] if said else next(ended, 0)


class OvertimeError(BaseException):
    """The time is over; no `except Exception` of the code in question swallows it."""


@contextlib.contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raises OvertimeError in the block, wherever it is by then."""
    thread = ctypes.c_ulong(threading.get_ident())
    lock, is_over = threading.Lock(), False

    def strike() -> None:
        with lock:
            if not is_over:
                error = ctypes.py_object(OvertimeError)
                ctypes.pythonapi.PyThreadState_SetAsyncExc(thread, error)

    timer = threading.Timer(seconds, strike)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        with lock:
            is_over = True
        time.sleep(0)  # what was struck with is raised here at the latest
