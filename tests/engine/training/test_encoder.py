"""Training of encoders: its batched forward pass is what is served; how tokens are masked."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from cottention.engine.models.bert.config import BertConfig
from cottention.engine.models.bert.model import BertForPreTraining
from cottention.engine.training.encoder import (
    ENCODER_KINDS,
    hidden_states,
    mask_tokens,
    masked_loss,
    new_encoder,
)

SHAPE: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 12,
}


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def encoder(kind: str) -> BertForPreTraining:
    """A random encoder in float64, with m that differ by head."""
    own = "cottention" if kind == "cottention" else "cosformer"
    model = new_encoder(BertConfig(**SHAPE, attention_type=own)).double()
    for name, weight in model.named_parameters():
        if name.endswith("norm_const"):
            weight.data.uniform_(-2, 1)
        elif weight.ndim == 2:
            weight.data.mul_(20)
    return model


@pytest.mark.parametrize("kind", ["cottention", "cosformer"])
def test_a_padded_batch_gives_what_the_served_definition_gives(kind: str) -> None:
    """Otherwise what is trained is another function than what is served."""
    model = encoder(kind)
    ids = torch.randint(40, (3, 12))
    mask = torch.arange(12) < torch.tensor([12, 7, 1]).unsqueeze(-1)
    found = hidden_states(model, kind, ids, mask, dtype=torch.float64)
    expected = model(ids, mask, torch.zeros_like(ids))
    torch.testing.assert_close(found[mask], expected[mask], rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ENCODER_KINDS)
def test_padding_changes_nothing_and_every_weight_learns(kind: str) -> None:
    model = encoder(kind)
    ids = torch.randint(40, (1, 7))
    longer = torch.nn.functional.pad(ids, (0, 5))
    all_places = torch.ones_like(ids, dtype=torch.bool)
    places = torch.nn.functional.pad(all_places, (0, 5))
    alone = hidden_states(model, kind, ids, all_places, dtype=torch.float64)
    padded = hidden_states(model, kind, longer, places, dtype=torch.float64)
    torch.testing.assert_close(padded[:, :7], alone, rtol=0, atol=1e-12)
    masked_loss(model, kind, ids, ids, all_places, dtype=torch.float64).backward()
    unused = ("pooler", "seq_relationship")
    without = [n for n, w in model.named_parameters() if w.grad is None or not w.grad.any()]
    assert [name for name in without if not any(part in name for part in unused)] == []


def test_fifteen_percent_are_predicted_and_most_of_them_are_hidden() -> None:
    ids = torch.randint(40, (100, 1000))
    shown, is_chosen = mask_tokens(ids, 40, 40, torch.Generator().manual_seed(1))
    assert is_chosen.float().mean() == pytest.approx(0.15, abs=0.005)
    assert torch.equal(shown[~is_chosen], ids[~is_chosen])
    assert (shown[is_chosen] == 40).float().mean() == pytest.approx(0.8, abs=0.01)
    # the tenth that stays, and the random ones that happen to be right
    assert (shown == ids)[is_chosen].float().mean() == pytest.approx(0.1 + 0.1 / 40, abs=0.01)
