"""The bytes that are given for a session are the most it takes, in memory and on the disk."""

import pytest
import torch

from cottention.engine.sessions.fingerprint import Fingerprint
from cottention.engine.sessions.memory_usage import EVENT_BYTES, SessionBytes
from cottention.engine.sessions.snapshot import SnapshotCodec
from cottention.engine.sessions.state_cache import ParkedStates
from cottention.engine.sessions.types import SessionValue
from cottention.engine.state.context_window import context_schedules
from cottention.engine.state.event_log import EventLog
from cottention.engine.state.session_state import SessionState
from cottention.engine.state.spec import StateSpec, recurrence_tensors

NUM_IDS, WINDOW, EVENT_LOG_BYTES = 500, 64, 64 * EVENT_BYTES
CONFIG = " ".join(f"{'n' * 12}{n}={10**6}" for n in range(14))
PRINTS = Fingerprint("a" * 64, "b" * 64, CONFIG, "c" * 100)


@pytest.mark.parametrize("has_denominator", [False, True])
def test_the_largest_session_takes_what_is_said(has_denominator: bool) -> None:
    spec = StateSpec(
        recurrence_tensors(
            layers=3, heads=2, value_width=16, key_width=16, has_denominator=has_denominator
        )
    )
    cost = SessionBytes.of(
        spec, num_ids=NUM_IDS, window=WINDOW, max_checkpoints=2, max_event_log_bytes=EVENT_LOG_BYTES
    )
    state, events = value = largest(spec)
    codec = SnapshotCodec(PRINTS, spec, NUM_IDS, context_schedules(WINDOW), WINDOW)
    raw = len(codec.encode(state)) + len(events.to_bytes())
    assert raw <= cost.places["stored"] // 3 <= raw + 1024
    parked = ParkedStates(1 << 30)
    parked.add("name", "digest", value)
    assert parked.num_bytes == cost.places["parked"]
    assert cost.places["resident"] == spec.bytes_per_slot == sum(spec.itemised_bytes().values())
    assert cost.items["turn_copy"] == state.nbytes
    assert cost.items["checkpoints"] == 2 * cost.places["stored"] // 3
    assert cost.per_gb() == {place: 10**9 // nbytes for place, nbytes in cost.places.items()}


def largest(spec: StateSpec) -> SessionValue:
    """Of a session that has seen every id, and whose last turn filled its event log."""
    rows = [torch.ones(shape) for shape in spec.shapes.values()]
    ids = tuple(range(WINDOW))
    events = EventLog("f" * 16, 2**62, (b"x" * EVENT_BYTES,) * 64)
    counts = dict.fromkeys(range(NUM_IDS), 1)
    full = SessionState(tuple(rows), 2**62, (1,), ids, counts, undecoded=b"\xf0\x9f\x98")
    return SessionValue(full, events)
