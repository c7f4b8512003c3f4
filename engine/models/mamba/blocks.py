"""The blocks of Mamba and Mamba-2: a norm and a mixer, in any dtype.

Letters: N tokens, C channels, I inner channels, H heads, V head width, K state size, G groups,
R rank of the time step.
"""

import torch
from torch import Tensor, nn

from cottention.engine import ops
from cottention.engine.models.mamba.config import Mamba2Config, MambaConfig
from cottention.engine.models.recurrence import Features, Recurrence
from cottention.engine.models.recurrent_model import (
    Convolution,
    Product,
    RecurrentBlock,
    RMSNorm,
    Servable,
    short_convolution,
)


class MambaMixer(nn.Module):
    """u, gate = in(y); Δ, k, q from u; a scan with a decay per channel and key (sec. 3, alg. 2)."""

    def __init__(self, config: MambaConfig) -> None:
        super().__init__()
        width, inner, rank = config.hidden_size, config.intermediate_size, config.time_step_rank
        self.config = config
        self.in_proj = nn.Linear(width, 2 * inner, bias=config.use_bias)
        self.conv1d = short_convolution(inner, config.conv_kernel, bias=config.use_conv_bias)
        self.x_proj = nn.Linear(inner, rank + 2 * config.state_size, bias=False)
        self.dt_proj = nn.Linear(rank, inner)
        self.A_log = nn.Parameter(torch.zeros(inner, config.state_size))
        self.D = nn.Parameter(torch.ones(inner))
        self.out_proj = nn.Linear(inner, width, bias=config.use_bias)
        self.project_in = Product(self.in_proj)
        self.convolve = Convolution(self.conv1d)
        self.project_u = Product(self.x_proj)
        self.project_step = Product(self.dt_proj)
        self.project_out = Product(self.out_proj)
        self.parts: list[Servable] = [
            self.project_in,
            self.convolve,
            self.project_u,
            self.project_step,
            self.project_out,
        ]

    def forward(self, y: Tensor, index: int, recurrence: Recurrence) -> Tensor:
        """y [N, C] → [N, C]; the rows of layer `index` are updated."""
        config = self.config
        u, gate = self.project_in(y).split(config.intermediate_size, dim=-1)
        u = ops.silu(self.convolve(u, index, recurrence))
        sizes = [config.time_step_rank, config.state_size, config.state_size]
        step, k, q = self.project_u(u).split(sizes, dim=-1)
        delta = ops.softplus(self.project_step(step))
        state, rows = recurrence.layer(index)[0].squeeze(2), recurrence.segments
        log_decay = -torch.exp(self.A_log)
        out = ops.selective_scan(
            u, delta, log_decay, k, q, state, rows.state_indices, rows.cu_seqlens
        )
        return self.project_out((out + self.D * u) * ops.silu(gate))


class Mamba2Mixer(nn.Module):
    """gate, (x, k, q), Δ = in(y); the recurrence with one decay per head; a gated norm (sec. 7)."""

    def __init__(self, config: Mamba2Config) -> None:
        super().__init__()
        width, inner, heads = config.hidden_size, config.intermediate_size, config.num_heads
        channels = config.convolved_size
        self.config = config
        self.in_proj = nn.Linear(width, inner + channels + heads, bias=config.use_bias)
        self.conv1d = short_convolution(channels, config.conv_kernel, bias=config.use_conv_bias)
        self.dt_bias = nn.Parameter(torch.zeros(heads))
        self.A_log = nn.Parameter(torch.zeros(heads))
        self.D = nn.Parameter(torch.ones(heads))
        self.norm = RMSNorm(inner, config.layer_norm_epsilon, groups=config.n_groups)
        self.out_proj = nn.Linear(inner, width, bias=config.use_bias)
        self.project_in = Product(self.in_proj)
        self.convolve = Convolution(self.conv1d)
        self.project_out = Product(self.out_proj)
        self.parts: list[Servable] = [self.project_in, self.convolve, self.project_out]

    def forward(self, y: Tensor, index: int, recurrence: Recurrence) -> Tensor:
        """y [N, C] → [N, C]; the rows of layer `index` are updated."""
        config = self.config
        sizes = [config.intermediate_size, config.convolved_size, config.num_heads]
        gate, convolved, step = self.project_in(y).split(sizes, dim=-1)
        convolved = ops.silu(self.convolve(convolved, index, recurrence))
        keys = config.n_groups * config.state_size
        x, k, q = convolved.split([config.intermediate_size, keys, keys], dim=-1)
        x = x.unflatten(-1, (config.num_heads, config.head_dim))
        delta = ops.softplus(step + self.dt_bias).clamp(*config.time_step_limit)
        w = ops.exp(-torch.exp(self.A_log) * delta)
        features = Features(self._of_heads(q), self._of_heads(k), delta.unsqueeze(-1) * x, w)
        out = recurrence(index, features) + self.D.unsqueeze(-1) * x
        return self.project_out(self.norm(out.flatten(-2) * ops.silu(gate)))

    def _of_heads(self, x: Tensor) -> Tensor:
        """[N, G K] → [N, H, K]: head h has those of group h // (H / G)."""
        config = self.config
        each = config.num_heads // config.n_groups
        x = x.view(len(x), config.n_groups, 1, config.state_size).expand(-1, -1, each, -1)
        return x.flatten(1, 2)


class MambaBlock(RecurrentBlock[None]):
    """x + mixer(norm(x))."""

    def __init__(self, config: MambaConfig | Mamba2Config) -> None:
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.mixer = Mamba2Mixer(config) if isinstance(config, Mamba2Config) else MambaMixer(config)
        self.parts = self.mixer.parts

    def advance(self, x: Tensor, index: int, _tables: None, recurrence: Recurrence) -> Tensor:
        out: Tensor = x + self.mixer(self.norm(x), index, recurrence)
        return out
