"""Forward pass, bits per byte, optimizers and learning rate of training."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from cottention.engine import ops
from cottention.engine.models.gptj.attention_kinds import ATTENTION_KINDS, RECURRENT_KINDS
from cottention.engine.models.gptj.model import CottentionForCausalLM, map_weight
from cottention.engine.models.recurrence import Features
from cottention.engine.ops import reference
from cottention.engine.training.data import SourceFile, train_tokenizer
from cottention.engine.training.evaluate import HeldOut, position_ranges, score, summarise
from cottention.engine.training.export import to_half_precision
from cottention.engine.training.forward import add_dropout, init_weights, logits_of
from cottention.engine.training.settings import TrainingSettings
from cottention.engine.training.trainer import Optimizers, learning_rate_factor

SMALL = TrainingSettings(context=16, layers=2, width=16, heads=2, vocab_size=300)


@pytest.fixture
def model() -> CottentionForCausalLM:
    torch.manual_seed(0)
    return init_weights(CottentionForCausalLM(SMALL.model_config(0)))


def held_out() -> HeldOut:
    tokenizer = train_tokenizer(["def f(self):\n    return self\n"] * 4, SMALL.vocab_size)
    texts = ["def g(self, x):\n    return self + 'é'\n", "x\n"]
    files = [SourceFile(f"{i}.py", text) for i, text in enumerate(texts)]
    return HeldOut.of(tokenizer, files, SMALL.context)


@pytest.mark.parametrize("attention", RECURRENT_KINDS)
def test_the_chunked_form_is_the_parallel_one(attention: str) -> None:
    is_divided = ATTENTION_KINDS[attention].has_denominator

    def attend(_layer: int, features: Features) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in features[:3])
        w = None if features.w is None else features.w.transpose(1, 2)
        return reference.parallel(q, k, v, w=w, denominator=is_divided).transpose(1, 2)

    shape = replace(SMALL, attention=attention, context=300).model_config(0)
    model = init_weights(CottentionForCausalLM(shape)).double()
    ids = torch.randint(300, (2, 300))
    expected = model(ids, torch.arange(300), attend)
    torch.testing.assert_close(
        logits_of(model, ids, dtype=torch.float64), expected.float(), rtol=1e-6, atol=1e-6
    )


def test_uniform_logits_cost_the_logarithm_of_the_vocabulary(model: CottentionForCausalLM) -> None:
    torch.nn.init.zeros_(model.lm_head.weight)
    texts = held_out()
    result = score(model, texts, dtype=torch.float32, batch=2)
    num_tokens = sum(window.targets.numel() for window in texts.windows)
    assert num_tokens > SMALL.context
    assert result.bits_per_byte == pytest.approx(num_tokens * math.log2(300) / texts.num_bytes)
    assert result.by_position == pytest.approx({"0-128": result.bits_per_byte})


@torch.no_grad()
def test_the_score_equals_a_direct_computation(model: CottentionForCausalLM) -> None:
    """Token by token, one window at a time."""
    texts, nats = held_out(), 0.0
    for window in texts.windows:
        logs = logits_of(model, window.inputs, dtype=torch.float32).log_softmax(-1)[0]
        nats -= sum(float(logs[i, token]) for i, token in enumerate(window.targets[0]))
    result = score(model, texts, dtype=torch.float32)
    assert result.bits_per_byte == pytest.approx(nats / math.log(2) / texts.num_bytes, rel=1e-5)
    assert model.training


def test_positions_are_scored_separately() -> None:
    nats = torch.full((300,), math.log(2), dtype=torch.float64)
    nats[128:256] *= 3
    result = summarise(nats, torch.full((300,), 2.0, dtype=torch.float64), 1000)
    assert result.bits_per_byte == pytest.approx((300 + 2 * 128) / 1000)
    assert result.by_position == pytest.approx({"0-128": 0.5, "128-256": 1.5, "256-512": 0.5})
    assert position_ranges(1024)[-1] == (512, 1024)


def test_weights_are_rounded_to_the_type_that_scores_better(model: CottentionForCausalLM) -> None:
    rounded = to_half_precision(model.state_dict(), model.config, held_out())
    dtypes = {map_weight(name) is None: weight.dtype for name, weight in rounded.weights.items()}
    assert dtypes == {True: getattr(torch, rounded.dtype), False: torch.float32}
    again = score(rounded.model, held_out(), dtype=torch.float32)
    assert again.bits_per_byte == rounded.score.bits_per_byte


def test_only_matrices_and_tables_decay(model: CottentionForCausalLM) -> None:
    optimizers = Optimizers(model, learning_rate=0.1, weight_decay=1.0)
    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    optimizers.step(1.0)
    for name, weight in model.named_parameters():
        if weight.ndim == 2:
            torch.testing.assert_close(weight, 0.9 * before[name])
        else:
            assert torch.equal(weight, before[name])


def test_the_rate_warms_up_stays_and_ends_at_zero() -> None:
    assert learning_rate_factor(0, 0.0) == pytest.approx(0.01)
    assert learning_rate_factor(500, 0.2) == 1.0
    assert learning_rate_factor(500, 0.65) == pytest.approx(0.5)
    assert learning_rate_factor(500, 1.0) == 0.0


def test_dropout_acts_in_training_only(model: CottentionForCausalLM) -> None:
    ids = torch.randint(300, (1, 8))
    before = logits_of(model, ids, dtype=torch.float32)
    add_dropout(model, 0.5)
    assert not torch.equal(logits_of(model, ids, dtype=torch.float32), before)
    assert torch.equal(logits_of(model.eval(), ids, dtype=torch.float32), before)


def test_every_op_of_the_forward_pass_differentiates() -> None:
    """Compiled ops have no gradients, so what needs them must take the reference."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(5, 2, 8, requires_grad=True) for _ in range(3))
    sigma = torch.rand(2, dtype=torch.float64, requires_grad=True)
    at = torch.arange(5), *ops.rotary_table(torch.arange(5), 8, 10_000.0)
    positions, cos, sin = at
    for form in (ops.cottention_features, reference.cottention_features):
        loss = sum(x.pow(3).sum() for x in form(q, k, v, positions, sigma, cos, sin))
        assert isinstance(loss, Tensor)
        loss.backward()
    up = torch.randn(5, 8, requires_grad=True)
    for gelu in (ops.gelu_new, reference.gelu_new):
        gelu(up).sum().backward()
    ops.elu_plus_one(q).sum().backward()
    for weight in (q, k, v, sigma, up):
        assert weight.grad is not None
        assert weight.grad.abs().sum() > 0


@pytest.mark.parametrize("leading", [(5,), (2, 5)])
def test_sigma_gets_a_gradient_even_where_nothing_else_does(leading: tuple[int, ...]) -> None:
    v = torch.randn(*leading, 2, 8)
    sigma = torch.rand(2, dtype=torch.float64, requires_grad=True)
    cos, sin = ops.rotary_table(torch.arange(5), 8, 10_000.0)
    ops.cottention_features(v, v, v, torch.arange(5), sigma, cos, sin)[2].sum().backward()
    assert sigma.grad is not None


def test_initial_decays_differ_between_heads(model: CottentionForCausalLM) -> None:
    for block in model.blocks():
        (sigma,) = block.attn.map_weights()
        expected = torch.linspace(0.1, 0.6, len(sigma), dtype=torch.float64)
        torch.testing.assert_close(sigma, expected, rtol=0, atol=1e-6)
