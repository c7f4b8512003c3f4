"""The definition of a GPT-J with some kind of attention: from token ids to logits.

Modules are named as the published weights are. Each layer hands its mapped q, k, v to an `Attend`
that the caller gives, so that the parallel, chunked and recurrent forms are one model.

Letters: N tokens (any leading shape), H heads, D head width, V value width, C channels.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from cottention.engine import ops
from cottention.engine.models.gptj.attention_kinds import ATTENTION_KINDS
from cottention.engine.models.gptj.config import GPTJConfig
from cottention.engine.models.gptj.feature_maps.base import TokenPositions
from cottention.engine.models.recurrence import Features

ROTARY_BASE = 10_000.0

Attend = Callable[[int, Features], Tensor]
"""(layer, mapped q, k, v [..., N, H, ·]) → outputs [..., N, H, V]."""


class Attention(nn.Module):
    """Projections, and the weights of the feature map, if it has any."""

    def __init__(self, config: GPTJConfig) -> None:
        super().__init__()
        width, bias = config.n_embd, config.attention_bias
        self.q_proj = nn.Linear(width, width, bias=bias)
        self.k_proj = nn.Linear(width, width, bias=bias)
        self.v_proj = nn.Linear(width, width, bias=bias)
        self.out_proj = nn.Linear(width, width, bias=bias)
        self._feature_map = config.feature_map
        self._feature_map.add_weights(self, config)

    def map_weights(self) -> tuple[Tensor, ...]:
        """The feature map's own weights, as `FeatureMap.features` takes them."""
        return self._feature_map.prepared_weights(self)


class MLP(nn.Module):
    """The two linear layers around gelu_new."""

    def __init__(self, config: GPTJConfig) -> None:
        super().__init__()
        self.fc_in = nn.Linear(config.n_embd, config.n_inner)
        self.fc_out = nn.Linear(config.n_inner, config.n_embd)


class Block(nn.Module):
    """x + attn(ln_1(x)) + mlp(ln_1(x)), as two stacked products with the recurrence between them.

    The weights have their published names; `stacked_in` and `stacked_out` concatenate them.
    """

    def __init__(self, config: GPTJConfig) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = Attention(config)
        self.mlp = MLP(config)

    def stacked_in(self) -> tuple[Tensor, Tensor]:
        """Weight [3C + inner, C] and bias [3C + inner] of q, k, v and fc_in in one product."""
        attn, fc_in = self.attn, self.mlp.fc_in
        projections = [attn.q_proj, attn.k_proj, attn.v_proj]
        none = fc_in.bias.new_zeros(fc_in.in_features)
        biases = [none if each.bias is None else each.bias for each in projections]
        weights = [each.weight for each in projections]
        return torch.cat([*weights, fc_in.weight]), torch.cat([*biases, fc_in.bias])

    def stacked_out(self) -> tuple[Tensor, Tensor]:
        """Weight [C, C + inner] and bias [C] of out_proj and fc_out in one product."""
        out_proj, fc_out = self.attn.out_proj, self.mlp.fc_out
        bias = fc_out.bias if out_proj.bias is None else out_proj.bias + fc_out.bias
        return torch.cat([out_proj.weight, fc_out.weight], dim=1), bias


class Transformer(nn.Module):
    """Token embeddings, blocks and the last norm."""

    def __init__(self, config: GPTJConfig) -> None:
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)


class CottentionForCausalLM(nn.Module):
    """The whole model; its state dict has exactly the keys of the published checkpoints."""

    def __init__(self, config: GPTJConfig) -> None:
        super().__init__()
        self.config = config
        self.transformer = Transformer(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size)

    def forward(self, ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """ids [..., N] at `positions` int64 [N], counted from 0 → logits [..., N, vocab_size]."""
        x = self.transformer.wte(ids)
        at = token_positions(self.config, positions, x.dtype)
        for layer, block in enumerate(self.blocks()):
            x = x + self._mixed(block, layer, x, at, attend)
        logits: Tensor = self.lm_head(self.transformer.ln_f(x))
        return logits

    def blocks(self) -> list[Block]:
        """The layers, in order."""
        return list(cast(Iterable[Block], self.transformer.h))

    def take_blocks(self) -> Iterator[Block]:
        """The layers, in order. Each is removed from the model as it is yielded."""
        while len(self.transformer.h):
            yield cast(Block, self.transformer.h.pop(0))

    def _mixed(
        self, block: Block, layer: int, x: Tensor, at: TokenPositions, attend: Attend
    ) -> Tensor:
        """Output of one block's attention and MLP, to be added to x [..., N, C]."""
        normed = block.ln_1(x)
        joined = nn.functional.linear(normed, *block.stacked_in())
        features, up = split_heads(self.config, normed, joined, block.attn.map_weights(), at)
        mixed = self.config.feature_map.outputs(attend(layer, features))
        out = torch.cat([mixed.flatten(-2).to(up.dtype), ops.gelu_new(up)], dim=-1)
        return nn.functional.linear(out, *block.stacked_out())


def token_positions(config: GPTJConfig, positions: Tensor, dtype: torch.dtype) -> TokenPositions:
    """Tables for int64 positions [N], from 0, in float32 or the wider `dtype`.

    Raises IndexError, on a CPU, for a position at or beyond cosFormer's M.
    """
    wide = torch.promote_types(dtype, torch.float32)
    cos, sin = ops.rotary_table(positions, config.rotary_dim, ROTARY_BASE, wide)
    table = config.feature_map.position_table(config, positions, wide)
    return TokenPositions(positions, cos, sin, table)


def split_heads(
    config: GPTJConfig,
    normed: Tensor,
    joined: Tensor,
    map_weights: Sequence[Tensor],
    at: TokenPositions,
) -> tuple[Features, Tensor]:
    """First product [..., N, 3C + inner] → mapped q, k, v and the MLP's [..., N, inner].

    normed: its input [..., N, C]. map_weights: what `Attention.map_weights` returned. Features are
    float32 or wider whatever the model's dtype, as the state is.
    """
    width = config.n_embd
    wide = torch.promote_types(joined.dtype, torch.float32)
    *qkv, up = joined.split([width, width, width, config.n_inner], dim=-1)
    q, k, v = (x.unflatten(-1, (config.n_head, config.head_dim)).to(wide) for x in qkv)
    q, k, v = config.feature_map.features(q, k, v, at, map_weights)
    gate = config.feature_map.gate(normed.to(wide), map_weights)
    if gate is None:
        return Features(q, k, v), up
    return Features(q, k, (1 - gate).unsqueeze(-1) * v, gate), up


_MAP_WEIGHTS = tuple({name for kind in ATTENTION_KINDS.values() for name in kind.weight_names})


def map_weight(name: str) -> str | None:
    """Of a weight of some feature map, its name in the attention; None for the others."""
    return next((own for own in _MAP_WEIGHTS if name.endswith(f".attn.{own}")), None)


def weight_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a weight is kept: a feature map's own are float32 in a model of any."""
    return dtype if map_weight(name) is None else torch.float32


_CONSTANTS: Mapping[str, Callable[[tuple[int, ...]], bool]] = {
    "bias": lambda shape: len(shape) >= 2 and shape[-1] == shape[-2],
    "masked_bias": lambda shape: math.prod(shape) == 1,
    "scale_attn": lambda shape: math.prod(shape) == 1,
    "inv_freq": lambda shape: len(shape) == 1,
    "embed_positions": lambda shape: len(shape) == 2,
}
"""Buffers of an attention's training code, and which shapes they have.

Causal mask and its value, 1 / √D, and the rotary embedding's frequencies and table.
"""


def is_constant(name: str, shape: tuple[int, ...]) -> bool:
    """Whether this is one of `_CONSTANTS` in an attention, as GPT-J's code has stored them."""
    *path, last = name.split(".")
    return "attn" in path[-2:] and last in _CONSTANTS and _CONSTANTS[last](shape)


def weights_hint(names: Iterable[str], config: GPTJConfig) -> str:
    """What attention_type should be, where weights of another kind of attention lie beside it."""
    found = {own for own in map(map_weight, names) if own is not None}
    expected = set(config.feature_map.weight_names)
    alike = [name for name, kind in ATTENTION_KINDS.items() if set(kind.weight_names) == found]
    if found == expected or not alike:
        return ""
    like = " or ".join(repr(kind) for kind in sorted(alike))
    what = ("with " if found else "without ") + " and ".join(sorted(found or expected))
    return (
        f". config.json has attention_type {config.attention_type!r}, and weights {what} look like"
        f" those of {like}: give attention_type what they were trained with"
    )
