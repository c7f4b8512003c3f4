"""The last try to store what the disk had no room for, and a line in the log for what is lost.

Does not know what is stored, or how.
"""

import logging
from collections.abc import Callable, Mapping
from typing import TypeVar

from cottention.engine.errors import SessionNotFoundError

logger = logging.getLogger(__name__)

Value = TypeVar("Value")

MAX_NAMED = 5
"""Sessions that the line names, so that it stays a line."""


def save_all(unsaved: Mapping[str, Value], save: Callable[[str, Value], object]) -> None:
    """Save each by its id; all are tried, whatever becomes of one. What is lost is logged."""
    lost: dict[str, Exception] = {}
    for session_id, value in unsaved.items():
        try:
            save(session_id, value)
        except SessionNotFoundError:  # it is past its time: nobody will ask for it
            continue
        except Exception as error:
            lost[session_id] = error
    if lost:
        _tell(lost)


def _tell(lost: Mapping[str, Exception]) -> None:
    named, num_others = ", ".join([*lost][:MAX_NAMED]), len(lost) - MAX_NAMED
    reason = next(iter(lost.values()))
    logger.error(
        "the last turns of %d session(s) are lost, since they could not be stored: %s (%s); each is"
        " as it was before them: make room on the disk before the next start, then repeat them",
        len(lost),
        named if num_others <= 0 else f"{named} and {num_others} more",
        " ".join(str(reason).split()) or type(reason).__name__,
    )
