"""`timings` in answers: llama.cpp's object, only where it is asked for, in each kind of answer."""

from dataclasses import replace
from typing import Any

import pytest

from cottention.server.generation.chat_template import ChatTemplate
from cottention.server.generation.template_environment import compile_template
from cottention.server.schemas.responses import Timings
from tests.server.fake_engine import FakeEngine
from tests.server.live import Live, eventually, serving

TEMPLATE = ChatTemplate(compile_template("{{ messages[-1]['content'] }}"), (), {})


def check(timings: Any, *, cache_n: int = 0, prompt_n: int, predicted_n: int) -> None:
    """The counts, and that the rates are quotients of what was measured."""
    found = Timings.model_validate(timings)
    assert set(timings) == set(Timings.model_fields)
    assert (found.cache_n, found.prompt_n, found.predicted_n) == (cache_n, prompt_n, predicted_n)
    assert found.prompt_ms > 0
    assert found.prompt_per_token_ms == pytest.approx(found.prompt_ms / prompt_n)
    assert found.prompt_per_second == pytest.approx(1000 * prompt_n / found.prompt_ms)
    if predicted_n > 1:
        assert found.predicted_ms > 0
        assert found.predicted_per_second == pytest.approx(1000 * predicted_n / found.predicted_ms)


@pytest.mark.parametrize("name", ["timings", "timings_per_token"])
def test_whole_answers(name: str) -> None:
    """All choices together; an answer that did not ask has no such field."""
    with serving(FakeEngine(step_seconds=0.002), template=TEMPLATE) as live:
        done = live.complete(prompt=["abc", "de"], n=2, max_tokens=3, **{name: True}).json()
        check(done["timings"], prompt_n=5, predicted_n=12)
        answer = live.chat("abcd", max_tokens=3, **{name: True}).json()
        check(answer["timings"], prompt_n=4, predicted_n=3)
        assert "timings" not in live.complete(prompt="abc", max_tokens=2).json()


@pytest.mark.parametrize("has_usage", [False, True])
def test_streams_have_them_in_their_last_chunk(has_usage: bool) -> None:
    options = {"stream_options": {"include_usage": True}} if has_usage else {}
    with serving(FakeEngine(step_seconds=0.002), template=TEMPLATE) as live:
        *before, last, _done = live.events(prompt="abc", n=2, max_tokens=3, timings=True, **options)
        check(last["timings"], prompt_n=3, predicted_n=6)
        assert bool(last["choices"]) is not has_usage
        assert not any("timings" in chunk for chunk in before)
        chunks = live.events(prompt="abc", max_tokens=3, timings_per_token=True, **options)[:-1]
        assert all(chunk["timings"]["prompt_n"] == 3 for chunk in chunks)
        assert chunks[-1]["timings"]["predicted_n"] == 3


def test_turns_of_sessions_count_what_the_session_held() -> None:
    """cache_n, prompt_n and predicted_n are together the session's position after the turn."""
    with serving(FakeEngine(step_seconds=0.002)) as live:
        session_id = live.opened("hello")
        turn = {"prompt": "abc", "session_id": session_id, "max_tokens": 2, "timings": True}
        whole = live.complete(**turn).json()
        check(whole["timings"], cache_n=5, prompt_n=3, predicted_n=2)
        *_, last, _done = live.events(**turn)
        check(last["timings"], cache_n=10, prompt_n=3, predicted_n=2)
        assert last["session"]["position"] == 15
        on = {"on_disconnect": "continue"}
        whole = live.complete(**turn, **on).json()
        check(whole["timings"], cache_n=15, prompt_n=3, predicted_n=2)
        assert live.complete(**turn, **on, stream=True).text.count('"timings":{"cache_n":20,') == 1


def test_an_answer_without_a_token_has_zeros(shared: Live) -> None:
    """Nothing was measured that could be divided by."""
    found = shared.complete(prompt="abc", max_tokens=0, echo=True, timings=True).json()["timings"]
    assert found["prompt_n"] == 3
    assert {name for name, value in found.items() if value} == {"prompt_n"}


def test_tokens_of_the_prefix_cache_are_not_computed() -> None:
    with serving() as live:
        deliver = live.engine._end

        def cached(*arguments: Any, **more: Any) -> Any:
            return [
                replace(each, num_cached=2) if each.finish_reason else each
                for each in deliver(*arguments, **more)
            ]

        live.engine._end = cached
        found = live.complete(prompt="abc", max_tokens=2, timings=True).json()
        assert (found["timings"]["cache_n"], found["timings"]["prompt_n"]) == (2, 1)
        eventually(lambda: not live.async_engine.streams)
