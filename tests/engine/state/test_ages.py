"""Sessions as old as they may be, and older: a turn that runs, or a refusal; nothing else."""

from dataclasses import replace

import pytest

from cottention.engine import Engine, FinishReason, SamplingParams
from cottention.engine.errors import ParameterError
from cottention.engine.scheduling.context_policy import MAX_HELD
from cottention.engine.state.context_window import ContextPolicy
from cottention.engine.state.session_state import SessionState
from tests.engine.making import state_of

TURN = SamplingParams(max_tokens=8, ignore_eos=True, seed=1)


def aged(engine: Engine, num_tokens: int, policy: ContextPolicy) -> SessionState:
    window = engine.policies.window
    made = state_of(engine.spec, 5, window)
    ids = {"recent": made.pending * window, "context_policy": policy}
    return replace(made, position=num_tokens - 1, **ids)


@pytest.mark.every_attention
@pytest.mark.parametrize("policy", ["renew", "exact"])
def test_the_last_turns_of_a_life(engine: Engine, policy: ContextPolicy) -> None:
    if policy == "exact" and engine.policies.max_exact_length is not None:
        pytest.skip("it is never so old")
    codec = engine.session_codec()
    state = aged(engine, MAX_HELD - 20, policy)
    for _ in range(2):
        engine.policies.check_goes_on(state)
        engine.submit([7, 8], TURN, start=state)
        outputs = [out for _ in iter(engine.has_work, False) for out in engine.step()]
        assert outputs[-1].finish_reason is FinishReason.LENGTH, outputs[-1].error
        assert outputs[-1].state is not None
        state = codec.decode(codec.encode(outputs[-1].state))
    assert state.num_tokens == MAX_HELD
    with pytest.raises(ParameterError, match=f"at most {MAX_HELD} tokens; here are {MAX_HELD + 1}"):
        engine.submit([7], TURN, start=state)
    assert not engine.has_work()


@pytest.mark.parametrize("policy", ["renew", "exact"])
def test_an_older_one_cannot_come_in(engine: Engine, policy: ContextPolicy) -> None:
    for num_tokens in (MAX_HELD + 1, 2**53, 2**62):
        with pytest.raises(ParameterError, match=f"here are {num_tokens} "):
            engine.policies.check_goes_on(aged(engine, num_tokens, policy))
