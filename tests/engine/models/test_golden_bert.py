"""The golden bidirectional cases: the encoder's definition against the papers' own code."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cottention.engine.errors import ModelFolderError
from cottention.engine.models.bert.config import BertConfig
from cottention.engine.models.bert.model import BertForPreTraining, SelfAttention
from cottention.engine.models.checkpoint import load_model
from cottention.engine.models.registry import parse_config, read_config
from cottention.engine.models.weight_files import read_weights
from tests.engine.encoders import changed_folder, read_raw

TOLERANCES = [(torch.float64, 1e-10), (torch.float32, 2e-5)]


@pytest.fixture(scope="module")
def bert(golden: Path) -> Path:
    return golden / "cottention-bert"


def hidden_of(model: BertForPreTraining, expected: dict[str, Tensor]) -> Tensor:
    mask = expected["attention_mask"].bool()
    with torch.inference_mode():
        return model(expected["input_ids"], mask, expected["token_type_ids"])


@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES)
def test_golden_bert(bert: Path, dtype: torch.dtype, tolerance: float) -> None:
    expected = load_file(bert / "expected.safetensors")
    model = load_model(bert, read_config(bert), dtype)
    assert isinstance(model, BertForPreTraining)
    assert model.cls.predictions is not None
    hidden = hidden_of(model, expected)
    with torch.inference_mode():
        got = {
            "last_hidden_state": hidden,
            "prediction_logits": model.cls.predictions(hidden),
            "seq_relationship_logits": model.seq_relationship(hidden),
        }
    for name, value in got.items():
        assert (value - expected[name]).abs().max() <= tolerance, name


@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES)
def test_golden_bidirectional_cosformer(golden: Path, dtype: torch.dtype, tolerance: float) -> None:
    case = golden / "cosformer-layer"
    raw, expected = read_raw(case), load_file(case / "expected.safetensors")
    width, length = raw["embed_dim"], raw["max_positions"]
    config = BertConfig(
        vocab_size=8,
        hidden_size=width,
        num_hidden_layers=1,
        num_attention_heads=raw["num_heads"],
        intermediate_size=8,
        max_position_embeddings=length,
        attention_type="cosformer",
    )
    attention = SelfAttention(config).to(dtype).requires_grad_(False)
    out = nn.Linear(width, width).to(dtype).requires_grad_(False)
    for module, name in (
        (attention.query, "q"),
        (attention.key, "k"),
        (attention.value, "v"),
        (out, "out"),
    ):
        for part in ("weight", "bias"):
            getattr(module, part).copy_(expected[f"weight.{name}_proj.{part}"])
    x = expected["input"].to(dtype).transpose(0, 1)
    got = out(attention(x, torch.ones(x.shape[:2], dtype=torch.bool))).transpose(0, 1)
    assert (got - expected["output_bidirectional"]).abs().max() <= tolerance


def test_what_a_folder_may_lack(bert: Path, tmp_path: Path) -> None:
    """A decoder is that of the word embeddings, a bare encoder has no prefix and no head."""
    expected = load_file(bert / "expected.safetensors")
    weights = read_weights(bert)
    words = weights["bert.embeddings.word_embeddings.weight"]
    masked = {k: v for k, v in weights.items() if "pooler" not in k and "seq_relation" not in k}
    del masked["cls.predictions.decoder.weight"], masked["cls.predictions.decoder.bias"]
    folder = changed_folder(bert, tmp_path / "masked", masked)
    model = load_model(folder, read_config(folder), torch.float64)
    assert isinstance(model, BertForPreTraining)
    assert model.cls.predictions is not None
    assert torch.equal(model.cls.predictions.decoder.weight, words.double())
    assert model.bert.pooler is None
    assert model.cls.seq_relationship is None

    prefix = "bert."
    bare = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
    bare["embeddings.position_ids"] = torch.arange(64).unsqueeze(0)  # as older files have it
    folder = changed_folder(bert, tmp_path / "bare", bare)
    model = load_model(folder, read_config(folder), torch.float64)
    assert isinstance(model, BertForPreTraining)
    assert model.cls.predictions is None
    assert (hidden_of(model, expected) - expected["last_hidden_state"]).abs().max() <= 1e-10


def test_weights_that_are_not_the_models_are_refused(bert: Path, tmp_path: Path) -> None:
    weights = read_weights(bert)

    def refused(changed: dict[str, Tensor], **settings: object) -> str:
        folder = changed_folder(bert, tmp_path / str(len(list(tmp_path.iterdir()))), changed)
        config = parse_config(read_raw(bert) | settings, "config.json")
        with pytest.raises(ModelFolderError) as caught:
            load_model(folder, config, torch.float32)
        return str(caught.value)

    softmax = {k: v for k, v in weights.items() if not k.endswith("norm_const")}
    assert "a BERT with softmax cannot be served" in refused(softmax)
    assert "those of 'cottention'" in refused(weights, attention_type="cosformer")
    untied = {k: v for k, v in weights.items() if k != "cls.predictions.decoder.weight"}
    assert "missing: cls.predictions.decoder.weight" in refused(untied, tie_word_embeddings=False)
    half = {k: v for k, v in weights.items() if k != "bert.pooler.dense.bias"}
    assert "missing: bert.pooler.dense.bias" in refused(half)
    assert "unexpected: bert.more" in refused(weights | {"bert.more": torch.zeros(1)})
    other = weights | {"cls.predictions.bias": torch.ones(300)}
    assert "with different values" in refused(other)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hidden_act": "relu"}, "hidden_act must be 'gelu', it is 'relu'"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type must be 'absolute'"),
        ({"is_decoder": True}, "is_decoder must be False, it is True"),
        ({"attention_type": "softmax"}, "is not one of: cosformer, cottention"),
        ({"attention_type": ["cottention"]}, "is not one of: cosformer, cottention"),
        ({"num_attention_heads": 5}, r"hidden_size \(64\) must be a multiple of"),
        ({"hidden_size": None}, "hidden_size must be a whole number from 1"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings must be true or false"),
        (
            {"attention_type": "cosformer", "cosformer_max_length": 63},
            r"cosformer_max_length \(63\) must be at least max_position_embeddings",
        ),
    ],
)
def test_settings_that_are_not_implemented_are_refused(
    bert: Path, settings: dict[str, object], message: str
) -> None:
    with pytest.raises(ModelFolderError, match=message):
        parse_config(read_raw(bert) | settings, "config.json")


def test_a_cosformer_encoder_is_read(bert: Path, tmp_path: Path) -> None:
    softmax = {k: v for k, v in read_weights(bert).items() if not k.endswith("norm_const")}
    folder = changed_folder(bert, tmp_path / "cosformer", softmax)
    save_file(softmax, folder / "model.safetensors")
    config = parse_config(read_raw(bert) | {"attention_type": "cosformer"}, "config.json")
    load_model(folder, config, torch.float32)
    assert config.state_spec().shapes == {"state": (1, 4, 16, 32), "denominator": (1, 4, 32)}
    assert config.description()["attention"] == "cosformer, bidirectional, M = 64"
