"""Turns that go on without their client survive their servers: killed, stopped, restarted."""

import os
import statistics
from collections.abc import Iterator
from typing import Any

import pytest

from cottention.engine.config import EngineConfig
from cottention.engine.engine import Engine
from tests.engine.making import model_folder
from tests.engine.postgres import Postgres
from tests.server.live import eventually
from tests.server.replicas.cluster import Cluster, Follower, cluster, twin_of

pytestmark = pytest.mark.cluster

NUM_KILLS = int(os.environ.get("COTTENTION_TEST_KILLS", "3"))
NUM_STREAMS = int(os.environ.get("COTTENTION_TEST_STREAMS", "10"))

GOES_ON: dict[str, Any] = {"on_disconnect": "continue"}


def body_of(n: int, num_tokens: int) -> dict[str, Any]:
    """Of a turn; sampled, with penalties and a stop string that is held back for."""
    return {
        "prompt": [40 + n, 41, 42],
        "max_tokens": num_tokens,
        "ignore_eos": True,
        "seed": n,
        "frequency_penalty": 0.2,
        "stop": ["never said in full"],
    }


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(model_folder("cottention"), EngineConfig(max_slots=1))


@pytest.fixture(scope="module")
def group(postgres: Postgres, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("cluster")
    with cluster(postgres, folder, "--drain-seconds", "1", "--max-slots", "32") as made:
        yield made


def followers(group: Cluster, num: int, num_tokens: int, name: str) -> list[Follower]:
    """Turns that have begun to tell."""
    made = [
        Follower(group, group.opened([30 + n]), body_of(n, num_tokens) | GOES_ON, f"{name}{n}")
        for n in range(num)
    ]
    for each in made:
        each.start()
    for each in made:
        eventually(lambda each=each: bool(each.ids) or each.error is not None)
    return made


def check_all(engine: Engine, made: list[Follower], num_tokens: int) -> None:
    for n, each in enumerate(made):
        each.check(
            twin_of(engine, [[30 + n], body_of(n, num_tokens)["prompt"]], body_of(n, num_tokens))
        )


def say(title: str, made: list[Follower]) -> None:
    gaps = sorted(each.longest_gap for each in made)
    print(
        f"{title}: longest gap of a stream p50 {statistics.median(gaps):.2f} s, p95"
        f" {gaps[int(0.95 * (len(gaps) - 1))]:.2f} s; breaks"
        f" {sum(each.num_breaks for each in made)}"
    )


def test_killed_under_live_streams(group: Cluster, engine: Engine) -> None:
    """Without adoption a turn would end with its server; without the journal it would repeat or
    skip events."""
    num_tokens = 200 + 250 * NUM_KILLS
    made = followers(group, NUM_STREAMS, num_tokens, "kills")
    for n in range(NUM_KILLS):
        counts = [len(each.ids) for each in made]
        victim = group.replicas[n % len(group.replicas)]
        victim.kill()
        victim.start()
        # what was running there goes on elsewhere
        for each, count in zip(made, counts, strict=True):
            eventually(
                lambda each=each, count=count: len(each.ids) > count + 5 or not each.is_alive()
            )
        victim.wait()
    check_all(engine, made, num_tokens)
    say(f"{NUM_KILLS} kills under {NUM_STREAMS} streams", made)
    for each in made:
        assert group.session(each.session_id)["version"] == 2
    assert group.rows("SELECT * FROM cottention.turns") == []
    assert group.rows("SELECT * FROM cottention.chunks") == []
