"""Control tokens that are spelled in the messages of a chat, and become ordinary text.

`track` renders messages and finds which parts of the text come from them; `encode` gives the ids.
Text that a template passes on, trims or transforms letter by letter is followed exactly. Where a
template cuts it to pieces, whole spellings are followed, by marks around each of them.
"""

import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby, takewhile
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cottention.engine.text.base import BaseTokenizer

Message = Mapping[str, Any]
Render = Callable[[Sequence[Message]], str | None]
Spans = tuple[tuple[int, int], ...]

TEXT_FIELDS = ("content", "name")
"""Fields of a message that are text; what is spelled in others, such as the role, is found, too."""

MARKS = range(0xE000, 0xF900)
"""Private-use characters. A template treats them as letters that have no case."""


class UntrackableError(Exception):
    """What comes from the messages cannot be found; the message completes "the template ..."."""


@dataclass(frozen=True, slots=True)
class ControlTokens:
    """Added tokens that control a model, by their ids.

    spellings: their texts. pattern: finds these, the longest first, in any case.
    """

    ids: frozenset[int]
    spellings: frozenset[str]
    pattern: re.Pattern[str]

    @classmethod
    def of(cls, tokenizer: "BaseTokenizer", literals: str) -> "ControlTokens | None":
        """A tokenizer's special tokens, and other added tokens that are in a template's `literals`.

        The same as transformers' `sanitize_control_tokens`. None if there are none.
        """
        found = {
            token_id: token.content
            for token_id, token in tokenizer.added_tokens.items()
            if token.special or (token.content.strip() and token.content in literals)
        }
        if not found:
            return None
        spellings = frozenset(found.values())
        return cls(frozenset(found), spellings, _pattern_of(spellings))

    def in_text(self, text: str) -> list[str]:
        """The control tokens that are spelled in a text."""
        found = (match.group() for match in self.pattern.finditer(text))
        return [each for each in found if each in self.spellings]


@dataclass(frozen=True, slots=True)
class RenderedChat:
    """The text of a chat's prompt.

    untrusted: (begin, end) of the parts that come from messages, in order; an empty one is a place
    across which no control token may be read.
    """

    text: str
    untrusted: Spans = ()

    def after(self, begin: int) -> "RenderedChat":
        """The text from a place on."""
        spans = ((max(0, a - begin), b - begin) for a, b in self.untrusted if b > begin)
        return RenderedChat(self.text[begin:], tuple(spans))

    def until(self, end: int) -> "RenderedChat":
        """The text up to a place."""
        spans = ((a, min(b, end)) for a, b in self.untrusted if a < end)
        return RenderedChat(self.text[:end], tuple(spans))

    def encode(self, tokenizer: "BaseTokenizer", control: ControlTokens | None) -> list[int]:
        """Token ids, in which control tokens in untrusted text are ordinary text."""
        if control is None:
            return tokenizer.encode(self.text)
        return tokenizer.encode_untrusted(self.text, self.untrusted, control.ids)


def track(
    text: str, render: Render, messages: Sequence[Message], control: ControlTokens | None
) -> RenderedChat:
    """Find what in the text of a chat comes from its messages.

    text: the messages as the template renders them. render: renders messages with marks in them;
    None where the template rejects these.
    The result has the same text, unless that has a control token that may be a message's and cannot
    be followed: then it is what the template makes of the messages with marks, without these.
    Raises UntrackableError.
    """
    if control is None:
        return RenderedChat(text)
    marks = _Marks.unused_in([text, *_strings(messages)])
    marked = render([_marked(each, marks, control) for each in messages])
    whole = None if marked is None else marks.removed(marked)
    if whole is not None and whole.text == text:
        return whole
    marked = render([marks.around_each(each, control) for each in messages])
    if marked is None:
        raise UntrackableError("rejects messages with special tokens in their text")
    spelled = marks.broken(marked)
    if spelled.text == text or control.in_text(text) != _outside(spelled, control):
        return spelled
    return RenderedChat(text)  # all of its control tokens are the template's


@dataclass(frozen=True, slots=True)
class _Marks:
    """Two characters that stand before and after what is followed."""

    before: str
    after: str

    @classmethod
    def unused_in(cls, texts: Iterable[str]) -> "_Marks":
        used = set().union(*(text for text in texts if not text.isascii()))
        free = [chr(each) for each in MARKS if chr(each) not in used]
        if len(free) < 2:
            raise UntrackableError("cannot be given so many different private-use characters")
        return cls(*random.sample(free, 2))

    @property
    def _pattern(self) -> re.Pattern[str]:
        """Either mark, also as JSON escapes it."""
        forms = (rf"{each}|\\u{ord(each):04x}" for each in (self.before, self.after))
        return re.compile("|".join(f"({form})" for form in forms))

    def around(self, text: str) -> str:
        """Marks around a text, inside of its white space, so that it can still be trimmed."""
        core = text.strip()
        if not core:
            return text
        begin = text.index(core)
        end = begin + len(core)
        return f"{text[:begin]}{self.before}{core}{self.after}{text[end:]}"

    def around_each(self, value: Any, control: ControlTokens) -> Any:
        """Marks around each control token that is spelled in the strings of a JSON value."""
        if isinstance(value, str):
            return control.pattern.sub(lambda each: f"{self.before}{each[0]}{self.after}", value)
        if isinstance(value, Mapping):
            return {name: self.around_each(each, control) for name, each in value.items()}
        if isinstance(value, list):
            return [self.around_each(each, control) for each in value]
        return value

    def _split(self, marked: str) -> tuple[str, list[tuple[bool, int]]]:
        """A text without its marks; and for each, whether it is `after`, and its place."""
        kept, places, begin, length = [], [], 0, 0
        for mark in self._pattern.finditer(marked):
            kept.append(marked[begin : mark.start()])
            length += mark.start() - begin
            begin = mark.end()
            places.append((mark.lastindex == 2, length))
        return "".join([*kept, marked[begin:]]), places

    def removed(self, marked: str) -> RenderedChat | None:
        """The text without its marks, untrusted between them. None unless they are pairs."""
        text, places = self._split(marked)
        begins, ends = places[::2], places[1::2]
        if any(is_after for is_after, _ in begins) or not all(is_after for is_after, _ in ends):
            return None
        if len(begins) != len(ends):
            return None
        spans = ((a, b) for (_, a), (_, b) in zip(begins, ends, strict=True))
        return RenderedChat(text, tuple(spans))

    def broken(self, marked: str) -> RenderedChat:
        """The text without its marks, untrusted between pairs of them and at single ones."""
        text, places = self._split(marked)
        spans: list[tuple[int, int]] = []
        is_open = False
        for is_after, place in places:
            if is_after and is_open:
                spans[-1] = (spans[-1][0], place)
            else:
                spans.append((place, place))
            is_open = not is_after
        return RenderedChat(text, tuple(spans))


def _marked(message: Message, marks: _Marks, control: ControlTokens) -> Message:
    """Marks around a message's texts, and around control tokens that are spelled elsewhere."""
    return {
        name: marks.around(value)
        if name in TEXT_FIELDS and isinstance(value, str)
        else marks.around_each(value, control)
        for name, value in message.items()
    }


def _outside(chat: RenderedChat, control: ControlTokens) -> list[str]:
    """The control tokens that are spelled in a text and overlap nothing untrusted."""
    found = []
    spans = iter(chat.untrusted)
    span = next(spans, None)
    for match in control.pattern.finditer(chat.text):
        while span is not None and span[1] <= match.start():
            span = next(spans, None)
        is_trusted = span is None or span[0] >= match.end()
        if is_trusted and match.group() in control.spellings:
            found.append(match.group())
    return found


def _strings(value: Any) -> Iterator[str]:
    """The strings in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _strings(each)
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _strings(each)


@lru_cache(maxsize=4)
def _pattern_of(texts: frozenset[str]) -> re.Pattern[str]:
    """Finds texts, the longest first, in any case."""
    return re.compile(_any_of(sorted(texts)), re.IGNORECASE)


def _any_of(texts: Sequence[str]) -> str:
    """A pattern of sorted texts, the longest first, that tests a common beginning only once."""
    branches = []
    for _, group in groupby((each for each in texts if each), key=lambda each: each[0]):
        alike = list(group)
        shared = _common_beginning(alike[0], alike[-1])
        branches.append(re.escape(shared) + _any_of([each[len(shared) :] for each in alike]))
    if not branches:
        return ""
    return f"(?:{'|'.join(branches)}){'?' if '' in texts else ''}"


def _common_beginning(first: str, last: str) -> str:
    pairs = zip(first, last, strict=False)
    length = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    return first[:length]
