"""Incremental detokenization: ids to text, one at a time.

Held back are the bytes of an incomplete character and text that may become a stop string. What is
emitted does not depend on how the text was cut into tokens.
"""

import codecs
from collections.abc import Sequence


class Detokenizer:
    """The text of one choice as it is generated.

    stop: the stop string that ended it, if any. undecoded: bytes of an incomplete character.
    """

    def __init__(
        self, token_bytes: Sequence[bytes], stop: Sequence[str] = (), undecoded: bytes = b""
    ) -> None:
        """undecoded: those of earlier ids, as `pause` left them."""
        self._token_bytes = token_bytes
        self.undecoded = undecoded
        self._held = ""
        self.stop: str | None = None
        self.watch(stop)

    def watch(self, stop: Sequence[str]) -> None:
        """Set the stop strings: text ends before the first that begins in text not yet decoded."""
        self._watched = tuple(stop)

    def push(self, token_id: int) -> str:
        """Add an id; returns the text that can be emitted."""
        written = self.undecoded + self._token_bytes[token_id]
        text, num_decoded = codecs.utf_8_decode(written, "replace")
        self.undecoded = written[num_decoded:]
        return self._release(text) if self._watched else text

    def pause(self) -> str:
        """As `finish`, where more may follow later: an incomplete character stays `undecoded`."""
        text, self._held = self._held, ""
        return text

    def finish(self) -> str:
        """Text that was held back; U+FFFD for an incomplete character."""
        if self.stop is not None:
            return ""
        text, self.undecoded = self.undecoded.decode(errors="replace"), b""
        text = self._release(text)
        rest, self._held = self._held, ""
        return text if self.stop is not None else text + rest

    def _release(self, new: str) -> str:
        """Cut before the stop string that is complete first; hold back what may become one."""
        if not self._watched:
            return new
        text = self._held + new
        found = [(text.find(stop), stop) for stop in self._watched if stop in text]
        if found:
            start, self.stop = min(found, key=lambda at: (at[0] + len(at[1]), at[0]))
            self._held = ""
            return text[:start]
        certain = len(text) - self._longest_start(text)
        self._held = text[certain:]
        return text[:certain]

    def _longest_start(self, text: str) -> int:
        """Length of the longest suffix of `text` that is a prefix of a stop string."""
        longest = min(len(text), max(len(stop) for stop in self._watched) - 1)
        lengths = range(longest, 0, -1)
        return next((n for n in lengths if any(s.startswith(text[-n:]) for s in self._watched)), 0)
