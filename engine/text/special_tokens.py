"""Which tokens a model folder adds to its vocabulary, and which of them are special.

`tokenizer_config.json`, `special_tokens_map.json` and `added_tokens.json` are read as transformers
reads them: the names of special_tokens_map.json come before those of tokenizer_config.json, and do
not count where that lists `added_tokens_decoder`.
"""

import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from cottention.engine.errors import ModelFolderError
from cottention.engine.text.files import Report, read_optional_json, read_side_json, warn

_log = logging.getLogger(__name__)

PADDING = re.compile(r"<\|extratoken_\d+\|>")
"""GPT-J pads its vocabulary to 50,400 with these; they are special, and never sampled."""

_ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
"""In the order in which transformers gives ids to those that the vocabulary lacks."""

_LISTS = ("extra_special_tokens", "additional_special_tokens")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized")


@dataclass(frozen=True, slots=True)
class NumberedToken:
    """An added token, the id that `file` gives it, and whether that id must be right."""

    token: AddedToken
    token_id: int
    file: Path
    is_required: bool


@dataclass(frozen=True, slots=True)
class TokenFacts:
    """What the files beside the vocabulary say.

    added: tokens with ids, in the order of their ids. named: special tokens by their role, such as
    eos_token, or by their own text where a list has them.
    """

    added: list[NumberedToken]
    named: Mapping[str, AddedToken]


def read_token_facts(folder: Path, *, is_needed: bool) -> TokenFacts:
    """Read the three files. Damage is a warning, or, where they are needed, ModelFolderError.

    is_needed: whether ids depend on them, because there is no tokenizer.json.
    """
    read = read_optional_json if is_needed else read_side_json
    config_path = folder / "tokenizer_config.json"
    config = read(config_path)
    by_role = named_tokens(folder, config, is_needed=is_needed)
    named = {role: token for role, token in by_role.items() if token is not None}
    added = _decoder(config, config_path)
    listed = {each.token.content for each in added}
    specials = {token.content for token in named.values()}
    path = folder / "added_tokens.json"
    for token in _added_tokens(read(path), path, specials, is_needed=is_needed):
        if token.token.content not in listed:
            added.append(token)
    return TokenFacts(sorted(added, key=lambda each: each.token_id), named)


def named_tokens(
    folder: Path, config: Mapping[str, Any], report: Report = warn, *, is_needed: bool = False
) -> dict[str, AddedToken | None]:
    """The special tokens by role or text; None where a file says that there is none for a role.

    config: the folder's tokenizer_config.json; is_needed: raise ModelFolderError for what is no
    token in it. Other damage is reported.
    """
    config_path, map_path = folder / "tokenizer_config.json", folder / "special_tokens_map.json"
    roles = dict(_named(config, config_path, report, is_needed=is_needed))
    more = dict(_named(read_side_json(map_path, report), map_path, report, is_needed=False))
    has_decoder = isinstance(config.get("added_tokens_decoder"), dict)
    named = roles if has_decoder else roles | more
    return dict(sorted(named.items(), key=lambda item: _rank(item[0])))


def _rank(role: str) -> int:
    """Place of a role among the named tokens: a model's own after the usual ones, lists last."""
    name = role.removesuffix("_token")
    if name in _ROLES:
        return _ROLES.index(name)
    return len(_ROLES) + (name == role)


def _named(
    raw: Mapping[str, Any], path: Path, report: Report, *, is_needed: bool
) -> Iterator[tuple[str, AddedToken | None]]:
    """The special tokens that a file names, by role or text; None for a role that is null."""
    for role, value in raw.items():
        if role in _LISTS and value is not None:
            yield from _listed(value, role, path, report)
        elif role.endswith("_token"):
            if value is None:
                yield role, None
                continue
            if isinstance(value, bool):  # add_bos_token and add_eos_token are switches
                continue
            token = _token(value, is_special=True)
            if token is None:
                message = f"{path} cannot be read: {role} must be a token, it is {value!r}"
                if is_needed:
                    raise ModelFolderError(message)
                report(f"{message}; it is ignored")
            else:
                yield role, token


def _listed(value: Any, role: str, path: Path, report: Report) -> Iterator[tuple[str, AddedToken]]:
    """The tokens of a list, or of a table by role."""
    items = list(value.items()) if isinstance(value, dict) else None
    if items is None:
        items = [(None, each) for each in value] if isinstance(value, list) else [(None, value)]
    for name, each in items:
        token = _token(each, is_special=True)
        if token is None:
            report(f"{path}: {role} has {each!r}, which is no token; it is ignored")
        else:
            yield name or token.content, token


def _decoder(config: Mapping[str, Any], path: Path) -> list[NumberedToken]:
    """The tokens of `added_tokens_decoder`, which are special where they say so."""
    raw = config.get("added_tokens_decoder")
    if raw is None:
        return []
    if not isinstance(raw, dict):
        _log.warning("%s: added_tokens_decoder must be an object; it is ignored", path)
        return []
    found = []
    for name, value in raw.items():
        is_special = isinstance(value, dict) and value.get("special") is True
        token = _token(value, is_special=is_special)
        if token is None or not name.isdecimal():
            _log.warning("%s: added_tokens_decoder has no token at %r; it is ignored", path, name)
        else:
            found.append(NumberedToken(token, int(name), path, is_required=False))
    return found


def _added_tokens(
    raw: Mapping[str, Any], path: Path, specials: set[str], *, is_needed: bool
) -> Iterator[NumberedToken]:
    """The tokens of added_tokens.json: ordinary text but for those that are named elsewhere."""
    for content, token_id in raw.items():
        is_special = content in specials or PADDING.fullmatch(content) is not None
        token = _token(content, is_special=is_special)
        if type(token_id) is int and token_id >= 0 and token is not None:
            yield NumberedToken(token, token_id, path, is_required=is_needed)
            continue
        message = f"{path} cannot be read: {content!r} must have an id, it has {token_id!r}"
        if is_needed:
            raise ModelFolderError(message)
        _log.warning("%s; it is ignored", message)


def _token(value: Any, *, is_special: bool) -> AddedToken | None:
    """A token that is written as text or as an object; None for anything else."""
    raw = value if isinstance(value, dict) else {"content": value}
    content = raw.get("content")
    if not isinstance(content, str) or not content or not _is_unicode(content):
        return None
    flags = {name: raw[name] for name in _FLAGS if isinstance(raw.get(name), bool)}
    return AddedToken(content, special=is_special, **({"normalized": not is_special} | flags))


def _is_unicode(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)
