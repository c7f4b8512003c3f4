"""The best of several choices: those whose tokens the model held likeliest on average.

Owns the ranking. Knows no endpoint.
"""

from collections.abc import Mapping
from dataclasses import replace

from cottention.server.orders import Order
from cottention.server.reading import Piece, Tokens


def best_choices(pieces: Mapping[int, Piece], order: Order) -> dict[int, Piece]:
    """The `num_choices` best of each prompt, best first, numbered anew; all of them as they are."""
    tried, kept = order.params.n, order.num_choices
    if tried == kept:
        return dict(sorted(pieces.items()))
    found: dict[int, Piece] = {}
    for place in range(len(order.prompts)):
        group = [pieces[place * tried + choice] for choice in range(tried)]
        best = sorted(group, key=mean_logprob, reverse=True)[:kept]
        best[0] = _with_prompt_of(group[0], best[0])
        found |= {place * kept + rank: piece for rank, piece in enumerate(best)}
    return found


def mean_logprob(piece: Piece) -> float:
    """Of its ids; an empty choice is worse than any other."""
    entries = piece.tokens.logprobs if piece.tokens else []
    return sum(each.logprob for each in entries) / len(entries) if entries else float("-inf")


def _with_prompt_of(first: Piece, piece: Piece) -> Piece:
    """The engine tells a prompt's log-probabilities with its first choice alone."""
    prompt = (first.tokens or Tokens()).prompt_logprobs
    return replace(piece, tokens=replace(piece.tokens or Tokens(), prompt_logprobs=prompt))
