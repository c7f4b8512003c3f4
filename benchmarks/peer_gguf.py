"""Softmax models for llama.cpp as GGUF files: random weights, in the shapes of `shapes.py`.

llama.cpp's architecture `llama` has three matrices in its MLP where a GPT-J has two, so they are
two thirds as wide: a step reads as many weights.
"""

from pathlib import Path
from typing import Any

import numpy as np

from cottention.engine.models.gptj.config import GPTJConfig

LONGEST = 1 << 16
"""Context length that the files allow."""

KINDS = ("f32", "bf16", "q8_0", "q4_K")


def written(config: GPTJConfig, kind: str, folder: Path) -> Path:
    """The file of this type of weights in `folder`; written if it is not there."""
    file = folder / f"llama-{config.n_embd}-{kind}.gguf"
    if not file.exists():
        if kind == "q4_K":
            _quantize(written(config, "f32", folder), file)
        else:
            _write(config, kind, file)
    return file


def _write(config: GPTJConfig, kind: str, file: Path) -> None:
    import gguf

    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(LONGEST)
    writer.add_embedding_length(config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_feed_forward_length(_inner(config))
    writer.add_head_count(config.n_head)
    writer.add_head_count_kv(config.n_head)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(config.rotary_dim)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    types = {"bf16": gguf.GGMLQuantizationType.BF16, "q8_0": gguf.GGMLQuantizationType.Q8_0}
    noise = np.random.default_rng(0).standard_normal(2**20, dtype=np.float32) * 0.02
    for name, shape in _shapes(config):
        if len(shape) == 1:
            writer.add_tensor(name, np.ones(shape, np.float32))
            continue
        weight: Any = np.resize(noise, shape)
        if kind == "f32":
            writer.add_tensor(name, weight)
        else:
            packed = gguf.quants.quantize(weight, types[kind])
            writer.add_tensor(name, packed, raw_dtype=types[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _inner(config: GPTJConfig) -> int:
    return config.n_inner * 2 // 3


def _shapes(config: GPTJConfig) -> list[tuple[str, tuple[int, ...]]]:
    width, inner, vocab = config.n_embd, _inner(config), config.vocab_size
    layer = {
        "attn_norm": (width,),
        "attn_q": (width, width),
        "attn_k": (width, width),
        "attn_v": (width, width),
        "attn_output": (width, width),
        "ffn_norm": (width,),
        "ffn_gate": (inner, width),
        "ffn_up": (inner, width),
        "ffn_down": (width, inner),
    }
    ends = {"token_embd": (vocab, width), "output_norm": (width,), "output": (vocab, width)}
    blocks = (
        (f"blk.{i}.{name}", shape) for i in range(config.n_layer) for name, shape in layer.items()
    )
    return [(f"{name}.weight", shape) for name, shape in (*ends.items(), *blocks)]


def _quantize(source: Path, file: Path) -> None:
    """By llama.cpp itself, all matrices in Q4_K or what it takes instead for some."""
    import llama_cpp

    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M
    if llama_cpp.llama_model_quantize(str(source).encode(), str(file).encode(), options):
        raise RuntimeError(f"llama.cpp could not quantize {source}")
