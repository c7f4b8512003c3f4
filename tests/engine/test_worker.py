"""The engine's thread: what it delivers, how it ends, and that nobody waits for ever."""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cottention.engine import Engine, EngineConfig, FinishReason, Output, SamplingParams
from cottention.engine.errors import EngineStoppedError
from cottention.engine.scheduling.scheduler import Scheduler
from cottention.engine.worker import EngineWorker
from tests.engine.making import make_request

PATIENCE = 60.0
"""Seconds after which something hangs."""

LONG = SamplingParams(max_tokens=100_000, ignore_eos=True)
SHORT = SamplingParams(max_tokens=5, ignore_eos=True)


class Reader:
    """Keeps what is delivered and lets tests wait for it."""

    def __init__(self) -> None:
        self.outputs: list[Output] = []
        self.deaths: list[BaseException] = []
        self.threads: set[str] = set()
        self._changed = threading.Condition()

    def deliver(self, outputs: list[Output]) -> None:
        assert outputs
        with self._changed:
            self.threads.add(threading.current_thread().name)
            self.outputs += outputs
            self._changed.notify_all()

    def on_death(self, error: BaseException) -> None:
        with self._changed:
            self.deaths.append(error)
            self._changed.notify_all()

    def of(self, request_id: str) -> list[Output]:
        return [out for out in self.outputs if out.request_id == request_id]

    def wait(self, condition: Callable[[], Any]) -> None:
        with self._changed:
            assert self._changed.wait_for(condition, PATIENCE)

    def wait_end(self, request_id: str) -> FinishReason | None:
        self.wait(lambda: any(out.finish_reason for out in self.of(request_id)))
        return self.of(request_id)[-1].finish_reason


@pytest.fixture
def reader() -> Reader:
    return Reader()


@pytest.fixture
def worker(engine: Engine, reader: Reader) -> Iterator[EngineWorker]:
    made = EngineWorker(engine, reader.deliver, reader.on_death)
    yield made
    made.stop()
    assert not made.is_alive


def wait_dead(worker: EngineWorker) -> None:
    """on_death is called from the thread, as its last act."""
    end = time.monotonic() + PATIENCE
    while worker.is_alive:
        assert time.monotonic() < end
        time.sleep(0.001)


def test_a_request_from_another_thread(worker: EngineWorker, reader: Reader) -> None:
    worker.start()
    assert worker.is_alive
    assert worker.submit([1], SHORT, request_id="a") == "a"
    assert reader.wait_end("a") is FinishReason.LENGTH
    assert len(reader.of("a")) == 5
    assert reader.threads == {"engine"}
    assert not reader.deaths


def test_requests_submitted_before_the_start_are_served(
    worker: EngineWorker, reader: Reader
) -> None:
    worker.submit([1], SHORT, request_id="early")
    assert not worker.is_alive
    worker.start()
    assert reader.wait_end("early") is FinishReason.LENGTH


def test_stop_without_start(worker: EngineWorker) -> None:
    worker.stop()
    assert not worker.is_alive


def test_an_idle_thread_sleeps(
    engine: Engine, worker: EngineWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = []
    original = engine.has_work
    monkeypatch.setattr(engine, "has_work", lambda: looks.append(1) or original())
    worker.start()
    time.sleep(0.2)
    assert len(looks) <= 2


def test_a_callback_that_raises_ends_the_thread(engine: Engine, reader: Reader) -> None:
    def deliver(_: list[Output]) -> None:
        raise ValueError("the socket is gone")

    worker = EngineWorker(engine, deliver, reader.on_death)
    worker.start()
    worker.submit([1], LONG, request_id="a")
    reader.wait(lambda: reader.deaths)
    wait_dead(worker)
    assert [str(error) for error in reader.deaths] == ["the socket is gone"]
    with pytest.raises(EngineStoppedError):
        worker.submit([1], SHORT, request_id="late")
    assert engine.pool.num_free == engine.pool.num_slots
    worker.cancel("a")
    worker.stop()


def test_a_fault_in_the_engine_itself_ends_the_thread(
    engine: Engine, worker: EngineWorker, reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not in the model, which costs a step, but in the bookkeeping; even where closing fails."""

    def fail(*_: Any) -> list[Output]:
        raise KeyError("inconsistent")

    monkeypatch.setattr(engine._request_manager, "advance", fail)
    monkeypatch.setattr(engine._request_manager, "cancel_all", fail)
    worker.start()
    worker.submit([1], SHORT, request_id="a")
    reader.wait(lambda: reader.deaths)
    wait_dead(worker)
    assert isinstance(reader.deaths[0], KeyError)
    assert len(reader.deaths) == 1
    with pytest.raises(EngineStoppedError):
        worker.submit([1], SHORT, request_id="late")


def test_a_failed_step_does_not_end_the_thread(
    engine: Engine, worker: EngineWorker, reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = engine._runner.run
    faults = [RuntimeError("broken")]

    def run(*given: Any) -> Any:
        if faults:
            raise faults.pop()
        return original(*given)

    monkeypatch.setattr(engine._runner, "run", run)
    worker.start()
    worker.submit([1], SHORT, request_id="a")
    assert reader.wait_end("a") is FinishReason.ERROR
    worker.submit([1], SHORT, request_id="b")
    assert reader.wait_end("b") is FinishReason.LENGTH
    assert worker.is_alive


def test_many_threads_at_once(gptj_folder: Path, reader: Reader) -> None:
    """Submit, cancel and ask for figures from six threads: every request ends once."""
    engine = Engine(gptj_folder, EngineConfig(max_slots=32, max_batch_tokens=64))
    worker = EngineWorker(engine, reader.deliver, reader.on_death)
    worker.start()
    faults: list[BaseException] = []

    def act(number: int) -> None:
        try:
            for turn in range(15):
                name = f"{number}-{turn}"
                worker.submit([1] * (turn + 1), LONG if turn % 3 else SHORT, request_id=name)
                if turn % 3:
                    worker.cancel(name)
                for _ in range(20):
                    stats = worker.stats()
                    assert 0 <= stats.num_running <= 32
        except BaseException as error:
            faults.append(error)

    threads = [threading.Thread(target=act, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    names = [f"{number}-{turn}" for number in range(6) for turn in range(15)]
    for name in names:
        reader.wait_end(name)
    worker.stop()
    assert not faults
    assert not reader.deaths
    ends = [out.request_id for out in reader.outputs if out.finish_reason]
    assert sorted(ends) == sorted(names)
    assert engine.pool.num_free == 32


@pytest.fixture
def eager_switching() -> Iterator[None]:
    """Threads take turns every microsecond, so that a race shows."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


@pytest.mark.usefixtures("eager_switching")
def test_num_running_is_exact_while_a_step_changes_it() -> None:
    """The number of running requests is asked for while the engine's thread moves them around."""
    scheduler = Scheduler(64)
    for number in range(4):
        scheduler.add(make_request(str(number), [1], SamplingParams(n=16)))
    for request in scheduler.admit(64).admitted:
        scheduler.start_decoding(request)
    stop = threading.Event()

    def change() -> None:
        while not stop.is_set():
            scheduler._decoding.append(scheduler._decoding.popleft())

    thread = threading.Thread(target=change)
    thread.start()
    try:
        assert all(scheduler.num_running == 4 for _ in range(20_000))
    finally:
        stop.set()
        thread.join()
