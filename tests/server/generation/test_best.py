"""Ranking by mean log-probability, and the prompt's own, which the engine returns once."""

from cottention.engine.outputs import Output, TokenLogprob
from cottention.engine.sampling_params import SamplingParams
from cottention.server.generation.output_stream import OutputDelta, TokenDeltas
from cottention.server.generation.request import GenerationRequest, OutputOptions
from cottention.server.generation.responses import best_choices


def request(num_choices: int = 2) -> GenerationRequest:
    params = SamplingParams(n=3, logprobs=0)
    return GenerationRequest([[1]], params, OutputOptions(), [""], num_choices=num_choices)


def delta(text: str, *logprobs: float, prompt: tuple[TokenLogprob | None, ...] = ()) -> OutputDelta:
    made = OutputDelta(TokenDeltas())
    entries = tuple(TokenLogprob(1, each, 1, ()) for each in logprobs)
    made.add(Output("r", 0, text, (1,) * len(entries), logprobs=entries, prompt_logprobs=prompt))
    return made


def test_choices_are_ordered_by_mean_log_probability() -> None:
    deltas = {
        0: delta("worst", -3, -3, prompt=(None,)),
        2: delta("best", -1),
        1: delta("long", *[-1.5] * 9),
    }
    best = best_choices(deltas, request())
    assert {index: each.text for index, each in best.items()} == {0: "best", 1: "long"}
    assert best[0].tokens
    assert best[0].tokens.prompt_logprobs == (None,)


def test_a_choice_without_tokens_is_ordered_last() -> None:
    best = best_choices({0: delta("", *[]), 1: delta("b", -50), 2: delta("a", -2)}, request())
    assert [each.text for each in best.values()] == ["a", "b"]


def test_choices_keep_their_order_where_all_are_returned() -> None:
    found = best_choices({2: delta("c", -1), 0: delta("a", -9), 1: delta("b", -5)}, request(3))
    assert [each.text for each in found.values()] == ["a", "b", "c"]
