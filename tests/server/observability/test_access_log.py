"""The log: one line for each request, in two forms, and no text of a prompt unless it is wanted."""

import json
import logging
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from cottention.server.log_config import FIELDS, JsonFormatter, TextFormatter
from tests.server.limits.test_api_keys import bearer
from tests.server.live import Live, eventually, serving

ROOT = Path(__file__).parents[3]


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Any:
    """The fields of each line so far."""
    caplog.set_level(logging.INFO, "cottention.requests")
    return lambda: [getattr(r, FIELDS) for r in caplog.records if r.name == "cottention.requests"]


def only(lines: Any) -> dict[str, Any]:
    eventually(lines)
    (line,) = lines()
    return dict(line)


def test_a_request_is_one_line(lines: Any) -> None:
    with serving() as live:
        answer = live.client.post(
            "/v1/completions",
            json={"prompt": ["abc", "de"], "n": 2, "max_tokens": 3},
            headers={"X-Request-Id": "mine"},
        )
        assert answer.status_code == 200
        fields = only(lines)
    seconds, started, first = (
        fields.pop(name) for name in ("seconds", "seconds_to_start", "seconds_to_first_token")
    )
    assert 0 <= started <= first <= seconds < 10
    assert fields == {
        "id": "mine",
        "key": "",
        "method": "POST",
        "path": "/v1/completions",
        "status": 200,
        "prompt_tokens": 5,
        "cached_tokens": 0,
        "completion_tokens": 12,
        "finish_reason": "length",
    }


@pytest.mark.parametrize(
    ("body", "status", "ended"),
    [
        ({"prompt": "x", "max_tokens": -1}, 400, None),
        ({"prompt": "fail", "max_tokens": 5}, 500, "error"),
        ({"prompt": ["say:ab", "x"], "max_tokens": 5}, 200, "stop,length"),
        ({"prompt": "x", "max_tokens": 5, "stream": True}, 200, "length"),
    ],
)
def test_the_line_has_status_and_finish_reason(
    lines: Any, body: dict[str, Any], status: int, ended: str | None
) -> None:
    with serving() as live:
        live.complete(**body)
        fields = only(lines)
        assert (fields["status"], fields.get("finish_reason")) == (status, ended)


def test_a_disconnected_request_is_logged(lines: Any) -> None:
    with serving() as live:
        live.engine.step_seconds = 0.01
        with live.connect(prompt="x", max_tokens=100_000, stream=True):
            eventually(lambda: live.engine.num_generated > 3)
        fields = only(lines)
        assert (fields["status"], fields["finish_reason"]) == (200, "client_disconnected")
        assert fields["completion_tokens"] > 3


def leave_early(live: Live, *, stream: bool, **body: Any) -> None:
    """A client of a turn that goes on leaves after a few tokens; the engine waits from then on."""
    live.engine.hold_after = 4
    body |= {"session_id": live.opened("x"), "on_disconnect": "continue", "stream": stream}
    with live.connect(**body) as sock:
        eventually(lambda: live.engine.num_generated, equals=4)
        if stream:
            sock.recv(1)
    eventually(lambda: not live.server.server_state.tasks)


@pytest.mark.parametrize(("stream", "status"), [(True, 200), (False, 499)])
def test_a_turn_that_continues_without_its_client_is_logged_at_its_end(
    lines: Any, stream: bool, status: int
) -> None:
    with serving() as live:
        leave_early(live, prompt="y", max_tokens=100, stream=stream)
        assert [line["path"] for line in lines()] == ["/v1/sessions"], "it still runs"
        live.engine.may_step.set()
        eventually(lambda: len(lines()), equals=2)
        fields = lines()[-1]
        assert (fields["status"], fields["finish_reason"], fields["completion_tokens"]) == (
            status,
            "length",
            100,
        )
        assert fields["seconds"] > fields["seconds_to_first_token"]


@pytest.mark.parametrize("stream", [True, False])
def test_a_continuing_turn_is_logged_when_the_server_stops(lines: Any, stream: bool) -> None:
    with serving() as live:
        leave_early(live, prompt="y", max_tokens=100_000, stream=stream)
        live.engine.may_step.set()
    assert lines()[-1]["finish_reason"] == "abort"


@pytest.mark.parametrize("stream", [True, False])
def test_a_turn_with_on_disconnect_continue_is_logged_once(lines: Any, stream: bool) -> None:
    with serving() as live:
        body = {"prompt": "y", "session_id": live.opened("x"), "max_tokens": 3, "stream": stream}
        live.client.post("/v1/completions", json=body | {"on_disconnect": "continue"})
        eventually(lambda: len(lines()), equals=2)
        assert (lines()[-1]["status"], lines()[-1]["finish_reason"]) == (200, "length")
    assert len(lines()) == 2


def test_turns_and_refused_keys_are_logged(lines: Any, tmp_path: Path) -> None:
    keys = {"alice": {"key": "one"}}
    (tmp_path / "keys.json").write_text(json.dumps(keys))
    with serving(api_key_file=str(tmp_path / "keys.json"), api_key=("two",)) as live:
        for key in ("one", "two", "three"):
            live.client.post("/v1/sessions", json={"prompt": "abc"}, headers=bearer(key))
        eventually(lambda: len(lines()), equals=3)
        named = [(line["key"], line["status"], line.get("prompt_tokens")) for line in lines()]
        assert named == [("alice", 200, 3), ("3fc4ccfe", 200, 3), ("", 401, None)]


def test_probes_are_not_logged(lines: Any, shared: Live) -> None:
    for path in ("/health", "/ready", "/metrics", "/v1/models"):
        shared.client.get(path)
    assert lines() == []


@pytest.mark.parametrize(("number", "expected"), [(0, None), (4, "abcé"), (100, "abcédef")])
def test_the_logged_prompt_is_cut_to_the_setting(
    lines: Any, number: int, expected: str | None
) -> None:
    with serving(log_prompt_characters=number) as live:
        live.complete(prompt="abcédef")
        assert only(lines).get("prompt") == expected


def record(message: str, **fields: Any) -> logging.LogRecord:
    made = logging.LogRecord("x", logging.INFO, "", 1, message, None, None)
    setattr(made, FIELDS, fields)
    return made


def test_the_text_format_is_one_line() -> None:
    line = TextFormatter().format(
        record("request", id="mine", path="/v1", seconds=0.5, prompt='a\nb "c"')
    )
    assert line.endswith(' INFO request id=mine path="/v1" seconds=0.5 prompt="a\\nb \\"c\\""')
    assert "\n" not in line
    assert TextFormatter().format(logging.makeLogRecord({"msg": "plain"})).endswith(" plain")


def test_the_json_format_is_one_object() -> None:
    fields = json.loads(JsonFormatter().format(record("request", id="mine", path=Path("/x"))))
    assert fields.pop("time") > 0
    assert fields == {"level": "info", "message": "request", "id": "mine", "path": "/x"}
    try:
        raise ValueError("broken")
    except ValueError:
        made = logging.makeLogRecord({"msg": "oh", "exc_info": sys.exc_info()})
    line = JsonFormatter().format(made)
    assert "\n" not in line
    assert "ValueError: broken" in json.loads(line)["exception"]


STARTS = ("model", "memory", "sessions", "access", "page", "ready")


def test_with_the_json_format_all_output_is_json(gptj_folder: Path) -> None:
    command = [sys.executable, "-m", "cottention.server", "serve", str(gptj_folder), "--port", "0"]
    with subprocess.Popen(
        [*command, "--log-format", "json", "--max-slots", "2", "--host", "0.0.0.0"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as popen:
        try:
            assert popen.stderr
            logged: list[Any] = []  # a busy machine may warn of something before it is ready
            while not logged or "ready" not in logged[-1]:
                logged.append(json.loads(popen.stderr.readline()))
            body = {"prompt": "secret", "max_tokens": 3, "ignore_eos": True}
            httpx.post(f"{logged[-1]['ready']}/v1/completions", json=body, timeout=60)
            popen.send_signal(signal.SIGTERM)
            printed, errors = popen.communicate(timeout=60)
        finally:
            popen.kill()
    assert (popen.returncode, printed) == (0, "")
    logged += [json.loads(line) for line in errors.splitlines()]
    assert any("--allow-unauthenticated" in line["message"] for line in logged)
    (start,) = (line for line in logged if line["message"] == "serving")
    assert start.keys() == {"time", "level", "message", *STARTS}
    (request,) = (line for line in logged if line["message"] == "request")
    assert request["completion_tokens"] == 3
    assert "secret" not in errors


def test_warnings_of_libraries_are_logged() -> None:
    script = (
        "import warnings; from cottention.server.log_config import configure_logging;"
        "configure_logging('info', 'json'); warnings.warn('old')"
    )
    command = [sys.executable, "-c", script]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "old" in json.loads(found.stderr)["message"]
