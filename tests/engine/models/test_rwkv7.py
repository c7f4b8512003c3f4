"""RWKV-7's files: what their configurations say, what their shapes say, and what is refused."""

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cottention.engine import Engine, EngineConfig, SamplingParams
from cottention.engine.errors import ConfigurationError, ModelFolderError, ParameterError
from cottention.engine.models.checkpoint import load_model
from cottention.engine.models.recurrence import Recurrence
from cottention.engine.models.registry import parse_config, read_config
from cottention.engine.models.rwkv7.config import LowRanks, RWKV7Config
from cottention.engine.models.rwkv7.model import RWKV7ForCausalLM
from cottention.engine.ops import Segments
from tests.engine.making import rwkv7_file

SMALLEST: dict[str, Any] = {"model_type": "rwkv7", "hidden_size": 128, "vocab_size": 9}
SMALLEST["num_hidden_layers"] = 2
Weights = dict[str, Tensor]


def parsed(**more: Any) -> RWKV7Config:
    config = parse_config(SMALLEST | more, "config.json")
    assert isinstance(config, RWKV7Config)
    return config


def test_defaults_are_those_of_flash_linear_attention() -> None:
    config = parsed()
    assert (config.head_dim, config.num_heads, config.intermediate_size) == (64, 2, 512)
    assert config.group_norm_eps == 64 * config.norm_eps == 64e-5
    assert parsed(head_dim=None, num_heads=4).head_dim == 32
    assert parsed(intermediate_size=None, hidden_ratio=3.5).intermediate_size == 448
    assert parsed(hidden_size=72, head_dim=8, hidden_ratio=4).intermediate_size == 288
    assert config.window is config.trained_length is None
    assert parsed(max_position_embeddings=2048).window == 2048


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"value_dim": [128, 256]}, r"value_dim must be hidden_size \(128\) in every layer"),
        ({"attn": {"layers": [1]}}, "attn must be None"),
        ({"hidden_act": "relu"}, "hidden_act must be 'sqrelu'"),
        ({"head_dim": 48}, "must be a multiple of head_dim"),
        ({"hidden_ratio": "4"}, "hidden_ratio"),
        ({"norm_first": 1}, "norm_first must be true or false"),
        ({"hidden_size": None}, "hidden_size must be a whole number"),
    ],
)
def test_another_arithmetic_is_refused(change: dict[str, Any], why: str) -> None:
    with pytest.raises(ModelFolderError, match=rf"^config\.json: .*{why}"):
        parsed(**change)


def test_low_ranks_and_absent_norms_come_from_the_weights(golden: Path, tmp_path: Path) -> None:
    """Older configurations have other ranks than their weights, or none."""
    weights = load_file(golden / "rwkv7" / "model.safetensors")
    without = {
        name: weight
        for name, weight in weights.items()
        if ".pre_norm." not in name and not name.endswith(("attn_norm.bias", "ffn_norm.bias"))
    }
    del without["model.norm.bias"]
    save_file(without, tmp_path / "model.safetensors")
    raw = {"hidden_size": 48, "head_dim": 16, "num_hidden_layers": 3, "vocab_size": 67}
    config = parsed(**raw, intermediate_size=64, norm_first=False, norm_bias=False)
    model = load_model(tmp_path, config, torch.float32)
    assert isinstance(model, RWKV7ForCausalLM)
    assert model.state_dict().keys() == without.keys()


def test_a_tied_head_is_the_embeddings(golden: Path, tmp_path: Path) -> None:
    weights = load_file(golden / "rwkv7" / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, tmp_path / "model.safetensors")
    raw = {"hidden_size": 48, "head_dim": 16, "num_hidden_layers": 3, "vocab_size": 67}
    config = parsed(**raw, intermediate_size=64, tie_word_embeddings=True)
    model = load_model(tmp_path, config, torch.float32)
    assert isinstance(model, RWKV7ForCausalLM)
    hidden = torch.randn(2, 48)
    normed = torch.nn.functional.layer_norm(
        hidden, (48,), weights["model.norm.weight"], weights["model.norm.bias"]
    )
    expected = normed @ weights["model.embeddings.weight"].T
    torch.testing.assert_close(model.logits(hidden), expected, rtol=1e-5, atol=1e-5)


# Single files


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return rwkv7_file(tmp_path)


def test_a_file_s_sizes_are_in_its_shapes(file: Path) -> None:
    config = read_config(file)
    assert config == RWKV7Config(
        vocab_size=320,
        hidden_size=64,
        head_dim=32,
        num_hidden_layers=3,
        intermediate_size=72,
        norm_eps=1e-5,
        group_norm_eps=64e-5,
        torch_dtype="bfloat16",
    )
    assert config.low_ranks is None


def test_a_file_is_served(file: Path) -> None:
    engine = Engine(file, EngineConfig(max_slots=2))
    assert engine.policies.default == "exact"
    assert engine.pool.nbytes == 2 * 4 * (3 * 64 * 32 + 2 * 3 * 64)
    params = SamplingParams(max_tokens=200, seed=1, ignore_eos=True, n=2, temperature=1.5)
    for done in engine.generate(["the thing in there"], params):
        assert 0 <= min(done.token_ids) <= max(done.token_ids) < engine.tokenizer.num_ids == 313
        assert done.text == engine.tokenizer.decode(done.token_ids)


def test_matrices_as_they_are_stored(file: Path) -> None:
    """In bfloat16 the products round their inputs; everything between them stays in float32."""
    config = read_config(file)
    ids, rows = torch.arange(1, 41), config.state_spec().shapes
    logits = []
    for dtype in (torch.float32, torch.bfloat16):
        loaded = load_model(file, config, dtype)
        assert isinstance(loaded, RWKV7ForCausalLM)
        assert loaded.state_dict()["model.layers.0.ffn.key.weight"].dtype == dtype
        assert (
            loaded.state_dict()["model.layers.0.attn.w_lora.lora.0.weight"].dtype == torch.float32
        )
        model = loaded.serve("cpu")
        pool = {name: torch.zeros(1, *shape) for name, shape in rows.items()}
        segments = Segments.of([0], [len(ids)], 1, "cpu")
        with torch.inference_mode():
            hidden = model.hidden(ids, torch.arange(len(ids)), Recurrence(pool, segments))
            logits.append(model.logits(hidden))
        assert all(row.any() for row in pool.values())
    assert logits[0].dtype == logits[1].dtype == torch.float32
    torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=0.1)
    assert not torch.equal(logits[0], logits[1])


def test_without_a_window_there_is_no_renewal(file: Path) -> None:
    with pytest.raises(ConfigurationError, match="--context-policy renew: the files of this model"):
        Engine(file, EngineConfig(max_slots=1, context_policy="renew"))
    engine = Engine(file, EngineConfig(max_slots=1))
    with pytest.raises(ParameterError, match="context window is not known"):
        engine.policies.new_session("renew")
    with pytest.raises(ParameterError, match="context window is not known"):
        engine.generate(["a"], SamplingParams(context_policy="renew"))


def test_a_long_session_keeps_its_last_ids_alone(file: Path) -> None:
    """And is what it was as a snapshot, though nothing says how long the model can follow."""
    engine = Engine(file, EngineConfig(max_slots=1))
    ids = [i % 300 + 1 for i in range(1500)]
    engine.submit(ids, SamplingParams(max_tokens=0), start=engine.policies.new_session(None))
    outputs = [out for _ in iter(engine.has_work, False) for out in engine.step()]
    state = outputs[-1].state
    assert state is not None
    assert state.recent == tuple(ids[-1024:])
    codec = engine.session_codec()
    again = codec.decode(codec.encode(state))
    assert all(map(torch.equal, again.rows, state.rows))
    assert state.nbytes == engine.spec.bytes_per_row


class Harmful:
    """Makes a folder where it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.folder),)


def faults_of(file: Path) -> str:
    """The one line that a model is refused with."""
    with pytest.raises(ModelFolderError) as caught:
        Engine(file, EngineConfig(max_slots=1))
    message = str(caught.value)
    assert "\n" not in message
    assert str(file) in message
    return message


@pytest.mark.parametrize("save", [torch.save, lambda x, path: path.write_bytes(pickle.dumps(x, 2))])
def test_code_in_a_file_is_never_executed(
    file: Path, tmp_path: Path, save: Callable[[object, Path], None]
) -> None:
    weights: dict[str, Any] = dict(torch.load(file, weights_only=True))
    save(weights | {"emb.weight": Harmful(tmp_path / "harm")}, file)
    assert "objects other than tensors, which are never loaded" in faults_of(file)
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("part", [0.0, 0.001, 0.5, 0.999])
def test_a_truncated_file_is_refused(file: Path, part: float) -> None:
    data = file.read_bytes()
    file.write_bytes(data[: int(part * len(data))])
    assert "is damaged" in faults_of(file)


def _without(*names: str) -> Callable[[Weights], Weights]:
    return lambda weights: {name: x for name, x in weights.items() if name not in names}


def _with(name: str, *shape: int) -> Callable[[Weights], Weights]:
    return lambda weights: weights | {name: torch.zeros(shape)}


def _renamed(old: str, new: str) -> Callable[[Weights], Weights]:
    return lambda weights: {name.replace(old, new): x for name, x in weights.items()}


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (_without("blocks.1.att.k_a"), "missing: model.layers.1.attn.k_a"),
        (_without("head.weight", "emb.weight"), "no weights of an RWKV-7: missing are emb.weight"),
        (_without("blocks.0.ffn.key.weight"), "blocks.0.ffn.key.weight must have 2 dimensions"),
        (_with("blocks.1.att.more", 3), "unexpected: model.layers.1.attn.more"),
        (_with("blocks.7.att.r_k", 2, 32), "missing: model.layers.3."),
        (_with("blocks.999999999.att.r_k", 2, 32), "names block 999999999"),
        (_with("blocks.1.att.w1", 9, 64), "of another shape: model.layers.1.attn.w_lora"),
        (_with("blocks.0.att.r_k", 64), "blocks.0.att.r_k must have 2 dimensions"),
        (_with("blocks.0.att.r_k", 3, 32), "3 heads of 32, and emb.weight has 64 channels"),
        (_with("blocks.1.ffn.s_emb.weight", 9, 64), "an RWKV with DeepEmbed"),
        (_renamed("att.x_", "att.time_maa_"), "is an RWKV-6, which is not supported"),
        (_renamed("att.x_", "att.time_mix_"), "is an RWKV-5 or older, which is not supported"),
        (lambda _: {}, "no weights of an RWKV-7"),
    ],
)
def test_a_file_of_another_model_is_refused(
    file: Path, change: Callable[[Weights], Weights], why: str
) -> None:
    torch.save(change(torch.load(file, weights_only=True)), file)
    assert why in faults_of(file)


def test_layer_0_s_mix_is_not_taken(file: Path) -> None:
    """Training code leaves v0, v1 and v2 there, of any shape, or not."""
    weights = torch.load(file, weights_only=True)
    del weights["blocks.0.att.v1"]
    weights["blocks.0.att.v2"] = torch.zeros(3)
    torch.save(weights, file)
    model = load_model(file, read_config(file), torch.float32)
    assert isinstance(model, RWKV7ForCausalLM)
    assert LowRanks(8, 6, 5, 12) == _ranks(model)


def _ranks(model: RWKV7ForCausalLM) -> LowRanks:
    shapes = {name: x.shape for name, x in model.state_dict().items()}
    ranks = {each: shapes[f"model.layers.1.attn.{each}_lora.lora.0.weight"][0] for each in "wavg"}
    return LowRanks(**ranks)
