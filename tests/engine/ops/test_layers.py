"""cottention_layers equals the four ops of each block in turn, bit for bit."""

from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from cottention.engine import ops

WIDTH, HEADS, INNER, LAYERS = 16, 3, 37, 3
CHANNELS = HEADS * WIDTH
EPSILON = 1e-5
FEW, SHARED = 6, 60
"""Tokens whose products one thread computes, and tokens whose products all threads share."""


class Case(NamedTuple):
    """Arguments of the op, in its order."""

    x: Tensor
    weights: list[Tensor]
    epsilon: float
    positions: Tensor
    cos: Tensor
    sin: Tensor
    state: Tensor
    state_indices: Tensor
    cu_seqlens: Tensor | None
    normed: Tensor
    joined: Tensor
    attn_gelu: Tensor


def _block(dtype: torch.dtype) -> list[Tensor]:
    first = torch.randn(3 * CHANNELS + INNER, CHANNELS).to(dtype) / CHANNELS**0.5
    second = torch.randn(CHANNELS, CHANNELS + INNER).to(dtype) / CHANNELS**0.5
    pack = torch.ops.cottention.pack_weight
    norm = [torch.randn(CHANNELS), torch.randn(CHANNELS)]
    sigma = torch.rand(HEADS, dtype=torch.float64)
    first_bias, second_bias = torch.randn(len(first)), torch.randn(len(second))
    return [*norm, pack(first), first_bias, sigma, pack(second), second_bias]


def _case(dtype: torch.dtype, poison: float, tokens: int = FEW) -> Case:
    """Two segments of different lengths on a full pool; scratch buffers are poisoned."""
    assert ops.backend() == "compiled"
    torch.manual_seed(0)
    positions = torch.arange(tokens)
    positions[-1] = 900
    weights = [weight for _ in range(LAYERS) for weight in _block(dtype)]
    table = ops.rotary_table(positions, 8, 1e4, torch.float32)
    state = torch.randn(5, LAYERS, HEADS, WIDTH, WIDTH)
    rows = (
        torch.tensor([3, 1], dtype=torch.int32),
        torch.tensor([0, tokens - 1, tokens], dtype=torch.int32),
    )
    widths = CHANNELS, 3 * CHANNELS + INNER, CHANNELS + INNER
    buffers = [torch.full((tokens, width), poison) for width in widths]
    x = torch.randn(tokens, CHANNELS)
    return Case(x, weights, EPSILON, positions, *table, state, *rows, *buffers)


def _one_after_the_other(case: Case) -> None:
    compiled = torch.ops.cottention
    for layer in range(LAYERS):
        scale, shift, first, first_bias, sigma, second, second_bias = case.weights[7 * layer :][:7]
        compiled.layer_norm(case.x, scale, shift, case.epsilon, case.normed)
        compiled.linear_out(case.normed, first, first_bias, case.joined)
        places, rows = (
            (case.cos, case.sin),
            (case.state[:, layer], case.state_indices, case.cu_seqlens),
        )
        compiled.cottention_attention_gelu(
            case.joined, case.positions, sigma, *places, *rows, case.attn_gelu
        )
        compiled.linear_add(case.attn_gelu, second, second_bias, case.x)


@pytest.mark.parametrize("tokens", [FEW, SHARED])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_its_ops_in_turn(dtype: torch.dtype, tokens: int) -> None:
    together, apart = (_case(dtype, float("nan"), tokens) for _ in range(2))
    ops.cottention_layers(*together)
    _one_after_the_other(apart)
    assert together.x.isfinite().all()
    assert torch.equal(together.x, apart.x)
    assert torch.equal(together.state, apart.state)
    assert torch.equal(together.state[[0, 2, 4]], _case(dtype, 0, tokens).state[[0, 2, 4]])


def test_calls_of_several_threads_at_once() -> None:
    cases = [_case(torch.float32, 0.0, SHARED) for _ in range(16)]
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda case: ops.cottention_layers(*case), cases))
    for case in cases[1:]:
        assert torch.equal(case.x, cases[0].x)
        assert torch.equal(case.state, cases[0].state)


def test_a_fault_in_a_later_layer_is_raised_and_the_next_call_computes() -> None:
    expected, case = (_case(torch.float32, 0.0, SHARED) for _ in range(2))
    ops.cottention_layers(*expected)
    wrong = [*case.weights]
    wrong[9] = wrong[9][:, :-1].contiguous()
    untouched = case.x.clone(), case.state.clone()
    with pytest.raises(RuntimeError, match=r"packed.size\(1\)"):
        ops.cottention_layers(*case._replace(weights=wrong))
    case.x.copy_(untouched[0])
    case.state.copy_(untouched[1])
    ops.cottention_layers(*case)
    assert torch.equal(case.x, expected.x)


def test_opcheck() -> None:
    case = _case(torch.float32, 0.0)
    torch.library.opcheck(torch.ops.cottention.cottention_layers.default, case)


def test_too_few_weights_are_refused_before_memory_is_touched() -> None:
    case = _case(torch.float32, 0.0)
    before = case.x.clone(), case.state.clone()
    with pytest.raises(RuntimeError, match="weights has 20 tensors for 3 layers of 7"):
        ops.cottention_layers(*case._replace(weights=case.weights[1:]))
    assert torch.equal(case.x, before[0])
    assert torch.equal(case.state, before[1])


def test_a_pool_of_one_layer_without_its_dimension_is_refused() -> None:
    case = _case(torch.float32, 0.0)
    with pytest.raises(RuntimeError, match="state must have 5 dimensions"):
        ops.cottention_layers(*case._replace(state=case.state[:, 0]))
