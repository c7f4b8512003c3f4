"""How a body becomes a GenerationRequest, and how a turn's prompt depends on its session."""

from typing import Any, cast

import pytest

from cottention.engine.sampling_params import SamplingParams
from cottention.engine.scheduling.context_policy import ContextPolicies
from cottention.engine.state.context_window import context_schedules
from cottention.engine.state.session_state import SessionState
from cottention.engine.text.tokenizer import Tokenizer
from cottention.server.generation.chat_template import ChatContinuation
from cottention.server.generation.choice_format import (
    ChatFormatter,
    ChoiceFormatter,
    CompletionFormatter,
)
from cottention.server.generation.output_stream import OutputDelta, TokenDeltas
from cottention.server.generation.request import (
    GenerationRequest,
    OutputOptions,
    ParsedRequest,
    turn_prompt,
)
from cottention.server.schemas.completions import completion_request
from tests.server.fake_engine import FakeTokenizer
from tests.short_steps import takes_short_steps

EMPTY = SessionState()
HELD = EMPTY.extended([1, 2], (), 512)
POLICIES = ContextPolicies("renew", 512, None, context_schedules(512))


def framing_tokenizer() -> Tokenizer:
    tokenizer = FakeTokenizer()
    tokenizer.before = (9,)
    return cast(Tokenizer, tokenizer)


def parsed(*prompts: list[int], **fields: Any) -> ParsedRequest:
    body = completion_request({"prompt": list(prompts)} | fields)
    return ParsedRequest(body, SamplingParams(n=body.num_tried), OutputOptions(), list(prompts))


def test_a_request_has_what_its_body_says() -> None:
    fields = {"n": 2, "best_of": 3, "priority": -4}
    request = parsed([1, 2], [3], **fields).build()
    assert request.prompts == [[1, 2], [3]]
    assert request.echoes == ["", ""], "a formatter looks up one for each prompt"
    assert (request.num_choices, request.params.n, request.priority) == (2, 3, -4)
    assert not request.is_stream
    assert request.num_prompt_tokens == 3
    options = {"include_usage": True}
    streamed = parsed([1], stream=True, stream_options=options).build()
    assert streamed.is_stream
    assert streamed.stream_options.include_usage


def test_a_turn_s_request_has_the_prompt_of_its_session() -> None:
    request = parsed([5], session_id="s", on_cancel="rollback")
    assert request.turn is not None
    assert (request.turn.session_id, request.turn.on_cancel) == ("s", "rollback")
    assert parsed([5]).turn is None
    tokenizer = framing_tokenizer()
    assert request.build_turn(EMPTY, tokenizer, POLICIES).prompts == [[5]]
    continuation = ChatContinuation([6, 7])
    chat = ParsedRequest(
        request.body, request.params, request.output, [[5]], continuation=continuation
    )
    assert chat.build_turn(EMPTY, tokenizer, POLICIES).prompts == [[5]]
    assert chat.build_turn(HELD, tokenizer, POLICIES).prompts == [[6, 7]]
    assert chat.prompts == [[5]], "a request may be built again"


def test_special_tokens_begin_a_session_and_no_later_turn() -> None:
    tokenizer = framing_tokenizer()
    assert turn_prompt([5], EMPTY, tokenizer, add_special_tokens_if_empty=True) == [9, 5]
    assert turn_prompt([5], HELD, tokenizer, add_special_tokens_if_empty=True) == [5]
    assert turn_prompt([5], EMPTY, tokenizer) == [5]


@pytest.mark.parametrize("field", [pytest.param("stop", marks=pytest.mark.slow), "stop_token_ids"])
def test_very_long_lists_are_made_distinct_in_short_steps(field: str) -> None:
    values: list[Any] = [*range(1_500_000)]
    if not field.endswith("ids"):
        values = [*map(str, values)]
    assert takes_short_steps(lambda: completion_request({"prompt": "x", field: values}))


@pytest.mark.parametrize(
    "formatter", [CompletionFormatter, pytest.param(ChatFormatter, marks=pytest.mark.slow)]
)
def test_the_ids_of_a_very_long_prompt_are_encoded_in_short_steps(
    formatter: type[ChoiceFormatter],
) -> None:
    output = OutputOptions(token_ids=True)
    request = GenerationRequest([[7] * 3_000_000], SamplingParams(), output, [""], is_stream=True)
    tokenizer: Any = FakeTokenizer()

    def chunk() -> None:
        choices = formatter(request, tokenizer)
        assert "7,7,7" in "".join(choices.chunks(0, OutputDelta(TokenDeltas())))

    assert takes_short_steps(chunk)
