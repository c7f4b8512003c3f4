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
        status = main()
    except SystemExit as stop:  # of argparse, or by a signal
        status = stop.code if isinstance(stop.code, int) else 0
    os._exit(status)  # all output has been flushed where it was written


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status. Every error is one line on standard error."""
    from cottention.engine.errors import ConfigurationError, CottentionError
    from cottention.engine.settings.command_line import EXIT_USAGE
    from cottention.engine.standard_streams import ReaderGoneError, write_notice
    from cottention.server.cli.parser import COMMANDS, parse

    program = "cottention"
    try:
        given = parse(arguments)
        program += f" {given.command}"
        return COMMANDS[given.command].run(given)
    except ReaderGoneError:
        return EXIT_READER_GONE
    except CottentionError as error:
        write_notice(f"{program}: {' '.join(str(error).split())}\n", sys.stderr)
        return EXIT_USAGE if isinstance(error, ConfigurationError) else EXIT_FAILURE
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
