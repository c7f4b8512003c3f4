"""Shells complete commands, flags, choices and files."""

import shutil
import subprocess
from pathlib import Path

import pytest

from cottention.server.cli import main as cli
from cottention.server.cli.parser import SHELLS
from tests.server.cli.at_terminal import XTERM, at_terminal


@pytest.fixture
def script(request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]) -> str:
    assert cli.main(["completion", request.param]) == 0
    return capsys.readouterr().out


def needs(shell: str) -> None:
    """Skip the test where a shell is not installed; .ci/install-shells installs it."""
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")


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


@pytest.mark.parametrize("script", ["fish"], indirect=True)
def test_fish_completes_commands_flags_choices_and_files(script: str, tmp_path: Path) -> None:
    needs("fish")
    (tmp_path / "script").write_text(script)
    (tmp_path / "keys.txt").touch()

    def completed(line: str) -> list[str]:
        asking = f"source script; complete -C '{line}'"
        command = ["fish", "--no-config", "-c", asking]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        assert done.stderr == ""
        return [each.split("\t")[0] for each in done.stdout.splitlines()]

    assert completed("cottention gen") == ["generate"]
    assert completed("cottention serve --tls-") == ["--tls-cert", "--tls-key"]
    assert completed("cottention serve --log-format ") == ["text", "json"]
    assert completed("cottention serve --api-key-file ke") == ["keys.txt"]
    assert completed("cottention completion z") == ["zsh"]


@pytest.mark.parametrize("script", ["zsh"], indirect=True)
def test_zsh_completes_commands_flags_choices_and_files(script: str, tmp_path: Path) -> None:
    """At a terminal, where alone zsh completes, with the script read as docs/terminal.md says."""
    needs("zsh")
    (tmp_path / "script").write_text(script)
    (tmp_path / "keys.txt").touch()
    with at_terminal(tmp_path, environ=XTERM, program=("zsh", "-f", "-i")) as it:
        it.type(f"PS1=; cd {tmp_path}; autoload -Uz compinit; compinit -u -D\n")
        it.type('eval "$(cat script)"\n')
        it.type("bindkey '^I' expand-or-complete; echo IS-$((1))-READY\n")
        it.shows("IS-1-READY\n")
        for typed, completed in (
            ("cottention gen", "cottention generate"),
            ("cottention serve --tls-c", "--tls-cert"),
            ("cottention serve --log-format j", "--log-format json"),
            ("cottention serve --api-key-file ke", "--api-key-file keys.txt"),
            ("cottention completion z", "completion zsh"),
        ):
            it.type(f"{typed}\t")
            it.shows(completed)
            it.type("\x15")  # empties the line


@pytest.mark.parametrize("script", SHELLS, indirect=True)
def test_each_shell_takes_its_script(
    script: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    assert "tls" in script
    shell = request.node.callspec.params["script"]
    needs(shell)
    (tmp_path / "script").write_text(script)
    subprocess.run([shell, "-n", str(tmp_path / "script")], check=True)
