"""The golden cases of Performer and RFA, and what their projections must be."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cottention.engine import Engine
from cottention.engine.errors import ModelFolderError
from cottention.engine.models.gptj.attention_kinds import ATTENTION_KINDS
from cottention.engine.models.gptj.config import MAX_RANDOM_FEATURES
from cottention.engine.models.gptj.feature_maps.base import TokenPositions
from cottention.engine.models.gptj.feature_maps.performer import KEY_EXPONENTS, orthogonal_rows
from cottention.engine.models.gptj.feature_maps.random_features import RandomFeatures
from cottention.engine.models.registry import read_config
from cottention.engine.models.weight_files import read_weights
from cottention.engine.ops import recurrent_step
from cottention.engine.ops.varlen import chunked, chunked_with_decay
from cottention.engine.sessions.fingerprint import Fingerprint
from tests.engine.making import attention_folder

KINDS = ("performer", "rfa")
SPLIT = 17
SLOT = torch.zeros(1, dtype=torch.int32)


def kind_of(name: str) -> RandomFeatures:
    kind = ATTENTION_KINDS[name]
    assert isinstance(kind, RandomFeatures)
    return kind


def without_rotary(length: int) -> TokenPositions:
    none = torch.empty(length, 0)
    return TokenPositions(torch.arange(length), none, none)


def features(name: str, q: Tensor, k: Tensor, v: Tensor, projection: Tensor) -> list[Tensor]:
    return [*kind_of(name).features(q, k, v, without_rotary(len(q)), [projection])]


class Case:
    """Tensors of a golden folder; q, k, v as [T, H, ·]."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.expected = load_file(folder / f"{name}-map" / "expected.safetensors")

    def tokens(self, name: str) -> Tensor:
        return self.expected[name][0].transpose(0, 1)

    def features(self, dtype: torch.dtype) -> list[Tensor]:
        q, k, v, w = (x.to(dtype) for x in (*map(self.tokens, "qkv"), self.expected["projection"]))
        return features(self.name, q, k, v, w)


@pytest.fixture(scope="module", params=KINDS)
def case(request: pytest.FixtureRequest, golden: Path) -> Case:
    return Case(request.param, golden)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 2e-5)])
def test_golden_outputs_and_states(case: Case, dtype: torch.dtype, tolerance: float) -> None:
    """In two parts, between which the state is all that is kept; its row V is the denominator."""
    q, k, v = case.features(dtype)
    assert (k - case.tokens("phi_k")).abs().max() <= tolerance
    width = case.tokens("v").shape[-1]
    state = torch.zeros(1, q.shape[1], v.shape[-1], q.shape[-1], dtype=dtype)
    outs = []
    for part, at in ((slice(None, SPLIT), SPLIT), (slice(SPLIT, None), "final")):
        ends = torch.tensor([0, len(q[part])], dtype=torch.int32)
        outs.append(recurrent_step(q[part], k[part], v[part], state, None, SLOT, ends))
        expected, z = (case.expected[f"{name}_{at}"][0] for name in ("state", "z"))
        assert (state[0, :, :width] - expected).abs().max() <= 10 * tolerance
        assert (state[0, :, width] - z).abs().max() <= 10 * tolerance
        assert not state[0, :, width + 1 :].any()
    out = kind_of(case.name).outputs(torch.cat(outs))
    assert (out - case.tokens("output")).abs().max() <= tolerance


def test_golden_chunked(case: Case) -> None:
    """The form of training."""
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in case.features(torch.float64))
    state = q.new_zeros(1, q.shape[1], v.shape[-1], q.shape[-1])
    out = kind_of(case.name).outputs(chunked(q, k, v, state, chunk_size=7)[0])
    assert (out - case.expected["output"]).abs().max() <= 1e-10


def test_golden_gated_recurrent_and_chunked(golden: Path) -> None:
    """With the gates of the case: its outputs, and the state whose row V is the denominator."""
    case = Case("rfa", golden)
    q, k, v = case.features(torch.float64)
    width, w = case.tokens("v").shape[-1], case.tokens("gate")
    v = (1 - w).unsqueeze(-1) * v
    state = q.new_zeros(1, q.shape[1], v.shape[-1], q.shape[-1])
    heads_first = [x.transpose(0, 1).unsqueeze(0) for x in (q, k, v, w)]
    out, last = chunked_with_decay(*heads_first, state, chunk_size=7)
    ends = torch.tensor([0, len(q)], dtype=torch.int32)
    steps = recurrent_step(q, k, v, state, None, SLOT, ends, w=w)
    for found, pool in ((out[0].transpose(0, 1), last), (steps, state)):
        outputs = kind_of("gated_rfa").outputs(found).transpose(0, 1)
        assert (outputs - case.expected["gated_output"][0]).abs().max() <= 1e-10
        assert (pool[0, :, :width] - case.expected["gated_state_final"][0]).abs().max() <= 1e-10
        assert (pool[0, :, width] - case.expected["gated_z_final"][0]).abs().max() <= 1e-10


def test_gates_are_learned_from_zero_and_may_close() -> None:
    """A logarithm of 0 would make training's sums of decays NaN."""
    q, k, v = torch.randn(3, 1, 2, 9, 8, generator=torch.Generator().manual_seed(0))
    logits = torch.tensor([-200.0, 0.0, 200.0] * 3).expand(1, 2, 9).clone().requires_grad_()
    w, state = torch.sigmoid(logits), torch.zeros(1, 2, 8, 8)
    out, _ = chunked_with_decay(q, k, v, w, state, chunk_size=4)
    out.sum().backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    rows, pool = [x[0].transpose(0, 1).contiguous() for x in (q, k, v, w.detach())], state.clone()
    ends = torch.tensor([0, 9], dtype=torch.int32)
    expected = recurrent_step(*rows[:3], pool, None, SLOT, ends, w=rows[3])
    torch.testing.assert_close(out[0].transpose(0, 1), expected)


def test_golden_queries_differ_by_a_factor_each(golden: Path) -> None:
    """Performer's constant of a query changes its features by one factor, the largest to M^−½."""
    case = Case("performer", golden)
    q, expected = case.features(torch.float64)[0], case.tokens("phi_q")
    factor = q / expected
    assert (factor / factor[..., :1] - 1).abs().max() <= 1e-12
    assert (q.amax(-1) - q.shape[-1] ** -0.5).abs().max() <= 1e-12


def test_golden_negative_denominators_stay_so(golden: Path) -> None:
    """Values that are all 1 have the output 1 whatever the sum of the scores is."""
    case = Case("rfa", golden)
    q, k, w = case.tokens("q"), case.tokens("k"), 4 * case.expected["projection"]
    q, k, v = features("rfa", q, k, torch.ones(len(q), q.shape[1], 8, dtype=q.dtype), w)
    mixed = (q.transpose(0, 1) @ k.permute(1, 2, 0)).tril() @ v.transpose(0, 1)
    total = mixed[..., 8]
    assert total.min() < -1e-3, "the case has none"
    assert (kind_of("rfa").outputs(mixed) - 1).abs().max() <= 1e-9


@pytest.mark.parametrize("name", KINDS)
def test_a_denominator_of_zero_gives_finite_outputs(name: str) -> None:
    """Outputs of padding are zero; ±1e-9 counts as ±1e-6 for RFA."""
    mixed = torch.zeros(3, 1, 10)
    mixed[1:, :, 0] = 1.0
    mixed[1:, 0, 2] = torch.tensor([1e-9, -1e-9])
    out = kind_of(name).outputs(mixed)[:, 0, 0]
    expected = torch.tensor([0.0, 1e6, -1e6] if name == "rfa" else [0.0, 1e9, -1e9])
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("size", [1e-3, 1.0, 30.0, 1e3, 1e6])
@pytest.mark.parametrize("name", KINDS)
def test_queries_and_keys_of_any_length_give_finite_float32(name: str, size: float) -> None:
    """Without the constant of a query the sum of its scores would underflow from a size of 30."""
    generator = torch.Generator().manual_seed(0)
    q, k = size * torch.randn(2, 40, 1, 64, generator=generator)
    v = torch.randn(40, 1, 64, generator=generator)
    w = orthogonal_rows(128, 64) if name == "performer" else torch.randn(1, 64, 64)
    k[0] = 64**0.25 * 64**0.5 * w.flatten(0, -2)[0]  # the key with the largest of features
    q.requires_grad_()
    q_, k_, v_ = features(name, q, k, v, w)
    state = torch.zeros(1, 1, 72, 128)
    out = kind_of(name).outputs(chunked(*(x.transpose(0, 1)[None] for x in (q_, k_, v_)), state)[0])
    assert out.isfinite().all()
    if name == "performer":
        assert out.abs().max() <= v.abs().max() * 1.001, "an average"
    out.sum().backward()
    assert q.grad is not None
    assert q.grad.isfinite().all()


def test_the_limits_of_exponents_hold_for_the_widest_sums() -> None:
    low, high = (torch.tensor(each).exp() for each in KEY_EXPONENTS)
    assert low / MAX_RANDOM_FEATURES > kind_of("performer").denominator_floor
    assert (high * 1e9).isfinite(), "a billion of the largest keys"


@pytest.mark.parametrize("name", KINDS)
def test_a_row_has_the_same_bits_in_any_company(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 67, 4, 16, generator=generator)
    w = torch.randn(40, 16) if name == "performer" else torch.randn(4, 24, 16)
    whole = features(name, q, k, v, w)
    for part in (slice(0, 1), slice(5, 38), slice(66, 67)):
        rows = features(name, q[part], k[part], v[part], w)
        assert all(torch.equal(x[part], y) for x, y in zip(whole, rows, strict=True))


@pytest.mark.parametrize("name", KINDS)
def test_training_in_bfloat16_has_features_of_float32(name: str) -> None:
    """Exponents and angles of three digits would be other features."""
    q, k, v = torch.randn(3, 9, 4, 16, generator=torch.Generator().manual_seed(0))
    w = torch.randn(40, 16) if name == "performer" else torch.randn(4, 24, 16)
    expected = features(name, q, k, v, w)
    with torch.autocast("cpu", torch.bfloat16):
        found = features(name, q.requires_grad_(), k, v, w)
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


def test_rows_are_orthogonal_within_blocks_and_as_long_as_gaussian_ones() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        rows = orthogonal_rows(4 * 32 + 5, 32)
        assert torch.equal(rows, orthogonal_rows(4 * 32 + 5, 32)), "the generator stays"
        torch.rand(1)
        assert not torch.equal(rows, orthogonal_rows(4 * 32 + 5, 32)), "as in the next layer"
    assert rows.shape == (133, 32)
    for block in rows.double().split(32):
        products = block @ block.T
        assert (products - products.diagonal().diag()).abs().max() < 1e-5
    assert rows.square().sum(-1).mean().item() == pytest.approx(32, rel=0.1)
    assert rows.norm(dim=-1).std() > 0.3
    assert abs(rows.mean().item()) < 0.06, "signs are not those of a decomposition"


@pytest.fixture(params=KINDS)
def small(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return shutil.copytree(attention_folder(request.param), tmp_path / request.param)


def test_a_projection_that_is_missing_or_of_another_size_is_named(small: Path) -> None:
    weights = read_weights(small)
    config = json.loads((small / "config.json").read_text(encoding="utf-8"))
    name = f"transformer.h.1.attn.{small.name}_projection"
    projection = weights.pop(name)
    save_file(weights, small / "model.safetensors")
    with pytest.raises(ModelFolderError, match=rf"missing: {name}"):
        Engine(small)
    save_file(weights | {name: projection}, small / "model.safetensors")
    config["num_random_features"] = 40
    (small / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ModelFolderError, match=r"_projection \[.*16\] instead of \[.*40, 16\]"):
        Engine(small)


def test_another_projection_is_another_fingerprint(small: Path) -> None:
    """A state means nothing with other random features."""

    def fingerprint() -> Fingerprint:
        return Fingerprint.of(small, [], read_config(small).state_spec(), "float32")

    first, weights = fingerprint(), read_weights(small)
    [name] = [each for each in weights if each.endswith(f"h.0.attn.{small.name}_projection")]
    weights[name] = -weights[name]
    save_file(weights, small / "model.safetensors")
    assert fingerprint().weights != first.weights
    assert f"num_random_features={32 if small.name == 'performer' else 16}" in first.config
