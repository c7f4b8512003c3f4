"""The byte-level BPE tokenizer of a model folder: text to ids, and ids to bytes.

Reads `tokenizer.json`, or the older `vocab.json`, `merges.txt` and `added_tokens.json`. An id's
bytes may be part of a character: streams are decoded by `detokenizer.py`.
"""

import json
import re
from bisect import bisect_right
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from cottention.engine.errors import ModelFolderError

_PADDING = re.compile(r"<\|extratoken_\d+\|>")
"""GPT-J pads its vocabulary to 50,400 with these; they are never sampled."""


class Tokenizer:
    """A byte-level BPE tokenizer and the bytes of each of its ids.

    token_bytes: of each id, empty for special tokens. written_bytes: the same with special tokens
    written out. sampleable_ids: those that may be generated, in order. added_tokens: by id, those
    that are found in a text before it is split into words.
    """

    def __init__(self, backend: Backend, where: str) -> None:
        decoder = json.loads(backend.to_str())["decoder"] or {}
        if decoder.get("type") != "ByteLevel":
            raise ModelFolderError(
                f"{where}: the tokenizer's decoder is {decoder.get('type')}; only byte-level BPE"
                " (decoder ByteLevel) is supported"
            )
        backend.no_truncation()  # a folder may have it enabled from training; prompts are whole
        backend.no_padding()
        self._backend = backend
        self._before, self._after = _frame(backend)
        self.added_tokens: dict[int, AddedToken] = backend.get_added_tokens_decoder()
        vocabulary = backend.get_vocab(with_added_tokens=True)
        self.num_ids = max(vocabulary.values()) + 1
        self.token_bytes = _token_bytes(backend, vocabulary, self.num_ids)
        self.written_bytes = _with_specials(backend, self.token_bytes)
        self.sampleable_ids = sorted(
            token_id for token, token_id in vocabulary.items() if not _PADDING.fullmatch(token)
        )

    @classmethod
    def from_folder(cls, folder: Path) -> "Tokenizer":
        """Read the tokenizer of a model folder. Raises ModelFolderError."""
        try:
            if (folder / "tokenizer.json").is_file():
                return cls(Backend.from_file(str(folder / "tokenizer.json")), str(folder))
            if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
                return cls(_from_vocab_and_merges(folder), str(folder))
        except ModelFolderError:
            raise
        except Exception as error:  # the tokenizers library raises plain Exception
            raise ModelFolderError(f"the tokenizer in {folder} cannot be read: {error}") from error
        raise ModelFolderError(
            f"{folder} has no tokenizer: it needs tokenizer.json, or vocab.json and merges.txt"
        )

    def encode(self, text: str) -> list[int]:
        """Ids of `text` without special tokens around it; those written in it become their ids.

        Uses `encode_batch_fast`, which releases the GIL: `encode` holds it, for seconds for a long
        text.
        """
        return self._backend.encode_batch_fast([text], add_special_tokens=False)[0].ids

    def encode_untrusted(
        self, text: str, spans: Sequence[tuple[int, int]], control_ids: Collection[int]
    ) -> list[int]:
        """As `encode`, but each of `control_ids` whose spelling overlaps a span is ordinary text.

        spans: (begin, end) in characters of `text`, in order and apart; an empty one is overlapped
        by what has characters on both sides of it. All other ids are those of `encode`.
        """
        if not spans or not control_ids:
            return self.encode(text)
        encoding = self._backend.encode_batch([text], add_special_tokens=False)[0]
        begins = [begin for begin, _ in spans]
        ids: list[int] = []
        for place, token_id in enumerate(encoding.ids):
            if token_id in control_ids and (found := encoding.token_to_chars(place)):
                written = text[found[0] : found[1]]  # with white space, if the token takes that in
                first = found[0] + len(written) - len(written.lstrip())
                if _overlaps(spans, begins, first, found[0] + len(written.rstrip())):
                    ids += self._encode_ordinary(written, control_ids)
                    continue
            ids.append(token_id)
        return ids

    def _encode_ordinary(self, text: str, control_ids: Collection[int]) -> list[int]:
        """Ids of `text` without added tokens; its bytes' ids where those do not write it."""
        backend, normalized = self._backend, text
        if backend.normalizer is not None:
            normalized = backend.normalizer.normalize_str(text)
        words = [normalized]
        if backend.pre_tokenizer is not None:
            words = [word for word, _ in backend.pre_tokenizer.pre_tokenize_str(normalized)]
        ids = [token.id for word in words for token in backend.model.tokenize(word)]
        is_ordinary = not any(each in control_ids for each in ids)
        if is_ordinary and b"".join(self.token_bytes[each] for each in ids) == text.encode():
            return ids
        of_bytes = (backend.token_to_id(_CHARACTER_OF_BYTE[each]) for each in text.encode())
        return [each for each in of_bytes if each is not None]

    def framed(self, ids: list[int]) -> list[int]:
        """Add the special ids that the tokenizer puts around a text; GPT-J's adds none."""
        return [*self._before, *ids, *self._after] if self._before or self._after else ids

    def token_text(self, token_id: int) -> str:
        """Text of one id by itself, special tokens written out."""
        return self.written_bytes[token_id].decode("utf-8", errors="replace")

    def id_to_token(self, token_id: int) -> str:
        """The vocabulary's own string of an id, such as "Ġthe": unlike text, it loses no byte.

        Empty for an id without a token.
        """
        return self._backend.id_to_token(token_id) or ""

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`, special tokens left out, incomplete characters as U+FFFD."""
        return b"".join(self.token_bytes[i] for i in ids).decode("utf-8", errors="replace")


def _overlaps(
    spans: Sequence[tuple[int, int]], begins: Sequence[int], first: int, last: int
) -> bool:
    """Whether one of `spans`, which begin at `begins`, has characters of `first` to `last`."""
    place = bisect_right(begins, last - 1) - 1  # the last that begins before; it also ends last
    return place >= 0 and spans[place][1] > first


def _frame(backend: Backend) -> tuple[list[int], list[int]]:
    """Special ids that the tokenizer's post-processor puts before and after a text."""
    encoding = backend.encode("a")
    is_text = [not added for added in encoding.special_tokens_mask]
    if True not in is_text:  # "a" has no ids in this vocabulary
        return encoding.ids, []
    start, stop = is_text.index(True), len(is_text) - is_text[::-1].index(True)
    return encoding.ids[:start], encoding.ids[stop:]


def _token_bytes(backend: Backend, vocabulary: dict[str, int], num_ids: int) -> list[bytes]:
    """Bytes of each id; empty for special tokens and for ids without a token."""
    table = [b""] * num_ids
    added = backend.get_added_tokens_decoder()
    for token, token_id in vocabulary.items():
        if token_id not in added:
            table[token_id] = bytes(_BYTE_OF_CHARACTER[character] for character in token)
        elif not added[token_id].special:
            table[token_id] = token.encode()
    return table


def _with_specials(backend: Backend, token_bytes: list[bytes]) -> list[bytes]:
    """The same table with special tokens written out."""
    table = list(token_bytes)
    for token_id, added in backend.get_added_tokens_decoder().items():
        table[token_id] = added.content.encode()
    return table


def _byte_alphabet() -> dict[str, int]:
    """Byte-level BPE's character of each byte: itself where printable, else from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + place): byte for place, byte in enumerate(others)
    }


_BYTE_OF_CHARACTER = _byte_alphabet()
_CHARACTER_OF_BYTE = {byte: character for character, byte in _BYTE_OF_CHARACTER.items()}


def _from_vocab_and_merges(folder: Path) -> Backend:
    """Read the three older files. Ids of added tokens must follow those of the vocabulary."""
    backend = Backend(models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt")))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    added = _json(folder / "added_tokens.json")
    for token, token_id in sorted(added.items(), key=lambda item: item[1]):
        backend.add_special_tokens([AddedToken(token, special=True, normalized=False)])
        if backend.token_to_id(token) != token_id:
            raise ModelFolderError(
                f"{folder}/added_tokens.json gives {token!r} the id {token_id}; the next free id"
                f" is {backend.token_to_id(token)}"
            )
    backend.add_special_tokens(_named_specials(_json(folder / "tokenizer_config.json")))
    return backend


def _json(path: Path) -> dict[str, Any]:
    """A JSON object, or an empty one where the file is absent."""
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return content


def _named_specials(config: dict[str, Any]) -> list[AddedToken]:
    """The bos, eos, unk and pad tokens that tokenizer_config.json names."""
    named = (config.get(f"{role}_token") for role in ("bos", "eos", "unk", "pad"))
    contents = [token["content"] if isinstance(token, dict) else token for token in named]
    unique = dict.fromkeys(token for token in contents if token)
    return [AddedToken(token, special=True, normalized=False) for token in unique]
