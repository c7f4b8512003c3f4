"""Rows before a step: those that begin are cleared, and where a context ends its spare takes over.

Owns when that happens. Does not know what is computed, nor who decided who runs.
"""

from cottention.engine.plan import Plan
from cottention.engine.state import StatePool


def prepare(plan: Plan, pool: StatePool) -> None:
    """Make every row of the plan what its ids are to be fed to."""
    for choice in plan.decode:
        grid, position = choice.request.grid, choice.position
        if grid.start(position) != grid.start(position - 1):
            choice.rows.reverse()  # the spare has had all from where the new context starts
    for choice, start in plan.ahead:
        if start == choice.position:
            pool.clear(choice.spare)
    for chunk in plan.prefill:
        if chunk.start == chunk.read.start:
            pool.clear(chunk.row)


def share_prompts(plan: Plan, pool: StatePool) -> None:
    """Where a prompt is complete, the request's other choices get its rows."""
    for chunk in plan.prefill:
        if chunk.is_last:
            pairs = zip(*(choice.rows for choice in chunk.request.choices), strict=True)
            for first, *others in pairs:
                pool.copy(first, others)
