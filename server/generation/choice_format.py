"""Formats choices for completions and chats: whole, or as chunks of a stream.

Log-probabilities have OpenAI's two shapes, and vLLM's shape for prompts.
"""

import codecs
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from json.encoder import encode_basestring_ascii as quoted
from typing import TYPE_CHECKING

from cottention.engine.outputs import TokenLogprob
from cottention.server.generation.output_stream import OutputDelta, TokenDeltas
from cottention.server.generation.request import GenerationRequest
from cottention.server.schemas.responses import JsonObject

if TYPE_CHECKING:
    from cottention.engine.text.tokenizer import Tokenizer


LEAST = -9999.0
"""JSON has no infinity; vLLM writes this instead."""


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

    def __init__(self, request: GenerationRequest, tokenizer: "Tokenizer") -> None:
        self._request = request
        self._output = request.output
        self._is_text_only = request.output.is_text_only
        self._names = TokenNames(tokenizer, request.output.tokens_as_ids)
        self._begun: set[int] = set()

    @abstractmethod
    def whole(self, index: int, delta: OutputDelta) -> JsonObject:
        """The object of a choice that has ended."""

    @abstractmethod
    def chunks(self, index: int, delta: OutputDelta) -> Iterator[str]:
        """What chunks say of a choice: JSON fields from "choices" on, without their braces."""

    def top_level_fields(self, deltas: Mapping[int, OutputDelta]) -> JsonObject:  # noqa: ARG002
        """Fields of the whole answer beside its choices."""
        return {}

    def _begins(self, index: int) -> bool:
        """Whether this choice has not been told of before."""
        is_new = index not in self._begun
        self._begun.add(index)
        return is_new

    def _prompt_of(self, index: int) -> int:
        return index // self._request.num_choices


class CompletionFormatter(ChoiceFormatter):
    """Choices of POST /v1/completions."""

    def __init__(self, request: GenerationRequest, tokenizer: "Tokenizer") -> None:
        super().__init__(request, tokenizer)
        skips = request.params.skip_special_tokens
        self._prompt_table = tokenizer.written_bytes
        self._table = tokenizer.token_bytes if skips else tokenizer.written_bytes
        self._offsets: dict[int, Offsets] = {}
        self._scores: dict[int, Sequence[TokenLogprob | None]] = {}

    def chunks(self, index: int, delta: OutputDelta) -> Iterator[str]:
        """One chunk, in the quick way where it has nothing but text."""
        if not self._is_text_only:
            yield f'"choices":[{compact(self.whole(index, delta))}]'
            return
        yield (
            f'"choices":[{{"index":{index},"text":{quoted(delta.text)},"logprobs":null,'
            f'"finish_reason":{ending(delta)}}}]'
        )

    def whole(self, index: int, delta: OutputDelta) -> JsonObject:
        """The object of a choice, or of what came of it; the first has the prompt's part, too."""
        tokens = delta.tokens or TokenDeltas()
        place, output = self._prompt_of(index), self._output
        begins = self._begins(index)
        if tokens.prompt_logprobs:
            self._scores[place] = tokens.prompt_logprobs
        choice: JsonObject = {
            "index": index,
            "text": self._request.echoes[place] + delta.text if begins else delta.text,
            "logprobs": None if output.logprobs is None else self._logprobs(index, tokens, begins),
            "finish_reason": delta.finish_reason,
            "stop_reason": delta.stop_reason,
            "context_start": delta.context_start if delta.finish_reason else None,
        }
        if output.prompt_logprobs is not None:
            scores = self._scores.get(place, ())
            choice["prompt_logprobs"] = prompt_logprobs(scores, self._names, output.prompt_logprobs)
        if output.token_ids:
            choice["prompt_token_ids"] = self._request.prompts[place] if begins else None
            choice["token_ids"] = tokens.ids
        return choice

    def _logprobs(self, index: int, tokens: TokenDeltas, begins: bool) -> JsonObject:
        """Of these tokens, after the prompt's where it is echoed."""
        num_top = self._output.logprobs or 0
        place = self._prompt_of(index)
        if begins:
            self._offsets[index] = Offsets(self._table, len(self._request.echoes[place]))
        new = completion_logprobs(
            tokens.logprobs, tokens.ids, self._offsets[index], self._names, num_top
        )
        if not begins or not self._output.echo:
            return new
        offsets = Offsets(self._prompt_table, 0)
        scores, ids = self._scores.get(place, ()), self._request.prompts[place]
        echo = completion_logprobs(scores, ids[: len(scores)], offsets, self._names, num_top)
        return {name: echo[name] + new[name] for name in new}


class ChatFormatter(ChoiceFormatter):
    """Choices of POST /v1/chat/completions."""

    def chunks(self, index: int, delta: OutputDelta) -> Iterator[str]:
        """The role in a chunk of its own, then text, in the quick way where that is all."""
        head = f'"choices":[{{"index":{index},"delta":{{'
        if self._begins(index):
            role = (
                f'{head}"role":"assistant","content":""}},"logprobs":null,"finish_reason":null}}]'
            )
            ids = self._request.prompts[0] if self._output.token_ids else None
            yield role + (f',"prompt_token_ids":{compact(ids)}' if ids else "")
        text = f'"content":{quoted(delta.text)}' if delta.text else ""
        if self._is_text_only:
            yield f'{head}{text}}},"logprobs":null,"finish_reason":{ending(delta)}}}]'
            return
        yield (
            f'{head}{text}}},"logprobs":{compact(self._logprobs(delta))},'
            f'"finish_reason":{ending(delta)}{self._ids(delta)}}}]'
        )

    def whole(self, index: int, delta: OutputDelta) -> JsonObject:
        """The object of a choice that has ended."""
        choice: JsonObject = {
            "index": index,
            "message": {"role": "assistant", "content": delta.text, "refusal": None},
            "logprobs": self._logprobs(delta),
            "finish_reason": delta.finish_reason,
            "stop_reason": delta.stop_reason,
            "context_start": delta.context_start if delta.finish_reason else None,
        }
        if delta.tokens and self._output.token_ids:
            choice["token_ids"] = delta.tokens.ids
        return choice

    def top_level_fields(self, deltas: Mapping[int, OutputDelta]) -> JsonObject:
        """The prompt's ids and log-probabilities, where they are wanted."""
        found: JsonObject = {}
        if self._output.token_ids:
            found["prompt_token_ids"] = self._request.prompts[0]
        if (num_top := self._output.prompt_logprobs) is not None:
            tokens = deltas[0].tokens or TokenDeltas()
            found["prompt_logprobs"] = prompt_logprobs(tokens.prompt_logprobs, self._names, num_top)
        return found

    def _logprobs(self, delta: OutputDelta) -> JsonObject | None:
        if delta.tokens is None or self._output.logprobs is None:
            return None
        return chat_logprobs(delta.tokens.logprobs, self._names)

    def _ids(self, delta: OutputDelta) -> str:
        if delta.tokens is None or not self._output.token_ids:
            return ""
        return f',"token_ids":{compact(delta.tokens.ids)}'


def ending(delta: OutputDelta) -> str:
    """JSON after "finish_reason"; a choice that goes on has nothing else."""
    if delta.finish_reason is None:
        return "null"
    return (
        f'"{delta.finish_reason}","stop_reason":{json.dumps(delta.stop_reason)},'
        f'"context_start":{delta.context_start}'
    )
