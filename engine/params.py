"""How a request wants its tokens chosen. Validated once, here; knows nothing of HTTP."""

import math
import sys
from dataclasses import dataclass
from typing import Any

from engine.errors import ParameterError

GREEDY_BELOW = 1e-5
"""Temperatures under this are taken as 0: dividing by them would overflow."""

MAX_STOP_STRINGS = 16
MAX_STOP_LENGTH = 256
MAX_SEED = 2**63 - 1
MAX_TOP_K = 2**31 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """Sampling parameters of one request, under the names of OpenAI's and vLLM's APIs.

    max_tokens: most ids generated for each choice, from 1.
    temperature: 0 is greedy; from 0, finite.
    top_p: in (0, 1]; 1 is off. top_k: from 1; 0 and −1 are off. min_p: in [0, 1]; 0 is off.
    seed: any int64; None draws a fresh one.
    stop: up to 16 non-empty strings; text ends before the first that appears.
    n: choices per prompt, from 1.
    ignore_eos: go on past the model's end-of-text token.

    Raises ParameterError naming the field and what it allows.
    """

    max_tokens: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    n: int = 1
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        _check_whole("max_tokens", self.max_tokens, 1, None)
        _check_whole("n", self.n, 1, None)
        _check_whole("top_k", self.top_k, -1, MAX_TOP_K)
        _check_number("temperature", self.temperature, 0.0, math.inf)
        _check_number("top_p", self.top_p, 0.0, 1.0)
        _check_number("min_p", self.min_p, 0.0, 1.0)
        if self.top_p == 0:
            raise ParameterError("top_p", "top_p must be greater than 0 and at most 1; it is 0")
        if self.seed is not None:
            _check_whole("seed", self.seed, -MAX_SEED - 1, MAX_SEED)
        _check_stop(self.stop)

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely id is always taken."""
        return self.temperature < GREEDY_BELOW


def _check_whole(name: str, value: Any, low: int, high: int | None) -> None:
    allowed = f"a whole number from {low}" + ("" if high is None else f" to {high}")
    if not isinstance(value, int) or isinstance(value, bool):
        raise ParameterError(name, f"{name} must be {allowed}; it is {value!r}")
    if value < low or (high is not None and value > high):
        raise ParameterError(name, f"{name} must be {allowed}; it is {value}")


def _check_number(name: str, value: Any, low: float, high: float) -> None:
    allowed = f"a finite number from {low:g}" + ("" if high == math.inf else f" to {high:g}")
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise ParameterError(name, f"{name} must be {allowed}; it is {value!r}")
    if not low <= value <= min(high, sys.float_info.max):  # false for NaN, exact for any int
        raise ParameterError(name, f"{name} must be {allowed}; it is {value}")


def _check_stop(stop: tuple[str, ...]) -> None:
    if len(stop) > MAX_STOP_STRINGS:
        raise ParameterError(
            "stop", f"stop takes at most {MAX_STOP_STRINGS} strings; it has {len(stop)}"
        )
    for text in stop:
        if not isinstance(text, str) or not 1 <= len(text) <= MAX_STOP_LENGTH:
            raise ParameterError(
                "stop", f"each stop string must have 1 to {MAX_STOP_LENGTH} characters"
            )
