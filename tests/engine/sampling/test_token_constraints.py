"""Lists of ids: prepared once, and looked up as the plain definition says."""

import random
from typing import Any

import pytest
import torch

from cottention.engine import Engine, SamplingParams
from cottention.engine.execution import model_runner
from cottention.engine.sampling.logits_processors import LogitsAdjustment
from cottention.engine.sampling.token_constraints import TokenConstraints


@pytest.mark.parametrize("seed", range(10))
def test_bad_words_end_where_their_other_ids_are_the_last(seed: int) -> None:
    rng = random.Random(seed)
    words = [[rng.randrange(3) for _ in range(rng.randint(1, 4))] for _ in range(12)]
    constraints = TokenConstraints.of(SamplingParams(), 5, (), words)
    assert constraints.max_history == max(map(len, words)) - 1
    for length in range(6):
        ids = [rng.randrange(3) for _ in range(length)]
        longer = [word for word in words if 1 < len(word) <= length + 1]
        expected = [word[-1] for word in longer if ids[length - len(word) + 1 :] == word[:-1]]
        assert sorted(constraints.ends_of_bad_words(ids)) == sorted(expected)
    mask = torch.zeros(5, dtype=torch.bool)
    mask[[word[0] for word in words if len(word) == 1]] = True
    assert (constraints.mask is None) == (not mask.any())
    assert constraints.mask is None or torch.equal(constraints.mask, mask)


def test_what_may_be_first() -> None:
    params = SamplingParams(
        allowed_token_ids=(1, 2), stop_token_ids=(2,), min_tokens=1, max_tokens=4
    )
    constraints = TokenConstraints.of(params, 5, (), [[1]])
    assert not constraints.leaves_one_of(torch.ones(5, dtype=torch.bool))
    assert TokenConstraints.of(params, 5).leaves_one_of(torch.ones(5, dtype=torch.bool))
    assert not TokenConstraints.of(params, 5).leaves_one_of(torch.arange(5) == 4)


def test_lists_are_prepared_once_for_all_prompts_choices_and_steps(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a list as long as the vocabulary is gone through for each token of each choice."""
    prepared: list[SamplingParams] = []
    encoded: list[str] = []
    seen: set[int] = set()
    of, encode = TokenConstraints.of, engine.tokenizer.encode

    def note(params: SamplingParams, *args: Any) -> TokenConstraints:
        prepared.append(params)
        return of(params, *args)

    class Noting(LogitsAdjustment):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            seen.add(id(self.constraints))

    monkeypatch.setattr(TokenConstraints, "of", note)
    monkeypatch.setattr(model_runner, "LogitsAdjustment", Noting)
    monkeypatch.setattr(
        engine.tokenizer, "encode", lambda text: (encoded.append(text), encode(text))[1]
    )
    params = SamplingParams(
        n=2,
        max_tokens=6,
        ignore_eos=True,
        allowed_token_ids=tuple(range(3, 200)) * 50,
        stop_token_ids=(300,) * 1000,
        bad_words=("zq", "xq"),
        logit_bias={5: 1.0},
    )
    engine.generate([[5], [6]], params)
    assert prepared == [params]
    assert sorted(encoded) == [" xq", " zq", "xq", "zq"]
    assert len(seen) == 1
