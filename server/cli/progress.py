"""Progress bars for what takes seconds: on a terminal only, on standard error, gone at the end.

Drawn by rich, which training uses as well: it is imported where a bar is shown and nowhere else.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

from cottention.server.cli.terminal import is_terminal

Report = Callable[[int, int], None]
"""Takes how much is done, and how much there is in all."""


def silent(_done: int, _total: int) -> None:
    """A report that nobody sees."""


@contextlib.contextmanager
def progress(what: str) -> Iterator[Report]:
    """A bar named `what` while the block runs; it only moves to and fro until a report comes."""
    if not is_terminal(sys.stderr):
        yield silent
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    columns: list[Any] = [TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()]
    bar = Progress(
        *columns,
        TaskProgressColumn(),
        console=Console(file=sys.stderr),
        transient=True,
        redirect_stdout=False,
        redirect_stderr=False,
    )
    with bar:
        task = bar.add_task(escape(what), total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
