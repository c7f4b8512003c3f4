"""Bits per byte far past the trained length: exact, renewed, and softmax with a sliding window.

Owns three ways to score a long text, in float32 and independent of the engine: windows and chunks
of whole layers. The text is all held-out code in one row, as often as needed; a stream begins at
any place of it.

Letters: B streams, T tokens, W window, R kept tokens.
"""

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from engine.feature_maps import FEATURE_MAPS, Features
from engine.model import Attend, CottentionForCausalLM
from engine.model_config import ModelConfig
from engine.ops.chunked import chunked
from engine.state_spec import StateSpec
from engine.training.corpus import read_corpus, standard_library, without_tables
from engine.training.data import token_stream
from engine.training.forward import attend_from_zero
from engine.training.score import token_lengths
from engine.weights import load_model

BORDERS = (0, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)
KEPT_PART = 8
"""R = W / 8, as the engine keeps by default."""

Nats = Callable[[CottentionForCausalLM, Tensor], Tensor]
"""A model and ids [T + 1] → −ln p of the T ids that follow the first, float32 [T]."""


@dataclass(frozen=True, slots=True)
class LongText:
    """Ids int64 [N] of a text that goes round, and the bytes that each id stands for."""

    ids: Tensor
    token_bytes: Tensor

    @classmethod
    def held_out(cls, folder: Path) -> "LongText":
        """All held-out code, character tables left out, in the tokens of a model folder."""
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        files = without_tables(read_corpus(standard_library()).held_out)
        return cls(token_stream(tokenizer, files)[:-1], token_lengths(tokenizer))

    def streams(self, count: int, length: int) -> Iterator[Tensor]:
        """`count` rows of length + 1 ids that begin at places evenly apart."""
        for index in range(count):
            start = index * len(self.ids) // count
            yield self.ids[(start + torch.arange(length + 1)) % len(self.ids)]


def load(folder: Path) -> CottentionForCausalLM:
    """A model folder in float32, softmax included."""
    return load_model(folder, ModelConfig.from_folder(folder), torch.float32).eval()


@torch.inference_mode()
def exact(model: CottentionForCausalLM, ids: Tensor, *, piece: int = 4096) -> Tensor:
    """The recurrence to the letter, from a zero state: its state goes from piece to piece."""
    carried = _Carried(model.config)
    places = torch.arange(len(ids) - 1)
    parts = places.split(piece)
    return torch.cat([_nats(model, ids, part, part, carried) for part in parts])


@torch.inference_mode()
def renewed(model: CottentionForCausalLM, ids: Tensor, *, kept: int) -> Tensor:
    """At index W, then every W − kept, the state becomes that of the last `kept` ids at 1…kept.

    A window of W tokens from a zero state tells of all its tokens if it is the first, else of those
    behind the kept ones.
    """
    window, count = model.config.window, len(ids) - 1
    attend = attend_from_zero(model.config, torch.float32)
    parts = []
    for start in range(0, max(count - kept, 1), window - kept):
        places = torch.arange(start, min(start + window, count))
        nats = _nats(model, ids, places, places - start, attend)
        parts.append(nats[kept if start else 0 :])
    return torch.cat(parts)


@torch.inference_mode()
def sliding(model: CottentionForCausalLM, ids: Tensor) -> Tensor:
    """Softmax whose every token sees the W tokens up to itself, as a cache of W entries gives."""
    places = torch.arange(len(ids) - 1)
    attend = functools.partial(_attend_sliding, model.config.window)
    return _nats(model, ids, places, places, attend)


def bits_by_position(
    model: CottentionForCausalLM, text: LongText, nats_of: Nats, num_streams: int, length: int
) -> dict[str, float]:
    """Bits per byte between BORDERS, up to `length` tokens.

    Inside the window every token of the text counts, each once, in windows side by side; behind it
    `num_streams` streams tell, which begin at places evenly apart: what stands at a position would
    otherwise say more than the position.
    """
    window = model.config.window
    near = _bits(model, text, nats_of, -(-len(text.ids) // window), window)
    far = _bits(model, text, nats_of, num_streams, length)
    return near | {key: bits for key, bits in far.items() if int(key.split("-")[0]) >= window}


def _bits(
    model: CottentionForCausalLM, text: LongText, nats_of: Nats, num_streams: int, length: int
) -> dict[str, float]:
    total = torch.zeros(2, length, dtype=torch.float64)
    for ids in text.streams(num_streams, length):
        total[0] += nats_of(model, ids)
        total[1] += text.token_bytes[ids[1:]]
    return {
        f"{start}-{stop}": float(total[0, start:stop].sum() / total[1, start:stop].sum())
        / math.log(2)
        for start, stop in pairwise(border for border in BORDERS if border <= length)
    }


def _nats(
    model: CottentionForCausalLM, ids: Tensor, places: Tensor, positions: Tensor, attend: Attend
) -> Tensor:
    logits = model(ids[places].unsqueeze(0), positions, attend)[0]
    return nn.functional.cross_entropy(logits, ids[places + 1], reduction="none")


class _Carried:
    """An `Attend` whose state goes on from call to call."""

    def __init__(self, config: ModelConfig) -> None:
        spec = StateSpec.of(config)
        self._state = torch.zeros(1, *spec.state_shape)
        has_denominator = FEATURE_MAPS[config.attention_type].has_denominator
        self._z = torch.zeros(1, *spec.denominator_shape) if has_denominator else None

    def __call__(self, layer: int, features: Features) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in features)
        z = None if self._z is None else self._z[:, layer]
        out, state, z = chunked(q, k, v, self._state[:, layer], z)
        self._state[:, layer] = state
        if self._z is not None:
            self._z[:, layer] = z
        return out.transpose(1, 2)


def _attend_sliding(window: int, _layer: int, features: Features) -> Tensor:
    """Blocks of W queries, each with its own keys and those of the block before it."""
    length = features.q.shape[1]
    padding = -length % window
    q, k, v = (nn.functional.pad(x[0], (0, 0, 0, 0, 0, padding)) for x in features)
    q, k, v = (x.unflatten(0, (-1, window)).transpose(1, 2) for x in (q, k, v))  # [n, H, W, D]
    k, v = (torch.cat([nn.functional.pad(x[:-1], (0,) * 6 + (1, 0)), x], dim=2) for x in (k, v))
    row, column = torch.arange(window).unsqueeze(-1), torch.arange(2 * window)
    seen = (column > row) & (column <= row + window)
    first = seen & (column >= window)
    mask = torch.stack([first, *[seen] * (len(q) - 1)]).unsqueeze(1)
    out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return out.transpose(1, 2).flatten(0, 1)[:length].unsqueeze(0)
