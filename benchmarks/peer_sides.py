"""One side of benchmarks/peers.py, in a process of its own: ours, or the library beside it.

`python -m benchmarks.peer_sides SIDE KIND FOLDER THREADS` reads one JSON command a line and answers
each with one JSON line: `open` (streams, context), `steps` (steps), `close`, `prompt` (tokens),
`memory`.
"""

import contextlib
import ctypes
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import psutil
import torch
from torch import Tensor

from benchmarks import peer_gguf, softmax
from benchmarks.shapes import SHAPES, random_model, weight_type

SHAPE = SHAPES["300M"]
CHUNK = 512
"""Tokens of a prompt that are processed at a time."""

SPARE = 64
"""Tokens that can be decoded beyond a context."""

Step = Callable[[], object]
"""One more token of each stream, chosen greedily."""


class Model(Protocol):
    """A model that can decode and read prompts."""

    def streams(self, number: int, context: int) -> Step:
        """Streams that have a past of `context` tokens each."""
        ...

    def prompt(self, length: int) -> object:
        """Read a prompt of one stream from its beginning, to the logits of its last token."""
        ...

    def close(self) -> None:
        """Free what is kept for the streams."""
        ...


class Ours:
    """The served model; its step does not depend on the context.

    `kind` is a type of weights, with "+compressed" for weights that are compressed without loss.
    """

    def __init__(self, kind: str, _folder: Path) -> None:
        from cottention.engine import ops
        from cottention.engine.models.gptj.inference import ServedGPTJ

        dtype, storage = weight_type(kind)
        with ops.weight_storage(storage):
            self._model = ServedGPTJ(random_model(SHAPE, dtype), "cpu")

    def streams(self, number: int, context: int) -> Step:
        from cottention.engine import ops
        from cottention.engine.models.recurrence import Recurrence
        from cottention.engine.state.pool import StatePool

        pool = StatePool(SHAPE.state_spec(), number, "cpu")
        rows = ops.Segments(torch.arange(number, dtype=torch.int32))
        recurrence, ids = Recurrence(pool.tensors, rows), torch.arange(number)
        positions = torch.full((number,), context)

        def step() -> None:
            hidden = self._model.hidden(ids, positions, recurrence)
            ids.copy_(self._model.logits(hidden).argmax(-1))
            positions.add_(1)

        return step

    def prompt(self, length: int) -> Tensor:
        from cottention.engine import ops
        from cottention.engine.models.recurrence import Recurrence
        from cottention.engine.state.pool import StatePool

        pool = StatePool(SHAPE.state_spec(), 1, "cpu")
        hidden = torch.empty(0)
        for start in range(0, length, CHUNK):
            positions = torch.arange(start, min(start + CHUNK, length))
            rows = ops.Segments.of([0], [len(positions)], 1, "cpu")
            hidden = self._model.hidden(positions, positions, Recurrence(pool.tensors, rows))
        return self._model.logits(hidden[-1:])

    def close(self) -> None:
        """Nothing is kept: a step holds its streams."""


class Transformers:
    """A GPT-J of `transformers` with a static cache of constant entries."""

    def __init__(self, kind: str, _folder: Path) -> None:
        self._model = softmax.build(SHAPE, peer_gguf.LONGEST).to(getattr(torch, kind))

    def streams(self, number: int, context: int) -> Step:
        return softmax.Stream(self._model, "static", number, context)

    def prompt(self, length: int) -> Any:
        from transformers import StaticCache

        cache = StaticCache(config=self._model.config, max_cache_len=length)
        out: Any = None
        for start in range(0, length, CHUNK):
            ids = torch.arange(start, min(start + CHUNK, length)).unsqueeze(0)
            out = self._model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return out

    def close(self) -> None:
        """Nothing is kept: a step holds its streams."""


class LlamaCpp:
    """llama.cpp; `kind` is a type of weights, with "+fa" for flash attention."""

    def __init__(self, kind: str, folder: Path) -> None:
        import llama_cpp

        self._llama = llama_cpp
        self._log = llama_cpp.llama_log_callback(lambda *_: None)  # referenced as long as the model
        llama_cpp.llama_log_set(self._log, None)
        llama_cpp.llama_backend_init()
        weights, _, flash = kind.partition("+")
        options = llama_cpp.llama_model_default_params()
        options.n_gpu_layers = 0
        file = peer_gguf.written(SHAPE, weights, folder)
        self._model = llama_cpp.llama_model_load_from_file(str(file).encode(), options)
        self._flash = bool(flash)
        self._batch = llama_cpp.llama_batch_init(4 * CHUNK, 0, 1)
        self._context: Any = None

    def streams(self, number: int, context: int) -> Step:
        self._open(number, context + SPARE)
        self._read(context)
        memory = self._llama.llama_get_memory(self._context)
        for other in range(1, number):
            self._llama.llama_memory_seq_cp(memory, 0, other, -1, -1)
        ids, position = np.arange(number), context

        def step() -> None:
            nonlocal ids, position
            each = zip(ids.tolist(), range(number), strict=True)
            logits = self._decode([(token, position, stream, True) for token, stream in each])
            ids, position = logits.argmax(-1), position + 1

        return step

    def prompt(self, length: int) -> None:
        self._open(1, length + SPARE)
        self._read(length)

    def close(self) -> None:
        if self._context is not None:
            self._llama.llama_free(self._context)
            self._context = None

    def _open(self, streams: int, length: int) -> None:
        self.close()
        settings = self._llama.llama_context_default_params()
        settings.n_ctx, settings.n_seq_max = length * streams, streams
        settings.n_batch, settings.n_ubatch = 4 * CHUNK, CHUNK
        settings.n_threads = settings.n_threads_batch = torch.get_num_threads()
        settings.flash_attn_type = int(self._flash)
        self._context = self._llama.llama_init_from_model(self._model, settings)
        if not self._context:
            raise RuntimeError(f"llama.cpp has no context of {streams} times {length} tokens")

    def _read(self, length: int) -> None:
        for start in range(0, length, CHUNK):
            places = range(start, min(start + CHUNK, length))
            self._decode([(place, place, 0, place == length - 1) for place in places])

    def _decode(self, tokens: list[tuple[int, int, int, bool]]) -> Any:
        """Token, position, stream and whether its logits are wanted → the logits of those."""
        batch, num_logits = self._batch, 0
        batch.n_tokens = len(tokens)
        for i, (token, position, stream, wanted) in enumerate(tokens):
            batch.token[i], batch.pos[i] = token, position
            batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = 1, stream, wanted
            num_logits += wanted
        if self._llama.llama_decode(self._context, batch):
            raise RuntimeError("llama_decode failed")
        if num_logits:
            logits = self._llama.llama_get_logits(self._context)
            return np.ctypeslib.as_array(logits, (num_logits, SHAPE.vocab_size))
        return None


SIDES: dict[str, Callable[[str, Path], Model]] = {
    "ours": Ours,
    "llama.cpp": LlamaCpp,
    "transformers": Transformers,
}


class Answers:
    """Answers commands about one model."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._step: Step = lambda: None

    @torch.inference_mode()
    def answer(self, command: dict[str, Any]) -> list[float]:
        """The seconds of steps or of a prompt, or the bytes of resident memory."""
        match command["do"]:
            case "open":
                self._step = self._model.streams(command["streams"], command["context"])
            case "close":
                self._step = lambda: None
                self._model.close()
            case "steps":
                self._step()  # not measured: threads wake up, and caches have this side's data
                return [_seconds(self._step) for _ in range(command["steps"])]
            case "prompt":
                return [_seconds(lambda: self._model.prompt(command["tokens"]))]
        return [float(psutil.Process().memory_info().rss)]


def _seconds(work: Step) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    """Answer commands until standard input ends."""
    side, kind, folder, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    answers = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):
        own = Answers(SIDES[side](kind, Path(folder)))
        ctypes.CDLL(None).malloc_trim(0)  # what was needed to make the weights is not counted
        for line in sys.stdin:
            print(json.dumps(own.answer(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
