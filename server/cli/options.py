"""Flags, variables, defaults and help, made from dataclasses whose fields are `option`s.

Owns the way from `--max-slots` or `COTTENTION_MAX_SLOTS` to a field `max_slots`, and the one line a
user gets for a mistake. Does not know what any setting means.

Which `COTTENTION_` variables there are, and what is said at start-up of those that are not.

Knows every setting's name and no setting's meaning; never shows a value, which may be a key.
"""

import argparse
import difflib
import logging
import re
import types
from collections.abc import Callable, Mapping
from dataclasses import Field, fields
from typing import Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin

from cottention.engine.config import EngineConfig
from cottention.engine.errors import ConfigurationError
from cottention.server.config import GenerateConfig, ServerConfig

Config = TypeVar("Config")

VARIABLE_PREFIX = "COTTENTION_"
_SIZE_SUFFIXES = {"K": 1024, "M": 1024**2, "G": 1024**3, "T": 1024**4}


class OneLineParser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, with the likeliest flag where one is near."""

    def error(self, message: str) -> NoReturn:
        """End with status 2 and one line that says what to do."""
        flags = list(self._option_string_actions)
        words = [word for word in message.split() if word.startswith("--")]
        near = [difflib.get_close_matches(word.partition("=")[0], flags, 1) for word in words]
        hint = f"did you mean {near[0][0]}? " if near and near[0] else ""
        self.exit(2, f"{self.prog}: {message}; {hint}see {self.prog} --help\n")


def add_flags(parser: argparse.ArgumentParser, config_type: type, title: str) -> None:
    """Give `parser` one flag per field of `config_type`, in a group of their own."""
    group = parser.add_argument_group(title)
    for item in fields(config_type):
        action = "append" if get_origin(item.type) is tuple else "store"
        group.add_argument(
            flag_of(item.name), action=action, metavar=_metavar(item), help=_help(item)
        )


def read_flags(
    config_type: type[Config], given: argparse.Namespace, environ: Mapping[str, str]
) -> Config:
    """Build a `config_type`: flag, else variable, else default. Raises ConfigurationError."""
    values: dict[str, Any] = {}
    variables: dict[str, str] = {}
    for item in fields(config_type):  # type: ignore[arg-type]  # every config is a dataclass
        text = getattr(given, item.name)
        source = flag_of(item.name)
        if text is None:
            variables[source] = variable_of(item.name)
            source = variables[source]
            text = environ.get(source) or None
        if text is not None:
            values[item.name] = _convert(item, text, source)
    try:
        return config_type(**values)
    except ConfigurationError as error:
        raise ConfigurationError(_named_as_given(str(error), variables, environ)) from None


def flag_of(name: str) -> str:
    """`max_slots` → `--max-slots`."""
    return "--" + name.replace("_", "-")


def variable_of(name: str) -> str:
    """`max_slots` → `COTTENTION_MAX_SLOTS`."""
    return VARIABLE_PREFIX + name.upper()


def _named_as_given(message: str, variables: Mapping[str, str], environ: Mapping[str, str]) -> str:
    """A configuration speaks of its flags; who set a variable reads the variable's name."""

    def name(found: re.Match[str]) -> str:
        variable = variables.get(found[0], "")
        return variable if variable in environ else found[0]

    return re.sub(r"--[a-z-]+", name, message)


def _convert(item: Field[Any], given: str | list[str], source: str) -> Any:
    """What a user wrote as a value of the field's type. Raises ConfigurationError."""
    if get_origin(item.type) is tuple:
        return (given,) if isinstance(given, str) else tuple(given)
    assert isinstance(given, str)
    kind = _plain_type(item.type)
    if get_origin(kind) is Literal:
        return given
    read, what = _READERS["bytes" if item.metadata["unit"] == "bytes" else kind.__name__]
    try:
        return read(given)
    except (ValueError, OverflowError):
        raise ConfigurationError(f"{source} must be {what}; it is {given!r}") from None


def _plain_type(annotation: Any) -> Any:
    """`int | None` → `int`."""
    if get_origin(annotation) in (Union, types.UnionType):
        return next(kind for kind in get_args(annotation) if kind is not types.NoneType)
    return annotation


def _size(text: str) -> int:
    """`512M` → bytes."""
    number = text.strip().upper().removesuffix("B").removesuffix("I")
    factor = _SIZE_SUFFIXES.get(number[-1:], 1)
    return int(float(number[:-1]) * factor) if factor > 1 else int(number)


def _number(text: str) -> float:
    number = float(text)
    if number - number != 0:  # infinite, or not a number
        raise ValueError(text)
    return number


_READERS: dict[str, tuple[Callable[[str], Any], str]] = {
    "int": (int, "a whole number"),
    "float": (_number, "a number"),
    "str": (str, "text"),
    "bytes": (_size, "a number of bytes, such as 4096, 512M or 2G"),
}


def _metavar(item: Field[Any]) -> str:
    kind = _plain_type(item.type)
    if get_origin(kind) is Literal:
        return "{" + ",".join(get_args(kind)) + "}"
    if item.metadata["unit"]:
        return str(item.metadata["unit"]).upper()
    return "N" if kind in (int, float) else "TEXT"


def _help(item: Field[Any]) -> str:
    default = "" if item.default in (None, ()) else f" (default: {_shown(item)})"
    text = f"{item.metadata['help']}{default} [{variable_of(item.name)}]"
    return text.replace("%", "%%")


def _shown(item: Field[Any]) -> str:
    """The default with its unit."""
    value: Any = item.default
    unit = item.metadata["unit"]
    if unit == "bytes" and value % _SIZE_SUFFIXES["M"] == 0:
        return f"{value // _SIZE_SUFFIXES['M']}M"
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return f"{text} {unit}" if unit else text


logger = logging.getLogger("cottention")

SETTINGS = (EngineConfig, ServerConfig, GenerateConfig)
OF_THE_OPS = ("cache", "cpu_isa", "cuda", "cxxflags", "ops")
NAMES = [*(each.name for kind in SETTINGS for each in fields(kind)), *OF_THE_OPS]
KNOWN = {variable_of(name): name for name in NAMES}


def warn_of_unknown(environ: Mapping[str, str]) -> None:
    """One line for each variable that is set and changes nothing, with the likeliest that would."""
    for variable in sorted(environ.keys() - KNOWN.keys()):
        if variable.startswith(VARIABLE_PREFIX) and environ[variable]:
            name = variable.removeprefix(VARIABLE_PREFIX).lower()
            near = difflib.get_close_matches(name, NAMES, 1)
            hint = f": did you mean {variable_of(near[0])}?" if near else ""
            logger.warning("there is no variable %s, and so it changes nothing%s", variable, hint)
