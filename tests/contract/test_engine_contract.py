"""What the server relies on of an engine, asked of the real one and of the fake alike.

The server's tests run on the fake: where it does other things than the engine, they prove nothing.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from cottention.engine import Engine, EngineConfig, FinishReason, Output, SamplingParams
from cottention.engine.errors import EngineStoppedError, ParameterError
from cottention.engine.state.session_state import SessionState
from cottention.engine.worker import EngineWorker
from tests.server.fake_engine import FakeEngine

NUM_SLOTS = 4
SHORT = SamplingParams(max_tokens=5, ignore_eos=True, seed=1)
LONG = SamplingParams(max_tokens=100_000, ignore_eos=True, seed=1)
PROMPT = [70, 71, 72]
MAX_STEPS = 1000
"""More than anything here takes."""


@pytest.fixture(params=["fake", "real"])
def engine(request: pytest.FixtureRequest, gptj_folder: Path) -> Any:
    if request.param == "fake":
        return FakeEngine(num_slots=NUM_SLOTS)
    return Engine(gptj_folder, EngineConfig(max_slots=NUM_SLOTS, max_batch_tokens=8))


def params(**changes: Any) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 5, "ignore_eos": True, "seed": 1} | changes)


def steps(engine: Any, until: Callable[[list[Output]], bool] = lambda _: False) -> list[Output]:
    """Outputs until there is no work, or until enough have come."""
    outputs: list[Output] = []
    for _ in range(MAX_STEPS):
        if not engine.has_work() or until(outputs):
            return outputs
        new = engine.step()
        assert len({(out.request_id, out.choice) for out in new}) == len(new), "one for each choice"
        outputs += new
    raise AssertionError(f"after {MAX_STEPS} steps there is work left: {engine.stats()}")


def of(outputs: Sequence[Output], request_id: str, choice: int = 0) -> list[Output]:
    return [out for out in outputs if (out.request_id, out.choice) == (request_id, choice)]


def ids_of(outputs: Sequence[Output]) -> list[int]:
    return [token_id for out in outputs for token_id in out.token_ids]


def ends(outputs: Sequence[Output]) -> list[tuple[str, int, FinishReason]]:
    """Every end, in an order of its own."""
    return sorted((o.request_id, o.choice, o.finish_reason) for o in outputs if o.finish_reason)


def test_a_request_ends_once_with_its_last_output(engine: Any) -> None:
    assert not engine.has_work()
    assert engine.submit(PROMPT, SHORT, request_id="a") == "a"
    assert engine.has_work()
    outputs = steps(engine)
    assert {out.request_id for out in outputs} == {"a"}
    assert len(ids_of(outputs)) == 5
    assert ends(outputs) == [("a", 0, FinishReason.LENGTH)]
    assert outputs[-1].finish_reason
    assert outputs[-1].error is None
    assert all(out.started is not None for out in outputs)


def test_each_choice_ends_once(engine: Any) -> None:
    engine.submit(PROMPT, params(n=3), request_id="a")
    outputs = steps(engine)
    assert ends(outputs) == [("a", n, FinishReason.LENGTH) for n in range(3)]
    assert [len(ids_of(of(outputs, "a", n))) for n in range(3)] == [5] * 3


def test_a_prompt_may_be_processed_without_generating(engine: Any) -> None:
    engine.submit(PROMPT, params(max_tokens=0), request_id="a")
    outputs = steps(engine)
    assert ends(outputs) == [("a", 0, FinishReason.LENGTH)]
    assert ids_of(outputs) == []


def test_more_requests_than_slots_all_end(engine: Any) -> None:
    names = [str(n) for n in range(3 * NUM_SLOTS)]
    for name in names:
        engine.submit(PROMPT, SHORT, request_id=name)
    assert ends(steps(engine)) == sorted((name, 0, FinishReason.LENGTH) for name in names)
    assert engine.stats().num_free_slots == NUM_SLOTS


def test_log_probabilities_come_with_their_ids(engine: Any) -> None:
    engine.submit(PROMPT, params(logprobs=2, prompt_logprobs=1, n=2), request_id="a")
    outputs = steps(engine)
    for n in range(2):
        told = of(outputs, "a", n)
        assert all(len(out.logprobs) == len(out.token_ids) for out in told)
        each = [logprob for out in told for logprob in out.logprobs]
        assert [logprob.token_id for logprob in each] == ids_of(told)
        assert {len(logprob.top) for logprob in each} == {2}
    prompts = [out.prompt_logprobs for out in outputs if out.prompt_logprobs is not None]
    assert prompts == [of(outputs, "a")[0].prompt_logprobs]
    [(none, *scored)] = prompts
    assert none is None
    assert [logprob and logprob.token_id for logprob in scored] == PROMPT[1:]


def test_outputs_have_no_logprobs_or_state_by_default(engine: Any) -> None:
    engine.submit(PROMPT, SHORT, request_id="a")
    for out in steps(engine):
        assert (out.logprobs, out.prompt_logprobs, out.state) == ((), None, None)


@pytest.mark.parametrize(
    ("prompt", "changes", "param"),
    [
        ([], {}, "prompt"),
        ([-1], {}, "prompt"),
        ([10**6], {}, "prompt"),
        (PROMPT, {"n": NUM_SLOTS + 1}, "n"),
        (PROMPT, {"max_tokens": 10**9}, "max_tokens"),
    ],
)
def test_an_impossible_request_is_refused_with_its_field(
    engine: Any, prompt: list[int], changes: dict[str, Any], param: str
) -> None:
    with pytest.raises(ParameterError) as error:
        engine.submit(prompt, params(**changes), request_id="a")
    assert error.value.param == param
    assert not engine.has_work()
    engine.submit(PROMPT, SHORT, request_id="a")  # the id was not taken
    assert ends(steps(engine)) == [("a", 0, FinishReason.LENGTH)]


def test_an_id_is_taken_until_its_request_ends(engine: Any) -> None:
    engine.submit(PROMPT, SHORT, request_id="a")
    for _ in range(2):
        with pytest.raises(ParameterError) as error:
            engine.submit(PROMPT, params(max_tokens=1), request_id="a")
        assert error.value.param == "request_id"
        outputs = engine.step()
    outputs += steps(engine)
    assert ends(outputs) == [("a", 0, FinishReason.LENGTH)]
    engine.submit(PROMPT, SHORT, request_id="a")
    assert ends(steps(engine)) == [("a", 0, FinishReason.LENGTH)]


@pytest.mark.parametrize("reason", [FinishReason.ABORT, FinishReason.TIMEOUT])
def test_a_cancelled_request_ends_in_the_next_step(engine: Any, reason: FinishReason) -> None:
    engine.submit(PROMPT, LONG, request_id="a")
    engine.submit(PROMPT, SHORT, request_id="b")
    steps(engine, until=lambda outputs: len(of(outputs, "a")) >= 2)
    engine.cancel("a", reason)
    assert engine.has_work()
    assert ends(of(engine.step(), "a")) == [("a", 0, reason)]
    assert ends(steps(engine)) == [("b", 0, FinishReason.LENGTH)]
    assert engine.stats().num_free_slots == NUM_SLOTS


@pytest.mark.parametrize("reason", [FinishReason.ABORT, FinishReason.TIMEOUT])
def test_a_request_cancelled_before_its_first_step_generates_nothing(
    engine: Any, reason: FinishReason
) -> None:
    """Its id is reserved, and the engine has not queued it yet."""
    engine.submit(PROMPT, params(n=2), request_id="a")
    for _ in range(2):
        engine.cancel("a", reason)
    outputs = steps(engine)
    assert ends(outputs) == [("a", n, reason) for n in range(2)]
    assert ids_of(outputs) == []


@pytest.mark.parametrize("verb", ["cancel", "pause", "resume"])
def test_unknown_and_finished_ids_are_ignored(engine: Any, verb: str) -> None:
    getattr(engine, verb)("nobody")
    engine.submit(PROMPT, SHORT, request_id="a")
    assert ends(steps(engine)) == [("a", 0, FinishReason.LENGTH)]
    getattr(engine, verb)("a")
    assert steps(engine) == []
    engine.submit(PROMPT, SHORT, request_id="a")  # nothing of it is left for a namesake
    assert ends(steps(engine)) == [("a", 0, FinishReason.LENGTH)]


def test_a_paused_request_continues_with_the_same_tokens(engine: Any) -> None:
    engine.submit(PROMPT, params(max_tokens=9), request_id="whole")
    whole = ids_of(steps(engine))
    engine.submit(PROMPT, params(max_tokens=9), request_id="a")
    before = steps(engine, until=lambda outputs: len(outputs) >= 3)
    engine.pause("a")
    engine.pause("a")
    assert steps(engine) == []  # there is no work, though it has not ended
    stats = engine.stats()
    assert (stats.num_paused, stats.num_running, stats.num_waiting) == (1, 0, 0)
    engine.submit(PROMPT, SHORT, request_id="other")
    assert ends(steps(engine)) == [("other", 0, FinishReason.LENGTH)]
    engine.resume("a")
    engine.resume("a")
    assert engine.has_work()
    after = steps(engine)
    assert ids_of(before) + ids_of(after) == whole
    assert ends(after) == [("a", 0, FinishReason.LENGTH)]
    assert engine.stats().num_paused == 0


def test_a_paused_request_can_be_cancelled(engine: Any) -> None:
    engine.submit(PROMPT, LONG, request_id="a")
    steps(engine, until=bool)
    engine.pause("a")
    steps(engine)
    engine.cancel("a")
    assert engine.has_work()
    assert ends(steps(engine)) == [("a", 0, FinishReason.ABORT)]
    assert engine.stats().num_paused == 0


def test_stats_follow_the_requests(engine: Any) -> None:
    before = engine.stats()
    assert (before.num_slots, before.num_free_slots) == (NUM_SLOTS, NUM_SLOTS)
    assert before.bytes_per_slot == engine.spec.bytes_per_slot
    assert sum(engine.spec.itemised_bytes().values()) == before.bytes_per_slot
    assert set(before.num_finished) == set(FinishReason)
    engine.submit(PROMPT, params(n=2), request_id="a")
    engine.submit(PROMPT, LONG, request_id="b")
    steps(engine, until=lambda outputs: len(of(outputs, "b")) >= 2)
    during = engine.stats()
    assert (during.num_running, during.num_free_slots) == (2, NUM_SLOTS - 3)
    engine.cancel("b")
    outputs = steps(engine)
    after = engine.stats()
    assert (after.num_running, after.num_waiting, after.num_paused) == (0, 0, 0)
    assert after.num_free_slots == NUM_SLOTS
    finished = {reason: num for reason, num in after.num_finished.items() if num}
    assert finished == {FinishReason.LENGTH: 2, FinishReason.ABORT: 1}
    assert after.num_prompt_tokens == 2 * len(PROMPT)
    assert after.num_generated_tokens >= len(ids_of(outputs))
    assert after.num_steps > 0
    assert (after.num_faults, after.num_undrawn) == (0, 0)


def test_closing_aborts_all_and_refuses_requests(engine: Any) -> None:
    engine.submit(PROMPT, params(max_tokens=100, n=2), request_id="a")
    engine.submit(PROMPT, LONG, request_id="b")
    steps(engine, until=lambda outputs: len(outputs) >= 3)
    engine.submit(PROMPT, SHORT, request_id="not begun")
    engine.pause("b")
    names = [("a", 0), ("a", 1), ("b", 0), ("not begun", 0)]
    assert ends(engine.close()) == [(*each, FinishReason.ABORT) for each in names]
    assert engine.close() == []
    assert not engine.has_work()
    with pytest.raises(EngineStoppedError):
        engine.submit(PROMPT, SHORT, request_id="late")
    engine.cancel("a")
    assert engine.step() == []
    assert engine.stats().num_free_slots == NUM_SLOTS


class TestTurns:
    """Requests that go on from a session."""

    def run(self, engine: Any, ids: list[int], start: SessionState, **changes: Any) -> list[Output]:
        engine.submit(ids, params(**changes), request_id="a", start=start)
        return steps(engine)

    def test_the_last_output_has_the_state_after_the_turn(self, engine: Any) -> None:
        *others, last = self.run(engine, PROMPT, SessionState())
        assert [out.state for out in others] == [None] * len(others)
        assert last.state is not None
        ids = ids_of([*others, last])
        assert last.state.recent == (*PROMPT, *ids)
        assert last.state.num_tokens == len(PROMPT) + len(ids)
        again = self.run(engine, [], last.state)[-1].state
        assert again is not None
        assert again.num_tokens == last.state.num_tokens + 5
        assert last.state.num_tokens == len(PROMPT) + len(ids), "a state is a value"

    def test_a_turn_without_generation_has_a_state(self, engine: Any) -> None:
        state = self.run(engine, PROMPT, SessionState(), max_tokens=0)[-1].state
        assert state is not None
        assert state.recent == tuple(PROMPT)

    def test_a_cancelled_turn_has_no_state(self, engine: Any) -> None:
        engine.submit(PROMPT, LONG, request_id="a", start=SessionState())
        steps(engine, until=bool)
        engine.cancel("a")
        assert [out.state for out in steps(engine)] == [None]

    @pytest.mark.parametrize(
        ("ids", "changes", "param"),
        [([], {}, "prompt"), (PROMPT, {"n": 2}, "n"), (PROMPT, {"prompt_logprobs": 1}, None)],
    )
    def test_parameters_that_a_turn_cannot_have_are_refused(
        self, engine: Any, ids: list[int], changes: dict[str, Any], param: str | None
    ) -> None:
        with pytest.raises(ParameterError) as error:
            self.run(engine, ids, SessionState(), **changes)
        assert error.value.param == (param or next(iter(changes)))


class Reader:
    """What a worker delivers, and a wait for it."""

    def __init__(self) -> None:
        self.outputs: list[Output] = []
        self._changed = threading.Condition()

    def deliver(self, outputs: list[Output]) -> None:
        assert outputs
        with self._changed:
            self.outputs += outputs
            self._changed.notify_all()

    def wait(self, condition: Callable[[list[Output]], Any]) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: condition(self.outputs), 60), self.outputs


@pytest.fixture
def reader() -> Reader:
    return Reader()


@pytest.fixture
def worker(engine: Any, reader: Reader) -> Iterator[EngineWorker]:
    def on_death(error: BaseException) -> None:
        raise AssertionError("the engine's thread died") from error

    made = EngineWorker(engine, reader.deliver, on_death)
    made.start()
    yield made
    made.stop()
    assert not made.is_alive


def test_a_worker_delivers_every_request_s_end_once(worker: EngineWorker, reader: Reader) -> None:
    names = [str(n) for n in range(20)]

    def ask(mine: Sequence[str]) -> None:
        for name, following in pairwise([*mine, "nobody"]):
            worker.submit(PROMPT, LONG if int(name) % 2 else SHORT, request_id=name)
            worker.pause(following)
            worker.resume(following)
            if int(name) % 2:
                worker.cancel(name)

    threads = [threading.Thread(target=ask, args=(names[n::4],)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    reader.wait(lambda outputs: len(ends(outputs)) == len(names))
    kinds = (FinishReason.LENGTH, FinishReason.ABORT)
    assert ends(reader.outputs) == sorted((name, 0, kinds[int(name) % 2]) for name in names)
    assert worker.stats().num_free_slots == NUM_SLOTS


def test_a_stopped_worker_aborts_every_request(worker: EngineWorker, reader: Reader) -> None:
    worker.submit(PROMPT, LONG, request_id="a")
    worker.submit(PROMPT, LONG, request_id="paused")
    worker.pause("paused")
    reader.wait(lambda outputs: len(of(outputs, "a")) >= 2)
    worker.stop()
    assert ends(reader.outputs) == [(name, 0, FinishReason.ABORT) for name in ("a", "paused")]
    assert worker.stats().num_free_slots == NUM_SLOTS
    worker.stop()
    with pytest.raises(EngineStoppedError):
        worker.submit(PROMPT, SHORT, request_id="late")
