"""Chat templates: from messages to the text of a prompt, and to that of a session's later turn.

Templates are found in the model folder, by name or as a file, and rendered in Jinja's sandbox as
transformers does, within a time limit. A turn of a session renders only its new messages:
`render_after` finds what a template writes after an assistant's message, and `ChatContinuation`
leaves out what the session already ends with.
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
"""For models that were trained on plain text: "User: ...", "Assistant: ..."."""

BUILT_IN_TEMPLATES: Mapping[str, tuple[str, tuple[str, ...]]] = {"plain": (PLAIN, ("\nUser:",))}
"""Built-in templates by name, each with the stop strings of the assistant's messages."""

Message = Mapping[str, Any]

PROBE_MESSAGES: Sequence[Message] = [
    {"role": role, "content": "?"} for role in ("user", "assistant", "user")
]
"""A conversation with which templates are tried out."""


class ChatTemplateError(Exception):
    """A template rejects these messages, or exceeds the limits on time or size."""


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """A compiled template.

    stop: stop strings, in addition to the client's own.
    variables: the special tokens, by name.
    opening: the token at the beginning of a conversation, unless every turn has it; else empty.
    """

    template: Template
    stop: tuple[str, ...]
    variables: Mapping[str, str]
    opening: str = ""

    @property
    def end_texts(self) -> tuple[str, ...]:
        """Texts with which a response may end, and that its session then holds."""
        token = self.variables.get("eos_token")
        return (*self.stop, token) if token else self.stop

    def render(self, messages: Sequence[Message], variables: Mapping[str, Any]) -> str:
        """The prompt, rendered with more variables. Raises ChatTemplateError."""
        given = {**self.variables, **variables, "messages": messages}
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


def find_template(choice: str | None, folder: Path) -> ChatTemplate | None:
    """The chosen template, else the model folder's own, else None.

    choice: the name of a template in the folder or of a built-in one, or a file.
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
        past, longer = (template.render(PROBE_MESSAGES[:num], {}) for num in (2, 3))
    except ChatTemplateError:  # the template rejects such a conversation
        return token
    return "" if longer.startswith(past + token) else token


def _chosen(choice: str | None, own: Mapping[str, str]) -> tuple[str | None, tuple[str, ...]]:
    if choice is None:
        return own.get("default"), ()
    if choice in own:
        return own[choice], ()
    if choice in BUILT_IN_TEMPLATES:
        return BUILT_IN_TEMPLATES[choice]
    try:
        return Path(choice).read_text(encoding="utf-8"), ()
    except (OSError, ValueError):
        names = ", ".join([*own, *BUILT_IN_TEMPLATES])
        message = f"--chat-template {choice} is neither a text file nor one of: {names}"
        raise ConfigurationError(message) from None


def _own_templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """The folder's templates by name: from chat_template.jinja, else from tokenizer_config.json."""
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
    """`bos_token` and similar, which tokenizer_config.json has as text or as an object."""
    found = {}
    for name, value in config.items():
        text = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(text, str):
            found[name] = text
    return found


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # loading the tokenizer reports files that it needs
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
        raise ConfigurationError(
            f"the chat template of {where} is not valid Jinja: {error}"
        ) from None


def _tojson(value: Any, indent: int | None = None, **_: Any) -> str:
    """Jinja's own filter would escape for HTML."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


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

    def after(self, past: Sequence[int], tokenizer: "Tokenizer") -> list[int]:
        """The prompt after a session that ends with `past`, without what `past` has of the seam."""
        seam, written = self.seam[:MAX_SEAM].encode(), tokenizer.written_bytes
        head = [written[each] for each in self.ids[: len(seam)]]
        tail = b"".join(written[each] for each in past[-len(seam) :]) if seam else b""
        stops = [each.encode() for each in self.end_texts if tail.endswith(each.encode())]
        ids = self.ids[_num_present(seam, head, tail, stops) :]
        return tokenizer.framed(ids) if self.add_special_tokens else ids


def render_after(
    template: ChatTemplate, messages: Sequence[Message], variables: Mapping[str, Any]
) -> tuple[str, str] | None:
    """What a template writes after an assistant's message, and the seam with which that begins.

    None if the template rejects `messages` at that place.
    """
    mark = f"mark{secrets.token_hex(8)}"
    past = [PROBE_MESSAGES[0], {"role": "assistant", "content": mark}]
    marked = [*past, {**messages[0], "content": mark}]
    try:
        texts = template.render([*past, *messages], variables).split(mark)
        seams = template.render(marked, variables).split(mark)
    except ChatTemplateError:
        return None
    if (len(texts), len(seams)) != (2, 3) or not texts[1]:
        return None
    text, seam = texts[1], seams[1]
    return text, seam if text.startswith(seam) else ""


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
