"""What a request tells once: with its choice 0. Knows no torch."""

from cottention.engine.choice import Choice
from cottention.engine.outputs import TokenLogprob


def num_cached_of(choice: Choice) -> int:
    """Told once: with choice 0."""
    return choice.request.num_cached if choice.index == 0 else 0


def scores_of(choice: Choice) -> tuple[TokenLogprob | None, ...] | None:
    """The prompt's log-probabilities, told once: with choice 0."""
    wants = choice.request.params.prompt_logprobs is not None and choice.index == 0
    return tuple(choice.request.scores) if wants else None
