"""How a setting is declared: a dataclass field with help text, unit and bounds, and its values.

A dataclass whose fields are made by `setting` is the only place that names a setting; its flag, its
variable, its key in the configuration file, its help text and its checks derive from the field.
"""

import os
import types
from collections.abc import Callable, Collection
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from cottention.engine.errors import ConfigurationError

MAX_WHOLE_NUMBER = 10**18
"""Of a setting without a maximum of its own: SQLite, the system and Python's loops take no number
above 2⁶³ − 1, and sums of two are numbers, too."""
MAX_SECONDS = 10**9
"""The same for a time, 31 years: clocks take no other."""

MAX_THREADS = 1024
"""More than that a process may not get, and ends."""

SIZE_SUFFIXES = {"K": 1024, "M": 1024**2, "G": 1024**3, "T": 1024**4}


def setting(
    default: Any,
    help: str,
    *,
    unset: str | None = None,
    unit: str | None = None,
    minimum: float | None = None,
    maximum: float | None = None,
    choices: Collection[str] = (),
    is_secret: bool = False,
    is_positional: bool = False,
    is_path: bool = False,
) -> Any:
    """Declare a field of a settings dataclass.

    The field's type is `int`, `float`, `bool`, `str`, `Path`, a `Literal` of strings, one of these
    with `| None`, or `tuple[str, ...]` for a flag that may be repeated.

    unset: what a default of None, or of no values, means to a user, such as "unlimited".
    unit: of a number; "bytes" also accepts 512K, 4M and 2G.
    maximum: without one, whole numbers and times have one that Python and the system can handle.
    choices: allowed strings, where the type is not a `Literal`.
    is_secret: the value is never printed.
    is_positional: on the command line it is an argument without a flag.
    is_path: of a `str` that is a path, or may be one; a `Path` always is. A leading `~` or `~user`
    of a path stands for a home directory.
    """
    metadata = {
        "help": help,
        "unset": unset,
        "unit": unit,
        "minimum": minimum,
        "maximum": maximum,
        "choices": tuple(choices),
        "is_secret": is_secret,
        "is_positional": is_positional,
        "is_path": is_path,
    }
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, slots=True)
class Setting:
    """A declared setting; `type` is that of one value, without `| None`."""

    name: str
    type: Any
    is_list: bool
    default: Any
    help: str
    unset: str | None
    unit: str | None
    minimum: float | None
    maximum: float | None
    choices: tuple[str, ...]
    is_secret: bool
    is_positional: bool
    is_path: bool

    @property
    def flag(self) -> str:
        """`max_slots` → `--max-slots`."""
        return "--" + self.name.replace("_", "-")

    @property
    def argument(self) -> str:
        """What a user writes on the command line: `--max-slots`, or `MODEL`."""
        return self.name.upper() if self.is_positional else self.flag

    @property
    def metavar(self) -> str:
        """What stands for a value in the help text."""
        if self.choices:
            return "{" + ",".join(self.choices) + "}"
        if self.unit:
            return self.unit.upper()
        if self.is_positional:
            return self.name.upper()
        if self.is_path:
            return "PATH"
        return {int: "N", float: "N"}.get(self.type, "TEXT")

    def from_text(self, text: str) -> Any:
        """A value as a flag or a variable gives it. Raises ValueError."""
        return self._kind.from_text(text)

    def from_toml(self, value: Any) -> Any:
        """A value as TOML gives it. Raises ValueError."""
        if self.is_list:
            values = value if isinstance(value, list) else [value]
            if not all(isinstance(each, str) for each in values):
                raise ValueError(value)
            return tuple(values)
        if isinstance(value, str) and self._kind.is_text_in_toml:
            return self._kind.from_text(value)
        if type(value) in self._kind.toml_types:  # in Python, though not in TOML, a bool is an int
            return self._kind.from_toml(value)
        raise ValueError(value)

    def format(self, value: Any) -> str:
        """A value with its unit, as a person reads it; the help text shows defaults like this."""
        if value is None or value == ():
            return self.unset or "none"
        if self.is_list:
            return ", ".join(value)
        if self.type is bool:
            return "true" if value else "false"
        if self.unit == "bytes":
            return _format_size(value)
        text = f"{value:g}" if isinstance(value, float) else str(value)
        return f"{text} {self.unit}" if self.unit else text

    @property
    def allowed(self) -> str:
        """What a value has to be, for the message about another."""
        return "text, or a list of texts" if self.is_list else self._kind.description

    def check(self, value: Any) -> None:
        """Raise ConfigurationError for a value that is none of the choices or out of bounds."""
        if value is None:
            return
        if self.choices and value not in self.choices:
            self._refuse(f"one of {', '.join(self.choices)}", value)
        if self.minimum is not None and value < self.minimum:
            self._refuse(f"at least {self.minimum}", value)
        if self.maximum is not None and value > self.maximum:
            self._refuse(f"at most {self.maximum}", value)

    def _refuse(self, allowed: str, value: Any) -> None:
        raise ConfigurationError(f"{self.argument} must be {allowed}; it is {shown(value)}")

    @property
    def _kind(self) -> "_Kind":
        return _SIZE if self.unit == "bytes" else _KINDS[self.type]


def settings_of(config_type: Any) -> list[Setting]:
    """The settings that a dataclass (or an instance of it) declares, in order."""
    return [_setting_of(item) for item in fields(config_type)]


def check_settings(config: Any) -> None:
    """Check every value of a settings dataclass; for its `__post_init__`."""
    for each in settings_of(config):
        each.check(getattr(config, each.name))


def expand_user(path: str) -> str:
    """A path with its leading `~` or `~user` as a home directory. Raises ConfigurationError."""
    try:
        expanded = os.path.expanduser(path)
    except ValueError:  # a null character
        expanded = path
    if path.startswith("~") and expanded == path:
        name = path.partition("/")[0]
        raise ConfigurationError(
            f"no home directory is known for {name}; give the whole path, or ./{name} for a file"
            " or folder of that name"
        )
    return expanded


def shown(value: Any) -> str:
    """A wrong value in a message, cut where it is long."""
    try:
        text = repr(value)
    except ValueError:  # an integer of thousands of digits
        return "too large"
    return text if len(text) <= 100 else text[:97] + "..."


def _setting_of(item: Field[Any]) -> Setting:
    is_list = get_origin(item.type) is tuple
    kind = str if is_list else _without_none(item.type)
    facts = dict(item.metadata)
    facts["is_path"] |= kind is Path
    if facts["maximum"] is None and facts["unit"] == "seconds":
        facts["maximum"] = MAX_SECONDS
    elif facts["maximum"] is None and kind is int:
        facts["maximum"] = MAX_WHOLE_NUMBER
    if get_origin(kind) is Literal:
        kind, facts["choices"] = str, get_args(kind)
    return Setting(name=item.name, type=kind, is_list=is_list, default=item.default, **facts)


def _without_none(annotation: Any) -> Any:
    """`int | None` → `int`."""
    if get_origin(annotation) in (Union, types.UnionType):
        return next(kind for kind in get_args(annotation) if kind is not types.NoneType)
    return annotation


@dataclass(frozen=True, slots=True)
class _Kind:
    """How values of one type are written in text and in TOML."""

    description: str
    from_text: Callable[[str], Any]
    toml_types: tuple[type, ...] = ()
    from_toml: Callable[[Any], Any] = lambda value: value
    is_text_in_toml: bool = False


def _size(text: str) -> int:
    """`512M` → bytes."""
    number = text.strip().upper().removesuffix("B").removesuffix("I")
    factor = SIZE_SUFFIXES.get(number[-1:], 1)
    try:
        return int(float(number[:-1]) * factor) if factor > 1 else int(number)
    except OverflowError:  # of infinity
        raise ValueError(text) from None


def _format_size(value: int) -> str:
    for suffix, factor in reversed(SIZE_SUFFIXES.items()):
        if value and value % factor == 0:
            return f"{value // factor}{suffix}"
    return f"{value} bytes"


def _number(value: str | int | float) -> float:
    try:
        number = float(value)
    except OverflowError:
        raise ValueError(value) from None
    if number - number != 0:  # infinite, or not a number
        raise ValueError(value)
    return number


def _switch(text: str) -> bool:
    found = {"true": True, "1": True, "false": False, "0": False}.get(text.strip().lower())
    if found is None:
        raise ValueError(text)
    return found


_SIZE = _Kind(
    "a number of bytes, such as 4096, 512M or 2G", _size, toml_types=(int,), is_text_in_toml=True
)
_KINDS: dict[type, _Kind] = {
    int: _Kind("a whole number", int, toml_types=(int,)),
    float: _Kind("a number", _number, toml_types=(int, float), from_toml=_number),
    bool: _Kind("true or false", _switch, toml_types=(bool,)),
    str: _Kind("text", str, is_text_in_toml=True),
    Path: _Kind("a path", Path, is_text_in_toml=True),
}
