"""Flags and help texts for argparse, made from declared settings."""

import argparse
import difflib
import re
import sys
from typing import Any, NoReturn

from cottention.engine.settings.declaration import Setting, settings_of
from cottention.engine.settings.sources import (
    CONFIG_NAME,
    VARIABLE_PREFIX,
    Resolved,
    variable_of,
)
from cottention.engine.standard_streams import write_notice, write_output

EXIT_USAGE = 2


class OneLineParser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, with the closest flag where there is one."""

    def error(self, message: str) -> NoReturn:
        """Exit with status 2 and one line that says what to do."""
        flags = list(self._option_string_actions)
        words = [word.partition("=")[0].rstrip(":") for word in message.split()]
        unknown = [word for word in words if word.startswith("--") and word not in flags]
        near = difflib.get_close_matches(unknown[0], flags, 1) if unknown else []
        # `cottention version` means `--version`.
        chosen = re.findall(r"invalid choice: '(\w+)'", message)
        near += [f"--{name}" for name in chosen if f"--{name}" in flags]
        hint = f"did you mean {near[0]}? " if near else ""
        self.exit(EXIT_USAGE, f"{self.prog}: {message}; {hint}see {self.prog} --help\n")

    def _print_message(self, message: str, file: Any = None) -> None:
        """As argparse's, which hides that help could not be written. Raises OutputError."""
        if file is sys.stdout:
            write_output(message)
        else:
            write_notice(message, file or sys.stderr)


def add_config_flag(parser: argparse.ArgumentParser, prefix: str = VARIABLE_PREFIX) -> None:
    """Give `parser` the flag `--config FILE`."""
    parser.add_argument(
        f"--{CONFIG_NAME}",
        metavar="FILE",
        help="TOML file with settings, one key = value per line; a key is a flag's name"
        f" [{variable_of(CONFIG_NAME, prefix)}]",
    )


def add_flags(
    parser: argparse.ArgumentParser, config_type: type, title: str, prefix: str = VARIABLE_PREFIX
) -> None:
    """Give `parser` one flag per setting of `config_type`, in a group of their own.

    What argparse stores is text, or a list of texts, or a bool; None where a flag is not given.
    """
    group = parser.add_argument_group(title)
    for each in settings_of(config_type):
        text = _help(each, prefix)
        if each.is_positional:
            group.add_argument(each.name, nargs="?", metavar=each.metavar, help=text)
        elif each.type is bool:
            action = argparse.BooleanOptionalAction
            group.add_argument(each.flag, action=action, default=None, help=text)
        else:
            kept = "append" if each.is_list else "store"
            group.add_argument(each.flag, action=kept, metavar=each.metavar, help=text)


def to_arguments(resolved: Resolved[Any]) -> list[str]:
    """Flags that give the same settings whatever the variables and the file are."""
    arguments: list[str] = []
    for each in settings_of(resolved.value):
        if resolved.origins[each.name].kind != "default":
            value = getattr(resolved.value, each.name)
            if each.type is bool:
                arguments.append(each.flag if value else each.flag.replace("--", "--no-", 1))
            else:
                for one in value if each.is_list else (value,):
                    arguments += [each.flag, str(one)]
    return arguments


def _help(each: Setting, prefix: str) -> str:
    default = f" (default: {each.format(each.default)})"
    return f"{each.help}{default} [{variable_of(each.name, prefix)}]".replace("%", "%%")
