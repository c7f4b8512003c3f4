"""`cottention run-batch`: files that are wrong, answers and their lines, and runs that go on.

In this process, around a server of a fake engine, unless a model is loaded.
"""

import fcntl
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cottention.server.cli.main import main
from cottention.server.client import batch as batch_module
from tests.engine.encoders import encoder_folder
from tests.server.cli.at_terminal import XTERM, at_terminal
from tests.server.fake_engine import FakeEngine
from tests.server.live import Live, serving


@pytest.fixture
def live() -> Iterator[Live]:
    with serving() as live:
        yield live


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    return tmp_path / "in.jsonl", tmp_path / "out.jsonl"


def request(custom_id: str, url: str = "/v1/completions", **body: Any) -> dict[str, Any]:
    given = {"prompt": "x", "max_tokens": 2} | body if url == "/v1/completions" else body
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": given}


def fill(path: Path, *requests: Any) -> None:
    lines = [each if isinstance(each, str) else json.dumps(each) for each in requests]
    path.write_text("".join(f"{line}\n" for line in lines))


def run(files: tuple[Path, Path], *flags: object) -> int:
    [asked, answers] = files
    return main(["run-batch", "-i", str(asked), "-o", str(answers), *map(str, flags)])


def answers_in(path: Path) -> dict[str, Any]:
    """The lines of an output by custom_id, each of which is there once."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(lines) == len({line["custom_id"] for line in lines})
    return {line["custom_id"]: line for line in lines}


def test_each_line_is_answered_in_openai_s_form(live: Live, files: tuple[Path, Path]) -> None:
    messages = [{"role": "user", "content": "x"}]
    fill(
        files[0],
        request("a", prompt="say:hi"),
        "",
        request("b", max_tokens=-1),
        request("é ", "/v1/chat/completions", messages=messages),
    )
    assert run(files, "--url", live.url) == 1, "a line failed"
    found = answers_in(files[1])
    assert {*found} == {"a", "b", "é "}
    good, bad, chat = found["a"], found["b"], found["é "]
    assert {*good} == {"id", "custom_id", "response", "error"}
    assert good["response"]["status_code"] == 200
    assert good["response"]["body"]["choices"][0]["text"] == "hi"
    assert good["response"]["body"]["id"].endswith(good["response"]["request_id"])
    assert good["error"] is bad["error"] is None
    assert bad["response"]["status_code"] == 400
    assert bad["response"]["body"]["error"]["param"] == "max_tokens"
    assert chat["response"]["status_code"] == 400, "the fake model has no template"
    assert len({each["id"] for each in found.values()}) == 3


def test_the_status_says_that_none_failed(
    live: Live, files: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    fill(files[0], *(request(str(number)) for number in range(40)))
    assert run(files, "--url", f"{live.url}/v1", "--max-concurrency", 3) == 0
    assert len(answers_in(files[1])) == 40
    assert capsys.readouterr() == ("", ""), "no bar where there is no terminal"


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        (["{"], "line 1: it is no JSON"),
        (["[1]"], "line 1: it must be a JSON object"),
        ([json.dumps(request(""))], "custom_id must be a text"),
        ([json.dumps(request("a") | {"method": "GET"})], 'method must be "POST"'),
        ([json.dumps(request("a", "/v1/sessions"))], "url must be one of /v1/completions,"),
        ([json.dumps(request("a") | {"body": 1})], "body must be an object"),
        ([json.dumps(request("a", stream=True))], "body.stream is not possible"),
        ([json.dumps(request(each)) for each in "abcab"], 'lines 1 and 4: both are "a"; lines 2'),
        (["{"] * 7, "; and 2 more"),
        (["", " "], "has no requests"),
    ],
)
def test_an_input_that_is_wrong_starts_nothing(
    live: Live,
    files: tuple[Path, Path],
    capsys: pytest.CaptureFixture[str],
    lines: list[str],
    told: str,
) -> None:
    fill(files[0], *lines, *([json.dumps(request("good"))] if lines != ["", " "] else []))
    assert run(files, "--url", live.url) == 2
    assert told in capsys.readouterr().err
    assert not files[1].exists()
    assert live.engine.seen == []


def test_a_run_goes_on_with_what_is_missing(live: Live, files: tuple[Path, Path]) -> None:
    """Also where the last line is torn: it is made again, and there once."""
    fill(files[0], *(request(str(number)) for number in range(6)))
    assert run(files, "--url", live.url) == 0
    whole = files[1].read_bytes().splitlines(keepends=True)
    for torn in (b"", whole[3][:1], whole[3][:-1], whole[3][:40]):
        files[1].write_bytes(b"".join(whole[:3]) + torn)
        num_seen = len(live.engine.seen)
        assert run(files, "--url", live.url) == 0
        assert {*answers_in(files[1])} == {*map(str, range(6))}
        assert files[1].read_bytes().startswith(b"".join(whole[:3]))
        assert len(live.engine.seen) - num_seen == 3
    assert run(files, "--url", "http://127.0.0.1:1") == 0, "nothing is left to ask"


def test_lines_that_failed_before_count(live: Live, files: tuple[Path, Path]) -> None:
    fill(files[0], request("a", max_tokens=-1))
    assert [run(files, "--url", live.url) for _ in range(2)] == [1, 1]


@pytest.mark.parametrize("content", ["mine\n", "mine", '{"a": 1}\n', "[]\n"])
def test_another_file_is_left_as_it_is(
    live: Live, files: tuple[Path, Path], content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    fill(files[0], request("a"))
    files[1].write_text(content)
    assert run(files, "--url", live.url) == 2
    assert "is no output of this input; line 1" in capsys.readouterr().err
    assert files[1].read_text() == content


def test_the_output_of_another_batch_is_left_as_it_is(
    live: Live, files: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    fill(files[0], request("a"))
    assert run(files, "--url", live.url) == 0
    before = files[1].read_text()
    fill(files[0], request("b"))
    assert run(files, "--url", live.url) == 2
    assert 'no custom_id "a"' in capsys.readouterr().err
    files[1].write_text(2 * before)
    fill(files[0], request("a"))
    assert run(files, "--url", live.url) == 2
    assert "there twice" in capsys.readouterr().err
    assert files[1].read_text() == 2 * before


def test_two_runs_do_not_write_one_output(
    live: Live, files: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Each would make the lines that the other makes."""
    fill(files[0], request("a"))
    with files[1].open("ab") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert run(files, "--url", live.url) == 2
    assert "another run writes" in capsys.readouterr().err
    assert run((files[0], files[0]), "--url", live.url) == 2


@pytest.mark.parametrize("flags", [("--url", "ftp://x"), ("--url", "http://x", "--model", "y")])
def test_flags_that_do_not_go(files: tuple[Path, Path], flags: tuple[str, ...]) -> None:
    fill(files[0], request("a"))
    assert run(files, *flags) == 2


def test_a_busy_server_is_asked_again(
    files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A limit of the server's must not become a failed line."""
    monkeypatch.setattr(batch_module, "_asked_delay", lambda _: 0.01)
    engine = FakeEngine(step_seconds=0.001)
    with serving(engine, api_key=("k" * 8,), key_max_requests=2) as live:
        fill(files[0], *(request(str(number)) for number in range(12)))
        flags = ("--api-key", "k" * 8, "--max-concurrency", 4)
        monkeypatch.setattr(batch_module, "MAX_ATTEMPTS", 10_000)
        assert run(files, "--url", live.url, *flags) == 0
    assert len(answers_in(files[1])) == 12


def test_a_limit_that_stays_is_a_failed_line(
    files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One request that can never run does not hold up all others for ever."""
    monkeypatch.setattr(batch_module, "MAX_ATTEMPTS", 1)
    engine = FakeEngine(step_seconds=0.01)
    with serving(engine, api_key=("k" * 8,), key_max_requests=1) as live:
        fill(files[0], *(request(str(number), max_tokens=20) for number in range(4)))
        flags = ("--api-key", "k" * 8, "--max-concurrency", 4)
        assert run(files, "--url", live.url, *flags) == 1
    found = [line["response"]["status_code"] for line in answers_in(files[1]).values()]
    assert len(found) == 4
    assert {*found} == {200, 429}


def test_a_server_that_is_gone_ends_the_run_and_loses_nothing(
    live: Live,
    files: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """No line is written as failed that was never asked."""
    monkeypatch.setattr(batch_module, "MAX_ATTEMPTS", 2)
    fill(files[0], request("a"), request("b"))
    assert run(files, "--url", "http://127.0.0.1:1") == 1
    assert "0 of 2 lines" in capsys.readouterr().err
    live.async_engine.drain()  # it answers with 503
    monkeypatch.setattr(batch_module, "MAX_WAIT_SECONDS", 0.01)
    assert run(files, "--url", live.url) == 1
    assert "503" in capsys.readouterr().err
    assert files[1].read_text() == ""


@pytest.mark.parametrize("path", ["missing/in.jsonl", "."])
def test_files_that_cannot_be_opened(
    tmp_path: Path, path: str, capsys: pytest.CaptureFixture[str]
) -> None:
    good = tmp_path / "good.jsonl"
    fill(good, request("a"))
    for wrong, flag in (
        ((tmp_path / path, tmp_path / "out"), "--input-file"),
        ((good, tmp_path / path), "--output-file"),
    ):
        assert run(wrong) == 2, "the status of flags and files that are wrong"
        told = capsys.readouterr().err
        assert told.count("\n") == 1
        assert f"give {flag}" in told


def test_a_model_is_loaded_here(files: tuple[Path, Path], gptj_folder: Path) -> None:
    messages = [{"role": "user", "content": "x"}]
    fill(
        files[0],
        request("text", model="mine", ignore_eos=True),
        request("chat", "/v1/chat/completions", messages=messages, max_tokens=2),
        request("vector", "/v1/embeddings", input="x"),
    )
    flags = ("--served-model-name", "mine", "--chat-template", "plain", "--embeddings")
    assert run(files, "--model", gptj_folder, *flags) == 0
    found = {name: line["response"]["body"] for name, line in answers_in(files[1]).items()}
    assert found["text"]["usage"]["completion_tokens"] == 2
    assert found["chat"]["choices"][0]["message"]["role"] == "assistant"
    assert found["vector"]["data"][0]["embedding"]


def test_a_bar_shows_how_far_it_is(tmp_path: Path, live: Live) -> None:
    live.engine.may_step.clear()
    fill(tmp_path / "in.jsonl", *(request(str(number)) for number in range(4)))
    files = ("-i", tmp_path / "in.jsonl", "-o", tmp_path / "out.jsonl")
    with at_terminal(tmp_path, "run-batch", *files, "--url", live.url, environ=XTERM) as it:
        it.shows("4 requests")
        live.engine.may_step.set()
        assert it.ends() == 0
    assert len(answers_in(tmp_path / "out.jsonl")) == 4


def test_an_encoder_embeds_a_batch(files: tuple[Path, Path]) -> None:
    fill(files[0], request("a", "/v1/embeddings", input="x"), request("b"))
    assert run(files, "--model", encoder_folder()) == 1
    found = answers_in(files[1])
    assert found["a"]["response"]["status_code"] == 200
    assert found["b"]["response"]["body"]["error"]["code"] == "unsupported_by_model"
