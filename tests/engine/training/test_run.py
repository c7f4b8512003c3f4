"""Training from end to end, with a model and a text so small that it takes a second."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from cottention.engine import Engine, SamplingParams
from cottention.engine.errors import ConfigurationError, ModelFolderError
from cottention.engine.models.checkpoint import load_model
from cottention.engine.models.gptj.attention_kinds import ATTENTION_KINDS
from cottention.engine.models.gptj.config import GPTJConfig
from cottention.engine.models.registry import read_config
from cottention.engine.models.weight_files import read_weights
from cottention.engine.settings.command_line import to_arguments
from cottention.engine.text.tokenizer import Tokenizer
from cottention.engine.training.__main__ import train
from cottention.engine.training.forward import initial_model
from cottention.engine.training.progress import (
    BarProgress,
    PlainProgress,
    TrainingStatus,
    open_progress,
)
from cottention.engine.training.settings import TrainingSettings, parse

SOURCE = "class Counter{n}:\n    def __init__(self, start={n}):\n        self.start = start\n\n"


class Killed(Exception):
    """Simulates a kill in the middle of a run."""


class Listener(PlainProgress):
    """Records losses and messages, and kills the run after step `until`."""

    def __init__(self, until: int | None = None) -> None:
        super().__init__()
        self.losses: list[float] = []
        self.messages: list[str] = []
        self._until = until

    def update(self, standing: TrainingStatus) -> None:
        self.losses.append(standing.loss)
        if standing.step == self._until:
            raise Killed

    def log(self, message: str) -> None:
        self.messages.append(message)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Several threads are slower on tensors this small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def settings(tmp_path: Path) -> TrainingSettings:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for n in range(20):
        (corpus / f"module_{n}.py").write_text(SOURCE.format(n=n) * 8, encoding="utf-8")
    return TrainingSettings(
        output=tmp_path / "model",
        checkpoints=tmp_path / "checkpoints",
        corpus=corpus,
        steps=12,
        context=16,
        layers=1,
        width=16,
        heads=2,
        vocab_size=300,
        batch_tokens=64,
        micro_batch_tokens=32,
        learning_rate=1e-2,
        eval_every=5,
        save_every=2,
        device="cpu",
    )


def seeded(config: GPTJConfig, seed: int) -> dict[str, Tensor]:
    """The weights with which a run begins."""
    torch.manual_seed(seed)
    return initial_model(config, None).state_dict()


def weights_of(settings: TrainingSettings) -> dict[str, Tensor]:
    return read_weights(settings.output)


def test_the_loss_falls_and_the_folder_can_be_served(settings: TrainingSettings) -> None:
    listener = Listener()
    train(replace(settings, steps=40), ["--steps", "40"], listener)
    assert listener.losses[-1] < listener.losses[0] - 0.3
    config = read_config(settings.output)
    assert isinstance(config, GPTJConfig)
    assert config == replace(
        settings.model_config(0), torch_dtype=config.torch_dtype, attention_type="cottention"
    )
    load_model(settings.output, config, torch.float32)
    with safe_open(settings.output / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert any("def __init__(self, " in message for message in listener.messages)


def test_the_folder_has_what_other_tools_look_for(settings: TrainingSettings) -> None:
    train(settings, ["--steps", "12"], Listener())
    assert sorted(path.name for path in settings.output.iterdir()) == [
        "README.md", "config.json", "generation_config.json", "merges.txt", "model.safetensors",
        "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json", "training.json",
        "vocab.json",
    ]  # fmt: skip
    whole = Tokenizer.from_folder(settings.output)
    (settings.output / "tokenizer.json").unlink()
    assert Tokenizer.from_folder(settings.output).encode("self.x = 'é'") == whole.encode(
        "self.x = 'é'"
    )


def test_the_card_agrees_with_training_json_and_names_no_path(
    settings: TrainingSettings, tmp_path: Path
) -> None:
    train(settings, ["--steps", "12"], Listener())
    facts = json.loads((settings.output / "training.json").read_text(encoding="utf-8"))
    card = (settings.output / "README.md").read_text(encoding="utf-8")
    assert facts["command"] == "python -m cottention.engine.training --steps 12"
    assert facts["training"]["tokens"] == 12 * 64
    for told in (facts["command"], facts["corpus"]["sha256"], facts["training"]["machine"]):
        assert told in card
    assert f"**{facts['held_out_bits_per_byte']['total']:.3f}**" in card
    assert str(tmp_path) not in card + json.dumps(facts)


def test_a_killed_run_ends_with_the_same_weights(
    settings: TrainingSettings, tmp_path: Path
) -> None:
    train(settings, [], Listener())
    other = replace(settings, output=tmp_path / "other", checkpoints=tmp_path / "kept")
    for until in (3, 9):
        with pytest.raises(Killed):
            train(other, [], Listener(until))
    listener = Listener()
    train(other, [], listener)
    assert "resumed at step 8" in listener.messages
    straight, resumed = weights_of(settings), weights_of(other)
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
    assert not list(other.checkpoints.glob("*.unfinished"))


def test_a_finished_run_is_exported_again_without_training(settings: TrainingSettings) -> None:
    train(settings, [], Listener())
    listener = Listener()
    train(settings, [], listener)
    assert listener.losses == []


def test_another_runs_checkpoint_is_refused(settings: TrainingSettings) -> None:
    with pytest.raises(Killed):
        train(settings, [], Listener(4))
    with pytest.raises(ConfigurationError, match=r"\(learning_rate differ\)"):
        train(replace(settings, learning_rate=2e-2), [], Listener())
    train(replace(settings, learning_rate=2e-2, resume=False), [], Listener())


def test_hours_end_a_run(settings: TrainingSettings) -> None:
    listener = Listener()
    train(replace(settings, steps=100_000, hours=1e-5), [], listener)
    assert len(listener.losses) < 20


@pytest.mark.parametrize(
    "attention",
    [
        pytest.param(kind, marks=() if kind in ("softmax", "gated_rfa") else pytest.mark.slow)
        for kind in ATTENTION_KINDS
        if kind != "cottention"
    ],
)
def test_other_kinds_of_attention_are_trained_alike(
    settings: TrainingSettings, attention: str
) -> None:
    """Same weights but for the map's own; kinds with a state of fixed size are served."""
    listener = Listener()
    train(replace(settings, steps=40, attention=attention), [], listener)
    assert listener.losses[-1] < listener.losses[0] - 0.3
    config = read_config(settings.output)
    assert isinstance(config, GPTJConfig)
    assert (config.attention_type, config.rotary_dim) == (attention, 8)
    assert config.max_exact_length == (16 if attention == "cosformer" else None)
    first, other = (seeded(each, settings.seed) for each in (settings.model_config(0), config))
    assert first.keys() - other.keys() == {"transformer.h.0.attn.norm_const"}
    assert all(torch.equal(first[name], other[name]) for name in first.keys() & other.keys())
    written = weights_of(settings)
    for name in other.keys() - first.keys():
        assert written[name].dtype == torch.float32
        is_trained = "rfa_sigma" in name or "rfa_gate" in name
        assert torch.equal(written[name], other[name]) != is_trained, "of the seed, as it was"
    if attention == "softmax":
        with pytest.raises(ModelFolderError, match="for training and benchmarks only"):
            Engine(settings.output)
    else:
        [done] = Engine(settings.output).generate(["class"], SamplingParams(max_tokens=3))
        assert done.token_ids
    card = (settings.output / "README.md").read_text(encoding="utf-8")
    assert "Cottention model" not in card


def test_flags_are_the_settings() -> None:
    assert parse([], {}).value == TrainingSettings()
    changed = parse(["--steps", "7", "--corpus", "texts", "--no-resume", "--hours", "0.5"], {})
    assert changed.value == replace(
        TrainingSettings(), steps=7, corpus=Path("texts"), resume=False, hours=0.5
    )


def test_variables_and_a_file_set_what_flags_do(tmp_path: Path) -> None:
    """Those of training are apart from the server's, whose COTTENTION_DEVICE is another thing."""
    file = tmp_path / "training.toml"
    file.write_text('steps = 5\nwidth = 64\nlearning-rate = 1\noutput = "made"\n')
    environ = {
        "COTTENTION_TRAINING_CONFIG": str(file),
        "COTTENTION_TRAINING_STEPS": "6",
        "COTTENTION_TRAINING_RESUME": "false",
        "COTTENTION_WIDTH": "128",
    }
    resolved = parse(["--heads", "2"], environ)
    assert resolved.value == replace(
        TrainingSettings(),
        steps=6,
        width=64,
        heads=2,
        learning_rate=1.0,
        output=Path("made"),
        resume=False,
    )
    assert str(resolved.origins["steps"]) == "variable COTTENTION_TRAINING_STEPS"
    assert parse(to_arguments(resolved), {}).value == resolved.value, "as the card tells it"


@pytest.mark.parametrize(
    ("arguments", "in_file", "says"),
    [
        (["--steps", "many"], "", "--steps must be a whole number; it is 'many'"),
        (["--dropout", "2"], "", "--dropout must be at most 1; it is 2.0"),
        ([], "attention = 'flash'", f"must be one of {', '.join(ATTENTION_KINDS)}"),
        ([], "max_slots = 3", "unknown key max_slots"),
    ],
)
def test_a_wrong_setting_ends_the_run_with_a_line(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    arguments: list[str],
    in_file: str,
    says: str,
) -> None:
    file = tmp_path / "training.toml"
    file.write_text(in_file)
    with pytest.raises(SystemExit) as caught:
        parse(["--config", str(file), *arguments], {})
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert says in said
    assert said.count("\n") == 1


def test_progress_is_lines_or_a_bar(capsys: pytest.CaptureFixture[str]) -> None:
    standing = TrainingStatus(3, 10, 2.5, 1234.5, 90.0, 1.5)
    assert isinstance(open_progress(), PlainProgress)
    for progress in (PlainProgress(), BarProgress()):
        with progress:
            progress.update(standing)
            progress.update(standing)
            progress.log("done")
    printed = capsys.readouterr().out
    assert len(re.findall(r"(?m)^step 3/10  loss 2.500 ", printed)) == 1
    assert "1,234 tokens/s" in printed
    assert printed.count("done") == 2


def test_the_command_says_in_a_line_what_is_wrong(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "cottention.engine.training",
         "--corpus", str(tmp_path), "--threads", "1"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert "0 training and 0 held-out" in done.stderr


def test_a_run_that_begins_with_a_model_reports_both_runs(
    settings: TrainingSettings, tmp_path: Path
) -> None:
    train(settings, ["--steps", "12"], Listener())
    again = replace(
        settings,
        begin_with=settings.output,
        output=tmp_path / "second",
        checkpoints=tmp_path / "second-checkpoints",
        learning_rate=1e-12,
        cut_every=20,
    )
    train(again, ["--begin-with", "first"], Listener())
    first, second = weights_of(settings), weights_of(again)
    for name, weight in first.items():  # each is rounded to the type that serves it best
        torch.testing.assert_close(second[name].float(), weight.float(), atol=1e-2, rtol=0)
    card = (again.output / "README.md").read_text(encoding="utf-8")
    assert card.index("engine.training --steps 12") < card.index("--begin-with first")
