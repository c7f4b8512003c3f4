"""Files of a model folder that have chat templates and the names of special tokens.

Read as transformers reads them, in its order of precedence; also the built-in templates.
"""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from cottention.engine.errors import ConfigurationError
from cottention.server.http.body import is_text

PLAIN = """\
{%- for message in messages %}
{{- message.role | capitalize }}: {{ message.content | trim }}

{% endfor %}
{%- if add_generation_prompt %}Assistant:{% endif -%}
"""
"""For models that were trained on plain text: "User: ...", "Assistant: ..."."""

BUILT_IN_TEMPLATES: Mapping[str, tuple[str, tuple[str, ...]]] = {"plain": (PLAIN, ("\nUser:",))}
"""Built-in templates by name, each with the stop strings of the assistant's messages."""

NEWER_FOLDER = "additional_chat_templates"
"""Where newer model folders have templates other than the default one, a file each."""

GPT_2_TOKENIZERS = ("GPT2Tokenizer", "GPT2TokenizerFast")
GPT_2_MODELS = ("gpt2", "gptj")
GPT_2_NAMES = ("bos_token", "eos_token", "unk_token")
GPT_2_TOKEN = "<|endoftext|>"
"""The special token of GPT-2's tokenizer, where its files name none."""

logger = logging.getLogger("cottention")


class DamagedFileError(Exception):
    """A file that should have the template does not; the message names both."""


class TemplateSource(NamedTuple):
    """A template's text, its stop strings, and the name of the file that has it."""

    text: str | None
    stop: tuple[str, ...] = ()
    where: str = ""


def choose_source(choice: str | None, folder: Path, config: Mapping[str, Any]) -> TemplateSource:
    """The chosen template, else the model folder's own, else one without a text.

    choice: the name of a template in the folder or of a built-in one, or a file. config: the
    folder's tokenizer_config.json. Raises DamagedFileError; ConfigurationError for a choice that is
    nothing.
    """
    try:
        own = _own_templates(folder, config)
    except DamagedFileError:
        if choice is None:
            raise
        own = {}
    if choice is None:
        return own.get("default", TemplateSource(None))
    if choice in own:
        return own[choice]
    if choice in BUILT_IN_TEMPLATES:
        return TemplateSource(*BUILT_IN_TEMPLATES[choice], choice)
    try:
        return TemplateSource(Path(choice).expanduser().read_text(encoding="utf-8-sig"), (), choice)
    except (OSError, ValueError, RuntimeError):
        names = ", ".join([*own, *BUILT_IN_TEMPLATES])
        message = f"--chat-template {choice} is neither a text file nor one of: {names}"
        raise ConfigurationError(message) from None


def _own_templates(folder: Path, config: Mapping[str, Any]) -> dict[str, TemplateSource]:
    """The folder's templates by name: from files of their own, else from tokenizer_config.json."""
    files = {each.stem: each for each in sorted((folder / NEWER_FOLDER).glob("*.jinja"))}
    if (single := folder / "chat_template.jinja").exists():
        files = {"default": single} | files
    if files:
        return _read_templates(files)
    where = f"chat_template in {folder / 'tokenizer_config.json'}"
    found = config.get("chat_template")
    match found:
        case None:
            return {}
        case list() if all(isinstance(each, dict) for each in found):
            named = {str(each.get("name")): each.get("template") for each in found}
        case dict():
            named = found
        case _:
            named = {"default": found}
    if not all(isinstance(source, str) for source in named.values()):
        raise DamagedFileError(f"{where} is neither text nor texts with names")
    return {name: TemplateSource(source, (), where) for name, source in named.items()}


def _read_templates(files: Mapping[str, Path]) -> dict[str, TemplateSource]:
    """Templates by name. A damaged one is left out and logged, unless it is the default one."""
    found = {}
    for name, file in files.items():
        try:
            found[name] = TemplateSource(_read_text(file), (), str(file))
        except DamagedFileError as error:
            if name == "default":
                raise
            logger.warning("%s", error)
    return found


def special_tokens(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """`bos_token` and similar by name, from the files that transformers reads them from.

    special_tokens_map.json, which older folders have, goes before tokenizer_config.json, unless
    that lists all added tokens. GPT-2's tokenizer has defaults.
    """
    found = dict(config)
    if "added_tokens_decoder" not in config:
        found |= read_json(folder / "special_tokens_map.json")
    extra = found.get("extra_special_tokens")
    found |= extra if isinstance(extra, dict) else {}
    named = {name: _content(value) for name, value in found.items() if _is_named(name, extra)}
    if _is_gpt_2(folder, config):
        named = dict.fromkeys(GPT_2_NAMES, GPT_2_TOKEN) | named
    return {name: text for name, text in named.items() if isinstance(text, str) and is_text(text)}


def _is_named(name: str, extra: Any) -> bool:
    return name.endswith("_token") or (isinstance(extra, dict) and name in extra)


def _content(token: Any) -> Any:
    """The text of a token, which files have as text or as an object."""
    return token.get("content") if isinstance(token, dict) else token


def _is_gpt_2(folder: Path, config: Mapping[str, Any]) -> bool:
    if "tokenizer_class" in config:
        return config["tokenizer_class"] in GPT_2_TOKENIZERS
    try:
        return _load_json(folder / "config.json").get("model_type") in GPT_2_MODELS
    except DamagedFileError:  # loading the model reports it
        return False


def read_json(path: Path) -> dict[str, Any]:
    """A file's object; empty where the file is absent, or damaged, which is logged."""
    try:
        return _load_json(path)
    except DamagedFileError as error:
        logger.warning("%s", error)
        return {}


def _load_json(path: Path) -> dict[str, Any]:
    """A file's object; empty where the file is absent. Raises DamagedFileError."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedFileError(f"{path} cannot be read: {one_line(error)}") from None
    if not isinstance(content, dict):
        raise DamagedFileError(f"{path} is not a JSON object")
    return content


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise DamagedFileError(f"{path} cannot be read: {one_line(error)}") from None


def one_line(error: Exception) -> str:
    """An error's message without line breaks."""
    return " ".join(str(error).split()) or type(error).__name__
