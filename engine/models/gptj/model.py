"""The definition of a GPT-J with some kind of attention: from token ids to logits.

Modules are named as the published weights are. Each layer hands its mapped q, k, v to an `Attend`
that the caller gives, so that the parallel, chunked and recurrent forms are one model.

Letters: N tokens (any leading shape), H heads, D head width, V value width, C channels.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import cast

import torch
from torch import Tensor, nn

from cottention.engine import ops
from cottention.engine.models.gptj.attention import TRAINED_MAPS, TokenPositions, token_positions
from cottention.engine.models.gptj.attention_kinds import ATTENTION_KINDS
from cottention.engine.models.gptj.config import GPTJConfig
from cottention.engine.models.recurrence import Features

Attend = Callable[[int, Features], Tensor]
"""(layer, mapped q, k, v [..., N, H, ·]) → outputs [..., N, H, V]."""


class Attention(nn.Module):
    """Projections, and with Cottention m, one learned scalar per head (eq. 5, arXiv 2409.18747)."""

    def __init__(self, config: GPTJConfig) -> None:
        super().__init__()
        width, bias = config.n_embd, config.attention_bias
        self.q_proj = nn.Linear(width, width, bias=bias)
        self.k_proj = nn.Linear(width, width, bias=bias)
        self.v_proj = nn.Linear(width, width, bias=bias)
        self.out_proj = nn.Linear(width, width, bias=bias)
        self._num_heads = config.n_head
        self.norm_const: nn.Parameter | None = None
        if ATTENTION_KINDS[config.attention_type].has_norm_const:
            self.norm_const = nn.Parameter(torch.full((1, config.n_head, 1, 1), 0.5))

    def sigma(self) -> Tensor:
        """σ(m), float64 [H]: values are divided by position^σ(m). Zeros where there is no m."""
        if self.norm_const is None:
            weight = self.q_proj.weight
            return torch.zeros(self._num_heads, dtype=torch.float64, device=weight.device)
        return torch.sigmoid(self.norm_const.double()).flatten()


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
        joined = nn.functional.linear(block.ln_1(x), *block.stacked_in())
        features, up = split_heads(self.config, joined, block.attn.sigma(), at)
        mixed = attend(layer, features).flatten(-2).to(up.dtype)
        out = torch.cat([mixed, ops.gelu_new(up)], dim=-1)
        return nn.functional.linear(out, *block.stacked_out())


def split_heads(
    config: GPTJConfig, joined: Tensor, sigma: Tensor, at: TokenPositions
) -> tuple[Features, Tensor]:
    """First product [..., N, 3C + inner] → mapped q, k, v and the MLP's [..., N, inner].

    Features are float32 or wider whatever the model's dtype, as the state is.
    """
    width = config.n_embd
    wide = torch.promote_types(joined.dtype, torch.float32)
    *qkv, up = joined.split([width, width, width, config.n_inner], dim=-1)
    q, k, v = (x.unflatten(-1, (config.n_head, config.head_dim)).to(wide) for x in qkv)
    return TRAINED_MAPS[config.attention_type](q, k, v, at, sigma), up


def weight_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a weight is kept: Cottention's m is float32 in a model of any type."""
    return torch.float32 if name.endswith("norm_const") else dtype


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
    has_norm_const = any(name.endswith("norm_const") for name in names)
    said = config.attention_type
    if has_norm_const == ATTENTION_KINDS[said].has_norm_const:
        return ""
    alike = [
        kind for kind, made in ATTENTION_KINDS.items() if made.has_norm_const == has_norm_const
    ]
    like = " or ".join(repr(kind) for kind in sorted(alike))
    what = "with norm_const" if has_norm_const else "without norm_const"
    return (
        f". config.json has attention_type {said!r}, and weights {what} look like those of {like}:"
        " give attention_type what they were trained with"
    )
