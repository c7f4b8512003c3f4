"""Weights from every format, and what each kind of damage says."""

import json
import os
import pickle
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file as read_part
from safetensors.torch import save_file
from torch import Tensor

from cottention.engine.errors import ModelFolderError
from cottention.engine.models.checkpoint import load_model
from cottention.engine.models.gptj.attention_kinds import ATTENTION_KINDS
from cottention.engine.models.registry import read_config
from cottention.engine.models.weight_files import read_weights

Save = Callable[[dict[str, Tensor], Path], None]

FORMATS: list[tuple[str, Save]] = [
    ("model.safetensors", lambda weights, path: save_file(weights, path)),
    ("pytorch_model.bin", lambda weights, path: torch.save(weights, path)),
]


PLAIN_KINDS = [name for name, kind in ATTENTION_KINDS.items() if not kind.weight_names]
"""Kinds of attention whose feature map has no weights of its own."""


@pytest.fixture(scope="module")
def weights(gptj_folder: Path) -> dict[str, Tensor]:
    return read_weights(gptj_folder)


@pytest.fixture
def bare(folder: Path) -> Path:
    """The small model's folder without its weights."""
    for name, _ in FORMATS:
        (folder / name).unlink(missing_ok=True)
    return folder


def write_shards(weights: dict[str, Tensor], folder: Path, name: str, save: Save) -> Path:
    """Two shards and their index, as transformers writes them."""
    stem, suffix = name.split(".")
    weight_map = {}
    for number in (1, 2):
        shard = f"{stem}-0000{number}-of-00002.{suffix}"
        part = {key: weights[key] for key in sorted(weights)[number - 1 :: 2]}
        save(part, folder / shard)
        weight_map |= dict.fromkeys(part, shard)
    index = folder / f"{name}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return index


def load(folder: Path, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    return load_model(folder, read_config(folder), dtype)


def refusal(folder: Path) -> str:
    """What a user is told."""
    with pytest.raises(ModelFolderError) as caught:
        load(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize(("name", "save"), FORMATS)
def test_every_format_gives_the_same_model(
    bare: Path, weights: dict[str, Tensor], name: str, save: Save, sharded: bool
) -> None:
    if sharded:
        write_shards(weights, bare, name, save)
    else:
        save(weights, bare / name)
    loaded = load(bare).state_dict()
    assert loaded.keys() == weights.keys()
    for key, weight in weights.items():
        torch.testing.assert_close(loaded[key], weight, rtol=0, atol=0)
    assert not any(weight.requires_grad for weight in loaded.values())


def test_parameters_saved_as_such_are_read(bare: Path, weights: dict[str, Tensor]) -> None:
    torch.save({k: torch.nn.Parameter(w) for k, w in weights.items()}, bare / "pytorch_model.bin")
    assert not any(weight.requires_grad for weight in load(bare).parameters())


def test_norm_const_stays_float32(folder: Path) -> None:
    for name, weight in load(folder, torch.bfloat16).state_dict().items():
        expected = torch.float32 if name.endswith("norm_const") else torch.bfloat16
        assert weight.dtype == expected


def test_missing_unexpected_and_misshapen_keys_are_named(
    bare: Path, weights: dict[str, Tensor]
) -> None:
    wrong = dict(weights)
    wrong["transformer.h.0.attn.bias"] = torch.ones(1)
    wrong["lm_head.bias"] = wrong["lm_head.bias"][:-1].clone()
    del wrong["transformer.ln_f.weight"]
    save_file(wrong, bare / "model.safetensors")
    message = refusal(bare)
    size = len(weights["lm_head.bias"])
    assert str(bare) in message
    assert "missing: transformer.ln_f.weight" in message
    assert "unexpected: transformer.h.0.attn.bias" in message
    assert f"of another shape: lm_head.bias [{size - 1}] instead of [{size}]" in message
    assert "attention_type" not in message


CONSTANTS = {
    "bias": torch.ones(1, 1, 64, 64, dtype=torch.uint8).tril(),
    "masked_bias": torch.tensor(-1e9),
    "scale_attn": torch.tensor(4.0),
    "rotary_emb.inv_freq": torch.ones(4),
    "embed_positions": torch.ones(64, 8),
}


@pytest.mark.parametrize("names", [["bias", "masked_bias"], ["rotary_emb.inv_freq"], CONSTANTS])
def test_constants_of_training_code_are_left_out(
    bare: Path, weights: dict[str, Tensor], names: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Older GPT-J code stores them; transformers drops them by name."""
    more = {
        f"transformer.h.{layer}.attn.{name}": CONSTANTS[name].clone()
        for name in names
        for layer in range(2)
    }
    save_file(weights | more, bare / "model.safetensors")
    with caplog.at_level("INFO"):
        loaded = load(bare).state_dict()
    assert loaded.keys() == weights.keys()
    (message,) = caplog.messages
    assert f"{bare}: {len(more)} constants of training code among the weights are left" in message


@pytest.mark.parametrize(
    "name", ["transformer.h.0.attn.bias", "transformer.h.0.mlp.bias", "lm_head.masked_bias"]
)
def test_what_only_resembles_a_constant_is_refused(
    bare: Path, weights: dict[str, Tensor], name: str
) -> None:
    """A bias that was learned would be lost."""
    save_file(weights | {name: torch.ones(64)}, bare / "model.safetensors")
    assert f"unexpected: {name}" in refusal(bare)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda name: f"module.{name}",
        lambda name: f"_orig_mod.{name}",
        lambda name: f"module._orig_mod.module.{name}",
        lambda name: name.replace(".attn.", "._orig_mod.attn."),
        lambda name: f"_fsdp_wrapped_module.{name}".replace(
            ".h.0.", ".h.0._checkpoint_wrapped_module."
        ),
    ],
)
def test_names_of_wrappers_are_removed(
    bare: Path,
    weights: dict[str, Tensor],
    wrap: Callable[[str], str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    save_file({wrap(name): weight for name, weight in weights.items()}, bare / "model.safetensors")
    with caplog.at_level("INFO"):
        loaded = load(bare).state_dict()
    for name, weight in weights.items():
        assert torch.equal(loaded[name], weight)
    (message,) = caplog.messages
    assert message.startswith(f"{bare}: names of weights are read without ")


def test_a_weight_with_and_without_a_wrapper_is_refused(
    bare: Path, weights: dict[str, Tensor]
) -> None:
    again = {"module.lm_head.bias": weights["lm_head.bias"].clone()}
    save_file(weights | again, bare / "model.safetensors")
    assert "have lm_head.bias twice, with and without a wrapper's name" in refusal(bare)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_weights_that_are_no_numbers_of_floating_point(
    bare: Path, weights: dict[str, Tensor], dtype: torch.dtype
) -> None:
    wrong = weights | {"lm_head.bias": weights["lm_head.bias"].to(dtype)}
    torch.save(wrong, bare / "pytorch_model.bin")
    name = str(dtype).removeprefix("torch.")
    assert f"not of floating point: lm_head.bias {name}" in refusal(bare)


def test_shards_that_disagree_are_refused(bare: Path, weights: dict[str, Tensor]) -> None:
    write_shards(weights, bare, *FORMATS[0])
    first, second = sorted(bare.glob("model-*.safetensors"))
    part = read_part(second)
    name = next(iter(read_part(first)))
    save_file(part | {name: weights[name].clone()}, second)
    load(bare)
    save_file(part | {name: weights[name] + 1}, second)
    assert refusal(bare) == f"{second} has {name} with other values than an earlier file"


def test_norm_const_is_required(bare: Path, weights: dict[str, Tensor]) -> None:
    """A plain GPT-J is no Cottention."""
    kept = {name: w for name, w in weights.items() if not name.endswith("norm_const")}
    save_file(kept, bare / "model.safetensors")
    message = refusal(bare)
    assert "missing: transformer.h.0.attn.norm_const" in message
    assert "unexpected" not in message
    assert message.endswith(
        ". config.json has attention_type 'cottention', and weights without norm_const look like"
        f" those of {' or '.join(map(repr, sorted(PLAIN_KINDS)))}: give attention_type what they"
        " were trained with"
    )


@pytest.mark.parametrize("said", PLAIN_KINDS)
def test_weights_of_another_kind_are_told_by_its_name(folder: Path, said: str) -> None:
    config = json.loads((folder / "config.json").read_text()) | {"attention_type": said}
    (folder / "config.json").write_text(json.dumps(config))
    message = refusal(folder)
    assert "unexpected: transformer.h.0.attn.norm_const" in message
    assert f"attention_type '{said}', and weights with norm_const look like" in message
    assert "those of 'cottention': give attention_type" in message


def test_many_faults_are_counted(bare: Path) -> None:
    save_file({"x": torch.ones(1)}, bare / "model.safetensors")
    assert " more; unexpected: x" in refusal(bare)


def test_folder_without_weights(bare: Path) -> None:
    (bare / "tf_model.h5").write_bytes(b"")
    message = refusal(bare)
    assert "has no weights: it needs model.safetensors (or model.safetensors.index.json) or" in (
        message
    )


class Attack:
    """Unpickled, it would write a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("plain", [False, True], ids=["zip", "plain pickle"])
def test_a_malicious_pickle_is_not_executed(bare: Path, tmp_path: Path, plain: bool) -> None:
    owned = tmp_path / "owned"
    path = bare / "pytorch_model.bin"
    if plain:
        path.write_bytes(pickle.dumps({"w": Attack(owned)}, protocol=2))
    else:
        torch.save({"w": Attack(owned)}, path)
    message = refusal(bare)
    assert not owned.exists()
    assert message.startswith(f"{path} is damaged or contains objects other than tensors")
    assert "weights_only" not in message  # torch advises to load the file unsafely


def test_other_pickles_are_never_opened(
    bare: Path, weights: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The published folders hold them; nothing may read a byte of them."""
    owned = tmp_path / "owned"
    for name in ("tokenizer.pt", "config.pt"):
        (bare / name).write_bytes(pickle.dumps(Attack(owned)))
        (bare / name).chmod(0)
    save_file(weights, bare / "model.safetensors")
    opened: list[str] = []
    original = torch.load

    def watch(path: Path, **options: Any) -> Any:
        opened.append(Path(path).name)
        return original(path, **options)

    monkeypatch.setattr(torch, "load", watch)
    load(bare)
    assert opened == []
    assert not owned.exists()


@pytest.mark.parametrize("length", [0, 4, 100, 5000, -1])
def test_truncated_safetensors(bare: Path, weights: dict[str, Tensor], length: int) -> None:
    path = bare / "model.safetensors"
    save_file(weights, path)
    path.write_bytes(path.read_bytes()[:length])
    message = refusal(bare)
    assert message.startswith(f"{path} is damaged or is not a weights file (")
    assert message.endswith("): download it again")


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_damaged_bin_files_never_end_in_a_traceback(bare: Path, legacy: bool) -> None:
    """Cut short or with changed bytes: loaded with other keys, or refused, always in one line."""
    path = bare / "pytorch_model.bin"
    torch.save({"a": torch.ones(3)}, path, _use_new_zipfile_serialization=not legacy)
    data = path.read_bytes()
    rng = random.Random(5)
    cases = [b"", b"hello", data[: len(data) // 2], data[:-20]]
    for _ in range(120):
        damaged = bytearray(data)
        for _ in range(3):
            damaged[rng.randrange(len(data))] = rng.randrange(256)
        cases.append(bytes(damaged))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, on protocol numbers that the damage made up
        for case in cases:
            path.write_bytes(case)
            assert str(bare) in refusal(bare)


@pytest.mark.parametrize(
    "content", [[torch.ones(1)], {"model": {"w": torch.ones(1)}}, {0: torch.ones(1)}, {"a": "b"}]
)
def test_a_bin_that_is_no_table_of_tensors(bare: Path, content: Any) -> None:
    torch.save(content, bare / "pytorch_model.bin")
    assert "does not contain a table of named tensors" in refusal(bare)


@pytest.mark.parametrize(
    "shard",
    ["../model.safetensors", "/etc/passwd", "missing.safetensors", "..", "", "config.json", "a/b"],
)
def test_an_index_names_files_of_its_kind_beside_it(
    bare: Path, weights: dict[str, Tensor], shard: str
) -> None:
    save_file(weights, bare.parent / "model.safetensors")
    index = bare / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"lm_head.bias": shard}}))
    assert f"{index} names {shard or '.'}, which is not a .safetensors file in its folder" in (
        refusal(bare)
    )


@pytest.mark.parametrize("name", ["config.pt", "tokenizer.pt"])
def test_an_index_that_names_a_pickle(bare: Path, tmp_path: Path, name: str) -> None:
    (bare / name).write_bytes(pickle.dumps(Attack(tmp_path / "owned")))
    index = bare / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": {"lm_head.bias": name}}))
    assert f"names {name}, which is not a .bin file" in refusal(bare)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"{}", b'{"weight_map": 3}', b'{"weight_map": {"a": 3}}', b"\xff"],
)
def test_damaged_index(bare: Path, content: bytes) -> None:
    (bare / "model.safetensors.index.json").write_bytes(content)
    assert "index.json is not a weights index" in refusal(bare)


def test_a_damaged_shard_is_named(bare: Path, weights: dict[str, Tensor]) -> None:
    write_shards(weights, bare, *FORMATS[0])
    shard = bare / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    assert refusal(bare).startswith(f"{shard} is damaged")


def test_a_shard_that_lacks_a_key(bare: Path, weights: dict[str, Tensor]) -> None:
    write_shards({k: w for k, w in weights.items() if k != "lm_head.bias"}, bare, *FORMATS[0])
    assert "missing: lm_head.bias" in refusal(bare)
