"""What a choice has had, as far as its parameters make later draws depend on it. Knows no torch.

How often ids came. Knows no torch.
"""

from array import array
from collections import deque
from collections.abc import Iterable, Mapping, Sequence

from cottention.engine.sampling_params import SamplingParams
from cottention.engine.text.tokenizer import Tokenizer


class TokenHistory:
    """Counts for the penalties, and the last few ids for words that may not be completed.

    counts: how often each id of the prompt and the text has been generated, in earlier turns of a
    session too; empty where no penalty asks for it.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt_ids: Sequence[int],
        bad_words: Sequence[Sequence[int]],
        earlier: Mapping[int, int],
    ) -> None:
        """`earlier`: counts of what a session had before this prompt."""
        self._is_counting = params.has_penalty
        self._bad_words = bad_words
        self._last: deque[int] = deque(maxlen=max((len(ids) - 1 for ids in bad_words), default=0))
        self.counts = TokenCounts(prompt_ids, earlier) if self._is_counting else TokenCounts()

    def note(self, token_id: int) -> None:
        """An id has been generated."""
        self._last.append(token_id)
        if self._is_counting:
            self.counts.note(token_id)

    def masked_token_ids(self) -> list[int]:
        """Ids that would complete a bad word now."""
        if not self._bad_words:
            return []
        last = list(self._last)
        return [
            ids[-1] for ids in self._bad_words if last[len(last) - len(ids) + 1 :] == list(ids[:-1])
        ]


def spellings(words: Sequence[str], tokenizer: Tokenizer) -> list[list[int]]:
    """Ids of each word as it stands and as it follows a space; of spaces alone, the latter."""
    texts = [start + word.lstrip(" ") for word in words for start in ("", " ")]
    return [ids for text in texts if (ids := tokenizer.encode(text))]


class TokenCounts:
    """Ids that came and how often each did, side by side in memory: tensors view them as they are.

    ids int64, each once; times float32.
    """

    def __init__(
        self, read: Iterable[int] = (), generated: Mapping[int, int] | None = None
    ) -> None:
        """`read`: ids that came, 0 times so far; `generated`: how often each was generated."""
        times = {**dict.fromkeys(read, 0), **(generated or {})}
        self.ids = array("q", times)
        self.times = array("f", times.values())
        self._places = {token_id: place for place, token_id in enumerate(times)}

    def __len__(self) -> int:
        return len(self.ids)

    def note(self, token_id: int) -> None:
        """An id has been generated."""
        place = self._places.setdefault(token_id, len(self.ids))
        if place == len(self.ids):
            self.ids.append(token_id)
            self.times.append(0)
        self.times[place] += 1
