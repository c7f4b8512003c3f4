"""On the CPU there is one arithmetic: who runs beside a request changes no bit of it.

200 requests, a fifth as many for each other feature map and fewer for each recurrent family, greedy
and seeded, run alone, and then in company: batches of up to 64, prompts cut into chunks of other
sizes, another order of arrival. Their logits are compared with torch.equal. In float32; fewer with
weights in eight bits, which have an arithmetic of their own.
"""

import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cottention.engine import Engine, EngineConfig, SamplingParams
from cottention.engine.scheduling.batch import Batch, BatchResult
from tests.engine.making import FAMILIES

pytestmark = [pytest.mark.every_model, pytest.mark.no_cover]

NUM_REQUESTS = {"cottention": 200, **dict.fromkeys(FAMILIES, 24)}


class Recorded:
    """An engine whose logits and ids are written down, by request id."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.engine = Engine(folder, EngineConfig(**settings))
        self.logits: dict[str, list[Tensor]] = defaultdict(list)
        self.ids: dict[str, list[int]] = defaultdict(list)
        self._last = torch.empty(0)
        runner = self.engine._runner
        runner._model.logits = self._keep(runner._model.logits)  # type: ignore[method-assign]
        runner.run = self._record(runner.run)  # type: ignore[method-assign]

    def _keep(self, logits: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def kept(hidden: Tensor) -> Tensor:
            out = logits(hidden)
            self._last = out.clone()
            return out

        return kept

    def _record(self, run: Callable[..., BatchResult]) -> Callable[..., BatchResult]:
        def recorded(batch: Batch, *given: Any) -> BatchResult:
            result = run(batch, *given)
            drawn = zip(result.choices, result.token_ids.tolist(), strict=True)
            for row, (choice, token_id) in enumerate(drawn):
                self.logits[choice.request.id].append(self._last[row])
                self.ids[choice.request.id].append(token_id)
            return result

        return recorded

    def run_alone(self, cases: Sequence["Case"]) -> None:
        for case in cases:
            self.engine.submit(case.prompt, case.params, request_id=case.id)
            self.drain()

    def run_together(self, cases: Sequence["Case"], arrivals_per_step: int) -> None:
        """Hand in a few before each step, so that they join and leave a running batch."""
        left = list(cases)
        while left:
            for case in left[:arrivals_per_step]:
                self.engine.submit(case.prompt, case.params, request_id=case.id)
            left = left[arrivals_per_step:]
            self.engine.step()
        self.drain()

    def drain(self) -> None:
        while self.engine.has_work():
            self.engine.step()


class Case:
    """A request that can be handed in again and again."""

    def __init__(self, number: int, num_ids: int) -> None:
        rng = random.Random(number)
        self.id = f"case-{number}"
        self.prompt = [rng.randrange(num_ids) for _ in range(rng.choice([1, 2, 7, 33, 65, 150]))]
        kinds = [
            {"temperature": 0.0},
            {"seed": number},
            {"seed": number, "temperature": 0.7, "top_k": 40},
            {"seed": number, "top_p": 0.9, "min_p": 0.01},
        ]
        self.params = SamplingParams(
            max_tokens=rng.choice([1, 3, 9]), ignore_eos=True, **kinds[number % 4]
        )


@pytest.fixture(scope="module")
def cases(attention: str, gptj_folder: Path) -> list[Case]:
    num_ids = Engine(gptj_folder, EngineConfig(max_slots=1)).tokenizer.num_ids
    return [Case(number, num_ids) for number in range(NUM_REQUESTS.get(attention, 40))]


@pytest.fixture(scope="module")
def alone(gptj_folder: Path, cases: list[Case]) -> Recorded:
    recorded = Recorded(gptj_folder, max_slots=1)
    recorded.run_alone(cases)
    return recorded


@pytest.mark.parametrize(
    ("max_slots", "max_batch_tokens", "arrivals_per_step"),
    [
        (64, 512, 200),
        pytest.param(64, 64, 5, marks=pytest.mark.slow),
        pytest.param(17, 40, 3, marks=pytest.mark.slow),
        (5, 7, 2),
    ],
)
def test_logits_have_equal_bits_alone_and_in_company(
    gptj_folder: Path,
    cases: list[Case],
    alone: Recorded,
    max_slots: int,
    max_batch_tokens: int,
    arrivals_per_step: int,
) -> None:
    company = Recorded(gptj_folder, max_slots=max_slots, max_batch_tokens=max_batch_tokens)
    order = random.Random(max_slots).sample(cases, len(cases))
    company.run_together(order, arrivals_per_step)
    _assert_equal(company, alone, cases)


def _assert_equal(company: Recorded, alone: Recorded, cases: Sequence[Case]) -> None:
    for case in cases:
        assert company.ids[case.id] == alone.ids[case.id], case.id
        for got, expected in zip(company.logits[case.id], alone.logits[case.id], strict=True):
            assert torch.equal(got, expected), case.id


def test_eight_bits_have_one_arithmetic_too(gptj_folder: Path, cases: list[Case]) -> None:
    """Sessions of an int8 server are stored as ids: a state fed again would differ from the old."""
    some = cases[:16]
    alone = Recorded(gptj_folder, max_slots=1, dtype="int8")
    assert alone.engine.has_one_arithmetic
    alone.run_alone(some)
    company = Recorded(gptj_folder, max_slots=8, max_batch_tokens=40, dtype="int8")
    company.run_together(some[::-1], arrivals_per_step=3)
    _assert_equal(company, alone, some)


def test_decode_and_prefill_have_equal_bits(gptj_folder: Path) -> None:
    """A prompt read at once, and the same ids fed one by one as a generation would."""
    recorded = Recorded(gptj_folder, max_slots=2)
    params = SamplingParams(max_tokens=40, temperature=0, ignore_eos=True)
    recorded.engine.submit([5, 9, 200], params, request_id="decoded")
    recorded.drain()
    ids = recorded.ids["decoded"]
    for length in (1, 8, 39):
        prompt = [5, 9, 200, *ids[:length]]
        one = SamplingParams(max_tokens=1, temperature=0, ignore_eos=True)
        recorded.engine.submit(prompt, one, request_id=f"prefilled-{length}")
        recorded.drain()
        expected = recorded.logits["decoded"][length]
        assert torch.equal(recorded.logits[f"prefilled-{length}"][0], expected)


def test_choices_are_the_same_bits_as_requests_of_their_own(gptj_folder: Path) -> None:
    """A prompt read once and copied gives each choice the logits that reading it again gives."""
    recorded = Recorded(gptj_folder, max_slots=8)
    params = SamplingParams(max_tokens=1, n=8, seed=3)
    recorded.engine.submit(list(range(1, 90)), params, request_id="copies")
    recorded.drain()
    first, *others = recorded.logits["copies"]
    assert all(torch.equal(first, other) for other in others)
    assert len(set(recorded.ids["copies"])) > 1
