"""`cottention bench`: against a real server, one that is none, and one that fails some requests."""

import json
import subprocess
import sys

import pytest

from cottention.server.cli.bench import histogram, report
from cottention.server.client.load_test import Level, Percentiles
from cottention.server.generation.chat_template import ChatTemplate
from cottention.server.generation.template_environment import compile_template
from tests.server.cli.at_terminal import ROOT
from tests.server.fake_engine import FakeEngine
from tests.server.live import serving

TEMPLATE = ChatTemplate(compile_template("{{ messages[-1]['content'] }}"), (), {})


def bench(*arguments: object) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "cottention.server", "bench", *map(str, arguments)]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=250, check=False
    )


@pytest.mark.parametrize("endpoint", ["--no-chat", "--chat"])
def test_it_counts_what_the_server_did(endpoint: str) -> None:
    """Each level has its requests, no more at a time than it says, and all of their tokens."""
    engine = FakeEngine(step_seconds=0.001)
    with serving(engine, template=TEMPLATE, api_key=("one-of-them",)) as live:
        flags = (endpoint, "--api-key", "one-of-them", "--concurrency", "1,3", "--requests", 6)
        done = bench(f"{live.url}/v1", *flags, "--max-tokens", 5, "--json")
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        prompts = [each.prompt for each in engine.seen]
    assert len(prompts) == len({*prompts}) == 13  # the first one warms the server up
    assert [each["concurrency"] for each in found["levels"]] == [1, 3]
    for level in found["levels"]:
        assert (level["requests"], level["failed"], level["completion_tokens"]) == (6, 0, 30)
        assert 0 < level["seconds_per_token"]["p50"] <= level["seconds_per_token"]["p99"]
        assert 0 < level["seconds_to_first_token"]["p50"] <= level["seconds"]
    assert found["levels"][1]["tokens_per_second"] == pytest.approx(
        30 / found["levels"][1]["seconds"]
    )


def test_the_table_and_failures() -> None:
    """Requests that a limit refuses are counted and told, and the status says that some failed."""
    with serving(FakeEngine(step_seconds=0.002), key_max_requests=2, api_key=("k" * 8,)) as live:
        flags = ("--api-key", "k" * 8, "--concurrency", 1, "--concurrency", 4, "--requests", 8)
        done = bench(live.url, *flags)
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    assert lines[2].split() == ["|", "first", "token,", "ms", "|", "per", "token,", "ms"]
    assert lines[4].split()[:3] == ["1", "8", "0"]
    assert lines[5].split()[0:2] == ["4", "8"]
    assert lines[5].split()[2] != "0"
    assert "time per token, 4 at a time" in done.stdout
    assert (
        "requests failed at 4: the limit of concurrent requests for this API key is 2"
        in done.stderr
    )


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("", "URL is missing"),
        ("127.0.0.1:8000", "is not the URL of a server: give http://HOST:PORT"),
        ("http://127.0.0.1:1", "cannot be reached"),
        ("LIVE/nowhere", "there is no /nowhere"),
        ("LIVE", "Incorrect API key"),
    ],
)
@pytest.mark.slow
def test_a_wrong_url_is_one_line(url: str, told: str) -> None:
    with serving(api_key=("one-of-them",)) as live:
        key = ("--api-key", "one-of-them") if url.endswith("/nowhere") else ()
        done = bench(*([url.replace("LIVE", live.url)] if url else []), *key)
    assert done.returncode in (1, 2)
    assert done.stdout == ""
    assert told in done.stderr
    assert done.stderr.count("\n") == 1


def test_percentiles_and_bins() -> None:
    """By nearest rank, without a value that nobody measured; every time is in one bin."""
    assert Percentiles.of([]) == Percentiles(None, None, None)
    assert Percentiles.of([3.0]) == Percentiles(3.0, 3.0, 3.0)
    assert Percentiles.of([n / 100 for n in range(1, 101)]) == Percentiles(0.51, 0.96, 1.0)
    for times in ([0.002] * 7, [0.001, 0.01, 0.1, 10.0], [0.0, 1.0]):
        counts = [int(line.split()[3]) for line in histogram(times)]
        assert sum(counts) == len(times)
    nothing = Level(1, 1, 1, "refused", 1.0, 0, 0, [], [])
    assert "none" in report("m", [nothing])
