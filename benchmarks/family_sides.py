"""One side of benchmarks/families.py, in a process of its own: ours, or the library beside it.

`python -m benchmarks.family_sides SIDE MODEL THREADS` reads one JSON command a line and answers
each with one JSON line. Threads of all sides wait as the engine lets them, which is in favour of
all where other work runs on the machine.
"""

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

IDS = (11, 300, 4_000, 5, 77, 12_345)
"""A prompt that all sides are asked for the logits of."""

Step = Callable[[Tensor], Tensor]
"""ids int64 [B] → logits [B, vocab_size] of one more token of each stream."""

Start = Callable[[int], Step]
"""Batch size B → the step of as many streams without a past."""


def ours(model: Path, dtype: torch.dtype = torch.float32) -> Start:
    """The served model, whose blocks are one call of a compiled op.

    With one stream a step takes any number of its tokens.
    """
    from cottention.engine import ops
    from cottention.engine.models.checkpoint import load_model
    from cottention.engine.models.recurrence import Recurrence
    from cottention.engine.models.registry import family_of, read_config
    from cottention.engine.state.pool import StatePool

    config = read_config(model)
    weights = load_model(model, config, dtype)
    served: Any = family_of(config).implementation().serve(weights, "cpu")

    def start(batch: int) -> Step:
        pool = StatePool(config.state_spec(), batch, "cpu")

        def step(ids: Tensor) -> Tensor:
            lengths = [len(ids) // batch] * batch
            recurrence = Recurrence(
                pool.tensors, ops.Segments.of(range(batch), lengths, batch, "cpu")
            )
            hidden = served.hidden(ids, torch.zeros(len(ids), dtype=torch.long), recurrence)
            logits: Tensor = served.logits(hidden[-batch:])
            return logits

        return step

    return start


def transformers(model: Path) -> Start:
    """The recurrent step of `transformers`, with its cache; the batch is one call."""
    from transformers import AutoModelForCausalLM

    peer = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()

    def start(_batch: int) -> Step:
        cache: Any = None  # None starts a sequence

        def step(ids: Tensor) -> Tensor:
            nonlocal cache
            out = peer(ids.unsqueeze(1), cache=cache, use_cache=True)
            cache = out.cache
            return out.logits[:, -1]

        return step

    return start


def rwkv(model: Path) -> Start:
    """The `rwkv` package, cpu fp32 with its TorchScript. It has no batches: stream by stream."""
    os.environ |= {"RWKV_V7_ON": "1", "RWKV_JIT_ON": "1", "RWKV_CUDA_ON": "0"}
    from rwkv.model import RWKV

    peer = RWKV(model=str(model.with_suffix("")), strategy="cpu fp32")

    def start(batch: int) -> Step:
        states: list[Any] = [None] * batch

        def step(ids: Tensor) -> Tensor:
            rows = []
            for stream, token in enumerate(ids.tolist()):
                row, states[stream] = peer.forward([token], states[stream])
                rows.append(row)
            return torch.stack(rows)

        return step

    return start


_CALLBACKS: list[object] = []
"""Those that C code calls, which does not keep them."""


def llama_cpp(model: Path, dtype: torch.dtype = torch.float32) -> Start:
    """llama.cpp on the same weights; the batch is one call. Its threads spin.

    With weights in bfloat16 it rounds what they are multiplied with to bfloat16 as well.
    """
    import llama_cpp as llama

    from benchmarks.family_gguf import written

    @llama.llama_log_callback
    def quiet(*_: object) -> None:
        """In place of a line on standard error for every tensor."""

    _CALLBACKS.append(quiet)
    llama.llama_log_set(quiet, None)
    llama.llama_backend_init()
    options = llama.llama_model_default_params()
    options.n_gpu_layers = 0
    weights = llama.llama_model_load_from_file(str(written(model, dtype)).encode(), options)
    vocab_size = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(weights))

    def start(batch: int) -> Step:
        settings = llama.llama_context_default_params()
        settings.n_ctx = settings.n_batch = 512 * batch
        settings.n_seq_max = batch
        settings.n_threads = settings.n_threads_batch = torch.get_num_threads()
        context = llama.llama_init_from_model(weights, settings)
        tokens, position = llama.llama_batch_init(batch, 0, 1), 0

        def step(ids: Tensor) -> Tensor:
            nonlocal position
            tokens.n_tokens = batch
            for stream, token in enumerate(ids.tolist()):
                tokens.token[stream], tokens.pos[stream] = token, position
                tokens.n_seq_id[stream], tokens.logits[stream] = 1, 1
                tokens.seq_id[stream][0] = stream
            if llama.llama_decode(context, tokens):
                raise RuntimeError("llama_decode failed")
            position += 1
            logits = llama.llama_get_logits(context)
            return torch.from_numpy(np.ctypeslib.as_array(logits, (batch, vocab_size))).clone()

        return step

    return start


SIDES: dict[str, Callable[[Path], Start]] = {
    "ours": ours,
    "ours_bfloat16": partial(ours, dtype=torch.bfloat16),
    "transformers": transformers,
    "rwkv": rwkv,
    "llama_cpp": llama_cpp,
    "llama_cpp_bfloat16": partial(llama_cpp, dtype=torch.bfloat16),
}
"""By the name of the package, where it is another's, and the type of its weights."""


def now() -> float:
    """Seconds; with one thread, of its processor time."""
    return time.thread_time() if torch.get_num_threads() == 1 else time.perf_counter()


class Streams:
    """Greedy streams; each call is a step of all."""

    def __init__(self, step: Step, batch: int) -> None:
        self._step = step
        self._ids = torch.arange(batch) + IDS[0]

    def __call__(self) -> float:
        """Seconds of one step; with one thread, of its processor time."""
        start = now()
        self._ids = self._step(self._ids).argmax(-1)
        return now() - start


@torch.inference_mode()
def main() -> None:
    """Answer commands until standard input ends."""
    side, model, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    answers = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):  # the rwkv package prints
        start = SIDES[side](Path(model))
        streams: dict[int, Streams] = {}
        for line in sys.stdin:
            print(json.dumps(_answer(json.loads(line), start, streams)), file=answers, flush=True)


def _answer(command: dict[str, Any], start: Start, streams: dict[int, Streams]) -> list[float]:
    """The logits [vocab_size] after IDS, or the seconds of some steps of a batch."""
    if command["do"] == "logits":
        step = start(1)
        last = [step(torch.tensor([each])) for each in IDS][-1]
        return last[0].tolist()
    batch = command["batch"]
    if batch not in streams:
        streams[batch] = Streams(start(batch), batch)
    work = streams[batch]
    work()  # not measured: threads wake up, and the caches have this side's data
    return [work() for _ in range(command["steps"])]


if __name__ == "__main__":
    main()
