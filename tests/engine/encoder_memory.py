"""Peak memory of one text in a process of its own: `python -m tests.engine.encoder_memory TOKENS`.

Prints two numbers of bytes. The first is the process's peak without the weights and the stream
[N, C] in float32, so with the interpreter and torch; the second is how far encoding rose above what
was resident before, without the stream. The model has random weights and a table of 65,536
positions.
"""

import sys
import tempfile
from pathlib import Path

import torch

from cottention.engine.config import EngineConfig
from cottention.engine.encoder_engine import EncoderEngine
from cottention.engine.models.bert.model import BertForPreTraining
from cottention.engine.models.registry import parse_config
from tests.engine.encoders import changed_folder, encoder_folder, read_raw, write_vocabulary

MAX_TOKENS = 65_536
SHAPE = {
    "num_hidden_layers": 1,
    "hidden_size": 128,
    "num_attention_heads": 2,
    "intermediate_size": 256,
    "max_position_embeddings": MAX_TOKENS,
}


def main(num_tokens: int) -> None:
    torch.set_num_threads(2)
    source = encoder_folder()
    model = BertForPreTraining(parse_config(read_raw(source) | SHAPE, "config.json"))
    with tempfile.TemporaryDirectory() as folder:
        target = changed_folder(source, Path(folder) / "long", model.state_dict(), **SHAPE)
        write_vocabulary(target)
        del model
        engine = EncoderEngine(target, EngineConfig(max_slots=2, max_batch_tokens=512))
    engine.encode([[5] * 512])  # the buffers of a whole chunk stay with the allocator
    ids = torch.randint(5, 300, (num_tokens,)).tolist()
    before = reset_peak()
    engine.encode([ids])
    at_most = peak() - 4 * num_tokens * SHAPE["hidden_size"]
    print(at_most - 4 * engine.num_parameters, at_most - before)


def reset_peak() -> int:
    """Resident bytes now, from which the peak is counted."""
    Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")


def peak() -> int:
    return status("VmHWM")


def status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


if __name__ == "__main__":
    main(int(sys.argv[1]))
