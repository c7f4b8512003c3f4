"""Maintenance runs periodically: sooner while there is work left, and also after an error."""

import threading

import pytest

from cottention.engine.sessions import maintenance


def test_it_goes_on_until_nothing_is_left_and_then_now_and_then() -> None:
    done = threading.Event()
    answers = [True, True, False]

    def maintain() -> bool:
        if len(answers) == 1:
            done.set()
        return answers.pop(0) if len(answers) > 1 else answers[0]

    with maintenance.maintenance_thread(maintain, 0.01):
        assert done.wait(60)


def test_more_work_is_not_put_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(maintenance, "PAUSE_SECONDS", 0.001)
    done = threading.Event()
    num_calls = 0

    def maintain() -> bool:
        nonlocal num_calls
        num_calls += 1
        if num_calls == 60:
            done.set()
        return True

    with maintenance.maintenance_thread(maintain, 1.0):
        assert done.wait(55), f"each waited a second: there were {num_calls}"


def test_a_fault_is_logged_and_it_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    calls: list[int] = []
    twice = threading.Event()

    def maintain() -> bool:
        calls.append(1)
        if len(calls) == 2:
            twice.set()
        raise RuntimeError("the disk is gone")

    with maintenance.maintenance_thread(maintain, 0.01):
        assert twice.wait(60)
    assert "the disk is gone" in caplog.text


def test_the_end_does_not_wait_for_the_next_time() -> None:
    """It would hang for an hour."""
    with maintenance.maintenance_thread(lambda: False, 3600):
        pass
