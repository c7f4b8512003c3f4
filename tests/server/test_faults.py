"""Faults of every kind under load, each of which may end the requests that it touches, no others.

COTTENTION_FAULTS says how many; CI takes some, `make faults` a thousand.
"""

import contextlib
import errno
import itertools
import json
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cottention.engine import Engine, EngineConfig, SamplingParams
from cottention.engine.errors import SnapshotError
from cottention.engine.execution.model_runner import Targets
from cottention.engine.scheduling.request import Choice
from cottention.engine.sessions.manager import SessionManager
from cottention.engine.sessions.store import SqliteStore
from cottention.server.config import ServerConfig
from cottention.server.sessions.storage import open_sessions
from tests.server.live import Live, serving

NUM_FAULTS = int(os.environ.get("COTTENTION_FAULTS", "150"))
NUM_CLIENTS = 6
NUM_TOKENS = 6
HALF = "\ufffd"
KINDS = ("model", "sampler", "logits", "text", "tokenizer", "disk", "damage")


class Broken(Exception):
    """What is injected."""


class Saboteur:
    """Wraps the places where things break; each fault notes whom it touches.

    A request is known by its seed, which is in whatever the engine does for it.
    """

    def __init__(self, live: Live, chance: random.Random) -> None:
        self._live = live
        self._chance = chance
        self._lock = threading.Lock()
        self._armed: set[str] = set()
        self.touched: set[int] = set()
        self.num_faults: Counter[str] = Counter()

    def arm(self) -> None:
        """The next chance to break in some way is taken."""
        with self._lock:
            self._armed.add(self._chance.choice(KINDS))

    @property
    def num_done(self) -> int:
        return sum(self.num_faults.values())

    def _takes(self, kind: str) -> bool:
        with self._lock:
            if kind not in self._armed:
                return False
            self._armed.remove(kind)
            self.num_faults[kind] += 1
            return True

    def sabotage(self, patch: pytest.MonkeyPatch) -> None:
        engine: Engine = self._live.engine
        sessions: SessionManager = self._live.sessions
        store, runner = sessions._store, engine._runner
        assert isinstance(store, SqliteStore)
        patch.setattr(runner, "run", self._noting(runner.run))
        patch.setattr(runner._model, "hidden", self._failing("model", runner._model.hidden))
        sampler = runner._sampler
        patch.setattr(sampler, "_adjusted", self._failing("sampler", sampler._adjusted))
        patch.setattr(runner, "_sample", self._spoiling(runner._sample))
        patch.setattr(
            engine._request_manager,
            "append_token",
            self._mistelling(engine._request_manager.append_token),
        )
        encode = self._failing_for_one("tokenizer", engine.tokenizer.encode)
        patch.setattr(engine.tokenizer, "encode", encode)
        patch.setattr(store._blobs, "_write", self._filling(store._blobs._write))
        patch.setattr(store, "get", self._damaging(store.get))

    def _noting(self, run: Any) -> Any:
        def noting(plan: Any, *given: Any) -> Any:
            self._in_step = {request.seed for request in plan.requests}
            return run(plan, *given)

        return noting

    def _failing(self, kind: str, work: Any) -> Any:
        """A step that breaks touches all that are in it."""

        def failing(*given: Any) -> Any:
            if self._takes(kind):
                self.touched |= self._in_step
                raise Broken(kind)
            return work(*given)

        return failing

    def _spoiling(self, sample: Any) -> Any:
        """Logits of one row that are not finite touch its request alone."""

        def spoiling(targets: Targets, logits: Tensor, *given: Any) -> Any:
            if self._takes("logits"):
                row = self._chance.randrange(len(targets.choices))
                logits[row] = torch.nan
                self.touched.add(targets.choices[row].request.seed)
            return sample(targets, logits, *given)

        return spoiling

    def _mistelling(self, accept: Any) -> Any:
        def mistelling(choice: Choice, *given: Any) -> Any:
            if self._takes("text"):
                self.touched.add(choice.request.seed)
                raise Broken("text")
            return accept(choice, *given)

        return mistelling

    def _failing_for_one(self, kind: str, encode: Any) -> Any:
        def failing(text: str) -> Any:
            if ":" in text and self._takes(kind):
                self.touched.add(int(text.partition(":")[0]))
                raise Broken(kind)
            return encode(text)

        return failing

    def _filling(self, write: Any) -> Any:
        """A full disk touches nobody's answer: the session waits in memory."""

        def filling(path: Path, raw: bytes) -> None:
            if self._takes("disk"):
                raise OSError(errno.ENOSPC, "full")
            write(path, raw)

        return filling

    def _damaging(self, get: Any) -> Any:
        def damaging(digest: str) -> Any:
            if self._takes("damage"):
                raise SnapshotError("injected")
            return get(digest)

        return damaging


def body_of(seed: int) -> dict[str, Any]:
    return {"prompt": f"{seed}:def f(x", "max_tokens": NUM_TOKENS, "seed": seed, "ignore_eos": True}


class Clients:
    """Whole answers, streams and turns of sessions, one after the other, by several at once."""

    def __init__(self, live: Live) -> None:
        self._live = live
        self._seeds = itertools.count(1)
        self.said: dict[int, str] = {}
        self.failed: set[int] = set()
        self.codes: Counter[str] = Counter()
        self.over = threading.Event()

    def run(self) -> None:
        while not self.over.is_set():
            seed = next(self._seeds)
            (self.whole, self.stream, self.turn)[seed % 3](seed)

    def whole(self, seed: int, **more: Any) -> None:
        response = self._live.client.post("/v1/completions", json=body_of(seed) | more)
        if response.status_code == 200:
            self.said[seed] = response.json()["choices"][0]["text"]
            return
        assert response.status_code == 500, response.text
        self.failed.add(seed)
        self.codes[response.json()["error"]["code"]] += 1

    def stream(self, seed: int) -> None:
        response = self._live.client.post("/v1/completions", json=body_of(seed) | {"stream": True})
        if response.status_code == 500:
            self.failed.add(seed)
            return
        *events, end = [line[6:] for line in response.text.split("\n\n") if line]
        if end == "[DONE]":
            chunks = [json.loads(event)["choices"][0] for event in events]
            self.said[seed] = "".join(chunk["text"] for chunk in chunks)
        else:
            assert json.loads(end)["error"]["type"] == "server_error"
            self.failed.add(seed)

    def turn(self, seed: int) -> None:
        opened = self._live.client.post("/v1/sessions", json={})
        if opened.status_code == 200:
            self.whole(seed, session_id=opened.json()["id"])
            return
        assert opened.status_code == 507
        self.codes["store_full"] += 1


@pytest.fixture
def live(gptj_folder: Path, tmp_path: Path) -> Iterator[Live]:
    engine = Engine(gptj_folder, EngineConfig(max_slots=4))
    config = ServerConfig(session_dir=str(tmp_path / "sessions"), session_memory=0)
    with contextlib.ExitStack() as stack:
        sessions = stack.enter_context(open_sessions(engine, config))
        yield stack.enter_context(serving(engine, sessions=sessions))


@pytest.mark.timeout(60 + NUM_FAULTS)
def test_faults_end_the_requests_that_they_touch_and_no_others(
    live: Live, gptj_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saboteur, clients = Saboteur(live, random.Random(1)), Clients(live)
    with monkeypatch.context() as patch, ThreadPoolExecutor(NUM_CLIENTS) as pool:
        saboteur.sabotage(patch)
        running = [pool.submit(clients.run) for _ in range(NUM_CLIENTS)]
        while saboteur.num_done < NUM_FAULTS and not any(each.done() for each in running):
            saboteur.arm()
            time.sleep(0.02)
        clients.over.set()
        for each in running:
            each.result()
    damaged, full = saboteur.num_faults["damage"], saboteur.num_faults["disk"]
    assert clients.codes["session_damaged"] == damaged
    assert clients.codes["store_full"] <= full
    assert saboteur.touched <= clients.failed
    assert len(clients.failed - saboteur.touched) == damaged
    solo = Engine(gptj_folder, EngineConfig(max_slots=1))
    for seed, text in clients.said.items():
        body = body_of(seed)
        prompt = body.pop("prompt")
        alone = solo.generate([prompt], SamplingParams(**body))[0].text
        assert text.rstrip(HALF) == alone.rstrip(HALF)  # which a session keeps for its next turn
    stats = live.engine.stats()
    assert stats.num_free_slots == stats.num_slots
    assert stats.num_faults > 0
    assert 0 < stats.num_undrawn <= saboteur.num_faults["logits"]
    assert live.client.get("/health").status_code == 200
    print(f"{dict(saboteur.num_faults)}: {len(clients.failed)} failed, {len(clients.said)} did not")
