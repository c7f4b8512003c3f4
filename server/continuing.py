"""How a chat goes on in a session: what its template writes after an assistant's message.

Owns how that is found, and what of it is not read again, since the session ends with it.
"""

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from cottention.server.templates import TURNS, ChatTemplate, ChatTemplateError, Message

if TYPE_CHECKING:
    from cottention.engine.tokenizer import Tokenizer


MAX_SEAM = 1024
"""Characters in which the end of an answer is looked for: a client's variables may be in them."""


@dataclass(frozen=True, slots=True)
class Continuation:
    """The prompt of a turn, if its session holds something.

    seam: the beginning of the text of `ids` that is the template's own, before any message.
    stops: texts that end an answer; a session may hold one that was drawn.
    is_framed: whether the tokenizer's special ids are put around it.
    """

    ids: list[int]
    seam: str = ""
    stops: tuple[str, ...] = ()
    is_framed: bool = False

    def after(self, past: Sequence[int], tokenizer: "Tokenizer") -> list[int]:
        """What is to be read after these ids: of the seam, no id twice."""
        seam, written = self.seam[:MAX_SEAM].encode(), tokenizer.written_bytes
        head = [written[each] for each in self.ids[: len(seam)]]
        tail = b"".join(written[each] for each in past[-len(seam) :]) if seam else b""
        stops = [each.encode() for each in self.stops if tail.endswith(each.encode())]
        ids = self.ids[_num_said(seam, head, tail, stops) :]
        return tokenizer.framed(ids) if self.is_framed else ids


def render_after(
    template: ChatTemplate, messages: Sequence[Message], more: Mapping[str, Any]
) -> tuple[str, str] | None:
    """What follows an assistant's message, and its beginning before the first of `messages`.

    more: other variables. None where the template does not take `messages` there.
    """
    mark = f"mark{secrets.token_hex(8)}"
    past = [TURNS[0], {"role": "assistant", "content": mark}]
    marked = [*past, {**messages[0], "content": mark}]
    try:
        texts = template.render([*past, *messages], more).split(mark)
        seams = template.render(marked, more).split(mark)
    except ChatTemplateError:
        return None
    if (len(texts), len(seams)) != (2, 3) or not texts[1]:
        return None
    text, seam = texts[1], seams[1]
    return text, seam if text.startswith(seam) else ""


def _num_said(seam: bytes, head: Sequence[bytes], tail: bytes, stops: Sequence[bytes]) -> int:
    """How many ids of `head` the text `tail` ends with.

    As many as possible; else to the first end of an answer, before which a template may want space
    that the model did not draw. Ids are never split: a special one would become letters.
    """
    ends = list(accumulate(map(len, head)))
    begins = [seam[:end] for end in ends if end <= len(seam)]
    said = [place for place, begin in enumerate(begins, 1) if tail.endswith(begin)]
    ended = (place for place, begin in enumerate(begins, 1) if begin.endswith(tuple(stops)))
    return said[-1] if said else next(ended, 0)
