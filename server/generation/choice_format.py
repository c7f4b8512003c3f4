"""How a choice is told: by a completion, and by a chat; whole, and as one chunk of a stream.

Owns the names in a choice's object and what its first chunk says beside text. Framing is
`streaming.py`'s, log-probabilities are `logprobs.py`'s.

How log-probabilities look in answers: OpenAI's two shapes and vLLM's for prompts.

Owns the shapes, names of tokens, and where each token begins in the text. Knows no requests.
"""

import codecs
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from json.encoder import encode_basestring_ascii as quoted
from typing import TYPE_CHECKING, Any

from cottention.engine.outputs import TokenLogprob
from cottention.server.generation.output_stream import OutputDelta, TokenDeltas
from cottention.server.generation.request import GenerationRequest

if TYPE_CHECKING:
    from cottention.engine.text.tokenizer import Tokenizer


LEAST = -9999.0
"""JSON has no infinity; vLLM writes this instead."""

JsonObject = dict[str, Any]


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
) -> JsonObject:
    """OpenAI's shape for completions; the first token of a prompt has no logprob."""
    return {
        "tokens": [names.name(each) for each in ids],
        "token_logprobs": [None if each is None else finite(each.logprob) for each in entries],
        "top_logprobs": [None if each is None else _top(each, names, num_top) for each in entries],
        "text_offset": [offsets.pass_over(each) for each in ids],
    }


def chat_logprobs(entries: Sequence[TokenLogprob], names: TokenNames) -> JsonObject:
    """OpenAI's shape for chats."""

    def one(token_id: int, logprob: float) -> JsonObject:
        name, raw = names.name(token_id), names.bytes(token_id)
        return {"token": name, "logprob": finite(logprob), "bytes": raw}

    content = [
        one(each.token_id, each.logprob) | {"top_logprobs": [one(*pair) for pair in each.top]}
        for each in entries
    ]
    return {"content": content, "refusal": None}


def prompt_logprobs(
    entries: Sequence[TokenLogprob | None], names: TokenNames, num_top: int
) -> list[JsonObject | None]:
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


def _ranked(entry: TokenLogprob, names: TokenNames, num_top: int) -> JsonObject:
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


compact = json.JSONEncoder(separators=(",", ":")).encode
"""JSON in ASCII, since some clients take U+2028 and its like for the end of a line."""


class ChoiceFormatter(ABC):
    """Tells the choices of one request; each is told whole once, or in chunks from the first."""

    def __init__(self, order: GenerationRequest, tokenizer: "Tokenizer") -> None:
        self._order = order
        self._details = order.details
        self._is_text_alone = order.details.is_text_alone
        self._names = TokenNames(tokenizer, order.details.tokens_as_ids)
        self._begun: set[int] = set()

    @abstractmethod
    def whole(self, index: int, piece: OutputDelta) -> JsonObject:
        """The object of a choice that has ended."""

    @abstractmethod
    def chunks(self, index: int, piece: OutputDelta) -> Iterator[str]:
        """What chunks say of a choice: JSON fields from "choices" on, without their braces."""

    def beside(self, pieces: Mapping[int, OutputDelta]) -> JsonObject:  # noqa: ARG002
        """Fields of the whole answer beside its choices."""
        return {}

    def _begins(self, index: int) -> bool:
        """Whether this choice has not been told of before."""
        is_new = index not in self._begun
        self._begun.add(index)
        return is_new

    def _prompt_of(self, index: int) -> int:
        return index // self._order.num_choices


class CompletionFormatter(ChoiceFormatter):
    """Choices of POST /v1/completions."""

    def __init__(self, order: GenerationRequest, tokenizer: "Tokenizer") -> None:
        super().__init__(order, tokenizer)
        skips = order.params.skip_special_tokens
        self._prompt_table = tokenizer.written_bytes
        self._table = tokenizer.token_bytes if skips else tokenizer.written_bytes
        self._offsets: dict[int, Offsets] = {}
        self._scores: dict[int, Sequence[TokenLogprob | None]] = {}

    def chunks(self, index: int, piece: OutputDelta) -> Iterator[str]:
        """One chunk, in the quick way where it has nothing but text."""
        if not self._is_text_alone:
            yield f'"choices":[{compact(self.whole(index, piece))}]'
            return
        yield (
            f'"choices":[{{"index":{index},"text":{quoted(piece.text)},"logprobs":null,'
            f'"finish_reason":{ending(piece)}}}]'
        )

    def whole(self, index: int, piece: OutputDelta) -> JsonObject:
        """The object of a choice, or of what came of it; the first has the prompt's part, too."""
        tokens, place, details = (
            piece.tokens or TokenDeltas(),
            self._prompt_of(index),
            self._details,
        )
        begins = self._begins(index)
        if tokens.prompt_logprobs:
            self._scores[place] = tokens.prompt_logprobs
        choice: JsonObject = {
            "index": index,
            "text": self._order.echoes[place] + piece.text if begins else piece.text,
            "logprobs": None if details.logprobs is None else self._logprobs(index, tokens, begins),
            "finish_reason": piece.finish_reason,
            "stop_reason": piece.stop_reason,
            "context_start": piece.context_start if piece.finish_reason else None,
        }
        if details.prompt_logprobs is not None:
            scores = self._scores.get(place, ())
            choice["prompt_logprobs"] = prompt_logprobs(
                scores, self._names, details.prompt_logprobs
            )
        if details.token_ids:
            choice["prompt_token_ids"] = self._order.prompts[place] if begins else None
            choice["token_ids"] = tokens.ids
        return choice

    def _logprobs(self, index: int, tokens: TokenDeltas, begins: bool) -> JsonObject:
        """Of these tokens, after the prompt's where it is echoed."""
        num_top = self._details.logprobs or 0
        place = self._prompt_of(index)
        if begins:
            self._offsets[index] = Offsets(self._table, len(self._order.echoes[place]))
        new = completion_logprobs(
            tokens.logprobs, tokens.ids, self._offsets[index], self._names, num_top
        )
        if not begins or not self._details.echo:
            return new
        offsets = Offsets(self._prompt_table, 0)
        scores, ids = self._scores.get(place, ()), self._order.prompts[place]
        echo = completion_logprobs(scores, ids[: len(scores)], offsets, self._names, num_top)
        return {name: echo[name] + new[name] for name in new}


class ChatFormatter(ChoiceFormatter):
    """Choices of POST /v1/chat/completions."""

    def chunks(self, index: int, piece: OutputDelta) -> Iterator[str]:
        """The role in a chunk of its own, then text, in the quick way where that is all."""
        head = f'"choices":[{{"index":{index},"delta":{{'
        if self._begins(index):
            role = (
                f'{head}"role":"assistant","content":""}},"logprobs":null,"finish_reason":null}}]'
            )
            ids = self._order.prompts[0] if self._details.token_ids else None
            yield role + (f',"prompt_token_ids":{compact(ids)}' if ids else "")
        text = f'"content":{quoted(piece.text)}' if piece.text else ""
        if self._is_text_alone:
            yield f'{head}{text}}},"logprobs":null,"finish_reason":{ending(piece)}}}]'
            return
        yield (
            f'{head}{text}}},"logprobs":{compact(self._logprobs(piece))},'
            f'"finish_reason":{ending(piece)}{self._ids(piece)}}}]'
        )

    def whole(self, index: int, piece: OutputDelta) -> JsonObject:
        """The object of a choice that has ended."""
        choice: JsonObject = {
            "index": index,
            "message": {"role": "assistant", "content": piece.text, "refusal": None},
            "logprobs": self._logprobs(piece),
            "finish_reason": piece.finish_reason,
            "stop_reason": piece.stop_reason,
            "context_start": piece.context_start if piece.finish_reason else None,
        }
        if piece.tokens and self._details.token_ids:
            choice["token_ids"] = piece.tokens.ids
        return choice

    def beside(self, pieces: Mapping[int, OutputDelta]) -> JsonObject:
        """The prompt's ids and log-probabilities, where they are wanted."""
        found: JsonObject = {}
        if self._details.token_ids:
            found["prompt_token_ids"] = self._order.prompts[0]
        if (num_top := self._details.prompt_logprobs) is not None:
            tokens = pieces[0].tokens or TokenDeltas()
            found["prompt_logprobs"] = prompt_logprobs(tokens.prompt_logprobs, self._names, num_top)
        return found

    def _logprobs(self, piece: OutputDelta) -> JsonObject | None:
        if piece.tokens is None or self._details.logprobs is None:
            return None
        return chat_logprobs(piece.tokens.logprobs, self._names)

    def _ids(self, piece: OutputDelta) -> str:
        if piece.tokens is None or not self._details.token_ids:
            return ""
        return f',"token_ids":{compact(piece.tokens.ids)}'


def ending(piece: OutputDelta) -> str:
    """JSON after "finish_reason"; a choice that goes on has nothing else."""
    if piece.finish_reason is None:
        return "null"
    return (
        f'"{piece.finish_reason}","stop_reason":{json.dumps(piece.stop_reason)},'
        f'"context_start":{piece.context_start}'
    )
