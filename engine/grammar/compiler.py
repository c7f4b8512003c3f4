"""Structured output of requests to grammars: tried, compiled, and kept for the next that ask.

May be used from any thread.
"""

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cottention.engine.errors import ParameterError
from cottention.engine.grammar.library import Vocabulary, compile_grammar, library_tokenizer
from cottention.engine.grammar.matcher import Matcher, num_words, packed
from cottention.engine.grammar.trial import Limits, Trial
from cottention.engine.structured_output import StructuredOutput
from cottention.engine.text.base import BaseTokenizer

MAX_KEPT_SIZE = 1024**2
"""Characters of the grammars that are kept; compiled, they take some hundred times as much."""


@dataclass(frozen=True, slots=True)
class Grammar:
    """A compiled grammar.

    native: the library's matcher at the beginning. first_mask: int32 [1, W], of the first id.
    end_mask: int32 [W], of the ids that end a text.
    """

    native: Any
    first_mask: Tensor
    end_mask: Tensor

    def matcher(self) -> Matcher:
        """A matcher at the beginning of a text, for one choice."""
        return Matcher(self.native.deep_copy(), self.first_mask, self.end_mask)


class GrammarCompiler:
    """Compiles grammars for one tokenizer, and keeps those that were used last."""

    def __init__(
        self, tokenizer: BaseTokenizer, eos_ids: Sequence[int], limits: Limits, max_size: int
    ) -> None:
        """eos_ids: ids that end a text. max_size: characters that a grammar may have."""
        self._tokenizer = tokenizer
        self._eos_ids = [*eos_ids]
        self._limits = limits
        self._max_size = max_size
        self._lock = threading.Lock()
        self._native: Any = None
        self._trial: Trial | None = None
        self._kept: OrderedDict[StructuredOutput, Grammar] = OrderedDict()
        self._kept_size = 0

    def compile(self, structure: StructuredOutput) -> Grammar:
        """Raises ParameterError, which names the structure's field, for one that is refused."""
        with self._lock:
            if (known := self._kept.get(structure)) is not None:
                self._kept.move_to_end(structure)
                return known
        if structure.size > self._max_size:
            raise ParameterError(
                structure.param,
                f"{structure.param} must have at most {self._max_size} characters"
                f" (--max-grammar-size); it has {structure.size}",
            )
        if not self._eos_ids:
            message = f"{structure.param} is not possible: this model has no end-of-text id"
            raise ParameterError(structure.param, message)
        tokenizer, trial = self._library()
        verdict = trial.run(structure)
        if verdict.error:
            message = f"{structure.param} cannot be followed: {verdict.error}"
            raise ParameterError(structure.param, message)
        native = compile_grammar(tokenizer, verdict.grammar)
        end_mask = packed(self._eos_ids, self._tokenizer.num_ids)
        grammar = Grammar(native, self._first_mask(native), end_mask)
        self._keep(structure, grammar)
        return grammar

    def is_kept(self, structure: StructuredOutput) -> bool:
        """Whether `compile` need not compile it again."""
        with self._lock:
            return structure in self._kept

    def close(self) -> None:
        """End the process of trials, if there is one."""
        with self._lock:
            if self._trial is not None:
                self._trial.close()

    def _library(self) -> tuple[Any, Trial]:
        """The tokenizer as the library has it, and the process that tries; made once."""
        with self._lock:
            if self._trial is None:
                vocabulary = Vocabulary.of(self._tokenizer, self._eos_ids)
                self._native = library_tokenizer(vocabulary, self._tokenizer.encode)
                self._trial = Trial(vocabulary, self._limits)
            return self._native, self._trial

    def _first_mask(self, native: Any) -> Tensor:
        mask = torch.zeros(1, num_words(self._tokenizer.num_ids), dtype=torch.int32)
        native.unsafe_compute_mask_ptr(mask.data_ptr(), mask.nbytes)
        return mask

    def _keep(self, structure: StructuredOutput, grammar: Grammar) -> None:
        """Keep a grammar, and drop those that were not used for longest."""
        with self._lock:
            if structure not in self._kept:
                self._kept_size += structure.size
            self._kept[structure] = grammar
            while self._kept_size > MAX_KEPT_SIZE and len(self._kept) > 1:
                dropped, _ = self._kept.popitem(last=False)
                self._kept_size -= dropped.size
