"""Ids to text, one at a time, never more than is certain.

Owns the bytes of an unfinished character and the text that may still become a stop string. What is
emitted does not depend on how the text was cut into tokens.
"""

import codecs
from collections.abc import Sequence


class Detokenizer:
    """One choice's text as it grows. `stopped` turns true when a stop string is complete."""

    def __init__(self, token_bytes: Sequence[bytes], stop: Sequence[str] = ()) -> None:
        self._token_bytes = token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._stop = tuple(stop)
        self._held = ""
        self.stopped = False

    def push(self, token_id: int) -> str:
        """Text that is certain now that `token_id` has come."""
        return self._release(self._decoder.decode(self._token_bytes[token_id]))

    def finish(self) -> str:
        """What was held back and will not become anything else; U+FFFD for half a character."""
        if self.stopped:
            return ""
        text = self._release(self._decoder.decode(b"", final=True))
        rest, self._held = self._held, ""
        return text if self.stopped else text + rest

    def _release(self, new: str) -> str:
        """Cut before a complete stop string; hold back the start of a possible one."""
        if not self._stop:
            return new
        text = self._held + new
        end = self._first_stop(text)
        if end is not None:
            self.stopped, self._held = True, ""
            return text[:end]
        certain = len(text) - self._longest_start(text)
        self._held = text[certain:]
        return text[:certain]

    def _first_stop(self, text: str) -> int | None:
        """Where the stop string begins that is complete first; of several, the longest."""
        found = [(text.find(stop) + len(stop), text.find(stop)) for stop in self._stop]
        complete = [place for place in found if place[1] >= 0]
        return min(complete)[1] if complete else None

    def _longest_start(self, text: str) -> int:
        """Length of the longest end of `text` that is the beginning of a stop string."""
        longest = min(len(text), max(len(stop) for stop in self._stop) - 1)
        lengths = range(longest, 0, -1)
        return next((n for n in lengths if any(s.startswith(text[-n:]) for s in self._stop)), 0)
