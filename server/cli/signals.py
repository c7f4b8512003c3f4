"""What SIGTERM and SIGINT do before the server handles them itself: they end the process.

Process 1 of a container has no default action for signals: without a handler they are lost.
"""

import os
import signal
from typing import NoReturn

SIGNALS = (signal.SIGINT, signal.SIGTERM)

EXIT_SECONDS = 1.0
"""Time for removing temporary files and ending the compiler; then the process ends as it is."""


def exit_on_signals() -> None:
    """From now on the first signal raises SystemExit with 128 + its number in the main thread."""
    for number in SIGNALS:
        if number == signal.SIGTERM or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _exit)


def _exit(number: int, _: object) -> NoReturn:
    """A library may swallow the exception, or wait for its threads: a timer ends them all."""
    status = 128 + number

    def end(*_: object) -> NoReturn:
        os._exit(status)

    for each in (*SIGNALS, signal.SIGALRM):
        signal.signal(each, end)
    signal.setitimer(signal.ITIMER_REAL, EXIT_SECONDS)
    raise SystemExit(status)
