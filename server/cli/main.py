"""The process of `cottention COMMAND`: its signals, standard streams and exit status.

The command line itself is loaded when signals are handled: its imports take a while.
"""

import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from cottention.server.cli.signals import exit_on_signals

EXIT_FAILURE = 1
EXIT_INTERRUPTED = 130
EXIT_READER_GONE = 141
"""128 + SIGPIPE: what a shell reports for a program that wrote to a pipe without a reader."""


def run() -> NoReturn:
    """Run `main` as a process: exit without finalizing torch, which would only take time."""
    exit_on_signals()
    from cottention.engine.standard_streams import protect_standard_streams

    protect_standard_streams()
    try:
        status = main() or _flush_output()
    except SystemExit as stop:  # of argparse, or by a signal
        status = stop.code if isinstance(stop.code, int) else 0
        status = status or _flush_output()
    os._exit(status)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status. Every error is one line on standard error."""
    from cottention.engine.errors import ConfigurationError, CottentionError
    from cottention.engine.settings.command_line import EXIT_USAGE
    from cottention.engine.standard_streams import ReaderGoneError
    from cottention.server.cli.parser import COMMANDS, parse

    given = parse(arguments)
    try:
        return COMMANDS[given.command].run(given)
    except ReaderGoneError:
        return EXIT_READER_GONE
    except CottentionError as error:
        _report(f"cottention {given.command}", error)
        return EXIT_USAGE if isinstance(error, ConfigurationError) else EXIT_FAILURE
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


def _flush_output() -> int:
    """Write what argparse printed; the exit status."""
    from cottention.engine.standard_streams import OutputError, ReaderGoneError, write_output

    try:
        write_output("")
    except ReaderGoneError:
        return EXIT_READER_GONE
    except OutputError as error:
        _report("cottention", error)
        return EXIT_FAILURE
    return 0


def _report(program: str, error: Exception) -> None:
    from cottention.engine.standard_streams import write_notice

    write_notice(f"{program}: {' '.join(str(error).split())}\n", sys.stderr)
