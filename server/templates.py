"""Chat templates: from a list of messages to the text of a prompt.

Owns where templates are found, the sandbox they run in, and the bounds on what they make. Knows
transformers' habits, for which published templates are written; knows no HTTP.
"""

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from cottention.engine.errors import ConfigurationError
from cottention.server.watchdog import OvertimeError, at_most
from jinja2 import Template, TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

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
