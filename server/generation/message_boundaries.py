"""Where the messages of a chat lie in its prompt's token ids.

Conversations that begin alike part between messages, so that states are kept there. A place that is
missed or wrong costs time and changes nothing that is generated.
"""

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cottention.engine.text.base import BaseTokenizer


def message_boundaries(
    text: str, messages: Sequence[Mapping[str, Any]], ids: Sequence[int], tokenizer: "BaseTokenizer"
) -> tuple[int, ...]:
    """How many ids lie before the content of each message after the first, ascending.

    text: the rendered prompt. ids: its token ids. None are found where ids do not spell the text,
    as with tokenizers that normalize it.
    """
    if len(messages) < 2:
        return ()
    written = tokenizer.written_bytes
    ends = list(accumulate(len(written[each]) for each in ids))
    if not ends or ends[-1] != len(text.encode()):
        return ()
    places = {bisect_right(ends, begin) for begin in _content_begins(text, messages)}
    return tuple(sorted(places - {0, len(ids)}))


def _content_begins(text: str, messages: Sequence[Mapping[str, Any]]) -> Iterator[int]:
    """Bytes of the text before the content of each message after the first that is found."""
    place = num_bytes = 0
    for index, message in enumerate(messages):
        content = message.get("content")
        core = content.strip() if isinstance(content, str) else ""
        found = text.find(core, place) if core else -1
        if found < 0:
            continue
        num_bytes += len(text[place:found].encode())
        if index:
            yield num_bytes
        num_bytes += len(core.encode())
        place = found + len(core)
