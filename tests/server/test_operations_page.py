"""The runbook is true: its table of metrics, its formulas, its table of sizes."""

import json
import re
import tomllib
from pathlib import Path

import pytest
import torch

from cottention.engine import StateSpec
from cottention.engine.config import DEFAULT_SLOTS
from cottention.engine.sessions.fingerprint import Fingerprint
from cottention.engine.sessions.snapshot import SnapshotCodec
from cottention.engine.state.context_window import context_schedules
from cottention.engine.state.session_state import SessionState
from cottention.engine.state.spec import recurrence_tensors
from cottention.server.cli import main as cli
from cottention.server.config import ServerConfig
from tests.server.exported import exported_families

PAGE = (Path(__file__).parents[2] / "docs" / "operations.md").read_text(encoding="utf-8")
SHAPES = {
    "shipped, 7M": (6, 4, 64),
    "Cottention 300M": (20, 16, 64),
    "Cottention 1.2B": (20, 16, 128),
}
"""Layers, heads and their width."""


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|\n").split("|")]


def test_it_names_every_exported_metric_once() -> None:
    names = re.findall(r"^\| `((?:cottention:|process_)\w+)` \|", PAGE, re.MULTILINE)
    assert sorted(names) == sorted(exported_families())


@pytest.mark.parametrize("model", SHAPES)
def test_its_sizes_are_those_of_the_spec(model: str) -> None:
    layers, heads, width = SHAPES[model]
    state = recurrence_tensors(layers=layers, heads=heads, value_width=width, key_width=width)
    size = StateSpec(state).bytes_per_slot
    slot = StateSpec(state, has_spare=True)
    assert slot.bytes_per_slot == 2 * size
    [row] = [line for line in PAGE.splitlines() if line.startswith(f"| {model} |")]
    disk = 1000 * size / 1e9
    checkpoints = ServerConfig().session_checkpoints
    assert cells(row)[1:] == [
        f"{size:,}",
        f"{10**9 // slot.bytes_per_slot:,}",
        f"{DEFAULT_SLOTS * slot.bytes_per_slot:,}",
        f"{disk:.2f} GB",
        f"{disk * (1 + checkpoints):.2f} GB",
    ]


@pytest.mark.parametrize("has_denominator", [False, True])
def test_its_formulas(has_denominator: bool) -> None:
    spec = StateSpec(
        recurrence_tensors(
            layers=3, heads=2, value_width=8, key_width=16, has_denominator=has_denominator
        )
    )
    assert spec.bytes_per_slot == 3 * 2 * 8 * 16 * 4 + has_denominator * 3 * 2 * 16 * 4
    state = SessionState(
        rows=tuple(torch.zeros(shape) for shape in spec.shapes.values()),
        position=10**9,
        pending=(5, 6, 7),
        recent=tuple(range(900)),
        counts=dict.fromkeys(range(500), 1),
    )
    prints = Fingerprint("a" * 64, "b" * 64, "c" * 200, "d" * 100)
    codec = SnapshotCodec(prints, spec, 1000, context_schedules(900), 900)
    beyond = len(codec.encode(state)) - (spec.bytes_per_slot + 4 * (900 + 3) + 8 * 500)
    assert 0 < beyond < 2000


def test_its_commands_and_defaults_are_those_of_the_files() -> None:
    example = (Path(__file__).parents[2] / "docker" / "env.example").read_text()
    named = set(re.findall(r"`([A-Z_]+)[=`]", PAGE)) - {"STOP_GRACE", "COTTENTION_CONFIG"}
    for name in (each for each in named if not each.startswith("OTEL_")):  # OpenTelemetry's own
        assert f"#{name}=" in example, name
    for flag in set(re.findall(r"`--([a-z-]+)`", PAGE)):
        assert f"#COTTENTION_{flag.upper().replace('-', '_')}=" in example, flag


def test_its_configuration_file_is_read(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    [example] = re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)
    file = tmp_path / "cottention.toml"
    file.write_text(example, encoding="utf-8")
    assert cli.main(["config", "--config", str(file), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    applied = {name: each["value"] for name, each in shown.items() if each["source"] == "file"}
    assert applied == tomllib.loads(example) | {"session_memory": 2 << 30}
