"""What a request says about ids, prepared once for all its prompts, choices and steps.

Lists of ids may be as long as the vocabulary. What a step needs of them is made here: masks, and
tables in which the last ids are looked up.

Letters: N ids of the tokenizer, M ids with a bias.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor

from cottention.engine.sampling_params import SamplingParams
from cottention.engine.text.base import BaseTokenizer

if TYPE_CHECKING:
    from cottention.engine.sampling.dry import RepeatRules


@dataclass(frozen=True, slots=True, eq=False)
class TokenConstraints:
    """Constraints on the ids of one request.

    stop_token_ids: those that end a choice; own_stop_token_ids: those of them that the request
    names itself.
    mask: bool [N], ids that are never sampled: those that are not allowed, and bad words of one id;
    None if there are none. early_mask: the same before min_tokens, with the stop ids.
    biased_ids int64 [M], biases float32 [M]: None without biases.
    bad_words: by their last id but one, the ids before the last one and that one.
    max_history: how many ids a bad word can have before its last one.
    repeats: which repetitions are penalized; None for none.
    """

    stop_token_ids: frozenset[int] = frozenset()
    own_stop_token_ids: frozenset[int] = frozenset()
    mask: Tensor | None = None
    early_mask: Tensor | None = None
    biased_ids: Tensor | None = None
    biases: Tensor | None = None
    bad_words: Mapping[int, Sequence[tuple[list[int], int]]] = field(default_factory=dict)
    max_history: int = 0
    repeats: "RepeatRules | None" = None
    _on_devices: dict[torch.device, Self] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        params: SamplingParams,
        num_ids: int,
        eos_token_ids: Iterable[int] = (),
        bad_words: Collection[Sequence[int]] = (),
    ) -> Self:
        """The constraints of a request. bad_words: the ids of each, as `encode_bad_words` says."""
        own = frozenset(params.stop_token_ids)
        stops = own if params.ignore_eos else own.union(eos_token_ids)
        single = [ids[0] for ids in bad_words if len(ids) == 1]
        mask = _mask(params.allowed_token_ids, single, num_ids)
        early = mask
        if params.min_tokens and stops:
            early = torch.zeros(num_ids, dtype=torch.bool) if mask is None else mask.clone()
            early[torch.tensor([*stops])] = True
        longer = [[*ids] for ids in bad_words if len(ids) > 1]
        table: dict[int, list[tuple[list[int], int]]] = {}
        for *before, last in longer:
            table.setdefault(before[-1], []).append((before, last))
        bias = params.logit_bias
        return cls(
            stops,
            own,
            mask,
            early,
            torch.tensor([*bias]) if bias else None,
            torch.tensor([*bias.values()], dtype=torch.float32) if bias else None,
            table,
            max(map(len, longer), default=1) - 1,
        )

    def on(self, device: torch.device) -> Self:
        """The same with its tensors on a device, where they are copied once."""
        if device.type == "cpu":
            return self
        if device not in self._on_devices:
            self._on_devices[device] = replace(
                self,
                mask=_moved(self.mask, device),
                early_mask=_moved(self.early_mask, device),
                biased_ids=_moved(self.biased_ids, device),
                biases=_moved(self.biases, device),
                _on_devices={},
            )
        return self._on_devices[device]

    def leaves_one_of(self, is_sampleable: Tensor) -> bool:
        """Whether an id of `is_sampleable` bool [N] may be the first of a choice."""
        mask = self.early_mask
        return mask is None or bool((is_sampleable & ~mask).any())

    def ends_of_bad_words(self, last_ids: Sequence[int]) -> list[int]:
        """Ids that would complete a bad word of several ids after these."""
        if not self.bad_words or not last_ids:
            return []
        found = self.bad_words.get(last_ids[-1], ())
        if not found:
            return []
        ids = list(last_ids)
        return [last for before, last in found if ids[-len(before) :] == before]


NO_CONSTRAINTS = TokenConstraints()


def _moved(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    return None if tensor is None else tensor.to(device)


def _mask(allowed: Collection[int] | None, banned: Sequence[int], num_ids: int) -> Tensor | None:
    if allowed is None and not banned:
        return None
    mask = torch.full((num_ids,), allowed is not None)
    if allowed:
        mask[torch.tensor(allowed)] = False
    if banned:
        mask[torch.tensor(banned)] = True
    return mask


def encode_bad_words(words: Sequence[str], tokenizer: BaseTokenizer) -> list[list[int]]:
    """Ids of each word at the start of a text and after a space; of a blank word, the latter."""
    texts = [start + word.lstrip(" ") for word in words for start in ("", " ")]
    return [ids for text in dict.fromkeys(texts) if (ids := tokenizer.encode(text))]
