"""The mixers of flash-linear-attention's models: from a normed input to what is added to it.

Each maps its projections to what the one recurrence is fed (`ops.recurrent_step`). Modules are
named as the published weights are; convolutions, where there are any, are of queries, keys and
values side by side.

Letters: N tokens, C channels, H heads, K key width, V value width, L layers.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cottention.engine import ops
from cottention.engine.models.fla.config import (
    DeltaNetConfig,
    FLAConfig,
    GatedDeltaNetConfig,
    GLAConfig,
    HGRN2Config,
    RetNetConfig,
)
from cottention.engine.models.recurrence import Features, Recurrence
from cottention.engine.models.recurrent_model import (
    Convolution,
    Product,
    RMSNorm,
    Servable,
    short_convolution,
)

GATE_RANK = 16
GATE_DIVISOR = 16
ROTARY_BASE = 10000.0
L2_EPSILON = 1e-6
HGRN2_NORM_EPSILON = 1e-5


@dataclass(frozen=True, slots=True)
class StepTables:
    """What the layers of one step share.

    cos, sin: RetNet's rotary tables [N, K / 2]. lower_bounds: HGRN2's [L, H K].
    """

    cos: Tensor | None = None
    sin: Tensor | None = None
    lower_bounds: Tensor | None = None


ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "silu": ops.silu,
    "swish": ops.silu,
    "sigmoid": ops.sigmoid,
    "relu": F.relu,
    "elu": lambda x: ops.elu_plus_one(x.unsqueeze(1)).squeeze(1),
    "identity": lambda x: x,
}
"""Those that a configuration may name, on [N, C]."""


class Mixer(nn.Module):
    """What all have: queries, keys or gates, and values, their convolutions, and the output.

    letters: of the names of the three projections. is_gated: whether a fourth gates the output.
    """

    def __init__(self, config: FLAConfig, letters: str = "qkv", *, is_gated: bool = False) -> None:
        super().__init__()
        self.keys = config.num_heads * config.key_width
        self.values = config.num_states * config.value_width
        self.scale = config.key_width**-0.5
        self.heads = config.num_heads
        width, widths = config.hidden_size, (self.keys, self.keys, self.values)
        self._qkv = [linear(width, each) for each in widths]
        for letter, module in zip(letters, self._qkv, strict=True):
            self.add_module(f"{letter}_proj", module)
        self.g_proj = linear(width, self.values) if is_gated else None
        self.o_proj = linear(self.values, width)
        self.project_out = Product(self.o_proj)
        self.parts: list[Servable] = [self.project_out]
        self.convolve: Convolution | None = None
        if config.conv_size:
            made = [short_convolution(each, config.conv_size, bias=False) for each in widths]
            for letter, convolution in zip(letters, made, strict=True):
                self.add_module(f"{letter}_conv1d", convolution)
            self.convolve = Convolution(*made)
            self.parts.append(self.convolve)

    def forward(self, y: Tensor, index: int, tables: StepTables, recurrence: Recurrence) -> Tensor:
        """y [N, C] → [N, C]; the rows of layer `index` are updated."""
        raise NotImplementedError

    def _product(self, *linears: nn.Linear) -> Product:
        made = Product(*linears)
        self.parts.append(made)
        return made

    def _inputs(self, *more: nn.Linear) -> Product:
        """The product of queries, keys and values, of `more`, and of the output's gate."""
        return self._product(*self._qkv, *more, *([] if self.g_proj is None else [self.g_proj]))

    def _output(self, out: Tensor, gate: Tensor, activation: str = "silu") -> Tensor:
        """out [N, H V], gated where there is a gate → [N, C]."""
        gated = out if self.g_proj is None else out * ACTIVATIONS[activation](gate)
        return self.project_out(gated)

    def _convolved(self, qkv: Tensor, index: int, recurrence: Recurrence) -> Tensor:
        return qkv if self.convolve is None else self.convolve(qkv, index, recurrence)

    def _split(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[N, 2 H K + H V] → [N, H K], [N, H K], [N, H V]."""
        q, k, v = qkv.split([self.keys, self.keys, self.values], dim=-1)
        return q, k, v

    def _of_heads(self, *tensors: Tensor) -> list[Tensor]:
        return [x.unflatten(-1, (self.heads, -1)) for x in tensors]


def linear(width: int, out: int, *, bias: bool = False) -> nn.Linear:
    """The module of one projection."""
    return nn.Linear(width, out, bias=bias)


class GLA(Mixer):
    """S ← S diag(w) + v kᵀ, w = σ(gate)^(1 / 16) per key (sec. 4 of arXiv 2312.06635)."""

    def __init__(self, config: GLAConfig) -> None:
        super().__init__(config, is_gated=config.use_output_gate)
        into = linear(config.hidden_size, GATE_RANK)
        out_of = linear(GATE_RANK, self.keys, bias=True)
        self.gk_proj = nn.Sequential(into, out_of)
        self.g_norm = _output_norm(config)
        self.clamp_min = config.clamp_min
        self.project_in = self._inputs(into)
        self.project_decay = self._product(out_of)

    def forward(self, y: Tensor, index: int, _tables: StepTables, recurrence: Recurrence) -> Tensor:
        qkv, low, gate = _parts(self.project_in(y), 2 * self.keys + self.values, GATE_RANK)
        qkv = self._convolved(qkv, index, recurrence)
        q, k, v = self._of_heads(*self._split(qkv if self.convolve is None else ops.silu(qkv)))
        log_decay = -ops.softplus(-self.project_decay(low)) / GATE_DIVISOR
        if self.clamp_min is not None:
            log_decay = log_decay.clamp_min(self.clamp_min)
        [w] = self._of_heads(ops.exp(log_decay))
        out = recurrence(index, Features(q * self.scale, k, v, w)).flatten(-2)
        return self._output(self.g_norm(out), gate)


class RetNet(Mixer):
    """S ← γ S + v kᵀ, γ = 1 − 2^(−5 − h), q and k rotated by halves (eq. 8, arXiv 2307.08621)."""

    def __init__(self, config: RetNetConfig) -> None:
        super().__init__(config, is_gated=config.use_output_gate)
        self.g_norm = _output_norm(config)
        self.project_in = self._inputs()

    def forward(self, y: Tensor, index: int, tables: StepTables, recurrence: Recurrence) -> Tensor:
        qkv, gate = _parts(self.project_in(y), 2 * self.keys + self.values)
        q, k, v = self._of_heads(*self._split(qkv))
        q, k = (_rotated_by_halves(x, tables) for x in (q, k))
        heads = torch.arange(self.heads, dtype=y.dtype, device=y.device)
        w = (1 - torch.pow(2.0, -5 - heads)).expand(len(y), -1)
        out = recurrence(index, Features(q * self.scale, k, v, w)).flatten(-2)
        return self._output(self.g_norm(out), gate)


class HGRN2(Mixer):
    """S ← S diag(w) + i (1 − w)ᵀ, w a forget gate above the layer's bound (sec. 3.2)."""

    def __init__(self, config: HGRN2Config) -> None:
        super().__init__(config, "qfi")
        self.g_norm = RMSNorm(self.values, HGRN2_NORM_EPSILON, has_weight=config.has_norm_weight)
        self.project_in = self._inputs()

    def forward(self, y: Tensor, index: int, tables: StepTables, recurrence: Recurrence) -> Tensor:
        qfi = self._convolved(self.project_in(y), index, recurrence)
        q, f, i = self._split(qfi)
        w = ops.sigmoid(f)
        if tables.lower_bounds is not None and index:
            bound = tables.lower_bounds[index]
            w = bound + (1 - bound) * w
        q, k, v, w = self._of_heads(ops.silu(q) * self.scale, 1 - w, i, w)
        out = recurrence(index, Features(q, k, v, w)).flatten(-2)
        return self.project_out(self.g_norm(out))


class DeltaNet(Mixer):
    """S ← S + β (v − S k) kᵀ (eq. 3, arXiv 2406.06484)."""

    def __init__(self, config: DeltaNetConfig) -> None:
        super().__init__(config, is_gated=config.use_gate)
        self.config = config
        self.b_proj = linear(config.hidden_size, self.heads) if config.use_beta else None
        self.o_norm = _output_norm(config)
        self.project_in = self._inputs(*([] if self.b_proj is None else [self.b_proj]))

    def forward(self, y: Tensor, index: int, _tables: StepTables, recurrence: Recurrence) -> Tensor:
        width = self.heads if self.config.use_beta else 0
        qkv, beta, gate = _parts(self.project_in(y), 2 * self.keys + self.values, width)
        q, k, v = self._split(self._convolved(qkv, index, recurrence))
        q, k = (ACTIVATIONS[self.config.qk_activation](x) for x in (q, k))
        q, k, v = self._of_heads(self._normed(q) * self.scale, self._normed(k), ops.silu(v))
        beta = ops.sigmoid(beta) if self.config.use_beta else y.new_ones(len(y), self.heads)
        beta = (2 * beta if self.config.allow_neg_eigval else beta).unsqueeze(-1)
        features = Features(q, k, beta * v, None, -k, beta * k)
        return self._output(self.o_norm(recurrence(index, features).flatten(-2)), gate)

    def _normed(self, x: Tensor) -> Tensor:
        """q or k [N, H K], each head divided by its norm."""
        if self.config.qk_norm == "l2":
            return l2_normed(x, self.heads)
        [of_heads] = self._of_heads(x)
        total = ops.row_sums(of_heads.abs().flatten(0, 1)).clamp_min(L2_EPSILON)
        return (of_heads / total.view(len(x), -1, 1)).flatten(-2)


class GatedDeltaNet(Mixer):
    """S ← α S, then the delta rule on it (eq. 10, arXiv 2412.06464)."""

    def __init__(self, config: GatedDeltaNetConfig) -> None:
        super().__init__(config, is_gated=config.use_gate)
        width, states = config.hidden_size, config.num_v_heads
        self.config = config
        self.a_proj = linear(width, states)
        self.b_proj = linear(width, states)
        self.A_log = nn.Parameter(torch.zeros(states))
        self.dt_bias = nn.Parameter(torch.zeros(states))
        self.o_norm = _output_norm(config)
        self.project_in = self._inputs(self.a_proj, self.b_proj)

    def forward(self, y: Tensor, index: int, _tables: StepTables, recurrence: Recurrence) -> Tensor:
        config, states = self.config, self.config.num_v_heads
        widths = 2 * self.keys + self.values, states, states
        qkv, a, b, gate = _parts(self.project_in(y), *widths)
        q, k, v = self._split(ops.silu(self._convolved(qkv, index, recurrence)))
        q, k = (self._for_values(l2_normed(x, self.heads)) for x in (q, k))
        beta = ops.sigmoid(b).unsqueeze(-1)
        beta = 2 * beta if config.allow_neg_eigval else beta
        alpha = ops.exp(-torch.exp(self.A_log) * ops.softplus(a + self.dt_bias))
        v = beta * v.unflatten(-1, (states, config.value_width))
        features = Features(q * self.scale, k, v, alpha, -alpha.unsqueeze(-1) * k, beta * k)
        out = self.o_norm(recurrence(index, features).flatten(-2))
        return self._output(out, gate, config.output_gate_activation)

    def _for_values(self, x: Tensor) -> Tensor:
        """[N, H K] → [N, value heads, K]: value head h has key head h // (value heads / H)."""
        each = self.config.num_v_heads // self.heads
        [x] = self._of_heads(x)
        return x.unsqueeze(2).expand(-1, -1, each, -1).flatten(1, 2)


def l2_normed(x: Tensor, heads: int) -> Tensor:
    """x / √(Σx² + 1e-6) for each head of x [N, H K], as a norm of mean squares, divided by √K."""
    width = x.shape[-1] // heads
    weight = x.new_full((x.shape[-1],), width**-0.5)
    return ops.rms_norm(x, weight, L2_EPSILON / width, heads)


def _output_norm(config: FLAConfig) -> RMSNorm:
    """Of each head's output; one weight for all heads."""
    return RMSNorm(
        config.value_width,
        config.norm_eps,
        heads=config.num_states,
        has_weight=config.has_norm_weight,
    )


def _parts(x: Tensor, *widths: int) -> tuple[Tensor, ...]:
    """Columns of these widths, and the rest, which may be none."""
    parts: tuple[Tensor, ...] = x.split([*widths, x.shape[-1] - sum(widths)], dim=-1)
    return parts


def _rotated_by_halves(x: Tensor, tables: StepTables) -> Tensor:
    """x [N, H, K]: channel j is paired with j + K / 2."""
    assert tables.cos is not None
    assert tables.sin is not None
    cos, sin = tables.cos.unsqueeze(1), tables.sin.unsqueeze(1)
    low, high = x.chunk(2, dim=-1)
    return torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1)


MIXERS: dict[type[FLAConfig], Any] = {
    GLAConfig: GLA,
    RetNetConfig: RetNet,
    HGRN2Config: HGRN2,
    DeltaNetConfig: DeltaNet,
    GatedDeltaNetConfig: GatedDeltaNet,
}
"""The mixer of each configuration, which is made of it."""
