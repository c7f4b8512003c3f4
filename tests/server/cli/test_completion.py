"""Shells complete commands, flags, choices and files."""

import shutil
import subprocess
from pathlib import Path

import pytest

from cottention.server.cli import main as cli
from cottention.server.cli.parser import SHELLS


@pytest.fixture
def script(request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]) -> str:
    assert cli.main(["completion", request.param]) == 0
    return capsys.readouterr().out


ASKING = """
source {script}
complete -p cottention >/dev/null || exit 1
COMP_WORDS=({words}) COMP_CWORD={last}
$(complete -p cottention | sed -E 's/.*-F ([^ ]+).*/\\1/')
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


@pytest.mark.parametrize("script", ["bash"], indirect=True)
def test_bash_completes_commands_flags_choices_and_files(script: str, tmp_path: Path) -> None:
    (tmp_path / "script").write_text(script)
    (tmp_path / "keys.txt").touch()

    def completed(*words: str) -> list[str]:
        quoted = " ".join(f"'{word}'" for word in ("cottention", *words))
        asking = ASKING.format(script=tmp_path / "script", words=quoted, last=len(words))
        command = ["bash", "--norc", "-c", asking]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        return done.stdout.split()

    assert completed("gen") == ["generate"]
    assert completed("serve", "--tls-") == ["--tls-cert", "--tls-key"]
    assert completed("serve", "--log-format", "") == ["text", "json"]
    assert completed("serve", "--api-key-file", "ke") == ["keys.txt"]
    assert completed("completion", "z") == ["zsh"]


@pytest.mark.parametrize("script", SHELLS, indirect=True)
def test_each_shell_takes_its_script(
    script: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    assert "tls" in script
    shell = request.node.callspec.params["script"]
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    (tmp_path / "script").write_text(script)
    subprocess.run([shell, "-n", str(tmp_path / "script")], check=True)
