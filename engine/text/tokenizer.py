"""The byte-level BPE tokenizer of a model folder: text to ids, and ids to bytes.

Reads `tokenizer.json`, or the older `vocab.json` and `merges.txt`, and what `special_tokens.py`
finds beside them. An id's bytes may be part of a character: streams are decoded by
`detokenizer.py`.
"""

import json
import logging
import os
import time
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from cottention.engine.errors import ModelFolderError
from cottention.engine.text.base import BaseTokenizer, overlaps
from cottention.engine.text.files import parse_json, read_json, read_text
from cottention.engine.text.special_tokens import (
    PADDING,
    NumberedToken,
    TokenFacts,
    read_token_facts,
)

_log = logging.getLogger(__name__)


class Tokenizer(BaseTokenizer):
    """A byte-level BPE tokenizer and the bytes of each of its ids."""

    def __init__(self, backend: Backend, where: str, eos_token: str | None = None) -> None:
        _check_kind(json.loads(backend.to_str()), where)
        backend.no_truncation()  # a folder may have it enabled from training; prompts are whole
        backend.no_padding()
        self._backend = backend
        self._before, self._after = frame_of(backend)
        self.added_tokens: dict[int, AddedToken] = backend.get_added_tokens_decoder()
        vocabulary = backend.get_vocab(with_added_tokens=True)
        _check_ids(vocabulary, where)
        self.num_ids = max(vocabulary.values()) + 1
        self.token_bytes = _token_bytes(backend, vocabulary, self.num_ids)
        self.written_bytes = _with_specials(backend, self.token_bytes)
        self.sampleable_ids = sorted(
            token_id for token, token_id in vocabulary.items() if not PADDING.fullmatch(token)
        )
        self.eos_token_id = None if eos_token is None else backend.token_to_id(eos_token)

    @classmethod
    def from_folder(cls, folder: Path, max_ids: int | None = None) -> "Tokenizer":
        """Read the tokenizer of a model folder. Raises ModelFolderError.

        max_ids: ids that the model has embeddings for. A special token that is named and that the
        vocabulary lacks gets the next id below it, as with transformers.
        """
        is_new = os.path.lexists(folder / "tokenizer.json")
        if not is_new and not all((folder / name).is_file() for name in _OLDER_FILES):
            raise ModelFolderError(
                f"{folder} has no tokenizer: it needs tokenizer.json, or vocab.json and merges.txt"
            )
        where = str(folder / "tokenizer.json") if is_new else str(folder)
        try:
            backend = read_tokenizer_json(folder) if is_new else _from_vocab_and_merges(folder)
            facts = read_token_facts(folder, is_needed=not is_new)
            add_tokens(backend, facts.added)
            add_specials(backend, facts, folder, max_ids)
            eos_token = facts.named.get("eos_token")
            made = cls(backend, where, None if eos_token is None else eos_token.content)
        except UnsupportedTokenizerError as error:
            raise ModelFolderError(str(error)) from None
        except BaseException as error:  # the tokenizers library raises Exception, and panics
            if not is_of_library(error):
                raise
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ModelFolderError(f"the tokenizer in {where} cannot be read: {reason}") from None
        made.files = tuple(path for name in _FILES if (path := folder / name).is_file())
        return made

    def encode(self, text: str) -> list[int]:
        """Ids of `text` without special tokens around it; those written in it become their ids.

        Uses `encode_batch_fast`, which releases the GIL: `encode` holds it, for seconds for a long
        text. Ids are read and what they come from is freed with it: one after the other.
        """
        encoding = self._backend.encode_batch_fast([text], add_special_tokens=False)[0]
        ids = encoding.ids
        time.sleep(0)  # other threads have their turn before `encoding` is freed
        return ids

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
                if overlaps(spans, begins, first, found[0] + len(written.rstrip())):
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

    def id_to_token(self, token_id: int) -> str:
        """The vocabulary's own string of an id, such as "Ġthe": unlike text, it loses no byte.

        Empty for an id without a token.
        """
        return self._backend.id_to_token(token_id) or ""


def frame_of(backend: Backend) -> tuple[list[int], list[int]]:
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
            table[token_id] = _bytes_of(token)
        elif not added[token_id].special:
            table[token_id] = token.encode()
    return table


def _bytes_of(token: str) -> bytes:
    """Bytes of an entry of the vocabulary; one that spells no bytes is text as it is."""
    try:
        return bytes(_BYTE_OF_CHARACTER[character] for character in token)
    except KeyError:
        return token.encode()


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


_OLDER_FILES = ("vocab.json", "merges.txt")
_FILES = ("tokenizer.json", *_OLDER_FILES, "added_tokens.json")


class UnsupportedTokenizerError(ModelFolderError):
    """A tokenizer that is read and is of another kind, or contradicts itself."""


def is_of_library(error: BaseException) -> bool:
    """Whether this is an exception, or a panic of a library in Rust, which is none of Python's."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def _check_kind(raw: dict[str, Any], where: str) -> None:
    """Refuse what is no byte-level BPE."""
    decoder = (raw["decoder"] or {}).get("type")
    if decoder != "ByteLevel":
        raise UnsupportedTokenizerError(
            f"{where}: the tokenizer's decoder is {decoder}; only byte-level BPE"
            " (decoder ByteLevel) is supported"
        )
    if raw["model"].get("type") != "BPE":
        raise UnsupportedTokenizerError(
            f"{where}: the tokenizer's model is {raw['model'].get('type')}; only byte-level BPE"
            " (model BPE) is supported"
        )
    steps = [*_steps(raw["pre_tokenizer"]), *_steps(raw["normalizer"])]
    if "ByteLevel" not in steps:
        raise UnsupportedTokenizerError(
            f"{where}: the tokenizer splits text by {', '.join(steps) or 'nothing'}; only"
            " byte-level BPE (pre_tokenizer ByteLevel) is supported"
        )


def _steps(raw: dict[str, Any] | None) -> Iterator[str]:
    """Types of a pre-tokenizer or normalizer and of those that it consists of."""
    if raw is not None:
        yield raw["type"]
        for each in [*raw.get("pretokenizers", ()), *raw.get("normalizers", ())]:
            yield from _steps(each)


def _check_ids(vocabulary: dict[str, int], where: str) -> None:
    """Refuse a vocabulary without tokens, or with two of one id; warn of bytes without a token."""
    if not vocabulary:
        raise UnsupportedTokenizerError(f"{where}: the tokenizer has no tokens")
    ((token_id, count),) = Counter(vocabulary.values()).most_common(1)
    if count > 1:
        tokens = sorted(token for token, each in vocabulary.items() if each == token_id)
        raise UnsupportedTokenizerError(
            f"{where}: {tokens[0]!r} and {tokens[1]!r} have one id, {token_id}"
        )
    missing = _BYTE_OF_CHARACTER.keys() - vocabulary.keys()
    if missing:
        _log.warning(
            "%s: the vocabulary has no token for %d of the 256 bytes; they are left out of prompts",
            where,
            len(missing),
        )


def read_tokenizer_json(folder: Path) -> Backend:
    path = folder / "tokenizer.json"
    text = read_text(path)
    backend = Backend.from_str(text)
    for each in parse_json(text, path).get("added_tokens") or ():
        found = backend.token_to_id(each["content"])
        if found != each["id"]:
            _log.warning(
                "%s gives %r the id %s; it has %s", path, each["content"], each["id"], found
            )
    return backend


def _from_vocab_and_merges(folder: Path) -> Backend:
    """Read the two older files."""
    vocabulary = read_json(folder / "vocab.json")
    for token, token_id in vocabulary.items():
        if type(token_id) is not int or not 0 <= token_id < 2**32:
            raise ModelFolderError(f"vocab.json: {token!r} must have an id, it has {token_id!r}")
    merges = list(_merges(folder / "merges.txt"))
    backend = Backend(models.BPE(vocabulary, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def _merges(path: Path) -> Iterator[tuple[str, str]]:
    """The pairs of merges.txt, whose lines may end as on Windows."""
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        parts = line.removesuffix("\r").split(" ")
        if line.startswith("#version") or parts == [""]:
            continue
        if len(parts) != 2 or not all(parts):
            raise ModelFolderError(f"merges.txt: line {number} is not two tokens and a space")
        yield parts[0], parts[1]


def add_tokens(backend: Backend, added: Iterable[NumberedToken]) -> None:
    """Add tokens to the vocabulary, and make those special that are.

    Their ids must be what they get here, which follow those of the vocabulary.
    """
    for each in added:
        content = each.token.content
        known = backend.token_to_id(content)
        found = _next_id(backend) if known is None else known
        if found != each.token_id:
            what = "the next free id is" if known is None else "its id is"
            message = f"{each.file} gives {content!r} the id {each.token_id}; {what} {found}"
            if each.is_required:
                raise UnsupportedTokenizerError(message)
            _log.warning("%s; it is ignored", message)
        else:
            _add(backend, each.token)


def add_specials(backend: Backend, facts: TokenFacts, folder: Path, max_ids: int | None) -> None:
    """Make the named tokens special; unknown ones are added where the model has ids for them."""
    for role, token in facts.named.items():
        is_known = backend.token_to_id(token.content) is not None
        if is_known or max_ids is None or _next_id(backend) < max_ids:
            _add(backend, token)
        else:
            _log.warning(
                "%s: %s is %r, which is not in the vocabulary, and the model has no embedding for"
                " it; it is ignored",
                folder,
                role,
                token.content,
            )


def _add(backend: Backend, token: AddedToken) -> None:
    """Add a token, or make a known one special; a known one that is special stays as it is."""
    token_id = backend.token_to_id(token.content)
    known = None if token_id is None else backend.get_added_tokens_decoder().get(token_id)
    if known is not None and (known.special or not token.special):
        return
    if token.special:
        backend.add_special_tokens([token])
    else:
        backend.add_tokens([token])


def _next_id(backend: Backend) -> int:
    """The id that the next added token gets."""
    added = backend.get_added_tokens_decoder()
    return max(backend.get_vocab_size(with_added_tokens=False), max(added, default=-1) + 1)
