"""A request inside the engine, and the choices that are generated for it. Knows no torch.

A request's prompt is read once, into the slot of its first choice; the others start as copies.
"""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field

from engine.detokenizer import Detokenizer
from engine.outputs import FinishReason
from engine.params import SamplingParams


@dataclass(slots=True, eq=False)
class Choice:
    """One continuation of a request's prompt.

    position counts the ids that are in the state; pending are those that were sampled and are not.
    """

    request: "Request"
    index: int
    detokenizer: Detokenizer
    position: int
    pending: list[int] = field(default_factory=list)
    num_generated: int = 0
    finish_reason: FinishReason | None = None

    @property
    def slot(self) -> int:
        """Its row in the pool; only an admitted request has slots."""
        return self.request.slots[self.index]


@dataclass(slots=True, eq=False)
class Request:
    """A prompt, what is wanted of it, and how far it has come.

    slots: one a choice while it is admitted, else empty.
    """

    id: str
    prompt_ids: Sequence[int]
    params: SamplingParams
    seed: int
    slots: list[int] = field(default_factory=list)
    choices: list[Choice] = field(default_factory=list)
    num_prefilled: int = 0

    @classmethod
    def new(
        cls,
        request_id: str,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        token_bytes: Sequence[bytes],
    ) -> "Request":
        """A request nobody has worked on; draws a fresh seed where none is given."""
        seed = secrets.randbits(63) if params.seed is None else params.seed
        request = cls(request_id, tuple(prompt_ids), params, seed)
        for index in range(params.n):
            text = Detokenizer(token_bytes, params.stop)
            request.choices.append(Choice(request, index, text, position=len(prompt_ids)))
        return request

    @property
    def unfinished(self) -> list[Choice]:
        """Choices that still grow, or have not begun to."""
        return [choice for choice in self.choices if choice.finish_reason is None]
