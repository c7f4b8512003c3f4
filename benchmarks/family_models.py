"""Files of random weights in the shapes of RWKV-7 0.4B and Mamba-2 370M, as published ones are.

Speed does not depend on the values unless they are denormal; decays and norms are in the range of
trained ones, so that all sides can be compared by their logits.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

MAMBA_2 = {
    "architectures": ["Mamba2ForCausalLM"],
    "model_type": "mamba2",
    "vocab_size": 50_288,
    "hidden_size": 1024,
    "num_hidden_layers": 48,
    "num_heads": 32,
    "head_dim": 64,
    "state_size": 128,
    "n_groups": 1,
    "expand": 2,
    "conv_kernel": 4,
    "chunk_size": 256,
    "hidden_act": "silu",
    "use_bias": False,
    "use_conv_bias": True,
    "layer_norm_epsilon": 1e-5,
    "tie_word_embeddings": True,
}

RWKV_7_RANKS = {"w": 64, "a": 64, "v": 32, "g": 128}


class _Random:
    def __init__(self) -> None:
        self._generator = torch.Generator().manual_seed(0)

    def matrix(self, rows: int, columns: int) -> Tensor:
        """Of products whose results have about the size of what goes in."""
        return torch.randn(rows, columns, generator=self._generator) * columns**-0.5

    def between(self, low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=self._generator)


def mamba2(
    folder: Path,
    num_layers: int = 48,
    vocab_size: int = 50_288,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """A folder as transformers writes it."""
    name = str(dtype).removeprefix("torch.")
    config = MAMBA_2 | {"num_hidden_layers": num_layers, "vocab_size": vocab_size, "dtype": name}
    random, width = _Random(), 1024
    heads, inner = 32, 2 * width
    convolved = inner + 2 * 128
    weights = {"backbone.embeddings.weight": random.matrix(vocab_size, width)}
    for layer in range(num_layers):
        part = f"backbone.layers.{layer}."
        mixer = part + "mixer."
        weights |= {
            part + "norm.weight": torch.ones(width),
            mixer + "in_proj.weight": random.matrix(inner + convolved + heads, width),
            mixer + "conv1d.weight": random.between(-0.5, 0.5, convolved, 1, 4),
            mixer + "conv1d.bias": random.between(-0.1, 0.1, convolved),
            mixer + "dt_bias": random.between(-6, -2, heads),
            mixer + "A_log": random.between(0, 2.7, heads),
            mixer + "D": torch.ones(heads),
            mixer + "norm.weight": torch.ones(inner),
            mixer + "out_proj.weight": random.matrix(width, inner),
        }
    weights["backbone.norm_f.weight"] = torch.ones(width)
    weights = {name: weight.to(dtype) for name, weight in weights.items()}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def rwkv7(file: Path, num_layers: int = 24, vocab_size: int = 65_536) -> Path:
    """A .pth file in bfloat16, as the RWKV project publishes them."""
    random, width = _Random(), 1024
    weights = {"emb.weight": random.matrix(vocab_size, width)}
    for layer in range(num_layers):
        weights |= {f"blocks.{layer}.{n}": w for n, w in _rwkv7_block(random, width).items()}
        if layer == 0:
            weights |= _norm("blocks.0.ln0", width)
    weights |= {**_norm("ln_out", width), "head.weight": random.matrix(vocab_size, width)}
    torch.save({name: weight.bfloat16() for name, weight in weights.items()}, file)
    return file


def _norm(name: str, width: int) -> dict[str, Tensor]:
    return {f"{name}.weight": torch.ones(width), f"{name}.bias": torch.zeros(width)}


def _rwkv7_block(random: _Random, width: int) -> dict[str, Tensor]:
    weights = {**_norm("ln1", width), **_norm("ln2", width), **_norm("att.ln_x", width)}
    for name, rank in RWKV_7_RANKS.items():
        weights |= {
            f"att.{name}1": random.matrix(rank, width).T.contiguous(),
            f"att.{name}2": random.matrix(width, rank).T.contiguous() / 4,
        }
    for name, (low, high) in {"w": (-6, -1), "a": (-1, 1), "v": (-1, 1)}.items():
        weights[f"att.{name}0"] = random.between(low, high, 1, 1, width)
    for name in "rwkvag":
        weights[f"att.x_{name}"] = random.between(0, 1, 1, 1, width)
    for name in ("receptance", "key", "value", "output"):
        weights[f"att.{name}.weight"] = random.matrix(width, width)
    return weights | {
        "att.k_k": random.between(0.7, 1, 1, 1, width),
        "att.k_a": random.between(0.9, 1.1, 1, 1, width),
        "att.r_k": random.between(-0.1, 0.1, width // 64, 64),
        "ffn.x_k": random.between(0, 1, 1, 1, width),
        "ffn.key.weight": random.matrix(4 * width, width),
        "ffn.value.weight": random.matrix(width, 4 * width),
    }
