"""Files of a model folder that have chat templates and the names of special tokens.

Read as transformers reads them, in its order of precedence; also the built-in templates.
"""

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from cottention.engine.errors import ConfigurationError, ModelFolderError
from cottention.engine.text.files import ignore, read_side_json, read_text
from cottention.engine.text.special_tokens import named_tokens

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


class TemplateSource(NamedTuple):
    """A template's text, its stop strings, and the name of the file that has it."""

    text: str | None
    stop: tuple[str, ...] = ()
    where: str = ""


def choose_source(choice: str | None, folder: Path, config: Mapping[str, Any]) -> TemplateSource:
    """The chosen template, else the model folder's own, else one without a text.

    choice: the name of a template in the folder or of a built-in one, or a file. config: the
    folder's tokenizer_config.json. Raises ModelFolderError for a damaged file of the folder;
    ConfigurationError for a choice that is nothing.
    """
    try:
        own = _own_templates(folder, config)
    except ModelFolderError:
        if choice is None:
            raise
        own = {}
    if choice is None:
        return own.get("default", TemplateSource(None))
    if choice in own:
        return own[choice]
    if choice in BUILT_IN_TEMPLATES:
        return TemplateSource(*BUILT_IN_TEMPLATES[choice], choice)
    path = os.path.expanduser(choice)
    if os.path.isdir(path) or not os.path.lexists(path):
        names = ", ".join([*own, *BUILT_IN_TEMPLATES])
        message = f"--chat-template {choice} is neither a text file nor one of: {names}"
        raise ConfigurationError(message)
    try:
        return TemplateSource(read_text(Path(path)), (), choice)
    except ModelFolderError as error:
        raise ConfigurationError(f"--chat-template: {error}") from None


def _own_templates(folder: Path, config: Mapping[str, Any]) -> dict[str, TemplateSource]:
    """The folder's templates by name: from files of their own, else from tokenizer_config.json."""
    files = {each.stem: each for each in sorted((folder / NEWER_FOLDER).glob("*.jinja"))}
    if os.path.lexists(single := folder / "chat_template.jinja"):
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
        raise ModelFolderError(f"{where} is neither text nor texts with names")
    return {name: TemplateSource(source, (), where) for name, source in named.items()}


def _read_templates(files: Mapping[str, Path]) -> dict[str, TemplateSource]:
    """Templates by name. A damaged one is left out and logged, unless it is the default one."""
    found = {}
    for name, file in files.items():
        try:
            found[name] = TemplateSource(read_text(file), (), str(file))
        except ModelFolderError as error:
            if name == "default":
                raise
            logger.warning("%s", error)
    return found


def special_tokens(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """`bos_token` and similar by name, as the tokenizer has them; GPT-2's has defaults.

    Damage is not reported here: the engine reports it as it reads the same files.
    """
    named = named_tokens(folder, config, ignore)
    found: dict[str, str | None] = {
        name: None if token is None else token.content
        for name, token in named.items()
        if token is None or token.content != name  # those of lists have no name of their own
    }
    if _is_gpt_2(folder, config):
        found = {**dict.fromkeys(GPT_2_NAMES, GPT_2_TOKEN), **found}
    return {name: text for name, text in found.items() if text is not None}


def _is_gpt_2(folder: Path, config: Mapping[str, Any]) -> bool:
    if "tokenizer_class" in config:
        return config["tokenizer_class"] in GPT_2_TOKENIZERS
    return read_side_json(folder / "config.json", ignore).get("model_type") in GPT_2_MODELS
