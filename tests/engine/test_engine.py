"""The engine as a library: its verbs, in every order that is awkward."""

import json
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch

import cottention.engine as library
from cottention.engine import Engine, EngineConfig, FinishReason, Output, SamplingParams
from cottention.engine.config import DType
from cottention.engine.errors import ConfigurationError, ParameterError, RequestFailedError
from cottention.engine.scheduling.batch import Batch, BatchResult
from cottention.engine.scheduling.request import Choice
from tests.engine.making import drew

LONG = SamplingParams(max_tokens=10_000, ignore_eos=True, seed=1)


def collect(engine: Engine, most_steps: int = 2000) -> dict[tuple[str, int], list[Output]]:
    """Step until there is no more work: all outputs by request and choice."""
    parts: dict[tuple[str, int], list[Output]] = {}
    for step in count():
        if not engine.has_work():
            break
        assert step < most_steps
        outputs = engine.step()
        assert len({(out.request_id, out.choice) for out in outputs}) == len(outputs)
        for out in outputs:
            parts.setdefault((out.request_id, out.choice), []).append(out)
    return parts


def ids_of(outputs: list[Output]) -> tuple[int, ...]:
    return tuple(token_id for out in outputs for token_id in out.token_ids)


def text_of(outputs: list[Output]) -> str:
    return "".join(out.text for out in outputs)


def check_all_ended(engine: Engine, parts: dict[tuple[str, int], list[Output]]) -> None:
    """Each choice ended exactly once, in its last output, and nothing is held."""
    for outputs in parts.values():
        assert [out.finish_reason is not None for out in outputs] == [False] * (
            len(outputs) - 1
        ) + [True]
    stats = engine.stats()
    assert (stats.num_running, stats.num_waiting) == (0, 0)
    assert stats.num_free_slots == stats.num_slots
    assert not engine._request_manager._requests
    assert not engine._inboxes._inboxes


def script(engine: Engine, monkeypatch: pytest.MonkeyPatch, text: str) -> list[int]:
    """Make the model say `text` whatever it is asked, one id a step; gives the ids."""
    ids = engine.tokenizer.encode(text)

    def run(batch: Batch, *_: Any) -> BatchResult:
        read = [chunk.request for chunk in batch.prefill if chunk.is_last]
        choices = batch.decode + [choice for request in read for choice in request.choices]
        return drew({choice: ids[choice.num_generated % len(ids)] for choice in choices})

    monkeypatch.setattr(engine._runner, "run", run)
    return ids


# What a request gets


@pytest.mark.every_attention
def test_seeded_requests_do_not_depend_on_the_batch(engine: Engine) -> None:
    params = [
        SamplingParams(max_tokens=12, seed=5, ignore_eos=True),
        SamplingParams(max_tokens=20, temperature=0, ignore_eos=True),
        SamplingParams(max_tokens=7, seed=9, top_k=5, n=2, ignore_eos=True),
        SamplingParams(max_tokens=9, seed=9, top_p=0.7, temperature=2.0, ignore_eos=True),
    ]
    prompts = ["def", "import os\nimport sys\n", "x", "class A:"]
    alone = [engine.generate([p], each) for p, each in zip(prompts, params, strict=True)]
    names = [
        engine.submit(engine.tokenizer.encode(p), each)
        for p, each in zip(prompts, params, strict=True)
    ]
    parts = collect(engine)
    check_all_ended(engine, parts)
    for name, completions in zip(names, alone, strict=True):
        for index, done in enumerate(completions):
            assert ids_of(parts[name, index]) == done.token_ids
            assert text_of(parts[name, index]) == done.text


def test_choices_are_numbered_and_the_first_is_that_of_one(engine: Engine) -> None:
    params = {"max_tokens": 16, "seed": 3, "ignore_eos": True}
    three = engine.generate(["abc"], SamplingParams(n=3, **params))
    one = engine.generate(["abc"], SamplingParams(**params))
    assert three[0] == one[0]
    assert len({done.token_ids for done in three}) == 3


@pytest.mark.every_attention
def test_greedy_choices_are_equal(engine: Engine) -> None:
    """The prompt's state reaches every choice, not the first alone."""
    done = engine.generate(["a longer prompt"], SamplingParams(temperature=0, n=4, max_tokens=8))
    assert len({each.token_ids for each in done}) == 1


def test_unseeded_requests_differ(engine: Engine) -> None:
    done = engine.generate(["abc"] * 3, SamplingParams(max_tokens=16, ignore_eos=True))
    assert len({each.token_ids for each in done}) == 3


def test_generate_keeps_the_order_of_prompts_and_choices(engine: Engine) -> None:
    params = SamplingParams(temperature=0, n=2, max_tokens=4)
    prompts = ["a very long prompt that takes several steps to read", "b", "c"]
    expected = [engine.generate([prompt], params) for prompt in prompts]
    assert engine.generate(prompts, params) == [each for pair in expected for each in pair]
    assert engine.generate([], params) == []


@pytest.mark.every_attention
@pytest.mark.parametrize("budget", [2, 3, 7, 64])
def test_the_budget_changes_nothing(gptj_folder: Path, budget: int) -> None:
    """Prompts longer than the budget; more running choices than the budget."""
    params = SamplingParams(max_tokens=6, seed=2, n=4, ignore_eos=True)
    wide = Engine(gptj_folder, EngineConfig(max_slots=4))
    narrow = Engine(gptj_folder, EngineConfig(max_slots=4, max_batch_tokens=budget))
    prompt = "for name, value in items:"
    assert narrow.generate([prompt], params) == wide.generate([prompt], params)


def test_one_token(engine: Engine) -> None:
    done = engine.generate(["abc"], SamplingParams(max_tokens=1, ignore_eos=True, n=4))
    assert all(len(each.token_ids) == 1 for each in done)
    assert all(each.finish_reason is FinishReason.LENGTH for each in done)
    assert engine.pool.num_free == 4


@pytest.mark.every_attention
def test_positions_beyond_the_trained_length_go_on(engine: Engine) -> None:
    length = engine.policies.window + 10
    done = engine.generate(["a"], SamplingParams(max_tokens=length, ignore_eos=True, seed=0))
    assert len(done[0].token_ids) == length


# How a text ends


@pytest.fixture
def always_ends(folder: Path) -> Engine:
    """Every id is an end-of-text id."""
    config = json.loads((folder / "config.json").read_text())
    config["eos_token_id"] = list(range(config["vocab_size"]))
    (folder / "config.json").write_text(json.dumps(config))
    return Engine(folder, EngineConfig(max_slots=2))


def test_end_of_text_as_the_first_token(always_ends: Engine) -> None:
    outputs = list(always_ends.stream("a", SamplingParams(n=2, seed=0)))
    assert [(out.text, out.finish_reason, len(out.token_ids)) for out in outputs] == [
        ("", FinishReason.STOP, 1)
    ] * 2
    assert always_ends.pool.num_free == 2


def test_end_of_text_can_be_ignored(always_ends: Engine) -> None:
    done = always_ends.generate(["a"], SamplingParams(max_tokens=5, ignore_eos=True, seed=0))
    assert (len(done[0].token_ids), done[0].finish_reason) == (5, FinishReason.LENGTH)


def test_end_of_text_releases_held_text(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    script(engine, monkeypatch, "so far<|endoftext|>")
    done = engine.generate(["a"], SamplingParams(stop=("far away",), max_tokens=50))[0]
    assert (done.text, done.finish_reason) == ("so far", FinishReason.STOP)
    assert done.token_ids[-1] in engine.model_config.eos_token_ids


@pytest.mark.parametrize(
    ("stop", "text"),
    [
        (("\n\n",), "one\ntwo"),
        (("\n",), "one"),
        (("wo\n", "o\n", "o"), ""),
        (("€",), "one\ntwo\n\nthree "),
        (("nowhere",), "one\ntwo\n\nthree €."),
    ],
)
def test_stop_strings(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, stop: tuple[str, ...], text: str
) -> None:
    ids = script(engine, monkeypatch, "one\ntwo\n\nthree €.")
    done = engine.generate(["a"], SamplingParams(stop=stop, max_tokens=len(ids)))[0]
    assert done.text == text
    stopped = stop != ("nowhere",)
    assert done.finish_reason is (FinishReason.STOP if stopped else FinishReason.LENGTH)
    assert done.token_ids == tuple(ids[: len(done.token_ids)])


def test_a_stop_in_the_last_allowed_token_is_a_stop(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = script(engine, monkeypatch, "ab.")
    done = engine.generate(["a"], SamplingParams(stop=(".",), max_tokens=len(ids)))[0]
    assert (done.text, done.finish_reason) == ("ab", FinishReason.STOP)


def test_half_a_character_at_the_last_token(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = script(engine, monkeypatch, "€")
    if len(ids) > 1:
        done = engine.generate(["a"], SamplingParams(max_tokens=1))[0]
        assert done.text == "\ufffd"


def test_a_stop_string_that_only_the_end_completes(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    half = next(i for i, b in enumerate(engine.tokenizer.token_bytes) if b == b"\xe2")
    monkeypatch.setattr(
        engine._runner,
        "run",
        lambda batch, *_: drew({chunk.request.choices[0]: half for chunk in batch.prefill}),
    )
    (done,) = engine.generate(["a"], SamplingParams(max_tokens=1, stop=("\ufffd",)))
    assert (done.text, done.finish_reason) == ("", FinishReason.STOP)


def test_choices_end_one_by_one(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A choice that ends gives its slot to the next request while its siblings go on."""
    end = engine.model_config.eos_token_ids[0]
    other = engine.tokenizer.encode("a")[0]

    def run(batch: Batch, *_: Any) -> BatchResult:
        read = [chunk.request for chunk in batch.prefill if chunk.is_last]
        choices = batch.decode + [choice for request in read for choice in request.choices]
        last = {c: 2 if c.request.id == "one" else c.index for c in choices}
        return drew({c: end if c.num_generated == last[c] else other for c in choices})

    monkeypatch.setattr(engine._runner, "run", run)
    engine.submit([1], SamplingParams(n=4), request_id="four")
    engine.submit([1], SamplingParams(), request_id="one")
    engine.step()
    assert engine.pool.num_free == 1
    engine.step()
    assert (engine.stats().num_running, engine.stats().num_waiting) == (2, 0)
    assert engine.pool.num_free == 1
    parts = collect(engine)
    assert [len(ids_of(parts[name])) for name in (("four", 2), ("four", 3), ("one", 0))] == [
        1,
        2,
        2,
    ]
    check_all_ended(engine, parts)


# Coming and going


@pytest.mark.parametrize("steps", range(6))
def test_cancel_at_every_stage(engine: Engine, steps: int) -> None:
    """Waiting, mid-prefill (n > 1, a prompt of two and a half budgets), first token, running."""
    engine.submit([1] * 20, SamplingParams(n=3, max_tokens=50, ignore_eos=True), request_id="a")
    for _ in range(steps):
        engine.step()
    engine.cancel("a")
    outputs = engine.step()
    assert [(out.choice, out.finish_reason) for out in outputs] == [
        (index, FinishReason.ABORT) for index in range(3)
    ]
    check_all_ended(engine, {})
    assert not engine.has_work()


def test_cancel_of_one_that_waits_for_slots(engine: Engine) -> None:
    engine.submit([1], SamplingParams(n=4, max_tokens=5, ignore_eos=True), request_id="all")
    engine.submit([1], LONG, request_id="waits")
    engine.step()
    assert engine.stats().num_waiting == 1
    engine.cancel("waits")
    outputs = engine.step()
    assert [out for out in outputs if out.request_id == "waits"] == [
        Output("waits", 0, "", (), FinishReason.ABORT)
    ]
    assert len(collect(engine)) == 4
    check_all_ended(engine, {})


def test_cancel_releases_held_text(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = script(engine, monkeypatch, "abc")
    engine.submit([1], SamplingParams(stop=("abcd",), max_tokens=99), request_id="a")
    outputs = [out for _ in ids for out in engine.step()]
    engine.cancel("a")
    assert text_of(outputs) == ""
    assert text_of(engine.step()) == "abc"


@pytest.mark.every_attention
def test_a_cancelled_request_leaves_its_slot_clean(engine: Engine) -> None:
    params = SamplingParams(temperature=0, max_tokens=8, n=4)
    expected = engine.generate(["abc"], params)
    engine.submit(engine.tokenizer.encode("something else entirely"), LONG, request_id="a")
    for _ in range(5):
        engine.step()
    engine.cancel("a")
    assert engine.generate(["abc"], params) == expected


def test_a_request_that_needs_every_slot_is_not_overtaken_for_ever(engine: Engine) -> None:
    """It is not overtaken for ever by small ones that come after it."""
    short = SamplingParams(max_tokens=4, ignore_eos=True)
    for name in ("a", "b", "c"):
        engine.submit([1], short, request_id=name)
    engine.submit([1] * 9, SamplingParams(n=4, max_tokens=3, ignore_eos=True), request_id="wide")
    for name in ("d", "e"):
        engine.submit([1], short, request_id=name)
    ends: list[str] = []
    while engine.has_work():
        ends += [out.request_id for out in engine.step() if out.finish_reason]
    assert ends[:3] == ["a", "b", "c"]
    assert ends[3:7] == ["wide"] * 4
    assert ends[7:] == ["d", "e"]


def test_a_prompt_is_copied_at_submission(engine: Engine) -> None:
    """The caller may go on using the list that it handed in."""
    params = SamplingParams(temperature=0, max_tokens=4)
    ids = engine.tokenizer.encode("a prompt of several steps, at eight tokens a step")
    expected = engine.generate([list(ids)], params)[0].token_ids
    name = engine.submit(ids, params)
    engine.step()
    ids.clear()
    assert ids_of(collect(engine)[name, 0]) == expected


@pytest.mark.parametrize("bad", ["", "\ud800"])
def test_a_refused_prompt_cancels_the_others_of_its_call(engine: Engine, bad: str) -> None:
    with pytest.raises(ParameterError) as caught:
        engine.generate(["good", bad], LONG)
    assert caught.value.param == "prompt"
    assert not engine.has_work()
    check_all_ended(engine, {})
    assert len(engine.generate(["good"], SamplingParams(max_tokens=2))) == 1


# Streams


def test_a_stream_is_what_generate_gives(engine: Engine) -> None:
    params = SamplingParams(max_tokens=20, seed=4, ignore_eos=True)
    done = engine.generate(["abc"], params)[0]
    outputs = list(engine.stream("abc", params))
    assert (text_of(outputs), ids_of(outputs)) == (done.text, done.token_ids)


def test_closing_a_stream_frees_its_slots(engine: Engine) -> None:
    stream = engine.stream("abc", SamplingParams(n=3, max_tokens=500, ignore_eos=True))
    next(stream)
    assert engine.pool.num_free == 1
    assert isinstance(stream, Iterator)
    stream.close()  # type: ignore[attr-defined]
    check_all_ended(engine, {})
    assert not engine.has_work()


def test_a_stream_that_is_never_iterated_submits_nothing(engine: Engine) -> None:
    engine.stream("abc")
    assert not engine.has_work()


def test_streams_in_turn_lose_nothing(engine: Engine) -> None:
    short = SamplingParams(max_tokens=5, seed=1, ignore_eos=True)
    long = SamplingParams(max_tokens=30, seed=2, ignore_eos=True)
    expected = [list(engine.stream("abc", params)) for params in (short, long)]
    one, two = engine.stream("abc", short), engine.stream("abc", long)
    got: tuple[list[Output], list[Output]] = ([next(one)], [next(two)])
    got[0].extend(one)  # ends although the other has not
    assert engine.stats().num_running == 1
    done = engine.generate(["abc"], short)
    got[1].extend(two)
    for outputs, wanted in zip(got, expected, strict=True):
        assert ids_of(outputs) == ids_of(wanted)
        assert text_of(outputs) == text_of(wanted)
    assert done[0].token_ids == ids_of(expected[0])
    check_all_ended(engine, {})


def test_a_stream_ends_when_the_engine_is_closed(engine: Engine) -> None:
    stream = engine.stream("abc", LONG)
    next(stream)
    engine.close()
    assert [out.finish_reason for out in stream][-1] is FinishReason.ABORT
    check_all_ended(engine, {})


# Faults


def fail_once(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> Callable[[], None]:
    """From the call on, the next run of the model fails, in its last product."""

    def arm() -> None:
        def fail(_: torch.Tensor) -> torch.Tensor:
            monkeypatch.undo()
            raise error

        monkeypatch.setattr(engine._runner._model, "logits", fail)

    return arm


@pytest.mark.parametrize("error", [RuntimeError("broken"), MemoryError(), ValueError("\n")])
def test_a_fault_ends_the_requests_of_the_step_and_no_others(
    gptj_folder: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    engine = Engine(gptj_folder, EngineConfig(max_slots=4, max_batch_tokens=2))
    params = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True)
    expected = engine.generate(["a"], params)[0].token_ids
    prompt = engine.tokenizer.encode("a")
    for name in ("a", "b", "c", "d", "waits"):
        engine.submit(prompt, params, request_id=name)
    parts: dict[str, list[Output]] = {}
    while engine.stats().num_generated_tokens < 6 + 8:
        for out in engine.step():
            parts.setdefault(out.request_id, []).append(out)
    fail_once(engine, monkeypatch, error)()
    failed = engine.step()
    assert 1 <= len(failed) <= 2
    assert all(out.finish_reason is FinishReason.ERROR for out in failed)
    assert all(type(error).__name__ in str(out.error) for out in failed)
    others = {"a", "b", "c", "d", "waits"} - {out.request_id for out in failed}
    for (name, _), outputs in collect(engine).items():
        parts.setdefault(name, []).extend(outputs)
    for name in others:
        assert ids_of(parts[name]) == expected
    check_all_ended(engine, {})
    assert engine.stats().num_finished[FinishReason.ERROR] == len(failed)


def test_a_fault_while_a_prompt_of_several_choices_is_read(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.submit([1] * 12, SamplingParams(n=3), request_id="a")
    engine.step()
    fail_once(engine, monkeypatch, RuntimeError("broken"))()
    assert [out.finish_reason for out in engine.step()] == [FinishReason.ERROR] * 3
    check_all_ended(engine, {})
    assert len(engine.generate(["abc"], SamplingParams(n=4, max_tokens=2))) == 4


def test_a_fault_in_processing_a_token_ends_its_request_alone(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All its choices, also those whose tokens of the same step were not processed yet."""
    params = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True)
    expected = engine.generate(["b"], params)[0].token_ids
    append_token = engine._request_manager.append_token

    def fail(choice: Choice, *given: Any) -> Output:
        if choice.request.id == "a":
            raise ValueError("broken")
        return append_token(choice, *given)

    monkeypatch.setattr(engine._request_manager, "append_token", fail)
    engine.submit([1], SamplingParams(n=3), request_id="a")
    engine.submit(engine.tokenizer.encode("b"), params, request_id="b")
    parts = collect(engine)
    reasons = [parts["a", choice][-1].finish_reason for choice in range(3)]
    assert reasons == [FinishReason.ERROR] * 3
    assert ids_of(parts["b", 0]) == expected
    assert engine.stats().num_faults == 1
    check_all_ended(engine, parts)


def test_generate_raises_the_request_s_error(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_once(engine, monkeypatch, RuntimeError("secret"))()
    with pytest.raises(RequestFailedError, match=r"failed on this request \(RuntimeError\)$"):
        engine.generate(["abc"])
    check_all_ended(engine, {})


def test_logits_that_are_not_finite_are_an_error(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    width = engine.model_config.vocab_size
    monkeypatch.setattr(
        engine._runner._model, "logits", lambda x: torch.full((len(x), width), torch.nan)
    )
    with pytest.raises(RequestFailedError, match="not finite"):
        engine.generate(["abc"])
    check_all_ended(engine, {})


# The end


def test_close_with_everything_in_flight(engine: Engine) -> None:
    params = SamplingParams(n=2, max_tokens=50, ignore_eos=True)
    engine.submit([1], params, request_id="running")
    for _ in range(3):
        engine.step()
    engine.submit([1] * 50, params, request_id="reading")
    engine.submit([1], params, request_id="waiting")
    engine.step()
    engine.submit([1], params, request_id="in the queue")
    outputs = engine.close()
    assert {(out.request_id, out.choice) for out in outputs} == {
        (name, index)
        for name in ("running", "reading", "waiting", "in the queue")
        for index in range(2)
    }
    assert all(out.finish_reason is FinishReason.ABORT for out in outputs)
    assert len(outputs) == 8
    check_all_ended(engine, {})
    assert engine.close() == []
    assert not engine.has_work()


# Figures, types and the face of the library


@pytest.mark.every_attention
def test_bfloat16_is_close(gptj_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits after a prompt, against float32: their spread is about 0.6."""
    seen: list[torch.Tensor] = []
    for dtype in ("float32", "bfloat16"):
        engine = Engine(gptj_folder, EngineConfig(max_slots=1, dtype=dtype))
        assert engine.dtype == dtype
        original = engine._runner._sampler.sample

        def watch(logits: torch.Tensor, *given: Any, original: Any = original) -> Any:
            seen.append(logits.clone())
            return original(logits, *given)

        monkeypatch.setattr(engine._runner._sampler, "sample", watch)
        engine.generate(["def __init__(self, "], SamplingParams(max_tokens=1, logprobs=0))
    assert all(logits.dtype == torch.float32 for logits in seen)
    error = float((seen[0] - seen[1]).abs().max())
    assert 0 < error < 0.1


def test_eight_bits_are_close(gptj_folder: Path) -> None:
    """Of the logits of a prompt's ids; a scale of the wrong group would be far off."""
    prompt = list(range(1, 40))
    params = SamplingParams(max_tokens=1, prompt_logprobs=0, temperature=0)
    nats = {}
    for dtype in ("float32", "int8"):
        engine = Engine(gptj_folder, EngineConfig(max_slots=1, dtype=dtype))
        engine.submit(prompt, params)
        (output,) = [out for _ in range(3) for out in engine.step() if out.finish_reason]
        assert output.prompt_logprobs is not None
        nats[dtype] = [each.logprob for each in output.prompt_logprobs if each is not None]
    pairs = zip(nats["float32"], nats["int8"], strict=True)
    assert 0 < max(abs(a - b) for a, b in pairs) < 0.1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_compressed_weights_change_no_bit(
    folder: Path, dtype: DType, caplog: pytest.LogCaptureFixture
) -> None:
    """Of weights that bfloat16 holds, whichever type they are used in."""
    file = folder / "pytorch_model.bin"
    torch.save({name: x.bfloat16() for name, x in torch.load(file).items()}, file)
    params = SamplingParams(max_tokens=8, prompt_logprobs=0, logprobs=1, temperature=0)
    found = []
    caplog.set_level("INFO")
    for compress in (False, True):
        config = EngineConfig(max_slots=1, dtype=dtype, compress_weights=compress)
        engine = Engine(folder, config)
        engine.submit(list(range(1, 40)), params)
        outputs = [out for _ in range(12) for out in engine.step()]
        found.append([(out.token_ids, out.logprobs, out.prompt_logprobs) for out in outputs])
    assert found[0] == found[1]
    assert " matrices are compressed" in caplog.text


def test_weights_that_cannot_be_compressed_are_told(
    gptj_folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    Engine(gptj_folder, EngineConfig(max_slots=1, compress_weights=True))
    assert "--compress-weights: none of" in caplog.text
    with pytest.raises(ConfigurationError, match="eight bits already; leave it out"):
        Engine(gptj_folder, EngineConfig(max_slots=1, compress_weights=True, dtype="int8"))
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    with pytest.raises(ConfigurationError, match="a CPU with AVX2"):
        Engine(gptj_folder, EngineConfig(max_slots=1, compress_weights=True))


def test_ids_beyond_the_tokenizer_s_may_be_the_likeliest(folder: Path) -> None:
    """Padded vocabularies: such an id is not sampled, and is told without text."""
    config = json.loads((folder / "config.json").read_text())
    size = config["vocab_size"]
    config["vocab_size"] = size + 8
    (folder / "config.json").write_text(json.dumps(config))
    file = folder / "pytorch_model.bin"
    weights = torch.load(file)
    for name in ("transformer.wte.weight", "lm_head.weight"):
        weights[name] = torch.nn.functional.pad(weights[name], (0, 0, 0, 8))
    weights["lm_head.bias"] = torch.nn.functional.pad(weights["lm_head.bias"], (0, 8), value=100)
    torch.save(weights, file)
    engine = Engine(folder, EngineConfig(max_slots=1))
    engine.submit([1, 2, 3], SamplingParams(max_tokens=2, logprobs=3, temperature=0))
    told = [each for out in engine.step() + engine.step() for each in out.logprobs]
    assert all(each.token_id < size for each in told)
    likeliest = [token_id for each in told for token_id, _ in each.top]
    assert min(likeliest) >= size
    assert [engine.tokenizer.token_text(token_id) for token_id in likeliest] == [""] * 6


def test_choices_that_want_the_likeliest_id_alone_skip_the_sampler(
    gptj_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They get the ids that they get from the sampler, beside a choice that needs it."""
    engine = Engine(gptj_folder, EngineConfig(max_slots=4))
    sample, num_sampled = engine._runner._sampler.sample, []

    def watch(logits: torch.Tensor, *given: Any) -> Any:
        num_sampled.append(len(logits))
        return sample(logits, *given)

    monkeypatch.setattr(engine._runner._sampler, "sample", watch)
    plain = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
    asking = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True, logprobs=1)
    alone = engine.generate(["def ", "class "], plain)
    assert not num_sampled
    beside = engine.submit(engine.tokenizer.encode("import "), asking)
    assert engine.generate(["def ", "class "], plain) == alone
    assert len(num_sampled) > 10
    engine.cancel(beside)


def test_threads_are_set_and_reach_torch(gptj_folder: Path) -> None:
    threads = torch.get_num_threads()
    try:
        Engine(gptj_folder, EngineConfig(max_slots=1, threads=1))
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(threads)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_cuda_where_there_is_none(gptj_folder: Path) -> None:
    from cottention.engine.errors import ConfigurationError

    with pytest.raises(ConfigurationError, match="torch sees no CUDA device; give --device cpu"):
        Engine(gptj_folder, EngineConfig(device="cuda"))


def test_exported_names() -> None:
    assert {name: getattr(library, name).__name__ for name in library.__all__} == {
        name: name for name in library.__all__
    }
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        library.nothing  # noqa: B018
    assert set(library.__all__) == set(library._HOMES)
