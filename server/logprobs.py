"""How log-probabilities look in answers: OpenAI's two shapes and vLLM's for prompts.

Owns the shapes, names of tokens, and where each token begins in the text. Knows no requests.
"""

import codecs
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from cottention.engine.outputs import TokenLogprob

if TYPE_CHECKING:
    from cottention.engine.tokenizer import Tokenizer

LEAST = -9999.0
"""JSON has no infinity; vLLM writes this instead."""

Shape = dict[str, Any]


class TokenNames:
    """What a token is called in an answer: its text, or its number where that is wanted."""

    def __init__(self, tokenizer: "Tokenizer", by_number: bool) -> None:
        self._tokenizer = tokenizer
        self._by_number = by_number

    def name(self, token_id: int) -> str:
        """The token by itself; bytes that are no character are U+FFFD."""
        if self._by_number:
            return f"token_id:{token_id}"
        return self._tokenizer.token_text(token_id)

    def bytes(self, token_id: int) -> list[int]:
        """Its exact bytes."""
        return list(self._tokenizer.written_bytes[token_id])


class Offsets:
    """Where tokens begin in a text, in characters; one that begins within a character is there."""

    def __init__(self, table: Sequence[bytes], start: int) -> None:
        self._table = table
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._count = start

    def pass_over(self, token_id: int) -> int:
        """The next token's offset."""
        offset = self._count
        self._count += len(self._decoder.decode(self._table[token_id]))
        return offset


def completion_logprobs(
    entries: Sequence[TokenLogprob | None],
    ids: Sequence[int],
    offsets: Offsets,
    names: TokenNames,
    num_top: int,
) -> Shape:
    """OpenAI's shape for completions; the first token of a prompt has no logprob."""
    return {
        "tokens": [names.name(each) for each in ids],
        "token_logprobs": [None if each is None else finite(each.logprob) for each in entries],
        "top_logprobs": [None if each is None else _top(each, names, num_top) for each in entries],
        "text_offset": [offsets.pass_over(each) for each in ids],
    }


def chat_logprobs(entries: Sequence[TokenLogprob], names: TokenNames) -> Shape:
    """OpenAI's shape for chats."""

    def one(token_id: int, logprob: float) -> Shape:
        name, raw = names.name(token_id), names.bytes(token_id)
        return {"token": name, "logprob": finite(logprob), "bytes": raw}

    content = [
        one(each.token_id, each.logprob) | {"top_logprobs": [one(*pair) for pair in each.top]}
        for each in entries
    ]
    return {"content": content, "refusal": None}


def prompt_logprobs(
    entries: Sequence[TokenLogprob | None], names: TokenNames, num_top: int
) -> list[Shape | None]:
    """vLLM's shape for prompts: the token itself and the likeliest, each with its rank."""
    return [None if each is None else _ranked(each, names, num_top) for each in entries]


def finite(logprob: float) -> float:
    """A number that JSON has."""
    return max(LEAST, logprob)


def _top(entry: TokenLogprob, names: TokenNames, num_top: int) -> dict[str, float]:
    """The likeliest and the token itself; of two that look the same the likelier is told."""
    found: dict[str, float] = {}
    for token_id, logprob in (*entry.top[:num_top], (entry.token_id, entry.logprob)):
        found.setdefault(names.name(token_id), finite(logprob))
    return found


def _ranked(entry: TokenLogprob, names: TokenNames, num_top: int) -> Shape:
    likeliest = entry.top[:num_top]
    ranks = {token_id: place for place, (token_id, _) in enumerate(likeliest, start=1)}
    told = dict(((entry.token_id, entry.logprob), *likeliest))
    return {
        str(token_id): {
            "logprob": finite(logprob),
            "rank": ranks.get(token_id, entry.rank),
            "decoded_token": names.name(token_id),
        }
        for token_id, logprob in told.items()
    }
