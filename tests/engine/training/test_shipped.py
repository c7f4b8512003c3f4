"""The model that ships with the package: complete, small, and as its card says."""

import ast
import json

import torch

from cottention.engine import Engine, EngineConfig, SamplingParams
from cottention.engine.models.checkpoint import load_model
from cottention.engine.models.model_folder import DEFAULT_MODEL
from cottention.engine.models.registry import read_config
from cottention.engine.text.tokenizer import Tokenizer

LARGEST_BYTES = 16_000_000


def test_the_weights_are_those_of_the_configuration() -> None:
    model = load_model(DEFAULT_MODEL, read_config(DEFAULT_MODEL), torch.float32)
    assert all(weight.isfinite().all() for weight in model.parameters())


def test_the_folder_is_small() -> None:
    assert sum(path.stat().st_size for path in DEFAULT_MODEL.iterdir()) <= LARGEST_BYTES


def test_the_card_agrees_with_training_json() -> None:
    facts = json.loads((DEFAULT_MODEL / "training.json").read_text(encoding="utf-8"))
    card = (DEFAULT_MODEL / "README.md").read_text(encoding="utf-8")
    bits = facts["held_out_bits_per_byte"]["total"]
    assert f"**{bits:.3f}**" in card
    assert facts["corpus"]["sha256"] in card
    assert facts["command"] in card
    assert bits < 1.4


def test_the_tokenizer_gives_text_back_and_fits_the_model() -> None:
    tokenizer = Tokenizer.from_folder(DEFAULT_MODEL)
    text = "def f(naïve: str) -> '日本🙂':\r\n\treturn 0x1F  # done\n\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.num_ids == read_config(DEFAULT_MODEL).vocab_size


def test_it_continues_python_with_python() -> None:
    """The signature that it completes, with the lines below it, is a function that compiles."""
    engine = Engine(config=EngineConfig(max_slots=1))
    prompt = "def __init__(self, "
    (done,) = engine.generate([prompt], SamplingParams(max_tokens=48, temperature=0))
    whole_lines = (prompt + done.text).splitlines()[:-1]
    function = ast.parse("\n".join(whole_lines)).body[0]
    assert isinstance(function, ast.FunctionDef)
    assert len(function.args.args) > 1
    assert len(function.body) > 0
