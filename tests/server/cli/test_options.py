"""The settings of the real commands: their file, what shows them, and which variables are known."""

import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from cottention.engine.config import EngineConfig
from cottention.engine.settings.declaration import settings_of
from cottention.engine.settings.sources import variable_of
from cottention.server.cli import main as cli
from cottention.server.cli.options import (
    GENERATE_SETTINGS,
    KNOWN_VARIABLES,
    SERVE_SETTINGS,
    warn_of_unknown_variables,
)
from cottention.server.config import GenerateConfig, ServerConfig

ROOT = Path(__file__).parents[3]
READ = re.compile(r"""["'](COTTENTION_[A-Z_]+)["']""")
SET = re.compile(r"^[ #-]*(?:ENV |name: )?(COTTENTION_[A-Z_]+)[=: \n]", re.MULTILINE)
"""In a Dockerfile, in a compose file or a file for it, in a manifest."""


def config(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What `cottention config ARGUMENTS` prints."""
    assert cli.main(["config", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def test_every_mistake_in_a_file_is_one_line_and_status_2(tmp_path: Path) -> None:
    """Of the process, whatever the command: nothing is loaded before the settings are read."""
    files: dict[str, tuple[bytes, str]] = {
        "unknown": (b"prot = 80", "unknown: unknown key prot; did you mean port?"),
        "type": (b"port = '80'", "port in {}/type must be a whole number; it is '80'"),
        "range": (b"port = 70000", "port in {}/range must be at most 65535; it is 70000"),
        "choice": (b"log-level = 'loud'", "log_level in {}/choice must be one of debug, info"),
        "both": (
            b"max_slots = 1\nstate_memory = '1G'",
            "give max_slots in {}/both or state_memory",
        ),
        "latin": (b"host = '\xe9'", "latin is not UTF-8 (byte 8); save it as UTF-8"),
        "yaml": (b"port: 80", "yaml is not TOML: "),
    }
    cases = [("serve", name, says) for name, (_, says) in files.items()]
    cases += [
        ("config", "missing", "--config {}/missing cannot be read: No such file or directory")
    ]
    cases += [("info", "unknown", "unknown key prot"), ("generate", "yaml", "is not TOML")]
    for name, (raw, _) in files.items():
        (tmp_path / name).write_bytes(raw)
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "cottention.server", command, "--config", str(tmp_path / name)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for command, name, _ in cases
    ]
    for (command, _, says), popen in zip(cases, started, strict=True):
        out, err = popen.communicate(timeout=60)
        assert (popen.returncode, out) == (2, ""), err
        assert err.count("\n") == 1, err
        assert err.startswith(f"cottention {command}: ")
        assert says.format(tmp_path) in err


def test_a_file_serves_every_command(
    capsys: pytest.CaptureFixture[str], gptj_folder: Path, tmp_path: Path
) -> None:
    """A key that another command knows is no mistake, and the model may be in the file, too."""
    file = tmp_path / "settings.toml"
    file.write_text(f'model = "{gptj_folder}"\nport = 0\nmax_slots = 2\nmax-tokens = 3\nseed = 5\n')
    assert cli.main(["info", "--config", str(file)]) == 0
    facts = capsys.readouterr().out
    assert "cottention-gptj" in facts
    assert "2 slots of" in facts
    assert cli.main(["generate", "def", "--config", str(file)]) == 0
    assert cli.main(["generate", "def", "--model", str(gptj_folder), "--max-tokens", "3",
                     "--seed", "5", "--max-slots", "1"]) == 0  # fmt: skip
    first, second = capsys.readouterr().out.splitlines()
    assert first == second


def test_config_shows_what_is_in_force_and_where_it_comes_from(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "settings.toml"
    file.write_text('port = 1\nhost = "::1"\nstate-memory = "512M"\nlog_level = "debug"\n')
    monkeypatch.setenv("COTTENTION_PORT", "2")
    monkeypatch.setenv("COTTENTION_LOG_LEVEL", "warning")
    arguments = ("some/model", "--config", file, "--log-level", "error")
    lines = config(capsys, *arguments).splitlines()
    rows = {line.split()[0]: re.split(r"  +", line)[1:] for line in lines}
    assert rows["port"] == ["2", "variable COTTENTION_PORT"]
    assert rows["host"] == ["::1", f"file {file}"]
    assert rows["state_memory"] == ["512M", f"file {file}"]
    assert rows["log_level"] == ["error", "flag --log-level"]
    assert rows["model"] == ["some/model", "argument MODEL"]
    assert rows["drain_seconds"] == ["30 seconds", "default"]
    assert rows["max_request_seconds"] == ["unlimited", "default"]
    assert len({line.index(rows[line.split()[0]][0]) for line in lines}) == 1
    served = [each.name for kind in SERVE_SETTINGS.values() for each in settings_of(kind)]
    assert list(rows) == ["setting", *served]

    shown = json.loads(config(capsys, *arguments, "--json"))
    assert list(shown) == served
    assert shown["port"] == {"value": 2, "source": "variable", "name": "COTTENTION_PORT"}
    assert shown["state_memory"] == {"value": 1 << 29, "source": "file", "name": str(file)}
    assert shown["max_request_seconds"] == {"value": None, "source": "default", "name": None}


def test_config_hides_secrets_and_nothing_else(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "settings.toml"
    file.write_text('api_key = ["first-key", "second-key"]\napi_key_file = "/etc/keys"\n')
    monkeypatch.setenv("COTTENTION_METRICS_KEY", "third-key")
    monkeypatch.setenv("COTTENTION_API_KYE", "fourth-key")
    for form in ((), ("--json",)):
        printed = config(capsys, "--config", file, *form)
        assert "-key" not in printed
        assert "********" in printed
        assert "/etc/keys" in printed
    assert cli.main(["config", "--config", str(file)]) == 0
    assert "did you mean COTTENTION_API_KEY?" in (said := capsys.readouterr().err)
    assert "fourth-key" not in said
    assert (
        json.loads(config(capsys, "--config", file, "--json"))["api_key"]["value"]
        == ["********"] * 2
    )
    assert config(capsys, "--config", os.devnull, "--api-key", "k", "--json").count("**") == 8


def test_a_setting_has_one_meaning_in_all_commands() -> None:
    """One file serves them all, and `COTTENTION_SEED` or `--threads` is one thing."""
    seen: dict[str, tuple[type, str | None]] = {}
    for kind in {*SERVE_SETTINGS.values(), *GENERATE_SETTINGS.values()}:
        for each in settings_of(kind):
            assert seen.setdefault(each.name, (each.type, each.unit)) == (each.type, each.unit)
    for kind in (ServerConfig, EngineConfig, GenerateConfig):
        kind()


def test_what_the_code_reads_by_name_is_known() -> None:
    sources = [*(ROOT / "engine").rglob("*.py"), *(ROOT / "server").rglob("*.py")]
    texts = [path.read_text() for path in (*sources, *(ROOT / "csrc").glob("*.cpp"))]
    found = {name for text in texts for name in READ.findall(text)}
    assert len(found) >= 5
    assert found <= KNOWN_VARIABLES


def test_what_the_containers_set_is_known() -> None:
    files = [path for path in (ROOT / "docker").rglob("*") if path.is_file()]
    found = {name for path in files for name in SET.findall(path.read_text())}
    assert len(found) > 30
    assert found <= KNOWN_VARIABLES


def test_each_unknown_variable_is_warned_of_without_its_value(
    caplog: pytest.LogCaptureFixture,
) -> None:
    warn_of_unknown_variables(
        {
            "COTTENTION_MAX_SLOT": "3",
            "COTTENTION_API_KYE": "secret",
            "COTTENTION_WEATHER": "fine",
            "COTTENTION_PROT": "",
            "COTTENTION_MAX_SLOTS": "3",
            "COTTENTION_CONFIG": "a file",
            "COTTENTION_OPS": "compiled",
            "COTTENTION_TEMPERATURE": "0",
            "COTTENTION_TRAINING_STEPS": "7",
            variable_of("max_batch_tokens"): "7",
            "OTHER_MAX_SLOT": "3",
        }
    )
    assert [record.getMessage() for record in caplog.records] == [
        "unknown variable COTTENTION_API_KYE is ignored; did you mean COTTENTION_API_KEY?",
        "unknown variable COTTENTION_MAX_SLOT is ignored; did you mean COTTENTION_MAX_SLOTS?",
        "unknown variable COTTENTION_WEATHER is ignored",
    ]
    assert {record.levelno for record in caplog.records} == {logging.WARNING}


def test_every_setting_that_is_a_file_or_folder_is_declared_as_a_path() -> None:
    """So that a ~ in it is expanded; the help text of no other setting begins like this."""
    every = {**SERVE_SETTINGS, **GENERATE_SETTINGS}.values()
    settings = {each.name: each for kind in every for each in settings_of(kind)}
    paths = {name for name, each in settings.items() if each.is_path}
    assert paths >= {"model", "session_dir", "api_key_file", "chat_template"}
    named = re.compile(r"^(a |the )?(folder|file|path|directory|template file|model folder)\b")
    assert {name for name, each in settings.items() if named.match(each.help)} == paths
