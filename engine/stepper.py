"""One step of the engine, and its faults.

Owns the order of a step and that a fault ends the requests it touches and nobody else's. Knows no
commands and no threads.
"""

import logging

from cottention.engine.outputs import FinishReason, Output
from cottention.engine.plan import Plan
from cottention.engine.registry import Registry
from cottention.engine.request import Request
from cottention.engine.runner import Runner, Sample
from cottention.engine.scheduler import Scheduler

_log = logging.getLogger(__name__)

UNDRAWN = "no token could be drawn: every one is forbidden, or the model's logits are not finite"


class Stepper:
    """num_steps: that succeeded. num_undrawn: choices without a token that could be drawn."""

    def __init__(self, scheduler: Scheduler, registry: Registry, runner: Runner) -> None:
        self._scheduler = scheduler
        self._registry = registry
        self._runner = runner
        self.num_steps = self.num_faults = self.num_undrawn = 0

    def step(self) -> list[Output]:
        """Schedule, run, postprocess: at most one output for each choice."""
        self._registry.admit()
        plan = self._scheduler.schedule()
        return self._advance(plan) if plan else []

    def _advance(self, plan: Plan) -> list[Output]:
        """Run a plan; a fault ends the plan's requests."""
        try:
            result = self._runner.run(plan)
        except Exception as error:
            _log.exception("a step failed; its %d requests end with an error", len(plan.requests))
            return [out for request in plan.requests for out in self._fault(request, error)]
        self.num_steps += 1
        outputs = self._registry.move_on(plan, result.scores)
        for sample in result.samples:
            outputs += self._accept(sample)
        self.num_undrawn += len(result.undrawn)
        failed = dict.fromkeys(choice.request for choice in result.undrawn)
        return outputs + [out for request in failed for out in self._fail(request, UNDRAWN)]

    def _accept(self, sample: Sample) -> list[Output]:
        """What an id means for its choice; a fault ends its request."""
        if sample.choice.finish_reason:  # by a fault of another choice of its request
            return []
        try:
            return [self._registry.accept(sample)]
        except Exception as error:
            _log.exception("an id could not be told; its request ends with an error")
            return self._fault(sample.choice.request, error)

    def _fault(self, request: Request, error: Exception) -> list[Output]:
        self.num_faults += 1
        return self._fail(request, f"the engine failed on this request ({type(error).__name__})")

    def _fail(self, request: Request, what: str) -> list[Output]:
        return self._registry.end(request, FinishReason.ERROR, what)
