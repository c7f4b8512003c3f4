"""What every kind of tokenizer offers: text to ids, and the bytes of each id."""

from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import AddedToken


class BaseTokenizer(ABC):
    """A tokenizer and the bytes of each of its ids.

    num_ids: ids are below it. token_bytes: of each id, empty for special tokens. written_bytes: the
    same with special tokens written out. sampleable_ids: those that may be generated, in order.
    added_tokens: by id, those that are found in a text before it is split. eos_token_id: of the
    token that the tokenizer's files name, if they name one. files: those on which ids depend.
    """

    num_ids: int
    token_bytes: list[bytes]
    written_bytes: list[bytes]
    sampleable_ids: list[int]
    added_tokens: "dict[int, AddedToken]"
    eos_token_id: int | None
    files: tuple[Path, ...] = ()

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Ids of `text` without special tokens around it; those written in it become their ids."""

    @abstractmethod
    def encode_untrusted(
        self, text: str, spans: Sequence[tuple[int, int]], control_ids: Collection[int]
    ) -> list[int]:
        """As `encode`, but each of `control_ids` whose spelling overlaps a span is ordinary text.

        spans: (begin, end) in characters of `text`, in order and apart; an empty one is overlapped
        by what has characters on both sides of it. All other ids are those of `encode`.
        """

    @abstractmethod
    def framed(self, ids: list[int]) -> list[int]:
        """Add the special ids that the tokenizer puts around a text."""

    @abstractmethod
    def id_to_token(self, token_id: int) -> str:
        """The vocabulary's own string of an id: unlike text, it loses no byte.

        Empty for an id without a token.
        """

    def cover(self, num_ids: int) -> None:
        """Give no bytes to the ids up to `num_ids` that a model has beyond the tokenizer's.

        None is sampled, but each may be among the likeliest.
        """
        for table in (self.token_bytes, self.written_bytes):
            table.extend([b""] * (num_ids - len(table)))

    def token_text(self, token_id: int) -> str:
        """Text of one id by itself, special tokens written out."""
        return self.written_bytes[token_id].decode("utf-8", errors="replace")

    def written(self, ids: Iterable[int]) -> str:
        """Text of `ids`, special tokens written out, incomplete characters as U+FFFD."""
        return b"".join(self.written_bytes[i] for i in ids).decode("utf-8", errors="replace")

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`, special tokens left out, incomplete characters as U+FFFD."""
        return b"".join(self.token_bytes[i] for i in ids).decode("utf-8", errors="replace")


def overlaps(
    spans: Sequence[tuple[int, int]], begins: Sequence[int], first: int, last: int
) -> bool:
    """Whether one of `spans`, which begin at `begins`, has characters of `first` to `last`."""
    place = bisect_right(begins, last - 1) - 1  # the last that begins before; it also ends last
    return place >= 0 and spans[place][1] > first
