"""Traces, received by a real collector: what spans there are, whose children, and what they say."""

import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from cottention.engine.errors import ConfigurationError
from cottention.server.cli import main as cli
from cottention.server.generation.chat_template import ChatTemplate
from cottention.server.generation.template_environment import compile_template
from cottention.server.observability.tracing import Tracing
from tests.server.fake_engine import FakeEngine
from tests.server.live import serving
from tests.server.process import ROOT

pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="the extra otel is missing")
from tests.server.observability.collector import (
    Collector,
    attributes,
    collecting,
)

TEMPLATE = ChatTemplate(compile_template("{{ messages[-1]['content'] }}"), (), {})
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.fixture
def collector() -> Iterator[Collector]:
    with collecting() as made:
        yield made


def test_a_chat_is_a_span_with_its_phases_in_the_client_s_trace(collector: Collector) -> None:
    """All is sent by the end of the server, within the trace of the request's traceparent."""
    began = time.time_ns()
    engine = FakeEngine(step_seconds=0.002)
    with serving(engine, TEMPLATE, otlp_endpoint=collector.url, api_key=("k" * 8,)) as live:
        live.client.headers["authorization"] = "Bearer kkkkkkkk"
        live.client.headers["traceparent"] = f"00-{TRACE}-{PARENT}-01"
        answer = live.chat("hello", max_tokens=3, seed=7)
        live.client.get("/v1/models")
    whole, chat = collector.named("POST /v1/chat/completions"), collector.named("chat fake")
    version, trace, span_id, flags = answer.headers["traceparent"].split("-")
    assert (version, trace, flags) == ("00", TRACE, "01")
    assert whole.span_id.hex() == span_id
    assert whole.parent_span_id.hex() == PARENT
    assert {each.trace_id.hex() for each in collector.spans} == {TRACE}
    assert chat.parent_span_id == whole.span_id
    phases = [collector.named(name) for name in ("queue", "prefill", "decode")]
    assert {each.parent_span_id for each in phases} == {chat.span_id}
    assert len(collector.spans) == 5  # and none of a GET
    times = [chat.start_time_unix_nano, *(each.end_time_unix_nano for each in phases)]
    assert times == sorted(times)
    assert chat.end_time_unix_nano == times[-1]
    assert began < times[0] < times[-1] < time.time_ns()
    assert [each.start_time_unix_nano for each in phases] == times[:3]
    assert attributes(whole)["http.response.status_code"] == 200
    assert attributes(whole)["http.route"] == "/v1/chat/completions"
    seconds = attributes(chat).pop("gen_ai.response.time_to_first_chunk")
    assert seconds > 0
    assert attributes(chat) == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "cottention",
        "gen_ai.request.model": "fake",
        "gen_ai.response.model": "fake",
        "gen_ai.response.id": answer.json()["id"],
        "gen_ai.response.finish_reasons": ["length"],
        "gen_ai.response.time_to_first_chunk": seconds,
        "gen_ai.usage.input_tokens": 5,
        "gen_ai.usage.output_tokens": 3,
        "gen_ai.usage.cache_read.input_tokens": 0,
        "gen_ai.request.max_tokens": 3,
        "gen_ai.request.temperature": 1.0,
        "gen_ai.request.top_p": 1.0,
        "gen_ai.request.top_k": 0,
        "gen_ai.request.seed": 7,
    }
    [resource] = {each["service.name"] for each in collector.resources}
    assert resource == "cottention-server"
    assert "hello" not in str(collector.spans)


def test_turns_errors_and_traces_that_are_not_sampled(collector: Collector) -> None:
    with serving(otlp_endpoint=f"{collector.url}/v1/traces/") as live:
        session_id = live.opened("abc")
        turn = {"prompt": "x", "session_id": session_id, "max_tokens": 2}
        live.events(**turn, on_disconnect="continue")
        assert live.complete(prompt="fail", max_tokens=3).status_code == 500
        assert live.complete(prompt=7).status_code == 400
        unsampled = {"traceparent": f"00-{TRACE}-{PARENT}-00"}
        body = {"prompt": "x", "max_tokens": 1}
        answer = live.client.post("/v1/completions", json=body, headers=unsampled)
        assert answer.headers["traceparent"].startswith(f"00-{TRACE}-")
        for wrong in ("", "00-0-0-00", "ff-x"):
            found = live.client.post("/v1/completions", json=body, headers={"traceparent": wrong})
            assert found.status_code == 200
    assert TRACE not in {each.trace_id.hex() for each in collector.spans}
    texts = [each for each in collector.spans if each.name == "text_completion fake"]
    assert attributes(texts[0])["gen_ai.conversation.id"] == session_id
    roots = [each for each in collector.spans if each.name == "POST /v1/completions"]
    statuses = [attributes(each)["http.response.status_code"] for each in roots]
    assert statuses == [200, 500, 400, 200, 200, 200]
    assert [each.status.code for each in roots] == [0, 2, 0, 0, 0, 0]
    prefills = [each for each in collector.spans if each.name == "prefill a session"]
    assert len(prefills) == 1


def test_a_collector_that_is_away_harms_no_request(caplog: pytest.LogCaptureFixture) -> None:
    """It is told once, and neither requests nor the end of the server wait for it."""
    with serving(otlp_endpoint="http://127.0.0.1:1") as live:
        for _ in range(3):
            assert live.complete(prompt="x", max_tokens=2).status_code == 200
    told = [each for each in caplog.records if each.name.startswith("opentelemetry")]
    assert len(told) <= 1


def test_nothing_of_it_is_imported_unless_it_is_asked_for() -> None:
    """But for its interface, which FastAPI imports by itself where it is installed."""
    code = (
        "import sys\nfrom tests.server.live import serving\n"
        "with serving() as live: live.complete(prompt='x', max_tokens=1).raise_for_status()\n"
        "print([name for name in sys.modules if 'opentelemetry.sdk' in name or 'otlp' in name])"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_an_endpoint_that_is_no_url_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["serve", "--port", "0", "--otlp-endpoint", "collector:4317"]) == 2
    told = capsys.readouterr().err
    assert "--otlp-endpoint collector:4317 is not a URL" in told.splitlines()[-1]


def test_without_the_extra_it_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(ConfigurationError, match=r"pip install 'cottention-server\[otel\]'"):
        Tracing("http://127.0.0.1:1", "m")
