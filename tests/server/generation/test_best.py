"""Ranking by mean log-probability, and the prompt's own, which the engine tells once."""

from dataclasses import replace

from cottention.engine.outputs import Output, TokenLogprob
from cottention.engine.sampling_params import SamplingParams
from cottention.server.generation.output_stream import OutputDelta, TokenDeltas
from cottention.server.generation.request import GenerationRequest, OutputOptions
from cottention.server.generation.responses import best_choices
from cottention.server.schemas.sampling import StreamOptions

ORDER = GenerationRequest(
    prompts=[[1]],
    echoes=[""],
    params=SamplingParams(n=3, logprobs=0),
    details=OutputOptions(),
    num_choices=2,
    is_stream=False,
    stream_options=StreamOptions.model_validate({}),
    priority=0,
    request_id=None,
)


def piece(text: str, *logprobs: float, prompt: tuple[TokenLogprob | None, ...] = ()) -> OutputDelta:
    made = OutputDelta(TokenDeltas())
    entries = tuple(TokenLogprob(1, each, 1, ()) for each in logprobs)
    made.add(Output("r", 0, text, (1,) * len(entries), logprobs=entries, prompt_logprobs=prompt))
    return made


def test_the_likeliest_on_average_come_first() -> None:
    pieces = {
        0: piece("worst", -3, -3, prompt=(None,)),
        2: piece("best", -1),
        1: piece("long", *[-1.5] * 9),
    }
    best = best_choices(pieces, ORDER)
    assert {index: each.text for index, each in best.items()} == {0: "best", 1: "long"}
    assert best[0].tokens
    assert best[0].tokens.prompt_logprobs == (None,)


def test_one_without_tokens_is_worse_than_any() -> None:
    best = best_choices({0: piece("", *[]), 1: piece("b", -50), 2: piece("a", -2)}, ORDER)
    assert [each.text for each in best.values()] == ["a", "b"]


def test_all_are_kept_in_order_where_none_is_left_out() -> None:
    order = replace(ORDER, num_choices=3)
    found = best_choices({2: piece("c", -1), 0: piece("a", -9), 1: piece("b", -5)}, order)
    assert [each.text for each in found.values()] == ["a", "b", "c"]
