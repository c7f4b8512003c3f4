"""Snapshots that no server wrote, under checksums that agree, at a server with a real engine.

Each is a 400, or a session that behaves. The slow form sends 2,000, `make forgeries` 10,000.
"""

import contextlib
import gc
import os
import struct
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from cottention.engine.config import EngineConfig
from cottention.engine.engine import Engine
from cottention.engine.sessions.snapshot import (
    FORMAT_VERSION,
    header_text,
    ints_to_bytes,
    placed,
    seal,
)
from cottention.engine.state.session_state import MAX_PENDING
from cottention.server.config import ServerConfig
from cottention.server.sessions.storage import open_sessions
from tests.engine.making import attention_folder
from tests.server.live import Live, serving

NUM_FORGERIES = int(os.environ.get("COTTENTION_FORGERIES", "2_000"))
NUM_QUICK = 80
MAX_SECONDS = 0.1
"""Of processor time on the event loop, at once."""

Lists = dict[str, Sequence[int]]
TYPES = {"pending": "I32", "recent": "I32", "count_ids": "I32", "counts": "I32", "undecoded": "U8"}


class Forger:
    """Writes any fields as a snapshot whose sizes and checksum agree with them."""

    def __init__(self, engine: Engine) -> None:
        self._codec = engine.session_codec()
        self._spec = engine.spec
        self.num_ids, self.window = engine.tokenizer.num_ids, engine.policies.window
        self.policies = [each.name for each in engine.policies.context_schedules.values()]

    def write(self, fields: dict[str, Any]) -> bytes:
        rows = self._spec.tensors if fields["has_rows"] else ()
        tensors: list[tuple[str, str, tuple[int, ...]]] = [
            *((f"row.{each.name}", "F32", each.shape) for each in rows),
            *((name, dtype, (len(fields[name]),)) for name, dtype in TYPES.items()),
        ]
        metadata = {
            "format": str(FORMAT_VERSION),
            **self._codec._expected,
            "position": str(fields["position"]),
            "context_policy": fields["context_policy"],
        }
        parts = [header_text(metadata | fields["more"], placed(tensors))]
        for each in rows:
            value = struct.pack("<f", fields["value"])
            parts.append(value + struct.pack("<f", fields["others"]) * (each.nbytes // 4 - 1))
        parts += [ints_to_bytes(dtype, fields[name]) for name, dtype in TYPES.items()]
        raw = bytearray(b"".join(parts))
        for at, byte in fields["bytes"]:
            raw[at % len(raw)] = byte
        return seal([bytes(raw)])

    def honest(self, position: int, pending: Sequence[int]) -> dict[str, Any]:
        """Fields that agree with each other."""
        num_held = position + len(pending)
        before = [pending[0]] * position if position <= self.window else [pending[0]] * self.window
        return {
            "position": position,
            "pending": pending,
            "recent": [*before, *pending][-min(num_held, self.window) :],
            "count_ids": sorted({*pending}),
            "counts": [0] * len({*pending}),
            "undecoded": b"",
            "context_policy": self.policies[0],
            "has_rows": position > 0,
            "value": 0.5,
            "others": 0.25,
            "more": {},
            "bytes": [],
        }

    def forgeries(self) -> st.SearchStrategy[bytes]:
        """Honest fields of any age, some of which are replaced by anything."""
        ids = st.integers(0, self.num_ids - 1)
        any_ids = st.lists(st.integers(-(2**31), 2**31 - 1) | ids, max_size=40)
        pending = st.lists(ids, min_size=1, max_size=40) | st.builds(
            lambda token_id, n: [token_id] * n, ids, st.integers(1, 3000)
        )
        ages = st.integers(0, 3 * self.window) | st.integers(0, 2**63)
        values = st.floats(width=32) | st.sampled_from([1e38, -1e38, float("nan"), float("inf")])
        lies = st.fixed_dictionaries(
            {},
            optional={
                "position": ages,
                "pending": any_ids,
                "recent": any_ids,
                "count_ids": any_ids,
                "counts": any_ids,
                "undecoded": st.binary(max_size=5),
                "context_policy": st.sampled_from(self.policies) | st.text(max_size=9),
                "has_rows": st.booleans(),
                "value": values,
                "others": values,
                "more": st.dictionaries(st.sampled_from(["format", "weights", "x"]), st.text()),
                "bytes": st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255))),
            },
        )
        few = lies.filter(lambda some: len(some) <= 3)
        return st.builds(
            lambda *of, lie: self.write(self.honest(*of) | lie), ages, pending, lie=few
        )


class LoopTime:
    """The most processor time that the event loop's thread took between two of its pauses."""

    def __init__(self, live: Live) -> None:
        self._loop = live.async_engine._loop
        self._ends = threading.Event()
        self.most = 0.0
        live.loop_call(self._begin)

    def _begin(self) -> None:
        self._last = time.thread_time()
        self._beat()

    def _beat(self) -> None:
        now = time.thread_time()
        self.most = max(self.most, now - self._last)
        self._last = now
        if not self._ends.is_set():
            self._loop.call_later(0.002, self._beat)

    def end(self) -> float:
        self._ends.set()
        return self.most


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(attention_folder("cottention"), EngineConfig(max_slots=4))


@pytest.fixture(scope="module")
def live(engine: Engine) -> Iterator[Live]:
    with contextlib.ExitStack() as stack:
        sessions = stack.enter_context(open_sessions(engine, ServerConfig()))
        yield stack.enter_context(serving(engine, sessions=sessions))


@contextlib.contextmanager
def undisturbed(live: Live) -> Iterator[None]:
    """Within the block the event loop is free, and another session stays as it is."""
    other = live.opened("def f(x):")
    path = f"/v1/sessions/{other}/snapshot"
    before = live.client.get(path).content
    gc.disable()  # or a collection of all that tests and hypothesis hold counts as the loop's
    loop_time = LoopTime(live)
    try:
        yield
    finally:
        gc.enable()
    assert loop_time.end() < MAX_SECONDS
    assert live.client.get(path).content == before
    live.client.delete(f"/v1/sessions/{other}")


def try_one(live: Live, raw: bytes) -> bool:
    """Whether a snapshot made a session; it then has a turn, a snapshot and an end."""
    answer = live.client.post("/v1/sessions/import", content=raw)
    if answer.status_code != 200:
        assert answer.status_code in (400, 409), answer.text
        assert answer.json()["error"]["message"]
        return False
    made = answer.json()
    path = f"/v1/sessions/{made['id']}"
    assert live.client.get(f"{path}/snapshot").content == raw
    turn = live.complete(prompt="", session_id=made["id"], max_tokens=2, ignore_eos=True)
    if turn.status_code == 200:
        assert live.session(made["id"])["position"] == made["position"] + 2
    else:  # numbers that overflow, and policies with a longest sequence
        assert turn.status_code in (400, 500), turn.text
        assert "an internal error" not in turn.text
        assert live.client.get(f"{path}/snapshot").content == raw
    assert live.client.delete(path).status_code == 200
    return True


def try_many(live: Live, forger: Forger, num: int) -> None:
    made = tried = 0

    @settings(
        max_examples=num,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=[*HealthCheck],
    )
    @given(forger.forgeries())
    def try_all(raw: bytes) -> None:
        nonlocal made, tried
        made += try_one(live, raw)
        tried += 1
        if tried % 100 == 0:
            gc.collect()

    with undisturbed(live):
        try_all()
    assert 0 < made < num, "either way has to be tried"


def test_an_honest_one_is_what_the_server_writes(live: Live, engine: Engine) -> None:
    """Else every forgery would be refused, whatever the server checks."""
    forger = Forger(engine)
    for position, num_pending in ((0, 1), (5, 1), (5, 700), (3 * forger.window, 60_000)):
        with undisturbed(live):
            assert try_one(live, forger.write(forger.honest(position, [7] * num_pending)))


def test_forged_snapshots_are_refused_or_behave(live: Live, engine: Engine) -> None:
    try_many(live, Forger(engine), NUM_QUICK)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_many_forged_snapshots(live: Live, engine: Engine) -> None:
    try_many(live, Forger(engine), NUM_FORGERIES)


@pytest.mark.slow
def test_the_longest_list_is_no_work_for_the_event_loop(live: Live, engine: Engine) -> None:
    forger = Forger(engine)
    with undisturbed(live):
        assert try_one(live, forger.write(forger.honest(5, [7] * MAX_PENDING)))
        too_many = forger.write(forger.honest(5, [7] * (MAX_PENDING + 1)))
        assert not try_one(live, too_many)
        longest = forger.honest(5, [7]) | {"undecoded": bytes(4 << 20)}
        assert not try_one(live, forger.write(longest))
