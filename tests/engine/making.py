"""What several engine tests make by hand."""

import functools
import json
import shutil
import tempfile
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from cottention.engine.models.gptj.config import GPTJConfig
from cottention.engine.models.gptj.model import CottentionForCausalLM, map_weight
from cottention.engine.models.weight_files import read_weights
from cottention.engine.sampling.token_constraints import TokenConstraints
from cottention.engine.sampling_params import SamplingParams
from cottention.engine.scheduling.batch import BatchResult
from cottention.engine.scheduling.request import Choice, Request
from cottention.engine.state.session_state import SessionState
from cottention.engine.state.spec import StateSpec, StateTensor, recurrence_tensors
from cottention.engine.text.tokenizer import Tokenizer

_FOLDER = Path(__file__).parents[1] / "data" / "golden" / "cottention-gptj"


@functools.cache
def small_tokenizer() -> Tokenizer:
    return Tokenizer.from_folder(_FOLDER)


_SETTINGS: dict[str, dict[str, Any]] = {
    "cosformer": {"rotary_dim": 0, "attention_bias": True, "cosformer_max_length": 20_000},
}
"""What the config.json of a kind's small model says beside the golden one's.

M is far beyond what tests reach, so that they are the same for all kinds.
"""

ATTENTIONS = ("cottention", "cosformer", "linear")
"""Kinds for which all that is done with states is tested again.

Those of Performer and RFA are one tensor, as Cottention's, and no position has a limit.
"""


@functools.cache
def attention_folder(kind: str) -> Path:
    """The small model with attention of some kind; for Cottention the golden folder itself."""
    if kind == "cottention":
        return _FOLDER
    target = Path(_made().name) / kind
    shutil.copytree(_FOLDER, target, ignore=shutil.ignore_patterns("expected.*", "*.bin"))
    config = json.loads((target / "config.json").read_text(encoding="utf-8"))
    config |= {"attention_type": kind, **_SETTINGS.get(kind, {})}
    (target / "config.json").write_text(json.dumps(config), encoding="utf-8")
    weights = weights_of_kind(GPTJConfig.from_dict(config, kind))
    if config.get("attention_bias"):
        weights |= _biases(weights)
    save_file(weights, target / "model.safetensors")
    return target


@functools.cache
def wide_folder(head_dim: int) -> Path:
    """A Cottention with heads as wide as published ones: two layers of two, random weights."""
    target = Path(_made().name) / f"wide-{head_dim}"
    shutil.copytree(_FOLDER, target, ignore=shutil.ignore_patterns("expected.*", "*.bin"))
    config = json.loads((target / "config.json").read_text(encoding="utf-8"))
    config |= {"n_embd": 2 * head_dim, "n_head": 2, "n_inner": 3 * head_dim, "n_positions": 512}
    config |= {"rotary_dim": 64}
    (target / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(head_dim)
        model = CottentionForCausalLM(GPTJConfig.from_dict(config, "wide"))
    save_file(model.state_dict(), target / "model.safetensors")
    return target


def weights_of_kind(config: GPTJConfig) -> dict[str, torch.Tensor]:
    """The golden model's weights, with those of this model's feature map in place of its own."""
    weights = {k: v for k, v in read_weights(_FOLDER).items() if map_weight(k) is None}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = CottentionForCausalLM(config).state_dict()
        for name, weight in made.items():
            if name.endswith("rfa_gate_weight"):  # at first 0, so that no gate looks at its token
                weight.normal_()
    return weights | {k: v for k, v in made.items() if map_weight(k) is not None}


FAMILIES = {
    "rwkv7": "rwkv7",
    "mamba2": "mamba2-groups",
    "mamba": "mamba",
    "gla": "gla",
    "retnet": "retnet",
    "hgrn2": "hgrn2",
    "delta_net": "delta_net",
    "gated_deltanet": "gated_deltanet-gva",
}
"""The recurrent families that are served, and the golden case that is the small model of each."""


SESSION_FAMILIES = ("rwkv7", "mamba2")
"""Those for which all that sessions do is tested again: they keep more than the recurrence."""


def model_folder(name: str) -> Path:
    """The small model of a kind of attention or of a recurrent family."""
    return family_folder(name) if name in FAMILIES else attention_folder(name)


@functools.cache
def family_folder(model_type: str) -> Path:
    """The small model of a recurrent family, which reads and writes the small tokenizer's ids.

    Its golden case has fewer ids: embeddings and head are continued with random rows.
    """
    target = Path(_made().name) / model_type
    source = _FOLDER.parent / FAMILIES[model_type]
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("expected.*", "*.md"))
    for each in ("tokenizer.json", "tokenizer_config.json"):
        if (_FOLDER / each).is_file():
            shutil.copy(_FOLDER / each, target)
    config = json.loads((target / "config.json").read_text(encoding="utf-8"))
    known, config["vocab_size"] = config["vocab_size"], small_tokenizer().num_ids
    (target / "config.json").write_text(json.dumps(config), encoding="utf-8")
    generator = torch.Generator().manual_seed(0)
    weights = read_weights(source)
    for name, weight in weights.items():
        if name.endswith(("embeddings.weight", "lm_head.weight")):
            shape = config["vocab_size"] - known, weight.shape[1]
            rest = float(weight.std()) * torch.randn(shape, generator=generator)
            weights[name] = torch.cat([weight, rest])
    (target / "model.safetensors").unlink()
    save_file(weights, target / "model.safetensors")
    return target


@functools.cache
def _made() -> "tempfile.TemporaryDirectory[str]":
    return tempfile.TemporaryDirectory(prefix="cottention-tests-")


def _biases(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    projections = [name for name in weights if ".attn." in name]
    return {
        name.replace("weight", "bias"): torch.randn(len(weights[name]), generator=generator) / 10
        for name in projections
    }


_TAILS: dict[str, Callable[[int], tuple[StateTensor, ...]]] = {
    "mamba2": lambda width: (StateTensor("conv", (1, 3, 2 * width)),),
    "rwkv7": lambda width: (
        StateTensor("att_shift", (1, 2 * width)),
        StateTensor("ffn_shift", (1, 2 * width)),
    ),
}
"""What the sessions of a family keep beside the state of its recurrence, by width of a head."""


def rwkv7_file(folder: Path) -> Path:
    """A .pth file of an RWKV-7 with as many ids as the small World vocabulary, which is beside it.

    Its golden case has fewer: embeddings and head are continued with random rows.
    """
    golden = _FOLDER.parent
    weights = read_weights(golden / "rwkv7-pth" / "model.pth")
    generator = torch.Generator().manual_seed(0)
    for name in ("emb.weight", "head.weight"):
        rest = torch.randn(320 - len(weights[name]), 64, generator=generator).to(torch.bfloat16)
        weights[name] = torch.cat([weights[name], rest * weights[name].std()])
    torch.save(weights, folder / "small.pth")
    shutil.copy(golden / "world-tokenizer" / "vocab.txt", folder / "rwkv_vocab_small.txt")
    return folder / "small.pth"


def small_spec(kind: str, width: int = 8, more_keys: int = 0) -> StateSpec:
    """States of one layer and two heads of this width, as a kind or a family has them.

    more_keys: by how much keys are wider, so that no shape is its transpose.
    """
    if kind in SESSION_FAMILIES:
        recurrence = recurrence_tensors(
            layers=1, heads=2, value_width=width, key_width=width + more_keys
        )
        return StateSpec((*recurrence, *_TAILS[kind](width)))
    config = GPTJConfig(8, 2 * width, 1, 2, 64, rotary_dim=0, n_inner=8, attention_type=kind)
    return StateSpec(
        recurrence_tensors(
            layers=1,
            heads=2,
            value_width=config.feature_map.value_width(config),
            key_width=config.feature_map.key_width(config) + more_keys,
            has_denominator=config.feature_map.has_denominator,
        )
    )


def state_of(spec: StateSpec, n: int, window: int) -> SessionState:
    """A session's of n tokens, all but the last in rows that tell n."""
    rows = tuple(torch.full(shape, float(n)) for shape in spec.shapes.values())
    return SessionState(rows if n > 1 else (), n - 1, (n,), (n,) * min(n, window), {n: 1})


def make_request(name: str, prompt_ids: list[int], params: SamplingParams) -> Request:
    """A request that nobody has worked on."""
    constraints = TokenConstraints.of(params, small_tokenizer().num_ids)
    return Request.new(name, prompt_ids, params, small_tokenizer(), constraints)


def drew(ids: dict[Choice, int]) -> BatchResult:
    """A step in which each choice drew this id."""
    return BatchResult([*ids], array("q", ids.values()))
