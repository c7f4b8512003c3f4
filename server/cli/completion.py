"""Completion of `cottention` in shells: a script that the shell reads, written by shtab."""

import argparse
from collections.abc import Iterable

import shtab

from cottention.engine.settings.declaration import settings_of


def completion_script(shell: str, parser: argparse.ArgumentParser, settings: Iterable[type]) -> str:
    """The script of a shell: bash, zsh or fish.

    settings: those whose flags the commands have, which know their choices and which are paths.
    """
    known = {each.argument: each for config_type in settings for each in settings_of(config_type)}
    for action in _actions(parser):
        setting = known.get(action.option_strings[0] if action.option_strings else action.dest)
        if action.dest in ("config", "input_file", "output_file"):
            action.complete = shtab.FILE  # type: ignore[attr-defined]  # shtab's own
        elif action.dest == "model" or (setting is not None and setting.is_path):
            action.complete = shtab.FILE  # type: ignore[attr-defined]
        elif setting is not None and setting.choices:
            action.choices = setting.choices
    return shtab.complete(parser, shell)


def _actions(parser: argparse.ArgumentParser) -> Iterable[argparse.Action]:
    """Those of a parser and of its commands."""
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for page in action.choices.values():
                yield from _actions(page)
