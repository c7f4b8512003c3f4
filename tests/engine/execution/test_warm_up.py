"""What is computed before the first request, where, and the memory that is kept free for steps."""

import threading
from pathlib import Path

import pytest

from cottention.engine import Engine, EngineConfig, SamplingParams
from cottention.engine.execution.step_memory import longest_batch_bytes, step_memory
from cottention.engine.execution.warm_up import longest_batches
from cottention.engine.sampling.topk_topp import sampling_bytes
from cottention.engine.worker import EngineWorker
from tests.engine.execution.test_cuda_graphs import captured_on_cpu


@pytest.mark.parametrize("num_rows", [1, 2, 8, 64, 1024])
@pytest.mark.parametrize("max_tokens", [2, 40, 512])
@pytest.mark.parametrize("max_length", [1, 16, 512])
def test_longest_batches_fill_a_step_and_no_more(
    num_rows: int, max_tokens: int, max_length: int
) -> None:
    """Prompts alone, beside rows that decode, and of mixed lengths."""
    for lengths in longest_batches(num_rows, max_tokens, max_length):
        assert 0 < len(lengths) <= num_rows
        assert 0 < min(lengths) <= max(lengths) <= max_length
        assert sum(lengths) == max_tokens or len(lengths) == num_rows
    if num_rows >= 8 and max_tokens == max_length == 512:
        alone, beside, mixed = longest_batches(num_rows, max_tokens, max_length)
        assert alone == [512]
        assert beside.count(1) == num_rows // 2 or beside.count(1) == 256
        assert {1, 33, 64, 65} < {*mixed}


@pytest.mark.every_attention
def test_longest_batches_run_and_leave_zeros(gptj_folder: Path) -> None:
    """All ways to sample; states that stayed in a row would be those of the next request."""
    engine = Engine(gptj_folder, EngineConfig(max_slots=5, max_batch_tokens=80, device="cpu"))
    params = SamplingParams(max_tokens=5, seed=1, ignore_eos=True)
    expected = engine.generate([[1, 2, 3]], params)
    engine._runner.run_longest_batches(80, engine.model_config.longest_prompt_part(80))
    assert not any(tensor.any() for tensor in engine.pool.tensors.values())
    assert engine.generate([[1, 2, 3]], params) == expected


def test_a_warm_up_does_not_touch_rows_in_use(gptj_folder: Path) -> None:
    """The thread that is to run the steps warms up again, perhaps after others have computed."""
    engine = Engine(gptj_folder, EngineConfig(max_slots=2, device="cpu"))
    engine._runner._captured = captured_on_cpu(engine._runner, engine.pool.num_rows)
    engine.submit([1, 2, 3], SamplingParams())
    engine.step()
    before = {name: tensor.clone() for name, tensor in engine.pool.tensors.items()}
    engine.warm_up()
    assert all(tensor.equal(before[name]) for name, tensor in engine.pool.tensors.items())


def test_the_thread_of_the_steps_warms_up(
    gptj_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Libraries have a state for each thread: the first request would wait for it."""
    engine, names = Engine(gptj_folder, EngineConfig(max_slots=1)), []
    monkeypatch.setattr(engine, "warm_up", lambda: names.append(threading.current_thread().name))
    worker = EngineWorker(engine, lambda _: None, lambda _: None)
    worker.start()
    worker.stop()
    assert names == ["engine"]


def test_what_is_kept_free_grows_with_rows_and_vocabulary() -> None:
    small, large = (step_memory("cuda", 512, size, layers=7) for size in (1000, 50_304))
    assert large.layers == 7
    assert large.logits >= 512 * 50_304 * 4 * 4 + 2 * sampling_bytes(512 * 50_304)
    assert small.logits < large.logits
    assert step_memory("cuda", 64, 50_304).logits < large.logits
    assert step_memory("cpu", 64, 50_304).logits == 2 * 64 * 50_304 * 4
    assert f"{large.nbytes:,} bytes" in str(large)
    assert f"{large.logits:,} for logits" in str(large)


def test_sampling_takes_tiles_of_bounded_size() -> None:
    """Twice the ids take no more once they are cut into tiles."""
    assert sampling_bytes(2**20) < sampling_bytes(2**24) < sampling_bytes(2**26)
    assert sampling_bytes(2**26) == sampling_bytes(2**30)


def test_nothing_is_measured_on_the_cpu(gptj_folder: Path) -> None:
    engine = Engine(gptj_folder, EngineConfig(max_slots=1))
    assert longest_batch_bytes(lambda _: engine._runner, engine.spec, "cpu", 512, 512) == 0


def test_what_is_kept_free_is_told(gptj_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("DEBUG", logger="cottention"):
        Engine(gptj_folder, EngineConfig(max_slots=2, device="cpu"))
    [line] = [each.message for each in caplog.records if "kept free" in each.message]
    assert line.startswith("kept free beside weights and states: ")
