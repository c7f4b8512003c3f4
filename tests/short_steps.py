"""Whether work leaves the interpreter to other threads in between."""

import gc
import os
import threading
import time
from collections.abc import Callable

MAX_STEP_SECONDS = 0.1
"""Of processor time, whatever else the machine does."""

NUM_TRIES = 3
"""The thread that measures may be late on a busy machine, but not always."""


def takes_short_steps(work: Callable[[], object]) -> bool:
    """Whether other threads may run at least every MAX_STEP_SECONDS of its processor time.

    Both threads share one core: on two, work beside them may hold up the one that measures alone.
    """
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})  # of this thread, and of those that it starts
    try:
        return any(_longest_step(work) < MAX_STEP_SECONDS for _ in range(NUM_TRIES))
    finally:
        os.sched_setaffinity(0, cores)


def _longest_step(work: Callable[[], object]) -> float:
    """The processor time that a thread has at most while another waits for the interpreter.

    The tests' own objects are frozen, as a server's are: they are not collected meanwhile.
    """
    begin, ended, done = threading.Event(), threading.Event(), threading.Event()

    def run() -> None:
        begin.wait()
        try:
            work()
        finally:
            ended.set()
        done.wait()

    thread = threading.Thread(target=run)
    gc.collect()
    gc.freeze()
    thread.start()
    assert thread.ident is not None
    clock = time.pthread_getcpuclockid(thread.ident)
    longest, last = 0.0, time.clock_gettime(clock)
    begin.set()
    while not ended.wait(0.001):
        now = time.clock_gettime(clock)
        longest, last = max(longest, now - last), now
    longest = max(longest, time.clock_gettime(clock) - last)
    done.set()
    thread.join()
    gc.unfreeze()
    return longest
