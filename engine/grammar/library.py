"""llguidance with this project's limits: a tokenizer's vocabulary, and a grammar that is compiled.

The library is imported where it is used: an engine that is asked for text alone runs without it.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, Self

from cottention.engine.text.base import BaseTokenizer

STEP_LEXER_FUEL = 200_000
STEP_MAX_ITEMS = 25_000
MAX_LEXER_STATES = 20_000
"""Bounds on one mask, some ten milliseconds each; and on what a matcher keeps, some 2 kB a state"""


class Vocabulary(NamedTuple):
    """What grammars need of a tokenizer.

    token_bytes: of each id; specials: ids of special tokens by their spellings; eos_ids: ids that
    end a text, at least one.
    """

    token_bytes: list[bytes]
    specials: dict[str, int]
    eos_ids: list[int]

    @classmethod
    def of(cls, tokenizer: BaseTokenizer, eos_ids: list[int]) -> Self:
        """Of a tokenizer, for a model whose texts end with one of `eos_ids`."""
        special = {i: token.content for i, token in tokenizer.added_tokens.items() if token.special}
        table = [
            special.get(place, "").encode() or each
            for place, each in enumerate(tokenizer.token_bytes)
        ]
        return cls(table, {text: place for place, text in special.items()}, eos_ids)


def compile_grammar(tokenizer: Any, grammar: str) -> Any:
    """A matcher at the beginning of a text; its `get_error` says what is wrong, if anything is."""
    from llguidance import LLMatcher, LLParserLimits

    limits = LLParserLimits(
        step_lexer_fuel=STEP_LEXER_FUEL,
        step_max_items=STEP_MAX_ITEMS,
        max_lexer_states=MAX_LEXER_STATES,
        verbose_errors=False,
    )
    return LLMatcher(tokenizer, grammar, log_level=0, limits=limits)


Encode = Callable[[str], Sequence[int]]

MAX_REMEMBERED = 4096
"""Texts whose ids are remembered: those that grammars force are few, and come again and again."""


def library_tokenizer(vocabulary: Vocabulary, encode: Encode) -> Any:
    """The vocabulary as llguidance reads it.

    encode: ids of a text. Where a grammar leaves one text, these are the ids that it allows.
    """
    from llguidance import LLTokenizer

    class Source:
        """What the library asks of a tokenizer, by these names."""

        is_tokenizer_wrapper = True
        eos_token_id = vocabulary.eos_ids[0]
        bos_token_id = None
        tokens = vocabulary.token_bytes
        special_token_ids = sorted({*vocabulary.specials.values(), *vocabulary.eos_ids})
        __call__ = staticmethod(lru_cache(MAX_REMEMBERED)(lambda text: list(encode(text))))

    source: Any = Source()
    num_ids = len(vocabulary.token_bytes)
    return LLTokenizer(source, n_vocab=num_ids, eos_token=vocabulary.eos_ids)
