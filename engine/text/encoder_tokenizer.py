"""The tokenizer of an encoder's folder: text to ids of any kind, and the mask token.

Reads `tokenizer.json`, or a BERT's `vocab.txt` (WordPiece) with the settings of
`tokenizer_config.json`. Encoders generate nothing, so that ids need not be bytes of a text.
"""

import os
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from cottention.engine.errors import ModelFolderError
from cottention.engine.text.files import read_optional_json, read_text
from cottention.engine.text.special_tokens import TokenFacts, read_token_facts
from cottention.engine.text.tokenizer import (
    UnsupportedTokenizerError,
    add_specials,
    add_tokens,
    frame_of,
    is_of_library,
    read_tokenizer_json,
)

_DEFAULTS = {"unk": "[UNK]", "sep": "[SEP]", "pad": "[PAD]", "cls": "[CLS]", "mask": "[MASK]"}
"""A BERT's special tokens, where no file names others."""

_PREFIX = "##"
"""Before a token of WordPiece that continues a word."""


class EncoderTokenizer:
    """Text to ids, with the special tokens that frame a text.

    num_ids: ids are 0 to num_ids − 1. token_ids: those that have a token, in order. mask_token,
    mask_id: None where the tokenizer has none. written_bytes: of each id, how it is written in a
    text. added_tokens: by id, those that are found in a text before it is split into words.
    """

    def __init__(self, backend: Backend, mask_token: str | None) -> None:
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._before, self._after = frame_of(backend)
        self.added_tokens: dict[int, AddedToken] = backend.get_added_tokens_decoder()
        vocabulary = backend.get_vocab(with_added_tokens=True)
        if not vocabulary:
            raise UnsupportedTokenizerError("the tokenizer has no tokens")
        self.token_ids = sorted(vocabulary.values())
        self.num_ids = self.token_ids[-1] + 1
        self.mask_id = None if mask_token is None else backend.token_to_id(mask_token)
        self.mask_token = mask_token if self.mask_id is not None else None
        self.written_bytes = [b""] * self.num_ids
        for token, token_id in vocabulary.items():
            is_inside = token.startswith(_PREFIX) and len(token) > len(_PREFIX)
            written = token.removeprefix(_PREFIX) if is_inside else f" {token}"
            self.written_bytes[token_id] = written.encode()

    @classmethod
    def from_folder(cls, folder: Path, max_ids: int) -> "EncoderTokenizer":
        """Read the tokenizer of a model folder. Raises ModelFolderError.

        max_ids: ids that the model has embeddings for.
        """
        is_new = os.path.lexists(folder / "tokenizer.json")
        if not is_new and not (folder / "vocab.txt").is_file():
            raise ModelFolderError(
                f"{folder} has no tokenizer: it needs tokenizer.json, or vocab.txt"
            )
        where = folder / ("tokenizer.json" if is_new else "vocab.txt")
        try:
            facts = read_token_facts(folder, is_needed=not is_new)
            backend = read_tokenizer_json(folder) if is_new else _from_vocabulary(folder, facts)
            add_tokens(backend, facts.added)
            add_specials(backend, facts, folder, max_ids)
            tokenizer = cls(backend, _named(facts, "mask"))
        except ModelFolderError:
            raise
        except BaseException as error:  # the tokenizers library raises Exception, and panics
            if not is_of_library(error):
                raise
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ModelFolderError(f"the tokenizer in {where} cannot be read: {reason}") from None
        if tokenizer.num_ids > max_ids:
            raise ModelFolderError(
                f"{where}: the tokenizer has ids up to {tokenizer.num_ids - 1}, the model only"
                f" {max_ids} embeddings (vocab_size)"
            )
        return tokenizer

    def encode(self, text: str) -> list[int]:
        """Ids of `text` without special tokens around it; those written in it become their ids."""
        return self._backend.encode_batch_fast([text], add_special_tokens=False)[0].ids

    def framed(self, ids: list[int]) -> list[int]:
        """Add the special ids that the tokenizer puts around a text, such as [CLS] and [SEP]."""
        return [*self._before, *ids, *self._after] if self._before or self._after else ids

    def id_to_token(self, token_id: int) -> str:
        """The vocabulary's own string of an id; empty for an id without a token."""
        return self._backend.id_to_token(token_id) or ""

    def token_id(self, text: str) -> int | None:
        """The id of a text that is one token: an entry of the vocabulary, or a word that is one."""
        known: int | None = self._backend.token_to_id(text)
        if known is not None:
            return known
        ids = self.encode(text)
        unknown = getattr(self._backend.model, "unk_token", None)
        is_one = len(ids) == 1 and self.id_to_token(ids[0]) != unknown
        return ids[0] if is_one else None

    def written(self, ids: list[int]) -> str:
        """Text of `ids`, special tokens written out."""
        return self._backend.decode(ids, skip_special_tokens=False)


def _named(facts: TokenFacts, role: str) -> str:
    """The token of a role, by the files or by default."""
    token = facts.named.get(f"{role}_token")
    return _DEFAULTS[role] if token is None else token.content


def _from_vocabulary(folder: Path, facts: TokenFacts) -> Backend:
    """WordPiece from a vocab.txt: one token a line, whose number is its id."""
    path = folder / "vocab.txt"
    tokens = [line.removesuffix("\r") for line in read_text(path).split("\n")]
    while tokens and not tokens[-1]:
        tokens.pop()
    vocabulary = {token: place for place, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        twice = next(token for place, token in enumerate(tokens) if vocabulary[token] != place)
        raise ModelFolderError(f"{path} has {twice!r} in two lines: each token has one id")
    config = read_optional_json(folder / "tokenizer_config.json")
    backend = Backend(models.WordPiece(vocabulary, unk_token=_named(facts, "unk")))
    backend.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=_switch(config, "tokenize_chinese_chars") is not False,
        strip_accents=_switch(config, "strip_accents"),
        lowercase=_switch(config, "do_lower_case") is not False,
    )
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(prefix=_PREFIX)
    specials = [_named(facts, role) for role in _DEFAULTS]
    for token in specials:
        if token in vocabulary:
            backend.add_special_tokens([AddedToken(token, special=True, normalized=False)])
    first, last = _named(facts, "cls"), _named(facts, "sep")
    for token in (_named(facts, "unk"), first, last):
        if token not in vocabulary:
            raise ModelFolderError(f"{path} has no {token!r}, which every text needs")
    backend.post_processor = processors.BertProcessing(
        (last, vocabulary[last]), (first, vocabulary[first])
    )
    return backend


def _switch(config: dict[str, Any], name: str) -> bool | None:
    value = config.get(name)
    if value is not None and not isinstance(value, bool):
        raise ModelFolderError(f"tokenizer_config.json: {name} must be true or false")
    return value
