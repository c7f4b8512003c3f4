"""Any sequence of verbs leaves a session that says what a fresh run of its ids would say.

The window is a few tokens, so that states are renewed all the time; some sessions are exact.
"""

import functools
import random
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    multiple,
    rule,
)

from cottention.engine import Engine, Output, SamplingParams
from cottention.engine.sessions.manager import SessionManager
from cottention.engine.sessions.store import SqliteStore
from cottention.engine.state.context_window import ContextPolicy
from cottention.engine.state.session_state import SessionState
from tests.engine.windows import engine_of

OWNER = "somebody"
WINDOW = 8
PARAMS = SamplingParams(max_tokens=10, ignore_eos=True, seed=3)
IDS = st.lists(st.integers(5, 200), min_size=1, max_size=12)
POLICIES: st.SearchStrategy[ContextPolicy] = st.sampled_from(["renew", "exact"])


@functools.cache
def the_engine(attention: str) -> Engine:
    """One for all examples: nothing of an example may stay in it."""
    return engine_of(WINDOW, attention, max_batch_tokens=8)


class AnyOrder(RuleBasedStateMachine):
    """Sessions beside the plain lists of ids that they should hold."""

    sessions = Bundle("sessions")
    attention = "cottention"

    @initialize()
    def start(self) -> None:
        self.engine = the_engine(self.attention)
        self.folder = Path(tempfile.mkdtemp())
        self.held: dict[str, list[list[int]]] = {}  # by id: ids after each turn, the last is now
        self.policies: dict[str, list[ContextPolicy]] = {}  # and the policies
        self._open_store()

    def _open_store(self) -> None:
        self.kept = SessionManager(
            SqliteStore(self.folder),
            self.engine.session_codec(),
            memory_bytes=2 * self.engine.spec.bytes_per_slot,
            max_checkpoints=2,
            is_durable=True,
        )

    def teardown(self) -> None:
        if hasattr(self, "kept"):
            self.kept.close()
            shutil.rmtree(self.folder)
            assert self.engine.pool.num_free == self.engine.pool.num_slots

    @rule(target=sessions, policy=POLICIES)
    def open(self, policy: ContextPolicy) -> str:
        policy = self._possible(policy)
        name = self.kept.open(OWNER, SessionState(context_policy=policy), {}, None).id
        self.held[name], self.policies[name] = [[]], [policy]
        return name

    @rule(name=sessions, ids=IDS, num=st.integers(0, 14), policy=POLICIES)
    def turn(self, name: str, ids: list[int], num: int, policy: ContextPolicy) -> None:
        """An append where nothing is generated. Young sessions change their policy."""
        taken = self.kept.begin(OWNER, name)
        wish = self._possible(policy) if taken.state.num_tokens <= WINDOW else None
        params = replace(PARAMS, max_tokens=num, context_policy=wish)
        outputs = self._run(ids, params, taken.state)
        said = [token_id for out in outputs for token_id in out.token_ids]
        assert outputs[-1].state is not None
        self.kept.commit(taken, outputs[-1].state)
        self._note(name, ids + said, wish)

    @rule(name=sessions, ids=IDS, num=st.integers(0, 14))
    def cancel(self, name: str, ids: list[int], num: int) -> None:
        """A turn that is cut when `num` ids were delivered."""
        taken = self.kept.begin(OWNER, name)
        request = self.engine.submit(ids, replace(PARAMS, max_tokens=20), start=taken.state)
        said: list[int] = []
        while len(said) < num:
            said += [i for out in self.engine.step() for i in out.token_ids]
        self.engine.cancel(request)
        while self.engine.has_work():
            self.engine.step()
        if not num:
            self.kept.abandon(taken)
            return
        self.kept.commit(taken, taken.state.extended(ids, said[:num], WINDOW))
        self._note(name, ids + said[:num])

    @rule(target=sessions, name=sessions, n=st.integers(1, 3))
    def fork(self, name: str, n: int) -> object:
        forks = [each.id for each in self.kept.fork(OWNER, name, n)]
        for each in forks:
            self.held[each] = [list(ids) for ids in self.held[name]]
            self.policies[each] = list(self.policies[name])
        return multiple(*forks)

    @rule(name=sessions)
    def rewind(self, name: str) -> None:
        if self.kept.find(OWNER, name).num_checkpoints:
            self.kept.rewind(OWNER, name)
            self.held[name].pop()
            self.policies[name].pop()

    @rule(target=sessions, name=sessions)
    def move(self, name: str) -> str:
        """Through a snapshot's bytes; a new session has no turns to go back to."""
        raw = self.kept.export(OWNER, name).raw
        check = self.engine.policies.check_goes_on
        moved = self.kept.import_(OWNER, raw, {}, None, check).id
        self.held[moved] = [list(self.held[name][-1])]
        self.policies[moved] = self.policies[name][-1:]
        return moved

    @rule(name=consumes(sessions))
    def close(self, name: str) -> None:
        self.kept.delete(OWNER, name)
        del self.held[name]

    @rule()
    def restart(self) -> None:
        self.kept.close()
        self._open_store()

    @rule(name=sessions)
    def says_what_a_fresh_run_says(self, name: str) -> None:
        ids, policy = self.held[name][-1], self.policies[name][-1]
        taken = self.kept.begin(OWNER, name)
        self.kept.abandon(taken)
        assert taken.state.num_tokens == len(ids)
        assert taken.session.context_policy == taken.state.context_policy == policy
        start = self.engine.policies.context_schedules[policy].start
        assert taken.session.context_start == (start(len(ids) - 1) if ids else 0)
        if ids:
            [fresh] = self.engine.generate([ids], replace(PARAMS, context_policy=policy))
            said = [i for out in self._run([], PARAMS, taken.state) for i in out.token_ids]
            assert said == list(fresh.token_ids)

    def _possible(self, policy: ContextPolicy) -> ContextPolicy:
        """cosFormer goes past its M only renewed."""
        return "renew" if self.attention == "cosformer" else policy

    def _note(self, name: str, new: list[int], wish: ContextPolicy | None = None) -> None:
        kept, policies = self.held[name], self.policies[name]
        kept.append(kept[-1] + new)
        policies.append(wish or policies[-1])
        del kept[:-3], policies[:-3]  # two checkpoints and what is now

    def _run(self, ids: list[int], params: SamplingParams, start: SessionState) -> list[Output]:
        """A turn beside another request, so that batches differ from example to example."""
        name = self.engine.submit(ids, params, start=start)
        self.engine.submit([random.Random(len(ids)).randrange(5, 200)], PARAMS)
        outputs: list[Output] = []
        while self.engine.has_work():
            outputs += self.engine.step()
        return [out for out in outputs if out.request_id == name]


class OfCosformer(AnyOrder):
    """With denominators, and keys that turn with the position."""

    attention = "cosformer"


class OfLinear(AnyOrder):
    """With denominators."""

    attention = "linear"


class AtLength(AnyOrder):
    """More of the same."""


TestAnyOrder = AnyOrder.TestCase
TestAnyOrderAtLength = pytest.mark.slow(AtLength.TestCase)
TestAnyOrderOfCosformer = OfCosformer.TestCase
TestAnyOrderOfLinear = OfLinear.TestCase
TestAnyOrder.settings = settings(
    max_examples=10,
    stateful_step_count=20,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
TestAnyOrderOfCosformer.settings = TestAnyOrderOfLinear.settings = settings(
    TestAnyOrder.settings, max_examples=5
)
TestAnyOrderAtLength.settings = settings(TestAnyOrder.settings, max_examples=50)
