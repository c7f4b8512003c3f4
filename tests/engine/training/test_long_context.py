"""Scores of long texts in the benchmarks: each method against its definition."""

import functools
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import long_context
from benchmarks.held_out import LongText, load
from cottention.engine import Engine, EngineConfig, SamplingParams
from cottention.engine.models.gptj.model import CottentionForCausalLM
from cottention.engine.models.recurrence import Features
from cottention.engine.state.context_window import KEPT_PART
from cottention.engine.training.forward import init_weights, logits_of
from cottention.engine.training.settings import TrainingSettings
from tests.engine.making import ATTENTIONS, attention_folder
from tests.engine.windows import folder_of

WINDOW = 16
LENGTH = 75


def model_of(attention: str) -> CottentionForCausalLM:
    settings = TrainingSettings(
        context=WINDOW, attention=attention, layers=2, width=16, heads=2, vocab_size=50
    )
    torch.manual_seed(0)
    model = init_weights(CottentionForCausalLM(settings.model_config(0)))
    for block in model.blocks():  # large enough that what is attended to matters
        block.attn.v_proj.weight.data.mul_(50)
    return model.eval().requires_grad_(False)


def ids_of(length: int = LENGTH) -> Tensor:
    return torch.randint(50, (length + 1,), generator=torch.Generator().manual_seed(1))


def nats_of(logits: Tensor, ids: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")


@pytest.mark.parametrize("piece", [7, 64, 1000])
@pytest.mark.parametrize("attention", [kind for kind in ATTENTIONS if kind != "cosformer"])
def test_exact_equals_the_whole_text_in_one_pass(attention: str, piece: int) -> None:
    model, ids = model_of(attention), ids_of()
    expected = nats_of(logits_of(model, ids[None, :-1], dtype=torch.float32)[0], ids)
    torch.testing.assert_close(long_context.exact(model, ids, piece=piece), expected)


@pytest.mark.parametrize(
    ("length", "kept"), [(1, 2), (WINDOW, 8), (WINDOW + 1, 4), (LENGTH, 2), (LENGTH, 8)]
)
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_renewed_token_by_token(attention: str, kept: int, length: int) -> None:
    """At index W, and then every W − kept, the state is recomputed from the last `kept` ids."""
    model, ids = model_of(attention), ids_of(length)
    expected = []
    for index in range(length):
        stride = WINDOW - kept
        start = 0 if index < WINDOW else (1 + (index - WINDOW) // stride) * stride
        logits = logits_of(model, ids[None, start : index + 1], dtype=torch.float32)[0, -1:]
        expected.append(nats_of(logits, ids[index : index + 2]))
    got = long_context.renewed(model, ids, kept=kept)
    torch.testing.assert_close(got, torch.cat(expected))


@pytest.mark.slow
@pytest.mark.every_attention
@pytest.mark.parametrize("part", [KEPT_PART, long_context.KEPT_PART])
@pytest.mark.parametrize("is_drawn", [False, True])
@pytest.mark.parametrize("folder_for", [functools.partial(folder_of, WINDOW), attention_folder])
def test_renewed_equals_the_engine(
    attention: str,
    part: int,
    is_drawn: bool,
    folder_for: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Over several windows, prefilled or generated; W and R the same."""
    monkeypatch.setattr("cottention.engine.state.context_window.KEPT_PART", part)
    folder = folder_for(attention)
    engine = Engine(folder, EngineConfig(max_slots=2, context_policy="renew", dtype="float32"))
    window, kept = engine.policies.window, engine.policies.window // part
    length = 4 * window + 7
    ids, logprobs = drawn(engine, length) if is_drawn else read(engine, length)
    expected = -long_context.renewed(load(folder), torch.tensor(ids), kept=kept)
    torch.testing.assert_close(torch.tensor(logprobs), expected[-len(logprobs) :])
    other = -long_context.renewed(load(folder), torch.tensor(ids), kept=kept + 1)
    assert (other - expected).abs().max() > 0.01, "R would not show"


Scored = tuple[list[int], list[float]]


def read(engine: Engine, length: int) -> Scored:
    """A prompt, and the log-probabilities of all its ids but the first."""
    ids = random.Random(length).choices(range(engine.tokenizer.num_ids), k=length)
    params = SamplingParams(max_tokens=0, prompt_logprobs=0)
    [output] = engine.stream(ids, params)
    assert output.prompt_logprobs is not None
    return ids, [one.logprob for one in output.prompt_logprobs if one is not None]


def drawn(engine: Engine, length: int) -> Scored:
    """One id and the ids generated after it, with their log-probabilities."""
    params = SamplingParams(max_tokens=length, logprobs=0, seed=1, ignore_eos=True)
    outputs = [*engine.stream([7], params)]
    ids = [7, *(i for out in outputs for i in out.token_ids)]
    return ids, [one.logprob for out in outputs for one in out.logprobs]


@pytest.mark.parametrize("length", [5, WINDOW, LENGTH])
def test_sliding_window_attends_to_one_window(length: int) -> None:
    model, ids = model_of("softmax"), ids_of(length)

    def attend(_layer: int, features: Features) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in features[:3])
        mask = torch.ones(length, length, dtype=torch.bool).tril().triu(1 - WINDOW)
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return out.transpose(1, 2)

    expected = nats_of(model(ids[None, :-1], torch.arange(length), attend)[0], ids)
    torch.testing.assert_close(long_context.sliding(model, ids), expected)


def test_each_position_has_the_same_tokens_in_fresh_windows() -> None:
    model, text = model_of("cottention"), LongText(ids_of(640)[:-1], torch.ones(50).long())
    ways = {"exact": long_context.exact, "renewed": functools.partial(long_context.renewed, kept=4)}
    told = dict(long_context.bits_by_position(model, text, ways, 2, 256))
    exact, renewed = (told[how] for how in ways)
    assert list(exact) == list(renewed) == ["128-256"]
    assert exact["128-256"].fresh == renewed["128-256"].fresh
    assert exact["128-256"].per_byte != renewed["128-256"].per_byte


def test_inside_the_window_all_are_fresh() -> None:
    settings = TrainingSettings(context=256, layers=1, width=16, heads=2, vocab_size=50)
    model = init_weights(CottentionForCausalLM(settings.model_config(0))).eval()
    text = LongText(ids_of(600)[:-1], torch.full((50,), 2))
    [(_, bits)] = long_context.bits_by_position(model, text, {"exact": long_context.exact}, 1, 512)
    assert list(bits) == ["0-128", "128-256", "256-512"]
    for each in bits.values():  # fresh weights know nothing: about log₂ 50 bits for two bytes
        assert each.fresh == pytest.approx(2.82, abs=0.05)
    assert bits["0-128"].per_byte == bits["0-128"].fresh


def test_streams_wrap_around_the_text() -> None:
    text = LongText(torch.arange(10), torch.ones(10))
    streams = [(places.tolist(), ids.tolist()) for places, ids in text.streams(2, 12)]
    assert streams == [
        ([*range(10), 0, 1], [*range(10), 0, 1, 2]),
        ([*range(5, 10), *range(7)], [*range(5, 10), *range(8)]),
    ]


@pytest.mark.slow
def test_the_text_is_held_out_code(gptj_folder: Path) -> None:
    text = LongText.held_out(gptj_folder)
    assert len(text.ids) > 100_000
    assert int(text.ids.max()) < len(text.token_bytes)
