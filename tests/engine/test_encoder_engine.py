"""The encoder as it is served: its bits, its limits, and how texts share the steps."""

import random
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cottention.engine.config import EngineConfig
from cottention.engine.encoder_engine import EncoderEngine
from cottention.engine.encoding import EncodeParams
from cottention.engine.engine import Engine
from cottention.engine.errors import (
    ConfigurationError,
    EngineStoppedError,
    ModelFolderError,
    ParameterError,
)
from cottention.engine.models.bert.model import BertForPreTraining
from cottention.engine.models.checkpoint import load_model
from cottention.engine.models.registry import read_config
from cottention.engine.opening import open_engine
from cottention.engine.outputs import FinishReason, Output
from cottention.engine.sampling.pooling import Pooler
from cottention.engine.sampling_params import SamplingParams
from cottention.engine.scheduling.client import Client
from cottention.engine.sessions.fingerprint import Fingerprint
from tests.engine.encoders import copied, encoder_folder

KINDS = ["cottention", "cosformer"]
EMBED = SamplingParams(max_tokens=0, encode=EncodeParams())


def engine_of(kind: str = "cottention", **settings: object) -> EncoderEngine:
    return EncoderEngine(encoder_folder(kind), EngineConfig(**{"max_slots": 4} | settings))


def some_texts(num: int, longest: int = 64) -> list[list[int]]:
    draw = random.Random(3)
    return [[draw.randrange(5, 300) for _ in range(draw.randint(1, longest))] for _ in range(num)]


def floats(raw: bytes) -> list[float]:
    return list(struct.unpack(f"<{len(raw) // 4}f", raw))


def run_all(engine: EncoderEngine) -> list[Output]:
    return [output for _ in iter(engine.has_work, False) for output in engine.step()]


def reference_hidden(kind: str, texts: list[list[int]]) -> list[Tensor]:
    """By the definition, in float64, as one batch padded to its longest text."""
    folder = encoder_folder(kind)
    model = load_model(folder, read_config(folder), torch.float64)
    assert isinstance(model, BertForPreTraining)
    ids = torch.zeros(len(texts), max(map(len, texts)), dtype=torch.int64)
    for row, text in zip(ids, texts, strict=True):
        row[: len(text)] = torch.tensor(text)
    lengths = torch.tensor(list(map(len, texts)))
    mask = torch.arange(ids.shape[1]) < lengths.unsqueeze(-1)
    with torch.inference_mode():
        hidden = model(ids, mask, torch.zeros_like(ids))
    return [row[:n] for row, n in zip(hidden, lengths, strict=True)]


@pytest.mark.parametrize("kind", KINDS)
def test_any_batch_and_any_chunks_give_equal_bits(kind: str) -> None:
    """Else what a text is told depends on who asks beside it."""
    texts = some_texts(12)
    alone = engine_of(kind, max_batch_tokens=64)
    expected = [alone.encode([text])[0].embedding for text in texts]
    for value, hidden in zip(expected, reference_hidden(kind, texts), strict=True):
        error = torch.tensor(floats(value), dtype=torch.float64) - hidden.mean(dim=0)
        assert error.abs().max() <= 2e-5
    for budget in (2, 7, 33, 200):
        together = engine_of(kind, max_batch_tokens=budget, max_slots=5)
        assert [each.embedding for each in together.encode(texts)] == expected, budget
        assert together.stats().num_free_slots == 5


@pytest.mark.parametrize("kind", KINDS)
def test_predictions_are_those_of_the_definition(kind: str) -> None:
    folder, text = encoder_folder(kind), some_texts(3)[2]
    text[0] = text[3] = 4
    assert text.count(4) == 2
    model = load_model(folder, read_config(folder), torch.float64)
    assert isinstance(model, BertForPreTraining)
    assert model.cls.predictions is not None
    [hidden] = reference_hidden(kind, [text])
    with torch.inference_mode():
        expected = model.cls.predictions(hidden).softmax(dim=-1)
    engine = engine_of(kind, max_batch_tokens=8)
    [encoded] = engine.encode([text], EncodeParams(mask_id=4, top_k=4))
    assert [each.position for each in encoded.masks] == [0, 3]
    for place in encoded.masks:
        values, ids = expected[place.position].topk(4)
        assert [token_id for token_id, _ in place.tokens] == ids.tolist()
        assert [p for _, p in place.tokens] == pytest.approx(values.tolist(), abs=1e-5)
    [encoded] = engine.encode([text], EncodeParams(mask_id=4, targets=(9, 8)))
    assert dict(encoded.masks[1].tokens) == pytest.approx(
        {each: float(expected[3, each]) for each in (8, 9)}, abs=1e-5
    )


@pytest.mark.parametrize("pooling", ["mean", "max", "cls", "last"])
@pytest.mark.parametrize("normalize", [False, True])
def test_pooling_does_not_depend_on_the_parts(pooling: str, normalize: bool) -> None:
    rows = torch.randn(50, 8)
    results = set()
    for size in (1, 7, 50):
        pooler = Pooler(pooling, normalize=normalize)
        for part in rows.split(size):
            pooler.add(part)
        results.add(pooler.result())
    [found] = results
    expected = {"mean": rows.mean(0), "max": rows.amax(0), "cls": rows[0], "last": rows[-1]}[
        pooling
    ]
    expected = expected / expected.norm() if normalize else expected
    assert floats(found) == pytest.approx(expected.tolist(), abs=1e-6)


def test_the_folder_says_how_to_pool_unless_a_flag_does(tmp_path: Path) -> None:
    folder = copied(encoder_folder(), tmp_path / "model")
    (folder / "1_Pooling").mkdir()
    file = folder / "1_Pooling" / "config.json"
    file.write_text('{"pooling_mode_cls_token": true, "pooling_mode_mean_tokens": false}')
    assert EncoderEngine(folder, EngineConfig(max_slots=1)).pooling == "cls"
    assert EncoderEngine(folder, EngineConfig(max_slots=1, pooling="max")).pooling == "max"
    file.write_text('{"pooling_mode_mean_sqrt_len_tokens": true}')
    with pytest.raises(ModelFolderError, match="pooling_mode_mean_sqrt_len_tokens: give --pooling"):
        EncoderEngine(folder, EngineConfig(max_slots=1))


@pytest.mark.parametrize(
    ("ids", "params", "param", "message"),
    [
        ([], EMBED, "input", "at least one token"),
        ([5] * 65, EMBED, "input", "at most 64 tokens, .* no more positions; it has 65"),
        ([5, 300], EMBED, "input", "from 0 to 299; 300"),
        ([5], SamplingParams(), "model", "does not generate text"),
        ([5], SamplingParams(encode=EncodeParams(mask_id=4)), "input", "the id 4 in it"),
    ],
)
def test_what_it_cannot_read_is_refused(
    ids: list[int], params: SamplingParams, param: str, message: str
) -> None:
    with pytest.raises(ParameterError, match=message) as caught:
        engine_of().submit(ids, params)
    assert caught.value.param == param


def test_long_texts_are_bounded_by_memory_and_hold_up_no_short_one() -> None:
    """Two streams of 40 tokens do not fit into 64 tokens' memory; short texts pass in between."""
    engine = engine_of(max_batch_tokens=8, encoder_memory=64 * 64 * 4)
    expected = [each.embedding for each in engine_of(max_batch_tokens=64).encode([[9] * 40])]
    for name in ("long 1", "long 2"):
        engine.submit([9] * 40, EMBED, request_id=name)
    outputs = engine.step()
    assert (engine.stats().num_running, engine.stats().num_waiting) == (1, 1)
    engine.submit([7] * 8, EMBED, request_id="short")
    outputs += engine.step()
    assert [output.request_id for output in outputs] == ["short"]
    found = {output.request_id: output.encoded for output in run_all(engine)}
    assert [each.embedding for each in found.values() if each] == expected * 2
    with pytest.raises(ConfigurationError, match="--encoder-memory"):
        engine_of(max_batch_tokens=8, encoder_memory=8 * 64 * 4)
    small = engine_of(max_batch_tokens=8, encoder_memory=32 * 64 * 4)
    with pytest.raises(ParameterError, match=r"at most 32 tokens.*--encoder-memory has no room"):
        small.submit([9] * 33, EMBED)


@pytest.mark.parametrize(("weight", "least"), [(1, 3), (3, 7)])
def test_clients_share_steps_and_parts_whatever_their_priority(weight: int, least: int) -> None:
    """One client's many texts, short or long, hold up another's no longer than its weight says."""
    hog, other = Client("hog"), Client("other", weight)
    for length, budget in ((8, 32), (40, 8)):
        engine = engine_of(max_batch_tokens=budget, max_slots=32)
        for number in range(12):
            engine.submit([9] * length, EMBED, request_id=f"hog {number}", priority=-9, client=hog)
        outputs = engine.step()
        for number in range(8):
            engine.submit([9] * length, EMBED, request_id=f"other {number}", client=other)
        outputs += run_all(engine)
        ended = [output.request_id.split()[0] for output in outputs]
        assert ended.index("other") <= 8
        assert ended[ended.index("other") :][:12].count("other") >= least
        assert len(ended) == 20


def test_a_cancelled_text_leaves_nothing_behind() -> None:
    engine = engine_of(max_batch_tokens=8)
    for name in ("begun", "waiting"):
        engine.submit([9] * 30, EMBED, request_id=name)
    engine.submit([9], EMBED, request_id="first", priority=-1)
    assert [output.request_id for output in engine.step()] == ["first"]
    with pytest.raises(ParameterError, match="unfinished request"):
        engine.submit([9], EMBED, request_id="begun")
    engine.cancel("begun", FinishReason.TIMEOUT)
    assert [output.finish_reason for output in engine.step()] == [FinishReason.TIMEOUT]
    engine.submit([9], EMBED, request_id="late")
    reasons = {output.request_id: output.finish_reason for output in engine.close()}
    assert reasons == dict.fromkeys(("waiting", "late"), FinishReason.ABORT)
    assert not engine.has_work()
    assert engine.stats().num_free_slots == 4
    with pytest.raises(EngineStoppedError):
        engine.submit([9], EMBED)


def test_a_fault_ends_its_batch_and_no_other(caplog: pytest.LogCaptureFixture) -> None:
    engine = engine_of()
    embed = engine._runner.model.embed
    engine._runner.model.embed = lambda *_: 1 / 0
    engine.submit([9], EMBED)
    [output] = run_all(engine)
    assert (output.finish_reason, output.encoded) == (FinishReason.ERROR, None)
    assert "ZeroDivisionError" in str(output.error)
    assert "a step failed" in caplog.text
    engine._runner.model.embed = embed
    assert engine.encode([[9]])
    assert engine.stats().num_faults == 1


def test_the_engine_follows_from_the_folder(gptj_folder: Path) -> None:
    config = EngineConfig(max_slots=1)
    assert isinstance(open_engine(encoder_folder(), config), EncoderEngine)
    assert isinstance(open_engine(gptj_folder, config), Engine)
    with pytest.raises(ModelFolderError, match="does not generate text"):
        Engine(encoder_folder(), config)
    assert (
        "model_type=bert"
        in Fingerprint.of(
            encoder_folder(),
            [encoder_folder() / "vocab.txt"],
            read_config(encoder_folder()).state_spec(),
            "float32",
        ).config
    )


@pytest.mark.slow
def test_a_text_of_65536_tokens_takes_no_more_than_its_stream() -> None:
    def measured(num_tokens: int) -> list[int]:
        command = [sys.executable, "-m", "tests.engine.encoder_memory", str(num_tokens)]
        root = Path(__file__).parents[2]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root)
        return list(map(int, done.stdout.split()))

    few, many = measured(4096), measured(65_536)
    print(f"peak without weights and stream, and rise: {few} at 4,096, {many} at 65,536 tokens")
    assert many[0] <= 1.1 * few[0]
    assert many[1] <= 16 * 2**20
