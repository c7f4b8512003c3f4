"""Embeddings by a model that generates text: its last hidden states, each token's once."""

import struct
from pathlib import Path

import pytest
import torch

from cottention.engine import Engine, EngineConfig, SamplingParams
from cottention.engine.encoding import EncodeParams
from cottention.engine.errors import ParameterError
from cottention.engine.execution.model_runner import Segment
from cottention.engine.models.gptj.inference import ServedGPTJ
from cottention.engine.sampling.pooling import Pooler
from tests.engine.windows import engine_of

EMBED = SamplingParams(max_tokens=0, encode=EncodeParams())
LONG = [(7 * i) % 200 for i in range(50)]


def embedded(engine: Engine, *prompts: list[int]) -> list[bytes]:
    names = [engine.submit(prompt, EMBED) for prompt in prompts]
    outputs = [out for _ in iter(engine.has_work, False) for out in engine.step()]
    found = {output.request_id: output.encoded for output in outputs}
    return [each.embedding for name in names if (each := found[name]) is not None]


def test_it_is_the_mean_of_what_the_head_reads(gptj_folder: Path) -> None:
    engine = Engine(gptj_folder, EngineConfig(max_slots=2, embeddings=True))
    [raw] = embedded(engine, LONG[:20])
    model = engine._runner._model
    assert isinstance(model, ServedGPTJ)
    slot = engine.pool.allocate()
    with torch.inference_mode():
        recurrence = engine._runner._recurrence([Segment(slot, LONG[:20], 0)])
        hidden = model.hidden(torch.tensor(LONG[:20]), torch.arange(20), recurrence)
        expected = model.last_hidden(hidden).mean(dim=0)
    assert list(struct.unpack(f"<{len(raw) // 4}f", raw)) == pytest.approx(
        expected.tolist(), abs=1e-6
    )


def test_it_has_the_same_bits_in_any_company_and_counts_each_token_once() -> None:
    """Also past the window, where the last tokens of one context are read again in the next."""
    engines = [engine_of(16, embeddings=True, max_batch_tokens=budget) for budget in (512, 7)]
    for engine in engines:
        made: list[Pooler] = []

        def noted(made: list[Pooler] = made) -> Pooler:
            made.append(Pooler("mean", normalize=False))
            return made[-1]

        engine._runner._new_pooler = noted
        alone = embedded(engine, LONG)
        engine.submit([5, 6], SamplingParams(max_tokens=30))
        assert embedded(engine, LONG[:3], LONG)[1] == alone[0]
        assert [pooler._num_rows for pooler in made] == [50, 3, 50]
    assert embedded(engines[0], LONG) == embedded(engines[1], LONG)


def test_it_needs_the_flag_and_a_prompt_alone(gptj_folder: Path) -> None:
    with pytest.raises(ParameterError, match="with --embeddings"):
        Engine(gptj_folder, EngineConfig(max_slots=1)).submit([5], EMBED)
    engine = Engine(gptj_folder, EngineConfig(max_slots=1, embeddings=True))
    with pytest.raises(ParameterError, match="without a session or generated tokens"):
        engine.submit([5], SamplingParams(encode=EncodeParams()))
    with pytest.raises(ParameterError, match="it fills no masks"):
        engine.submit([5], SamplingParams(max_tokens=0, encode=EncodeParams(mask_id=5)))
