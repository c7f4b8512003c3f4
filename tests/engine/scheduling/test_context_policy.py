"""What a session's turn reads besides its prompt, which its key is charged with."""

import pytest

from cottention.engine.scheduling.context_policy import ContextPolicies
from cottention.engine.state.context_window import context_schedules
from cottention.engine.state.session_state import SessionState

POLICIES = ContextPolicies("renew", 8, None, context_schedules(8))  # renewed at 8, 14, 20, ...


@pytest.mark.parametrize(
    ("position", "num_pending", "policy", "num_reread"),
    [
        (0, 0, "renew", 0),
        (4, 1, "renew", 1),
        (4, 60, "renew", 60),  # all of them enter the penalties, although few enter the state
        (7, 1, "renew", 2),  # the state after the renewal at index 8 is that of ids 6 and 7
        (12, 1, "renew", 1),
        (13, 1, "renew", 2),  # and so it is wherever a snapshot claims to be
        (2**30, 1, "exact", 1),
        (3, 60, "exact", 60),
    ],
)
def test_ids_read_again(position: int, num_pending: int, policy: str, num_reread: int) -> None:
    state = SessionState(position=position, pending=(1,) * num_pending, context_policy=policy)  # type: ignore[arg-type]
    assert POLICIES.num_reread(state, 1) == num_reread
