"""How a choice is told: by a completion, and by a chat; whole, and as one chunk of a stream.

Owns the names in a choice's object and what its first chunk says beside text. Framing is
`streaming.py`'s, log-probabilities are `logprobs.py`'s.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from json.encoder import encode_basestring_ascii as quoted
from typing import TYPE_CHECKING

from cottention.engine.outputs import TokenLogprob
from cottention.server.logprobs import (
    Offsets,
    Shape,
    TokenNames,
    chat_logprobs,
    completion_logprobs,
    prompt_logprobs,
)
from cottention.server.orders import Order
from cottention.server.reading import Piece, Tokens

if TYPE_CHECKING:
    from cottention.engine.tokenizer import Tokenizer


compact = json.JSONEncoder(separators=(",", ":")).encode
"""JSON in ASCII, since some clients take U+2028 and its like for the end of a line."""


class Choices(ABC):
    """Tells the choices of one request; each is told whole once, or in chunks from the first."""

    def __init__(self, order: Order, tokenizer: "Tokenizer") -> None:
        self._order = order
        self._details = order.details
        self._is_text_alone = order.details.is_text_alone
        self._names = TokenNames(tokenizer, order.details.tokens_as_ids)
        self._begun: set[int] = set()

    @abstractmethod
    def whole(self, index: int, piece: Piece) -> Shape:
        """The object of a choice that has ended."""

    @abstractmethod
    def chunks(self, index: int, piece: Piece) -> Iterator[str]:
        """What chunks say of a choice: JSON fields from "choices" on, without their braces."""

    def beside(self, pieces: Mapping[int, Piece]) -> Shape:  # noqa: ARG002
        """Fields of the whole answer beside its choices."""
        return {}

    def _begins(self, index: int) -> bool:
        """Whether this choice has not been told of before."""
        is_new = index not in self._begun
        self._begun.add(index)
        return is_new

    def _prompt_of(self, index: int) -> int:
        return index // self._order.num_choices


class CompletionChoices(Choices):
    """Choices of POST /v1/completions."""

    def __init__(self, order: Order, tokenizer: "Tokenizer") -> None:
        super().__init__(order, tokenizer)
        skips = order.params.skip_special_tokens
        self._prompt_table = tokenizer.written_bytes
        self._table = tokenizer.token_bytes if skips else tokenizer.written_bytes
        self._offsets: dict[int, Offsets] = {}
        self._scores: dict[int, Sequence[TokenLogprob | None]] = {}

    def chunks(self, index: int, piece: Piece) -> Iterator[str]:
        """One chunk, in the quick way where it has nothing but text."""
        if not self._is_text_alone:
            yield f'"choices":[{compact(self.whole(index, piece))}]'
            return
        yield (
            f'"choices":[{{"index":{index},"text":{quoted(piece.text)},"logprobs":null,'
            f'"finish_reason":{ending(piece)}}}]'
        )

    def whole(self, index: int, piece: Piece) -> Shape:
        """The object of a choice, or of what came of it; the first has the prompt's part, too."""
        tokens, place, details = piece.tokens or Tokens(), self._prompt_of(index), self._details
        begins = self._begins(index)
        if tokens.prompt_logprobs:
            self._scores[place] = tokens.prompt_logprobs
        choice: Shape = {
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

    def _logprobs(self, index: int, tokens: Tokens, begins: bool) -> Shape:
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


class ChatChoices(Choices):
    """Choices of POST /v1/chat/completions."""

    def chunks(self, index: int, piece: Piece) -> Iterator[str]:
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

    def whole(self, index: int, piece: Piece) -> Shape:
        """The object of a choice that has ended."""
        choice: Shape = {
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

    def beside(self, pieces: Mapping[int, Piece]) -> Shape:
        """The prompt's ids and log-probabilities, where they are wanted."""
        found: Shape = {}
        if self._details.token_ids:
            found["prompt_token_ids"] = self._order.prompts[0]
        if (num_top := self._details.prompt_logprobs) is not None:
            tokens = pieces[0].tokens or Tokens()
            found["prompt_logprobs"] = prompt_logprobs(tokens.prompt_logprobs, self._names, num_top)
        return found

    def _logprobs(self, piece: Piece) -> Shape | None:
        if piece.tokens is None or self._details.logprobs is None:
            return None
        return chat_logprobs(piece.tokens.logprobs, self._names)

    def _ids(self, piece: Piece) -> str:
        if piece.tokens is None or not self._details.token_ids:
            return ""
        return f',"token_ids":{compact(piece.tokens.ids)}'


def ending(piece: Piece) -> str:
    """JSON after "finish_reason"; a choice that goes on has nothing else."""
    if piece.finish_reason is None:
        return "null"
    return (
        f'"{piece.finish_reason}","stop_reason":{json.dumps(piece.stop_reason)},'
        f'"context_start":{piece.context_start}'
    )
