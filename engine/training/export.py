"""A complete Hugging Face model folder, which other tools load too.

Owns the folder's files and their form. Knows nothing of how the weights came to be: the model card
and the facts are handed to it.
"""

import json
from pathlib import Path
from typing import Any

from cottention.engine.model_config import ModelConfig
from cottention.engine.training.bpe import END_OF_TEXT, end_of_text_id
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor


def write_folder(
    folder: Path, config: ModelConfig, dtype: str, weights: dict[str, Tensor], tokenizer: Tokenizer
) -> None:
    """Write weights, configuration and tokenizer files into `folder`, which is made if needed."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)  # as the other files: a package is for all to read
    tokenizer.save(str(folder / "tokenizer.json"))
    tokenizer.model.save(str(folder))  # vocab.json and merges.txt
    end = end_of_text_id(tokenizer)
    write_json(folder / "config.json", config_json(config, dtype, end))
    write_json(folder / "generation_config.json", generation_json(end))
    write_json(folder / "tokenizer_config.json", tokenizer_json(config, end))
    write_json(folder / "special_tokens_map.json", _special_roles())


def config_json(config: ModelConfig, dtype: str, end: int) -> dict[str, Any]:
    """config.json: a GPT-J's, with the kind of attention named."""
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
        **_fixed_length(config),
    }


def _fixed_length(config: ModelConfig) -> dict[str, Any]:
    """cosFormer's M, and nothing for other kinds of attention."""
    if config.max_exact_length is None:
        return {}
    return {"cosformer_max_length": config.max_exact_length}


def generation_json(end: int) -> dict[str, Any]:
    """generation_config.json: nothing but the ids that begin and end a text."""
    return {"_from_model_config": True, "bos_token_id": end, "eos_token_id": end}


def tokenizer_json(config: ModelConfig, end: int) -> dict[str, Any]:
    """tokenizer_config.json, for loaders that go by its class name."""
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
    """Indented, with a line end, so that the files compare well."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _special_roles() -> dict[str, Any]:
    return {f"{role}_token": END_OF_TEXT for role in ("bos", "eos", "unk")}
