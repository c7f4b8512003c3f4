"""What the server says of itself: models, health, readiness, figures, its description."""

import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest

from cottention.server.generation.latency import LatencyStats
from tests.server.live import Live, eventually, serving


def figures(live: Live) -> dict[str, float]:
    text = live.client.get("/metrics").text
    lines = [line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#")]
    return {re.sub(r',?model_name="fake"', "", name): float(value) for name, value in lines}


def test_the_model_is_listed_and_described(shared: Live) -> None:
    listed = shared.client.get("/v1/models").json()
    (model,) = listed["data"]
    assert listed["object"] == "list"
    assert model == shared.client.get("/v1/models/fake").json()
    assert (model["id"], model["object"]) == ("fake", "model")
    assert model["created"] > 1_600_000_000
    assert (model["root"], model["parent"]) == ("fake", None)


def test_a_model_served_under_another_name_has_its_own_as_root() -> None:
    with serving(served_model_name="org/other") as live:
        (model,) = live.client.get("/v1/models").json()["data"]
        assert (model["id"], model["root"], model["parent"]) == ("org/other", "fake", None)
        assert live.client.get("/v1/models/org/other").json() == model


def test_metrics_follow_the_requests() -> None:
    with serving() as live:
        live.complete(prompt="hello", max_tokens=7)
        live.engine.may_step.clear()
        with live.connect(prompt="xy", n=2):
            eventually(lambda: live.engine.running)
            told = figures(live)
        live.engine.may_step.set()
    assert told["cottention:num_requests_running{}"] == 1
    assert told["cottention:num_requests_waiting{}"] == 0
    assert told["cottention:prompt_tokens_total{}"] == 7
    assert told["cottention:generation_tokens_total{}"] == 7
    assert told['cottention:request_success_total{finished_reason="length"}'] == 1
    assert told['cottention:request_success_total{finished_reason="stop"}'] == 0
    assert told["cottention:num_slots{}"] == 64
    assert told["cottention:num_free_slots{}"] == 62
    assert told["cottention:state_pool_bytes{}"] == 64_000
    assert told["cottention:bytes_per_slot{}"] == 1000
    assert told["process_resident_memory_bytes"] > 0


def test_latencies_have_vllm_s_metric_names() -> None:
    with serving() as live:
        live.engine.step_seconds = 0.01
        live.complete(prompt=["abc", "de"], n=2, max_tokens=6)
        told = figures(live)
    counts = {
        name.removeprefix("cottention:").partition("_count")[0]: value
        for name, value in told.items()
        if name.endswith("_count{}")
    }
    assert counts == {
        "time_to_first_token_seconds": 2,
        "inter_token_latency_seconds": 2 * 2 * 5,
        "request_time_per_output_token_seconds": 2,
        "e2e_request_latency_seconds": 2,
        "request_queue_time_seconds": 2,
        "request_prefill_time_seconds": 2,
        "request_decode_time_seconds": 2,
        "request_prompt_tokens": 2,
        "request_generation_tokens": 2,
    }
    assert 0.2 <= told["cottention:inter_token_latency_seconds_sum{}"] < 20
    assert told['cottention:request_prompt_tokens_bucket{le="2.0"}'] == 1
    assert told['cottention:request_prompt_tokens_bucket{le="5.0"}'] == 2
    assert told["cottention:request_generation_tokens_sum{}"] == 24
    assert told['cottention:e2e_request_latency_seconds_bucket{le="+Inf"}'] == 2


def test_tokens_of_one_step_are_observed_together() -> None:
    """However many streams there are: one value with its number."""
    timings, seen = LatencyStats(), []
    timings.between_tokens.observe = lambda value, times: seen.append((value, times))  # type: ignore[method-assign]
    timings.observe_gaps(Counter({0.5: 63, 1.0: 1}))
    assert seen == [(0.5, 63), (1.0, 1)]


def test_metrics_count_queued_and_refused_requests() -> None:
    with serving(max_queued_requests=1) as live:
        live.engine.may_step.clear()
        with live.connect(prompt="abc"):
            eventually(lambda: live.engine.running)
            live.complete(prompt="x")
            told = figures(live)
            live.engine.may_step.set()
    assert told["cottention:num_requests_queued{}"] == 1
    assert told["cottention:num_tokens_queued{}"] == 3
    assert told["cottention:requests_refused_total{}"] == 1


def test_metrics_have_prometheus_content_type(shared: Live) -> None:
    response = shared.client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=")
    assert "# TYPE cottention:num_requests_running gauge" in response.text


def test_health_and_ready_are_200(shared: Live) -> None:
    assert shared.client.get("/health").status_code == 200
    assert shared.client.get("/ready").status_code == 200


def test_readiness_for_sessions_is_asked_for_by_a_flag(shared: Live) -> None:
    """Load balancers ask so; a flag that is misspelt would ask for less in silence."""
    assert shared.client.get("/ready?sessions=1").status_code == 200
    assert shared.client.get("/ready?sessions=0").status_code == 200
    refused = shared.client.get("/ready?sessions=perhaps")
    assert refused.status_code == 400
    assert "true or false, or 1 or 0" in refused.json()["error"]["message"]


def test_a_draining_server_is_healthy_and_not_ready() -> None:
    with serving() as live:
        name = live.opened()
        live.async_engine.drain()
        assert live.client.get("/health").status_code == 200
        posts = [
            live.client.post(f"/v1/sessions{path}", json=body)
            for path, body in (
                ("", {}),
                (f"/{name}/fork", {}),
                (f"/{name}/append", {"prompt": "x"}),
            )
        ]
        for response in (live.client.get("/ready"), live.complete(prompt="x"), *posts):
            assert response.status_code == 503
            assert int(response.headers["retry-after"]) > 0
            assert "shutting down" in response.json()["error"]["message"]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/sessions"])
def test_a_stop_before_the_first_token_is_a_503_to_retry(path: str) -> None:
    with serving() as live, ThreadPoolExecutor(1) as pool:
        live.engine.may_step.clear()
        answer = pool.submit(live.client.post, path, json={"prompt": "x"})
        eventually(lambda: live.engine.running)
        (running,) = live.engine.running.values()
        live.loop_call(live.async_engine.cancel_all)
        eventually(lambda: running.cancelled_at is not None)
        live.engine.may_step.set()
        assert answer.result().status_code == 503
        assert int(answer.result().headers["retry-after"]) > 0


def test_a_dead_engine_ends_streams_with_an_error_and_health_with_503() -> None:
    with serving() as live:
        live.engine.may_step.clear()
        with live.connect(prompt="x", stream=True, max_tokens=100) as stream:
            eventually(lambda: live.engine.running)
            with live.connect(prompt="die"):
                eventually(lambda: len(live.engine.running), equals=2)
                live.engine.may_step.set()
                received = b""
                while not received.endswith(b"0\r\n\r\n"):
                    received += stream.recv(10_000)
        assert b'"type": "server_error"' in received
        assert b"[DONE]" not in received
        response = live.client.get("/health")
        assert response.status_code == 503
        assert "told to die" not in response.text
        assert live.client.get("/ready").status_code == 503
        assert live.complete(prompt="x").status_code == 503
        live.async_engine.drain()
        assert live.client.get("/health").status_code == 503


def test_the_description_names_the_endpoints(shared: Live) -> None:
    paths = shared.client.get("/openapi.json").json()["paths"]
    assert {"/v1/completions", "/v1/models", "/health", "/ready", "/metrics"} <= paths.keys()
