"""Writes a trained model as a complete Hugging Face folder, with weights of 16 bits.

A feature map's own weights are written in float32, as they are served.
Of float16 and bfloat16, the type is used that scores better on the held-out files.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from cottention.engine.models.gptj.config import GPTJConfig
from cottention.engine.models.gptj.feature_maps.random_features import RandomFeatures
from cottention.engine.models.gptj.model import CottentionForCausalLM, weight_dtype
from cottention.engine.training.data import END_OF_TEXT, end_of_text_id
from cottention.engine.training.evaluate import HeldOut, Score, score


def write_folder(
    folder: Path, config: GPTJConfig, dtype: str, weights: dict[str, Tensor], tokenizer: Tokenizer
) -> None:
    """Write weights, configuration and tokenizer files; creates `folder` if needed."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)  # readable by all, as the others
    tokenizer.save(str(folder / "tokenizer.json"))
    tokenizer.model.save(str(folder))  # vocab.json and merges.txt
    end = end_of_text_id(tokenizer)
    write_json(folder / "config.json", config_json(config, dtype, end))
    write_json(folder / "generation_config.json", generation_json(end))
    write_json(folder / "tokenizer_config.json", tokenizer_json(config, end))
    write_json(folder / "special_tokens_map.json", _special_roles())


def config_json(config: GPTJConfig, dtype: str, end: int) -> dict[str, Any]:
    """config.json: that of a GPT-J, with `attention_type`."""
    return {
        "architectures": ["GPTJForCausalLM"],
        "model_type": "gptj",
        "attention_type": config.attention_type,
        "activation_function": "gelu_new",
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "bos_token_id": end,
        "eos_token_id": end,
        "layer_norm_epsilon": config.layer_norm_epsilon,
        "tie_word_embeddings": False,
        "use_cache": True,
        "rotary": True,
        "vocab_size": config.vocab_size,
        "n_embd": config.n_embd,
        "n_head": config.n_head,
        "n_layer": config.n_layer,
        "n_inner": config.n_inner,
        "n_positions": config.n_positions,
        "rotary_dim": config.rotary_dim,
        "torch_dtype": dtype,
        **_kind_settings(config),
    }


def _kind_settings(config: GPTJConfig) -> dict[str, Any]:
    """cosFormer's M, the number of random features; empty for other kinds of attention."""
    kind = config.feature_map
    if isinstance(kind, RandomFeatures):
        return {"num_random_features": kind.num_features(config)}
    if config.max_exact_length is None:
        return {}
    return {"cosformer_max_length": config.max_exact_length}


def generation_json(end: int) -> dict[str, Any]:
    """generation_config.json: the ids that begin and end a text."""
    return {"_from_model_config": True, "bos_token_id": end, "eos_token_id": end}


def tokenizer_json(config: GPTJConfig, end: int) -> dict[str, Any]:
    """tokenizer_config.json, for loaders that go by its tokenizer class."""
    special = {"content": END_OF_TEXT, "lstrip": False, "normalized": False}
    special |= {"rstrip": False, "single_word": False, "special": True}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "added_tokens_decoder": {str(end): special},
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": config.n_positions,
        **_special_roles(),
    }


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write indented JSON with a final newline, so that versions of a file can be compared."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _special_roles() -> dict[str, Any]:
    return {f"{role}_token": END_OF_TEXT for role in ("bos", "eos", "unk")}


HALF_TYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}

Weights = dict[str, Tensor]


class HalfPrecision(NamedTuple):
    """Weights in `dtype`, the float32 model with these weights, and its score."""

    dtype: str
    weights: Weights
    model: CottentionForCausalLM
    score: Score


def to_half_precision(weights: Weights, config: GPTJConfig, held_out: HeldOut) -> HalfPrecision:
    """The weights in float16 or bfloat16, whichever has fewer bits per byte."""
    candidates = [_rounded(weights, name, config, held_out) for name in HALF_TYPES]
    return min(candidates, key=lambda model: model.score.bits_per_byte)


def _rounded(weights: Weights, name: str, config: GPTJConfig, held_out: HeldOut) -> HalfPrecision:
    half = {
        key: weight.to(weight_dtype(key, HALF_TYPES[name])).contiguous()
        for key, weight in weights.items()
    }
    model = CottentionForCausalLM(config).requires_grad_(False).eval()
    model.load_state_dict({key: weight.float() for key, weight in half.items()})
    return HalfPrecision(name, half, model, score(model, held_out, dtype=torch.float32))
