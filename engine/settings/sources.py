"""Where settings come from: a flag, else a variable, else the configuration file, else the default.

The configuration file is TOML without sections: one `key = value` per setting, where a key is a
flag's name with underscores or dashes. Messages name a setting as the user gave it.
"""

import argparse
import difflib
import re
import tomllib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from cottention.engine.errors import ConfigurationError
from cottention.engine.settings.declaration import Setting, expand_user, settings_of, shown

Config = TypeVar("Config")

VARIABLE_PREFIX = "COTTENTION_"
CONFIG_NAME = "config"
"""`--config FILE` and `COTTENTION_CONFIG`; the one name that is no key of the file."""


@dataclass(frozen=True, slots=True)
class Origin:
    """Which source a value was taken from.

    name: the flag or argument, the variable or the file's path; None for a default.
    """

    kind: Literal["flag", "argument", "variable", "file", "default"]
    name: str | None = None

    def __str__(self) -> str:
        return self.kind if self.name is None else f"{self.kind} {self.name}"


@dataclass(frozen=True, slots=True)
class Resolved(Generic[Config]):
    """A settings object, and the origin of each of its values by name."""

    value: Config
    origins: Mapping[str, Origin]


@dataclass(frozen=True, slots=True)
class ConfigFile:
    """A configuration file that has been read. `values` are as TOML gives them, by name."""

    path: str
    values: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Sources:
    """What a user has set for one run of a command.

    given: parsed flags by name; None where a flag was not given.
    prefix: of the variables.
    """

    given: Mapping[str, Any]
    environ: Mapping[str, str]
    file: ConfigFile | None = None
    prefix: str = VARIABLE_PREFIX

    @classmethod
    def of(
        cls,
        namespace: argparse.Namespace,
        environ: Mapping[str, str],
        known: Collection[str],
        prefix: str = VARIABLE_PREFIX,
    ) -> "Sources":
        """Sources of a command line; reads the file that `--config` or its variable names.

        known: every name that the file may have. Raises ConfigurationError.
        """
        given = vars(namespace)
        variable = variable_of(CONFIG_NAME, prefix)
        path, source = given.get(CONFIG_NAME), f"--{CONFIG_NAME}"
        if path is None:
            path, source = environ.get(variable) or None, variable
        file = None if path is None else read_config_file(path, known, source)
        return cls(given, environ, file, prefix)

    def read(self, config_type: type[Config]) -> Resolved[Config]:
        """Build a settings object. Raises ConfigurationError."""
        values: dict[str, Any] = {}
        origins: dict[str, Origin] = {}
        settings = settings_of(config_type)
        for setting in settings:
            found = self._find(setting)
            if found is None:
                origins[setting.name] = Origin("default")
            else:
                values[setting.name], origins[setting.name] = found
        try:
            return Resolved(config_type(**values), origins)
        except ConfigurationError as error:
            labels = {each.argument: _label(each, origins[each.name]) for each in settings}
            raise ConfigurationError(_relabel(str(error), labels)) from None

    def _find(self, setting: Setting) -> tuple[Any, Origin] | None:
        """A value and its origin from the first source that has the setting."""
        given = self.given.get(setting.name)
        if given is not None:
            origin = Origin("argument" if setting.is_positional else "flag", setting.argument)
            return _convert(setting, given, origin), origin
        variable = variable_of(setting.name, self.prefix)
        if text := self.environ.get(variable):
            origin = Origin("variable", variable)
            return _convert(setting, text, origin), origin
        if self.file is not None and setting.name in self.file.values:
            origin = Origin("file", self.file.path)
            return _convert(setting, self.file.values[setting.name], origin), origin
        return None


def variable_of(name: str, prefix: str = VARIABLE_PREFIX) -> str:
    """`max_slots` → `COTTENTION_MAX_SLOTS`."""
    return prefix + name.upper()


def read_config_file(path: str, known: Collection[str], source: str) -> ConfigFile:
    """Read a TOML file of settings. Raises ConfigurationError that names the file and the key.

    known: names that are allowed. source: the flag or variable that names the file.
    """
    path = _expanded(path, f"{source} {path}")
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigurationError(
            f"{path} is not UTF-8 (byte {error.start}); save it as UTF-8"
        ) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigurationError(
            f"{source} {path} cannot be read: {reason}; it must name a TOML file"
        ) from None
    try:
        table = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigurationError(
            f"{path} is not TOML: {error}; write key = value, with text in quotes"
        ) from None
    return ConfigFile(path, _by_name(table, known, path))


def unknown_variables(
    environ: Mapping[str, str], known: Collection[str], prefix: str = VARIABLE_PREFIX
) -> Iterator[str]:
    """A message for each variable with the prefix that nothing reads; never its value.

    known: variables that are read.
    """
    names = [variable.removeprefix(prefix) for variable in known]
    for variable in sorted(environ.keys() - set(known)):
        if variable.startswith(prefix) and environ[variable]:
            near = difflib.get_close_matches(variable.removeprefix(prefix), names, 1)
            hint = f"; did you mean {prefix}{near[0]}?" if near else ""
            yield f"unknown variable {variable} is ignored{hint}"


def _by_name(table: Mapping[str, Any], known: Collection[str], path: str) -> dict[str, Any]:
    """The file's values under the settings' names."""
    values: dict[str, Any] = {}
    for key, value in table.items():
        name = key.replace("-", "_")
        if name not in known:
            raise ConfigurationError(f"{path}: {_unknown_key(key, value, known)}")
        if name in values:
            raise ConfigurationError(f"{path}: {name} is set twice, with _ and with -; remove one")
        values[name] = value
    return values


def _unknown_key(key: str, value: Any, known: Collection[str]) -> str:
    if isinstance(value, dict):
        return f"{key} is a section, and there are none; write key = value at the top level"
    near = difflib.get_close_matches(key.replace("-", "_"), known, 1)
    hint = f"did you mean {near[0]}?" if near else "keys are the names of flags, see --help"
    return f"unknown key {key}; {hint}"


def _convert(setting: Setting, given: Any, origin: Origin) -> Any:
    """A value of the setting's type; a `~` is expanded. Raises ConfigurationError."""
    label = _label(setting, origin)
    try:
        value = _typed(setting, given, origin)
    except ValueError:
        found = "" if setting.is_secret else f"; it is {shown(given)}"
        raise ConfigurationError(f"{label} must be {setting.allowed}{found}") from None
    return setting.type(_expanded(str(value), f"{label} {value}")) if setting.is_path else value


def _typed(setting: Setting, given: Any, origin: Origin) -> Any:
    """A value of the setting's type. Raises ValueError."""
    if origin.kind == "file":
        return setting.from_toml(given)
    if setting.is_list:
        return (given,) if isinstance(given, str) else tuple(given)
    return setting.from_text(given) if isinstance(given, str) else given


def _expanded(path: str, label: str) -> str:
    """A path without `~`. Raises ConfigurationError."""
    try:
        return expand_user(path)
    except ConfigurationError as error:
        raise ConfigurationError(f"{label}: {error}") from None


def _label(setting: Setting, origin: Origin) -> str:
    """A setting as the user gave it."""
    if origin.kind == "file":
        return f"{setting.name} in {origin.name}"
    return origin.name or setting.argument


def _relabel(message: str, labels: Mapping[str, str]) -> str:
    """A settings object names its flags; who set a variable reads the variable's name."""
    return re.sub(r"--[a-z][a-z-]*", lambda found: labels.get(found[0], found[0]), message)
