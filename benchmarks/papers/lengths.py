"""Peak memory and time of one sequence by its length: of a training step and of a prompt's pass.

Each measurement is a process of its own, so that its peak is its own: what the step adds to the
resident memory of a process that has the model. Time is that of the one thread's processor.
"""

import json
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
import torch
from torch import Tensor

from benchmarks.papers.causal import Causal
from benchmarks.papers.results import Result
from cottention.engine.models.gptj.model import Attend, CottentionForCausalLM
from cottention.engine.models.recurrence import Features
from cottention.engine.training.data import Windows
from cottention.engine.training.forward import attend_from_zero, init_weights, token_losses

LENGTHS = tuple(2**power for power in range(9, 17))
WAYS = ("cottention", "softmax, fused", "softmax, eager")
MAX_BYTES = 4 << 30
MAX_SECONDS = 150
_NO_MEMORY = "can't allocate memory"


@dataclass(frozen=True, slots=True)
class Length:
    """One measurement, in the shape of the causal twins and float32.

    way: Cottention's chunked form, torch's scaled_dot_product_attention, or the softmax of the
    whole matrix of scores. What takes more than 4 GiB or 150 s is skipped, and says so.
    """

    way: str
    length: int
    is_training: bool

    def run(self, _folder: Path, _shared: Path) -> Result:
        """Measure in a process of its own."""
        matrix = Causal("softmax", 0, 0).heads * self.length**2 * 4
        if self.way == "softmax, eager" and matrix > MAX_BYTES:
            return {"skipped": f"one layer's scores take {matrix / 2**30:.0f} GiB"}
        command = [sys.executable, "-m", "benchmarks.papers.lengths", json.dumps(asdict(self))]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode == -signal.SIGXCPU:
            return {"skipped": f"over {MAX_SECONDS} s"}
        if _NO_MEMORY in done.stderr:
            return {"skipped": f"over {MAX_BYTES >> 30} GiB"}
        if done.returncode:
            raise RuntimeError(done.stderr)
        result: Result = json.loads(done.stdout)
        return result

    def measure(self) -> Result:
        """Bytes that the step adds, and its seconds; the faster of two where they are short."""
        shape = Causal("cottention" if self.way == "cottention" else "softmax", 0, 0)
        config = shape.settings().model_config(end_of_text=0)
        torch.manual_seed(0)
        model = init_weights(CottentionForCausalLM(config)).requires_grad_(self.is_training)
        attend = _eager if self.way == "softmax, eager" else attend_from_zero(config, torch.float32)
        ids = torch.randint(config.vocab_size, (1, self.length + 1))
        step = _training if self.is_training else _inference
        step(model, Windows(ids[:, :65], ids[:, 1:66]), attend)
        before = psutil.Process().memory_info().rss
        resource.setrlimit(resource.RLIMIT_DATA, (before + MAX_BYTES, -1))
        resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time()) + MAX_SECONDS, -1))
        seconds = []
        while len(seconds) < 2 and sum(seconds) < MAX_SECONDS / 10:
            began = time.process_time()
            step(model, Windows(ids[:, :-1], ids[:, 1:]), attend)
            seconds.append(time.process_time() - began)
        return {"bytes": _peak_bytes() - before, "seconds": round(min(seconds), 4)}


def _peak_bytes() -> int:
    """Of this program's resident memory; ru_maxrss has that of the process it was forked from."""
    status = Path("/proc/self/status").read_text()
    [line] = [each for each in status.splitlines() if each.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


Step = Callable[[CottentionForCausalLM, Windows, Attend], None]


def _training(model: CottentionForCausalLM, windows: Windows, attend: Attend) -> None:
    """Forward and backward; the gradients are there afterwards, as before an optimizer's step."""
    logits = model(windows.inputs, torch.arange(windows.inputs.shape[1]), attend)
    model.zero_grad(set_to_none=True)
    token_losses(logits, windows.targets).mean().backward()  # type: ignore[no-untyped-call]


@torch.inference_mode()
def _inference(model: CottentionForCausalLM, windows: Windows, attend: Attend) -> None:
    """A prompt's pass, up to the logits that follow it."""
    head, model.lm_head = model.lm_head, torch.nn.Identity()  # type: ignore[assignment]
    hidden = model(windows.inputs, torch.arange(windows.inputs.shape[1]), attend)
    model.lm_head = head
    head(hidden[:, -1])


def _eager(_layer: int, features: Features) -> Tensor:
    """Causal softmax attention with a matrix of all scores, scaled by 1/√d."""
    q, k, v = (x.transpose(1, 2) for x in features[:3])
    length = q.shape[-2]
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    is_later = torch.ones(length, length, dtype=torch.bool).triu(1)
    return (scores.masked_fill(is_later, -torch.inf).softmax(-1) @ v).transpose(1, 2)


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(Length(**json.loads(sys.argv[1])).measure()))
