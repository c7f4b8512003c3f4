"""Outputs of sampled ids, without a pool or a model."""

from typing import Any

import pytest

from cottention.engine.outputs import FinishReason, Output, TokenLogprob
from cottention.engine.sampling.token_constraints import NO_CONSTRAINTS
from cottention.engine.sampling_params import SamplingParams
from cottention.engine.scheduling.output_processor import OutputProcessor
from cottention.engine.scheduling.request import Choice, Request
from cottention.engine.state.session_state import SessionState
from tests.engine.making import make_request, small_tokenizer

WINDOW = 8
PROCESSOR = OutputProcessor(WINDOW)


def request(**params: Any) -> Request:
    return make_request("r", [1, 2], SamplingParams(**params))


def process(choice: Choice, token_id: int) -> Output:
    choice.append_token(token_id)
    return PROCESSOR.process(choice, token_id)


def say(choice: Choice, text: str) -> list[Output]:
    """Outputs of the ids of a text, up to the one that ends the choice."""
    outputs = []
    for token_id in small_tokenizer().encode(text):
        outputs.append(process(choice, token_id))
        if outputs[-1].finish_reason is not None:
            break
    return outputs


def text_of(outputs: list[Output]) -> str:
    return "".join(out.text for out in outputs)


def test_text_comes_with_its_ids_and_ends_at_the_length() -> None:
    ids = small_tokenizer().encode("one two three")
    outputs = say(request(max_tokens=len(ids)).choices[0], "one two three")
    assert [out.token_ids for out in outputs] == [(token_id,) for token_id in ids]
    assert text_of(outputs) == "one two three"
    assert [out.finish_reason for out in outputs[:-1]] == [None] * (len(ids) - 1)
    assert outputs[-1].finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize(("is_included", "expected"), [(False, "one"), (True, "one two")])
def test_a_stop_string_over_several_ids_ends_the_choice(is_included: bool, expected: str) -> None:
    made = request(max_tokens=50, stop=(" two",), include_stop_str_in_output=is_included)
    outputs = say(made.choices[0], "one two three")
    assert text_of(outputs) == expected
    assert (outputs[-1].finish_reason, outputs[-1].stop_reason) == (FinishReason.STOP, " two")


def test_a_stop_string_counts_from_min_tokens_on() -> None:
    num_ids = len(small_tokenizer().encode("a.b."))
    made = request(max_tokens=50, stop=(".",), min_tokens=num_ids)
    outputs = say(made.choices[0], "a.b.c.d")
    assert text_of(outputs) == "a.b"
    assert len(outputs) == num_ids


def test_stop_ids_are_not_text() -> None:
    outputs = say(request(max_tokens=50, stop_token_ids=(7,)).choices[0], "one")
    made = request(max_tokens=50, stop_token_ids=(7,))
    last = process(made.choices[0], 7)
    assert outputs[-1].stop_reason is None
    assert (last.text, last.token_ids) == ("", (7,))
    assert (last.finish_reason, last.stop_reason) == (FinishReason.STOP, 7)


@pytest.mark.parametrize(
    ("reason", "expected"),
    [(FinishReason.ABORT, "abc"), (FinishReason.TIMEOUT, "abc"), (FinishReason.ERROR, "")],
)
def test_text_that_was_held_back_is_sent_unless_there_was_an_error(
    reason: FinishReason, expected: str
) -> None:
    choice = request(max_tokens=50, stop=("abcd",)).choices[0]
    assert text_of(say(choice, "abc")) == ""
    last = PROCESSOR.finish(choice, reason, "what happened")
    assert (last.text, last.token_ids, last.finish_reason) == (expected, (), reason)
    assert last.error == "what happened"


def test_per_request_fields_are_sent_once_and_only_with_choice_0() -> None:
    """A client adds them up over the choices, and they would count n times."""
    made = request(max_tokens=2, n=2, prompt_logprobs=0)
    logprob = TokenLogprob(2, -1.0, 1, ())
    made.prompt_logprobs.append(logprob)
    made.num_cached = 5
    outputs = {
        choice.index: [process(choice, token_id) for token_id in (3, 4)] for choice in made.choices
    }
    assert [out.prompt_logprobs for out in outputs[0]] == [(None, logprob), None]
    assert [out.num_cached for out in outputs[0]] == [0, 5]
    assert [(out.prompt_logprobs, out.num_cached) for out in outputs[1]] == [(None, 0)] * 2


def test_a_choice_that_ends_without_an_id_has_its_prompts_logprobs() -> None:
    first, second = request(max_tokens=2, n=2, prompt_logprobs=0).choices
    assert PROCESSOR.finish(first, FinishReason.LENGTH).prompt_logprobs == (None,)
    assert PROCESSOR.finish(second, FinishReason.LENGTH).prompt_logprobs is None


def test_a_session_state_has_the_turns_ids_and_no_rows_of_them() -> None:
    """The pool's rows are RequestManager's to add; a turn that is cut leaves no state."""
    start = SessionState(position=0, pending=(9,), recent=(9,))
    made = Request.new(
        "r", [1, 2], SamplingParams(max_tokens=2), small_tokenizer(), NO_CONSTRAINTS, start=start
    )
    choice = made.choices[0]
    assert process(choice, 3).state is None
    assert PROCESSOR.finish(choice, FinishReason.ABORT).state is None
    state = process(choice, 4).state
    assert state is not None
    assert (state.pending, state.recent) == ((9, 1, 2, 3, 4), (9, 1, 2, 3, 4))
    assert (state.rows, state.position) == ((), 0)
    assert dict(state.counts) == {1: 0, 2: 0, 3: 1, 4: 1}
