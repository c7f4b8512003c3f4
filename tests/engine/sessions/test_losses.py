"""What the last try to store says of those that it could not."""

import logging
import sqlite3

import pytest

from cottention.engine.errors import SessionNotFoundError, StoreFullError
from cottention.engine.sessions.manager import save_all


def told_of(
    errors: dict[str, Exception | None], caplog: pytest.LogCaptureFixture
) -> tuple[list[str], list[str]]:
    """Sessions that were tried, and what the log says."""
    tried = []

    def save(session_id: str, _: object) -> None:
        tried.append(session_id)
        if error := errors[session_id]:
            raise error

    save_all(errors, save)
    assert all(record.levelno == logging.ERROR for record in caplog.records)
    return tried, caplog.messages


def test_nothing_is_said_where_nothing_is_lost(caplog: pytest.LogCaptureFixture) -> None:
    errors = {"a": None, "expired": SessionNotFoundError("no session")}
    assert told_of(errors, caplog) == ([*errors], [])


def test_one_line_names_what_is_lost_and_why(caplog: pytest.LogCaptureFixture) -> None:
    """Neither a full disk nor a broken one keeps others from being tried."""
    errors = {"a": StoreFullError("no\nspace"), "b": None, "c": sqlite3.OperationalError("broken")}
    tried, [line] = told_of(errors, caplog)
    assert tried == [*errors]
    assert line == (
        "the last turns of 2 session(s) are lost, since they could not be stored: a, c (no space);"
        " each is as it was before them: make room on the disk before the next start, then repeat"
        " them"
    )


def test_many_are_counted_and_a_few_named(caplog: pytest.LogCaptureFixture) -> None:
    _, [line] = told_of({f"s{n}": StoreFullError() for n in range(7)}, caplog)
    assert "of 7 session(s)" in line
    assert ": s0, s1, s2, s3, s4 and 2 more (StoreFullError);" in line
