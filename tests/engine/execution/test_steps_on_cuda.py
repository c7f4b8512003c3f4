"""Whole engines on CUDA, id by id; without a GPU, with the ops of CUDA on the host.

On the host nothing is captured, but the padding, the mixed batches and every op are those of a GPU.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cottention.engine import Engine, EngineConfig, SamplingParams
from cottention.engine.models.checkpoint import load_model
from cottention.engine.models.gptj.config import GPTJConfig
from cottention.engine.models.gptj.inference import ServedGPTJ
from cottention.engine.models.gptj.model import CottentionForCausalLM, weight_dtype
from cottention.engine.models.recurrence import Features, Recurrence
from cottention.engine.models.registry import read_config
from cottention.engine.ops import PIECE_TOKENS, Segments, reference
from cottention.engine.ops.loader import DELAYED_VARIABLE
from cottention.engine.state.pool import StatePool
from cottention.engine.state.session_state import SessionState
from tests.engine.cuda_on_host import as_on_cuda, num_launches
from tests.engine.execution.test_cuda_graphs import captured_on_cpu
from tests.engine.making import small_tokenizer, wide_folder
from tests.engine.windows import PARAMS, drain, folder_of, told, turn

OnDevice = Callable[..., Engine]
"""A model folder and settings, to an engine on the device with captured steps."""

TOLERANCES = {"float32": 1e-4, "bfloat16": 0.06}
"""How far below the likeliest an id may be, in standard deviations of the logits."""


@pytest.fixture(params=["host", "cuda"])
def on_device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> OnDevice:
    def on_host(folder: Path, **settings: Any) -> Engine:
        as_on_cuda(monkeypatch)
        engine = Engine(folder, EngineConfig(device="cpu", **settings))
        engine._runner._captured = captured_on_cpu(engine._runner, engine.pool.num_rows)
        return engine

    def on_cuda(folder: Path, **settings: Any) -> Engine:
        return Engine(folder, EngineConfig(device="cuda", **settings))

    if request.param == "host":
        return on_host
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return on_cuda


def exact_logits(folder: Path, ids: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Logits [N, vocab_size] after each id, in float64 with weights rounded to `dtype`."""
    model = load_model(folder, read_config(folder), dtype).double()

    def attend(_: int, features: Features) -> Tensor:
        q, k, v = (x.transpose(0, 1) for x in features[:3])
        return reference.parallel(q, k, v).transpose(0, 1)

    with torch.inference_mode():
        logits: Tensor = model(torch.tensor(ids), torch.arange(len(ids)), attend)
    return logits


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_each_id_is_the_references(on_device: OnDevice, head_dim: int, dtype: str) -> None:
    """Captured steps, and prompts that are read in pieces beside rows that decode."""
    folder = wide_folder(head_dim)
    vocabulary = small_tokenizer().num_ids
    lengths = (1, 3, PIECE_TOKENS + 1, 150)
    prompts = [[(7 * i + 31 * n) % vocabulary for i in range(n)] for n in lengths]
    engine = on_device(folder, dtype=dtype, max_slots=3, max_batch_tokens=160)
    params = SamplingParams(max_tokens=10, temperature=0, ignore_eos=True)
    answers = [done.token_ids for done in engine.generate(prompts, params)]
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = [*prompt, *answer]
        logits = exact_logits(folder, ids[:-1], getattr(torch, dtype))[len(prompt) - 1 :]
        drawn = logits.gather(1, torch.tensor(answer).unsqueeze(-1)).squeeze(-1)
        short = (logits.amax(-1) - drawn) / logits.std()
        assert (short <= TOLERANCES[dtype]).all(), short


def story(engine: Engine) -> list[list[int]]:
    """What an engine says to one and the same course of events: all that moves a state."""
    renewed = [3 + i for i in range(11)]
    names = [engine.submit(renewed, replace(PARAMS, max_tokens=40))]  # states that are renewed
    names.append(engine.submit([9] * 14, replace(PARAMS, max_tokens=12, n=3)))  # and copied
    outputs = [out for _ in range(3) for out in engine.step()]
    engine.pause(names[0])  # parked while the third begins
    names.append(engine.submit([5, 6, 7] * 4, replace(PARAMS, max_tokens=20)))
    outputs += [out for _ in range(4) for out in engine.step()]
    engine.resume(names[0])
    outputs += drain(engine)
    said = [told(outputs, name) for name in names]
    said += [told(outputs, names[1], choice) for choice in (1, 2)]
    state, first = turn(engine, SessionState(), [8, 9, 10], 9)
    codec = engine.session_codec()
    kept = codec.decode(codec.encode(state))  # a snapshot; then two forks of it
    ends = [turn(engine, kept, [4 + fork], 12)[1] for fork in range(2)]
    return [[token_id for token_id, _ in each] for each in (*said, first, *ends)]


@pytest.mark.every_attention
def test_what_moves_states_gives_the_same_ids(on_device: OnDevice, attention: str) -> None:
    """Renewal, choices of one prompt, a pause, a snapshot and forks, beside a CPU's own engine."""
    folder = folder_of(16, attention)
    settings = {"dtype": "float32", "max_slots": 4, "max_batch_tokens": 24}
    expected = story(Engine(folder, EngineConfig(device="cpu", **settings)))
    assert story(on_device(folder, **settings)) == expected


@pytest.mark.parametrize("capacity", [2, 5])
def test_delayed_updates_change_no_id(
    on_device: OnDevice, monkeypatch: pytest.MonkeyPatch, capacity: int
) -> None:
    """Whoever reads a row, copies, snapshots, renewal and prompts, settles it first."""
    folder = folder_of(16)
    settings = {"dtype": "float32", "max_slots": 4, "max_batch_tokens": 24}
    expected = story(on_device(folder, **settings))
    monkeypatch.setenv(DELAYED_VARIABLE, str(capacity))
    engine = on_device(folder, **settings)
    assert engine.pool.delayed is not None
    assert story(engine) == expected


def test_delayed_updates_are_told_and_take_slots(
    on_device: OnDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`--state-memory` holds fewer slots with them, and what is told is what they take."""
    folder = folder_of(16)
    memory = 8 * on_device(folder, max_slots=1).spec.bytes_per_slot
    monkeypatch.setenv(DELAYED_VARIABLE, "8")
    engine = on_device(folder, state_memory=memory)
    stats = engine.stats()
    assert 1 <= stats.num_slots < 8
    assert engine.pool.nbytes == stats.num_slots * stats.bytes_per_slot <= memory
    assert engine.spec.itemised_bytes()["delayed"] > 0


def memory_of(x: Tensor) -> int:
    """The address of a tensor's storage."""
    return x.untyped_storage().data_ptr()


class Launches(TorchDispatchMode):
    """Counts operations that would enqueue a kernel: all but views and allocations.

    What may be a view, as `Tensor.to`, is one where it shares the memory of its input.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = num_launches()
        out = func(*args, **(kwargs or {}))
        is_ours = func.namespace == "cottention_on_host"
        is_free = func.name().startswith(("aten::empty", "aten::new_empty", "aten::promote_types"))
        if func.is_view and args:
            parts = [out] if isinstance(out, Tensor) else out
            is_free = {memory_of(part) for part in parts} <= {memory_of(args[0])}
        self.count += num_launches() - before if is_ours else 0 if is_free else 1
        return out


def launches_of_a_layer(attention: str, dtype: torch.dtype, lengths: list[int]) -> int:
    """What a model of two layers enqueues more than one of one."""
    counts = []
    for num_layers in (1, 2):
        config = GPTJConfig(
            320, 128, num_layers, 2, 512, rotary_dim=64, n_inner=192, attention_type=attention
        )
        model = CottentionForCausalLM(config).requires_grad_(False)
        for name, weight in (*model.named_parameters(), *model.named_buffers()):
            weight.data = weight.to(weight_dtype(name, dtype))
        served = ServedGPTJ(model, "cpu")
        pool = StatePool(config.state_spec(), len(lengths), "cpu")
        segments = Segments.of(range(len(lengths)), lengths, pool.num_rows, "cpu", form="pieces")
        ids = torch.arange(sum(lengths)) % config.vocab_size
        positions, rows = torch.arange(len(ids)), Recurrence(pool.tensors, segments)
        with torch.inference_mode():
            served.hidden(ids, positions, rows)  # what is computed once for all steps
            with Launches() as launches:
                served.hidden(ids, positions, rows)
        counts.append(launches.count)
    return counts[1] - counts[0]


LAUNCHES = {"cottention": (4, 5, 6), "gated_rfa": (6, 6, 6)}
"""Of a layer: decoding, beside a short prompt, and beside one that is read in pieces."""
OTHERS = 6, 6, 7


@pytest.mark.every_feature_map
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch", range(3))
def test_a_layer_is_few_launches_on_the_host_whatever_the_batch(
    monkeypatch: pytest.MonkeyPatch, attention: str, dtype: torch.dtype, batch: int
) -> None:
    """At most 8. A gate reads what is not rounded, whose product begins with a copy that is."""
    as_on_cuda(monkeypatch)
    expected = LAUNCHES.get(attention, OTHERS)[batch]
    expected += attention == "gated_rfa" and dtype != torch.float32
    lengths = ([1, 1, 1], [1, 5, 1], [1, 200, 1, 1])[batch]
    assert launches_of_a_layer(attention, dtype, lengths) == expected <= 8
