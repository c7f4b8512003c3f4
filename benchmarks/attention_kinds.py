"""The kinds of attention, trained alike: quality by position, training speed, memory at decode.

Takes folders written by `python -m cottention.engine.training --attention KIND`. Bits per byte are
those of all held-out code without character tables, in adjacent windows, with the stored weights in
float32. Training speed is measured in steps from fresh weights, the kinds in turn, so that other
load affects all alike. Memory is computed, from `StateSpec` and the size of a float32 KV cache.
"""

import statistics
import time
from dataclasses import replace
from pathlib import Path

import torch
from tokenizers import Tokenizer

from benchmarks.common import Report, machine, parser, show, write_json
from benchmarks.held_out import load
from benchmarks.memory import kv_cache_bytes
from cottention.engine.models.gptj.attention_kinds import ATTENTION_KINDS
from cottention.engine.models.gptj.config import GPTJConfig
from cottention.engine.models.gptj.model import CottentionForCausalLM
from cottention.engine.training.data import (
    Windows,
    read_corpus,
    standard_library,
    without_character_tables,
)
from cottention.engine.training.evaluate import HeldOut, score
from cottention.engine.training.forward import add_dropout, init_weights, mean_loss
from cottention.engine.training.settings import TrainingSettings
from cottention.engine.training.trainer import Optimizers

SETTINGS = TrainingSettings(context=512, batch_tokens=4096)
AGES = (1_000, 8_000, 64_000, 1_000_000)


def main() -> None:
    """Score the given folders, measure training, compute memory."""
    options = parser(__doc__)
    options.add_argument("folders", nargs="*", type=Path, help="trained model folders")
    options.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    arguments = options.parse_args()
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    report: Report = {"machine": machine()}
    report["quality"] = [_quality(folder) for folder in arguments.folders]
    report["training"] = _training(2 if arguments.quick else 8)
    report["memory"] = [_memory(kind) for kind in ATTENTION_KINDS]
    for title, name in _TABLES.items():
        if report[name]:
            show(title, report[name])
    if arguments.json:
        write_json(arguments.json, report)


_TABLES = {
    "Held-out bits per byte, by position in the window": "quality",
    "Training, tokens per second": "training",
    "Bytes per stream at decode, by number of tokens": "memory",
}


def _quality(folder: Path) -> dict[str, object]:
    model = load(folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    files = without_character_tables(read_corpus(standard_library()).held_out)
    held_out = HeldOut.of(tokenizer, files, model.config.n_positions)
    result = score(model, held_out, dtype=torch.float32)
    return {
        "attention": model.config.attention_type,
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "all": round(result.bits_per_byte, 4),
        **{place: round(bits, 4) for place, bits in result.by_position.items()},
    }


def _training(num_rounds: int) -> list[dict[str, object]]:
    """Medians of steps in turn, without the first step of each."""
    steps = {kind: _Step(kind) for kind in ATTENTION_KINDS}
    seconds: dict[str, list[float]] = {kind: [] for kind in steps}
    for number in range(num_rounds + 1):
        for kind, step in steps.items():
            began = time.perf_counter()
            step()
            if number:
                seconds[kind].append(time.perf_counter() - began)
    medians = {kind: statistics.median(each) for kind, each in seconds.items()}
    return [
        {
            "attention": kind,
            "tokens/s": SETTINGS.batch_tokens / median,
            "vs softmax": medians["softmax"] / median,
        }
        for kind, median in medians.items()
    ]


class _Step:
    """An optimizer step on random ids, from fresh weights."""

    def __init__(self, kind: str) -> None:
        self._model = init_weights(CottentionForCausalLM(_config(kind))).train()
        add_dropout(self._model, SETTINGS.dropout)
        settings = SETTINGS.learning_rate, SETTINGS.weight_decay
        self._optimizers = Optimizers(self._model, *settings)
        ids = torch.randint(SETTINGS.vocab_size, (SETTINGS.batch, SETTINGS.context + 1))
        self._windows = Windows(ids[:, :-1], ids[:, 1:])

    def __call__(self) -> None:
        mean_loss(self._model, self._windows, dtype=torch.bfloat16).backward()
        self._optimizers.step(0.01)


def _config(kind: str) -> GPTJConfig:
    return replace(SETTINGS, attention=kind).model_config(end_of_text=0)


def _memory(kind: str) -> dict[str, object]:
    config = _config(kind)
    if config.feature_map.is_recurrent:
        state = config.state_spec().bytes_per_slot
        return {"attention": kind, **{f"{age:,}": state for age in AGES}}
    return {"attention": kind, **{f"{age:,}": kv_cache_bytes(config, age) for age in AGES}}


if __name__ == "__main__":
    main()
