"""Names and shapes of an RWKV-7's weights: those of .pth files become those of folders.

Letters: C channels, R rank.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from cottention.engine.models.recurrent_model import with_tied_head
from cottention.engine.models.rwkv7.config import LowRanks, RWKV7Config

EMBEDDINGS = "model.embeddings.weight"

_TOP = {"emb": "model.embeddings", "ln_out": "model.norm", "head": "lm_head"}
_NORMS = {"ln0": "pre_norm", "ln1": "attn_norm", "ln2": "ffn_norm"}
_MATRICES = {"receptance": "r_proj", "key": "k_proj", "value": "v_proj", "output": "o_proj"}
_LOW_RANK = {"0": "lora.2.bias", "1": "lora.0.weight", "2": "lora.2.weight"}
_IS_LOW_RANK = re.compile(r"([wavg])([012])")


def from_pth(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a .pth file under a folder's names and in its shapes.

    A name of no known part stays as it is, and is then refused as unexpected. Layer 0 has no v to
    mix in: its v0, v1 and v2, which training code leaves there, are not taken.
    """
    renamed: dict[str, Tensor] = {}
    for name, weight in weights.items():
        if re.fullmatch(r"blocks\.0\.att\.v[012]", name):
            continue
        new = _new_name(name)
        is_transposed = re.search(r"\.lora\.[02]\.weight$", new) is not None
        renamed[new] = weight.T.contiguous() if is_transposed and weight.dim() == 2 else weight
    return renamed


def _new_name(name: str) -> str:
    part, _, rest = name.partition(".")
    if part in _TOP:
        return f"{_TOP[part]}.{rest}"
    found = re.fullmatch(r"blocks\.(\d+)\.(ln[012]|att|ffn)\.(.+)", name)
    if found is None:
        return name
    layer, part, rest = found.groups()
    prefix = f"model.layers.{layer}"
    if part in _NORMS:
        return f"{prefix}.{_NORMS[part]}.{rest}"
    if part == "ffn":
        return f"{prefix}.ffn.{rest}"
    if low_rank := _IS_LOW_RANK.fullmatch(rest):
        return f"{prefix}.attn.{low_rank[1]}_lora.{_LOW_RANK[low_rank[2]]}"
    first, _, last = rest.partition(".")
    first = {**_MATRICES, "ln_x": "g_norm"}.get(first, first)
    return f"{prefix}.attn.{first}.{last}" if last else f"{prefix}.attn.{first}"


def renamed(weights: dict[str, Tensor], config: RWKV7Config) -> dict[str, Tensor]:
    """The weights of either container under the model's names, vectors as [C]."""
    if "emb.weight" in weights:
        weights = from_pth(weights)
    weights = {
        name: weight.flatten() if weight.shape[:-1] == (1, 1) else weight
        for name, weight in weights.items()
    }
    return with_tied_head(weights, EMBEDDINGS, is_tied=config.tie_word_embeddings)


def completed(weights: Mapping[str, Tensor], config: RWKV7Config) -> RWKV7Config:
    """The configuration with the low ranks that the weights have; 1 where one is missing."""
    named = from_pth(weights) if "emb.weight" in weights else weights

    def rank(part: str, layer: int = 0) -> int:
        ending = f"model.layers.{layer}.attn.{part}_lora.lora.0.weight"
        found = [each for name, each in named.items() if name.endswith(ending)]
        return found[0].shape[0] if found and found[0].dim() == 2 else 1

    return replace(config, low_ranks=LowRanks(rank("w"), rank("a"), rank("v", 1), rank("g")))


_MATRIX = re.compile(r"(_proj|\.ffn\.key|\.ffn\.value|\.embeddings|lm_head)\.weight$")


def weight_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """The large matrices have the model's dtype; norms, mixes and low ranks stay in float32."""
    return dtype if _MATRIX.search(name) else torch.float32


def weights_hint(names: Iterable[str], _config: RWKV7Config) -> str:
    """Where a folder has another version's weights."""
    if any("time_maa" in name or "time_mix" in name for name in names):
        return ". time_mix and time_maa are names of RWKV-4 to RWKV-6, which are not supported"
    return ""
