"""Formats choices for completions and chats: whole, or as chunks of a stream.

Log-probabilities have OpenAI's two shapes, and vLLM's shape for prompts.
"""

import codecs
import json
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from json.encoder import encode_basestring_ascii as quoted
from typing import TYPE_CHECKING, Any

from cottention.engine.outputs import FinishReason, TokenLogprob
from cottention.server.generation.json_pieces import (
    Encode,
    LongList,
    compact,
    encode_elements,
    encode_unicode,
    json_pieces,
)
from cottention.server.generation.output_stream import OutputDelta, TokenDeltas
from cottention.server.generation.request import GenerationRequest
from cottention.server.generation.tools.calls import CallReader
from cottention.server.schemas.responses import JsonObject

if TYPE_CHECKING:
    from cottention.engine.text.base import BaseTokenizer


MIN_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON does not have, as in vLLM."""


class TokenNames:
    """How tokens are named in log-probabilities: by text, or as `token_id:N`."""

    def __init__(self, tokenizer: "BaseTokenizer", by_number: bool) -> None:
        self._tokenizer = tokenizer
        self._by_number = by_number

    def name(self, token_id: int) -> str:
        """The token decoded by itself; incomplete characters become U+FFFD."""
        if self._by_number:
            return f"token_id:{token_id}"
        return self._tokenizer.token_text(token_id)

    def bytes(self, token_id: int) -> list[int]:
        """The token's bytes."""
        return list(self._tokenizer.written_bytes[token_id])


class TextOffsets:
    """Character offsets of consecutive tokens in a text.

    A token that begins within a character has the offset of that character.
    """

    def __init__(self, table: Sequence[bytes], start: int) -> None:
        self._table = table
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._count = start

    def next(self, token_id: int) -> int:
        """The offset of the next token, which is `token_id`."""
        offset = self._count
        self._count += len(self._decoder.decode(self._table[token_id]))
        return offset


def completion_logprobs(
    entries: Sequence[TokenLogprob | None],
    ids: Sequence[int],
    offsets: TextOffsets,
    names: TokenNames,
    num_top: int,
) -> dict[str, Iterator[Any]]:
    """OpenAI's shape for completions; the entry of a prompt's first token is None."""
    return {
        "tokens": (names.name(each) for each in ids),
        "token_logprobs": (None if each is None else finite(each.logprob) for each in entries),
        "top_logprobs": (None if each is None else _top(each, names, num_top) for each in entries),
        "text_offset": (offsets.next(each) for each in ids),
    }


def chat_logprobs(entries: Sequence[TokenLogprob], names: TokenNames) -> JsonObject:
    """OpenAI's shape for chats."""

    def one(token_id: int, logprob: float) -> JsonObject:
        name, raw = names.name(token_id), names.bytes(token_id)
        return {"token": name, "logprob": finite(logprob), "bytes": raw}

    content = (
        one(each.token_id, each.logprob) | {"top_logprobs": [one(*pair) for pair in each.top]}
        for each in entries
    )
    return {"content": LongList(content), "refusal": None}


def prompt_logprobs(
    entries: Sequence[TokenLogprob | None], names: TokenNames, num_top: int
) -> Iterator[JsonObject | None]:
    """vLLM's shape for prompts: the token itself and the most likely ones, with their ranks."""
    return (None if each is None else _ranked(each, names, num_top) for each in entries)


def finite(logprob: float) -> float:
    """A log-probability as a number that JSON can represent."""
    return max(MIN_LOGPROB, logprob)


def _top(entry: TokenLogprob, names: TokenNames, num_top: int) -> dict[str, float]:
    """The most likely tokens and the token itself; of equal names the more likely is kept."""
    found: dict[str, float] = {}
    for token_id, logprob in (*entry.top[:num_top], (entry.token_id, entry.logprob)):
        found.setdefault(names.name(token_id), finite(logprob))
    return found


def _ranked(entry: TokenLogprob, names: TokenNames, num_top: int) -> JsonObject:
    top = entry.top[:num_top]
    ranks = {token_id: place for place, (token_id, _) in enumerate(top, start=1)}
    logprobs = dict(((entry.token_id, entry.logprob), *top))
    return {
        str(token_id): {
            "logprob": finite(logprob),
            "rank": ranks.get(token_id, entry.rank),
            "decoded_token": names.name(token_id),
        }
        for token_id, logprob in logprobs.items()
    }


OPTIONAL_FIELDS = ("prompt_logprobs", "prompt_token_ids", "token_ids")
"""Fields of a whole response that are null unless requested, as in vLLM."""


class ChoiceFormatter(ABC):
    """Formats the choices of one request, each of them whole or as consecutive chunks."""

    def __init__(self, request: GenerationRequest, tokenizer: "BaseTokenizer") -> None:
        self._encode = compact if request.is_stream else encode_unicode
        self._request = request
        self._output = request.output
        self._is_text_only = request.output.is_text_only
        self._names = TokenNames(tokenizer, request.output.tokens_as_ids)
        self._begun: set[int] = set()

    @abstractmethod
    def whole(self, index: int, delta: OutputDelta) -> JsonObject:
        """The JSON object of a choice that has ended."""

    @abstractmethod
    def chunks(self, index: int, delta: OutputDelta) -> Iterator[str]:
        """Chunks with a choice's delta: JSON fields from "choices" on, without braces."""

    def around_text(self, index: int) -> tuple[str, str] | None:  # noqa: ARG002
        """What a chunk of a choice that has begun has before its text, and between that and its
        finish reason; None where chunks differ in more than these two.
        """
        return None

    def top_level_fields(self, deltas: Mapping[int, OutputDelta]) -> JsonObject:  # noqa: ARG002
        """More top-level fields of a whole response."""
        return {}

    def _begin(self, index: int) -> bool:
        """Whether this is the first call for the choice."""
        is_new = index not in self._begun
        self._begun.add(index)
        return is_new

    def _prompt_of(self, index: int) -> int:
        return index // self._request.num_choices


class CompletionFormatter(ChoiceFormatter):
    """Choices of POST /v1/completions."""

    def __init__(self, request: GenerationRequest, tokenizer: "BaseTokenizer") -> None:
        super().__init__(request, tokenizer)
        skips = request.params.skip_special_tokens
        self._prompt_table = tokenizer.written_bytes
        self._table = tokenizer.token_bytes if skips else tokenizer.written_bytes
        self._offsets: dict[int, TextOffsets] = {}
        self._prompts: dict[int, _ScoredPrompt] = {}

    def chunks(self, index: int, delta: OutputDelta) -> Iterator[str]:
        """One chunk; text alone has a fast path."""
        if (around := self.around_text(index)) is not None:
            yield f"{around[0]}{quoted(delta.text)}{around[1]}{finish_fields(delta)}}}]"
            return
        choice = self._choice(index, delta)
        if self._output.echo or choice.get("prompt_token_ids"):
            yield f'"choices":[{"".join(json_pieces(choice, compact))}]'
        else:
            yield f'"choices":[{compact(choice)}]'

    def around_text(self, index: int) -> tuple[str, str] | None:
        """As ChoiceFormatter.around_text."""
        if not self._is_text_only:
            return None
        return f'"choices":[{{"index":{index},"text":', ',"logprobs":null,"finish_reason":'

    def whole(self, index: int, delta: OutputDelta) -> JsonObject:
        """The JSON object of a choice that has ended; its optional fields are null if absent."""
        choice = self._choice(index, delta)
        return choice | {name: choice.get(name) for name in OPTIONAL_FIELDS}

    def _choice(self, index: int, delta: OutputDelta) -> JsonObject:
        """The JSON object of a choice or its delta; the first one includes the echoed prompt."""
        tokens = delta.tokens or TokenDeltas()
        place, output = self._prompt_of(index), self._output
        begins = self._begin(index)
        prompt = self._prompts.setdefault(place, _ScoredPrompt(self._request.num_choices))
        prompt.scores = tokens.prompt_logprobs or prompt.scores
        choice: JsonObject = {
            "index": index,
            "text": self._request.echoes[place] + delta.text if begins else delta.text,
            "logprobs": None if output.logprobs is None else self._logprobs(index, tokens, begins),
            "finish_reason": delta.finish_reason,
            "stop_reason": delta.stop_reason,
            "context_start": delta.context_start if delta.finish_reason else None,
        }
        if output.prompt_logprobs is not None:
            worded = prompt_logprobs(prompt.scores, self._names, output.prompt_logprobs)
            choice["prompt_logprobs"] = prompt.listed("prompt_logprobs", worded, (), self._encode)
        if output.token_ids:
            choice["prompt_token_ids"] = self._request.prompts[place] if begins else None
            choice["token_ids"] = tokens.ids
        return choice

    def _logprobs(self, index: int, tokens: TokenDeltas, begins: bool) -> JsonObject:
        """Of these tokens, after those of the prompt if it is echoed."""
        num_top = self._output.logprobs or 0
        place = self._prompt_of(index)
        if begins:
            self._offsets[index] = TextOffsets(self._table, len(self._request.echoes[place]))
        new = completion_logprobs(
            tokens.logprobs, tokens.ids, self._offsets[index], self._names, num_top
        )
        if not begins or not self._output.echo:
            return {name: LongList(values) for name, values in new.items()}
        offsets, prompt = TextOffsets(self._prompt_table, 0), self._prompts[place]
        ids = self._request.prompts[place][: len(prompt.scores)]
        echo = completion_logprobs(prompt.scores, ids, offsets, self._names, num_top)
        return {name: prompt.listed(name, echo[name], new[name], self._encode) for name in new}


class _ScoredPrompt:
    """The log-probabilities of one prompt, and their JSON where several choices repeat it."""

    def __init__(self, num_choices: int) -> None:
        self.scores: Sequence[TokenLogprob | None] = ()
        self._num_choices = num_choices
        self._encoded: dict[str, Sequence[str]] = {}
        self._num_uses: Counter[str] = Counter()

    def listed(
        self, name: str, own: Iterator[Any], more: Iterable[Any], encode: Encode
    ) -> LongList:
        """A choice's array of this name: `own` of the prompt, then `more` of the choice.

        `own` is encoded for the first choice, and kept until the last has it.
        """
        if self._num_choices == 1:
            return LongList(chain(own, more))
        if name not in self._encoded:
            self._encoded[name] = [*encode_elements(own, encode)]
        encoded = self._encoded[name]
        self._num_uses[name] += 1
        if self._num_uses[name] == self._num_choices:
            del self._encoded[name]
        return LongList(more, encoded)


MESSAGE_PARTS = ("refusal", "annotations", "audio", "function_call", "tool_calls", "reasoning")
"""Parts of a message in OpenAI's and vLLM's responses that are null; but for calls always."""


class ChatFormatter(ChoiceFormatter):
    """Choices of POST /v1/chat/completions."""

    def __init__(self, request: GenerationRequest, tokenizer: "BaseTokenizer") -> None:
        super().__init__(request, tokenizer)
        self._readers: dict[int, CallReader] = {}

    def chunks(self, index: int, delta: OutputDelta) -> Iterator[str]:
        """The role in a chunk of its own, then the delta; text alone has a fast path."""
        head = f'"choices":[{{"index":{index},"delta":{{'
        if self._begin(index):
            role = (
                f'{head}"role":"assistant","content":""}},"logprobs":null,"finish_reason":null}}]'
            )
            ids = self._request.prompts[0] if self._output.token_ids else None
            yield role + (
                f',"prompt_token_ids":{"".join(json_pieces(ids, compact))}' if ids else ""
            )
        if self._output.calls is not None:
            yield from self._call_chunks(index, delta, head)
            return
        has_text = delta.text or delta.finish_reason is None  # as OpenAI, nothing at the end only
        around = self.around_text(index) if has_text else None
        if around is not None:
            yield f"{around[0]}{quoted(delta.text)}{around[1]}{finish_fields(delta)}}}]"
            return
        text = f'"content":{quoted(delta.text)}' if has_text else ""
        if self._is_text_only:
            yield f'{head}{text}}},"logprobs":null,"finish_reason":{finish_fields(delta)}}}]'
            return
        yield (
            f'{head}{text}}},"logprobs":{compact(self._logprobs(delta))},'
            f'"finish_reason":{finish_fields(delta)}{self._ids(delta)}}}]'
        )

    def around_text(self, index: int) -> tuple[str, str] | None:
        """As ChoiceFormatter.around_text."""
        if not self._is_text_only or self._output.calls is not None:
            return None
        head = f'"choices":[{{"index":{index},"delta":{{"content":'
        return head, '},"logprobs":null,"finish_reason":'

    def _call_chunks(self, index: int, delta: OutputDelta, head: str) -> Iterator[str]:
        """A chunk for each part of the message that may have calls; the last has all else."""
        reader = self._reader(index)
        parts = reader.read(delta.text, is_last=delta.finish_reason is not None)
        *before, last = parts or [{}]
        for part in before:
            yield f'{head}{compact(part)[1:-1]}}},"logprobs":null,"finish_reason":null}}]'
        reason = finish_fields(delta, _finish_reason(delta, reader))
        yield (
            f'{head}{compact(last)[1:-1]}}},"logprobs":{compact(self._logprobs(delta))},'
            f'"finish_reason":{reason}{self._ids(delta)}}}]'
        )

    def _reader(self, index: int) -> CallReader:
        assert self._output.calls is not None
        if index not in self._readers:
            self._readers[index] = CallReader(self._output.calls)
        return self._readers[index]

    def whole(self, index: int, delta: OutputDelta) -> JsonObject:
        """The JSON object of a choice that has ended."""
        message: JsonObject = {"role": "assistant", "content": delta.text}
        message |= dict.fromkeys(MESSAGE_PARTS)
        reason: str | None = delta.finish_reason
        if self._output.calls is not None:
            reader = self._reader(index)
            reader.read(delta.text, is_last=True)
            message["content"] = reader.content or (None if reader.calls else "")
            message["tool_calls"] = [call.as_json() for call in reader.calls] or None
            reason = _finish_reason(delta, reader)
        choice: JsonObject = {
            "index": index,
            "message": message,
            "logprobs": self._logprobs(delta),
            "finish_reason": reason,
            "stop_reason": delta.stop_reason,
            "context_start": delta.context_start if delta.finish_reason else None,
            "token_ids": None,
        }
        if delta.tokens and self._output.token_ids:
            choice["token_ids"] = delta.tokens.ids
        return choice

    def top_level_fields(self, deltas: Mapping[int, OutputDelta]) -> JsonObject:
        """The prompt's ids and log-probabilities; null unless requested."""
        found: JsonObject = {"prompt_token_ids": None, "prompt_logprobs": None}
        if self._output.token_ids:
            found["prompt_token_ids"] = self._request.prompts[0]
        if (num_top := self._output.prompt_logprobs) is not None:
            tokens = deltas[0].tokens or TokenDeltas()
            worded = prompt_logprobs(tokens.prompt_logprobs, self._names, num_top)
            found["prompt_logprobs"] = LongList(worded)
        return found

    def _logprobs(self, delta: OutputDelta) -> JsonObject | None:
        if delta.tokens is None or self._output.logprobs is None:
            return None
        return chat_logprobs(delta.tokens.logprobs, self._names)

    def _ids(self, delta: OutputDelta) -> str:
        if delta.tokens is None or not self._output.token_ids:
            return ""
        return f',"token_ids":{compact(delta.tokens.ids)}'


def _finish_reason(delta: OutputDelta, reader: CallReader) -> str | None:
    """As OpenAI, tool_calls where a choice has ended by itself and with calls."""
    has_calls = delta.finish_reason is FinishReason.STOP and reader.is_complete
    return "tool_calls" if has_calls else delta.finish_reason


def finish_fields(delta: OutputDelta, reason: str | None = None) -> str:
    """The JSON value of "finish_reason" and, if the choice has ended, the fields after it.

    reason: in place of the engine's own.
    """
    if delta.finish_reason is None:
        return "null"
    return (
        f'"{reason or delta.finish_reason}","stop_reason":{json.dumps(delta.stop_reason)},'
        f'"context_start":{delta.context_start}'
    )
