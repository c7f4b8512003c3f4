"""`cottention chat` and `generate -i`: at a terminal, in pipes, and with a model of their own."""

import subprocess
import sys
from pathlib import Path

import pytest

from cottention.server.generation.chat_template import ChatTemplate
from cottention.server.generation.template_environment import compile_template
from tests.engine.making import attention_folder
from tests.server.cli.at_terminal import COLOURS, CTRL_C, CTRL_D, ROOT, UP, XTERM, at_terminal
from tests.server.live import Live, eventually, serving

TEMPLATE = ChatTemplate(compile_template("{{ messages[-1]['content'] }}"), (), {})
"""The prompt is the last message, so that the fake engine says what it is told to."""


def piped(stdin: str, *arguments: object) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "cottention.server", *map(str, arguments)]
    return subprocess.run(
        command, cwd=ROOT, input=stdin, capture_output=True, text=True, timeout=250, check=False
    )


def sessions(live: Live) -> list[str]:
    return [each["id"] for each in live.client.get("/v1/sessions").json()["data"]]


def held(live: Live) -> set[str]:
    """The texts of all sessions."""
    return {live.text_of(each) for each in sessions(live)}


def test_a_conversation_with_branches_and_files(tmp_path: Path) -> None:
    """Each command does to the server's sessions what it says, and they are gone in the end."""
    with serving(template=TEMPLATE) as live, at_terminal(tmp_path, "chat", "--url", live.url) as it:
        it.shows("fake: type a message")
        it.shows("> ")
        it.type("say:one\n")
        it.shows("\none\n")
        it.type("/fork\n")
        it.shows("this is branch-1\nbranch-1> ")
        it.type("say:two\n")
        it.shows("\ntwo\n")
        assert held(live) == {"say:oneone", "say:oneonesay:twotwo"}
        it.type(f"/save {tmp_path}/kept\n")
        it.shows("wrote ")
        assert (tmp_path / "kept").stat().st_mode & 0o777 == 0o600
        it.type("/rewind\n")
        it.shows("branch-1 holds 10 tokens")
        assert held(live) == {"say:oneone"}
        it.type("/rewind 9\n")
        it.shows("branch-1 holds 0 tokens")
        it.type(f"/load {tmp_path}/kept\n")
        it.shows("kept holds 20 tokens")
        it.type("/switch main\n")
        it.shows("main holds 10 tokens")
        it.type("/branches\n")
        assert it.shows("\n  kept  20 tokens").endswith("* main  10 tokens\n  branch-1  0 tokens")
        for wrong, told in (
            ("/switch nowhere", "there is no branch nowhere; there are main, branch-1, kept"),
            ("/load /nowhere", "/nowhere cannot be read: No such file or directory"),
            (f"/load {ROOT}/LICENSE", "no snapshot"),
            ("/rewind 0", "N must be a whole number from 1"),
            ("/fork kept", "there is a branch kept already"),
            ("/sing", "there is no command /sing"),
        ):
            it.type(f"{wrong}\n")
            it.shows(told)
        it.type("/help\n")
        it.shows("/quit")
        it.type("/quit\n")
        assert it.ends() == 0
        assert sessions(live) == []


def test_ctrl_c_stops_the_answer_and_ctrl_d_leaves(tmp_path: Path) -> None:
    """The session keeps what was shown, the program goes on, and nothing else of it runs on."""
    with serving(template=TEMPLATE) as live, at_terminal(tmp_path, "chat", "--url", live.url) as it:
        it.shows("> ")
        it.interrupts("(Ctrl-D leaves)")
        live.engine.hold_after = 3
        it.type("go\n")
        it.shows("\nabc")
        it.type(CTRL_C)
        eventually(lambda: bool(live.async_engine.streams[0].was_cancelled))
        live.engine.may_step.set()
        it.shows("(stopped)")
        assert held(live) == {"goabc"}
        it.type("say:more\n")
        it.shows("\nmore\n")
        assert held(live) == {"goabcsay:moremore"}
        it.shows("> ")  # before it, the terminal itself takes Ctrl-D
        it.type(CTRL_D)
        assert it.ends() == 0


def test_what_goes_wrong_is_a_line_and_the_conversation_goes_on(tmp_path: Path) -> None:
    with serving(template=TEMPLATE) as live, at_terminal(tmp_path, "chat", "--url", live.url) as it:
        it.shows("> ")
        it.type("fail\n")
        it.shows("the engine failed on this request")
        it.type("say:fine\n")
        it.shows("\nfine\n")
        assert held(live) == {"say:finefine"}


def test_lines_are_kept_for_the_next_conversation_and_joined_by_a_backslash(tmp_path: Path) -> None:
    with serving(template=TEMPLATE) as live:
        with at_terminal(tmp_path, "chat", "--url", live.url) as it:
            it.shows("> ")
            it.type("say:a\\\n")
            it.shows(". ")
            it.type("b\n")
            it.shows("\na\nb\n")
            it.type("say:again\n")
            it.shows("\nagain\n")
            it.shows("> ")  # before it, the terminal itself takes Ctrl-D
            it.type(CTRL_D)
            assert it.ends() == 0
        history = tmp_path / "cottention" / "history"
        assert history.stat().st_mode & 0o777 == 0o600
        assert history.read_text().splitlines() == ["say:a\\", "b", "say:again"]
        with at_terminal(tmp_path, "chat", "--url", live.url) as it:
            it.shows("> ")
            it.type(f"{UP}\n")
            it.shows("say:again\nagain\n")
            it.type("/re\t\n")
            it.shows("/rewind")


def test_a_model_without_a_template_is_offered_to_continue_text(tmp_path: Path) -> None:
    with serving() as live:
        with at_terminal(tmp_path, "chat", "--url", live.url) as it:
            it.shows("has no chat template")
            it.type("n\n")
            assert it.ends() == 1
        with at_terminal(tmp_path, "chat", "--url", live.url) as it:
            it.shows("Continue your text instead? [Y/n] ")
            it.type("\n")
            it.shows("type text to continue")
            it.type("say:x\n")
            it.shows("\nx\n")
            it.type("\n")  # goes on: the fake engine says the alphabet to an empty prompt
            it.shows("abcdef")
        done = piped("say:x", "chat", "--url", live.url)
        assert (done.returncode, done.stdout) == (1, "")
        assert "has no chat template" in done.stderr
        assert "start its server with --chat-template plain" in done.stderr
        assert done.stderr.count("\n") == 1


def test_a_model_without_a_template_that_is_loaded_here_can_be_given_one(
    gptj_folder: Path,
) -> None:
    refused = piped("x", "chat", "--model", gptj_folder)
    assert refused.returncode == 1
    assert "chat with --chat-template plain" in refused.stderr
    flags = ["--chat-template", "plain", "--max-tokens", 1]
    assert piped("x", "chat", "--model", gptj_folder, *flags).returncode == 0


def test_texts_are_continued_line_by_line(tmp_path: Path) -> None:
    """What stands on a new line of the terminal is on a new line of the text."""
    with (
        serving() as live,
        at_terminal(tmp_path, "generate", "say:1", "-i", "--url", live.url) as it,
    ):
        it.shows("say:11\n")
        it.type("say:2\n")
        it.shows("abcdef")  # it does not begin with say:, but with a line break
        eventually(lambda: [each.prompt for each in live.engine.seen] == ["say:1", "\nsay:2"])


@pytest.mark.parametrize("where", ["variable", "file", "json"])
def test_pipes_carry_a_message_and_its_answer(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of standard input is one message; standard output is the answer and nothing else."""
    flags: list[object] = []
    if where == "variable":
        monkeypatch.setenv("COTTENTION_API_KEY", "one-of-them")
    else:
        file = tmp_path / "keys"
        is_json = where == "json"
        file.write_text('{"me": {"key": "one-of-them"}}' if is_json else "# mine\none-of-them\n")
        flags = ["--api-key-file", file]
    with serving(template=TEMPLATE, api_key=("one-of-them",)) as live:
        done = piped("say:two\nlines", "chat", "--url", f"{live.url}/v1", *flags)
        assert (done.returncode, done.stdout, done.stderr) == (0, "two\nlines\n", "")


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("ftp://x", "give http://HOST:PORT"),
        ("http://127.0.0.1:1", "http://127.0.0.1:1 cannot be reached: Connection refused; start"),
        ("unix:/nowhere", "unix:/nowhere cannot be reached: No such file or directory; start"),
        ("", "Incorrect API key provided"),
    ],
)
def test_a_server_that_cannot_be_used_is_one_line(url: str, told: str) -> None:
    with serving(template=TEMPLATE, api_key=("one-of-them",)) as live:
        done = piped("hello", "chat", "--url", url or live.url)
    assert done.returncode in (1, 2)
    assert told in done.stderr
    assert done.stderr.count("\n") == 1


def test_colours_are_for_terminals_that_want_them(tmp_path: Path) -> None:
    with serving(template=TEMPLATE) as live:
        for environ, has_any in (
            (XTERM, True),
            (XTERM | {"NO_COLOR": "1"}, False),
            ({"TERM": "dumb"}, False),
        ):
            with at_terminal(tmp_path, "chat", "--url", live.url, environ=environ) as it:
                it.shows("> ")
                it.type("/quit\n")
                assert it.ends() == 0
                assert bool(COLOURS.search(it.seen)) is has_any


def test_a_model_does_not_steer_the_terminal(tmp_path: Path) -> None:
    """An answer with an escape sequence would colour, move or rename what the person sees."""
    with serving(template=TEMPLATE) as live:
        arguments = ("chat", "say:\x1b[31mred\x9b\rx", "--url", live.url)
        with at_terminal(tmp_path, *arguments) as it:
            it.shows("␛[31mred")
            assert it.ends() == 0
            assert "\x1b[31m" not in it.seen


@pytest.mark.slow
def test_a_model_of_its_own_in_a_socket_of_its_own(tmp_path: Path) -> None:
    """Without --url the model is served within the process, to nobody else, and leaves nothing."""
    folder = attention_folder("cottention")
    flags = ("--chat-template", "plain", "--max-tokens", 4, "--temperature", 0)
    with at_terminal(
        tmp_path, "chat", "--model", folder, *flags, environ={"TMPDIR": str(tmp_path)}
    ) as it:
        it.shows("type a message")
        it.shows("> ")
        [made] = (each for each in tmp_path.glob("cottention-*") if (each / "server").exists())
        assert made.stat().st_mode & 0o777 == 0o700
        it.type("hello there\n")
        it.shows("(stopped at --max-tokens)")
        it.type("/rewind\n")
        it.shows("main holds 0 tokens")
        it.shows("> ")  # before it, the terminal itself takes Ctrl-D
        it.type(CTRL_D)
        assert it.ends() == 0
        assert list(tmp_path.glob("cottention-*")) == []
    done = piped("hello", "generate", "-i", "--model", folder, "--max-tokens", 4, "--seed", 1)
    same = piped("hello", "generate", "--model", folder, "--max-tokens", 4, "--seed", 1)
    assert done.stdout.removesuffix("\n") == same.stdout.removesuffix("\n") != ""
