"""The papers' comparisons: a stopped list goes on, and the generated tasks are what they say."""

import random
import statistics
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from benchmarks.papers import tables
from benchmarks.papers.__main__ import do_next
from benchmarks.papers.listops import CLASSIFY, CLOSE, FIRST_DIGIT, FIRST_OPERATOR, Rules, batches
from benchmarks.papers.loop import Schedule, train
from benchmarks.papers.recall import recall_batch
from benchmarks.papers.results import Result, add_result, read_results
from benchmarks.papers.runs import LEARNING_RATES, Run, all_runs, best_rate
from benchmarks.papers.tables import with_tables


@dataclass
class Counted:
    """An experiment that notes when it is run."""

    log: list[str]
    name: str

    def run(self, _folder: Path, _shared: Path) -> Result:
        self.log.append(self.name)
        return {"figure": len(self.log)}


def test_a_list_goes_on_with_the_runs_that_have_no_result(tmp_path: Path) -> None:
    """Otherwise hours are trained again, or what waits for other runs is done with nothing."""
    log: list[str] = []

    def waits_for_a(results: Mapping[str, Result]) -> Counted | None:
        return Counted(log, "c") if "a" in results else None

    runs = [
        Run("c", waits_for_a),
        Run("a", lambda _: Counted(log, "a")),
        Run("b", lambda _: Counted(log, "b")),
    ]
    path = tmp_path / "results.json"
    add_result("b", {"figure": 7}, path)
    while do_next(runs, path, tmp_path):
        pass
    assert log == ["a", "c"]
    results = read_results(path)
    assert {name: result["figure"] for name, result in results.items()} == {"a": 1, "b": 7, "c": 2}


def test_names_of_runs_differ_and_none_waits_for_what_is_not_in_the_list() -> None:
    runs = all_runs()
    names = {run.name for run in runs}
    assert len(names) == len(runs)
    everything = {name: {"bits_per_byte": 1.0, "bits_per_token": 1.0} for name in names}
    assert [run.name for run in runs if run.experiment(everything) is None] == []


def test_the_best_rate_waits_for_all_trials() -> None:
    rates = LEARNING_RATES["causal"]
    trials = {f"causal/x/lr={rate:g}": {"bits_per_byte": abs(rate - 6e-3)} for rate in rates}
    assert best_rate(trials, "causal/x") == 6e-3
    trials.popitem()
    assert best_rate(trials, "causal/x") is None


class Line:
    """A task that is killed when it reaches a step."""

    def __init__(self, until: int | None = None) -> None:
        torch.manual_seed(0)
        self.model = nn.ModuleDict({"h": nn.ModuleList([nn.Linear(4, 4)])})
        self._until = until

    def loss(self, step: int) -> Tensor:
        if step == self._until:
            raise KeyboardInterrupt
        x = torch.rand(2, 4, generator=torch.Generator().manual_seed(step))
        blocks = self.model["h"]
        assert isinstance(blocks, nn.ModuleList)
        loss: Tensor = (blocks[0](x) - 1).square().mean()
        return loss


def test_a_killed_run_ends_with_the_weights_of_one_that_was_not(tmp_path: Path) -> None:
    schedule = Schedule(steps=70, learning_rate=1e-2)
    whole, second = Line(), Line()
    train(whole, schedule, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(Line(until=60), schedule, tmp_path / "killed")
    progress = train(second, schedule, tmp_path / "killed")
    assert progress.step == 70
    for one, other in zip(whole.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_every_key_is_asked_once_and_its_value_is_the_one_that_followed() -> None:
    ids, answers = recall_batch(50, 20, 8, torch.Generator().manual_seed(0))
    for row, expected in zip(ids.tolist(), answers.tolist(), strict=True):
        pairs, queries = row[:40], row[40:]
        value_of = dict(zip(pairs[::2], pairs[1::2], strict=True))
        assert sorted(queries) == sorted(value_of)
        assert [value_of[key] - 50 for key in queries] == expected
        assert queries != pairs[::2]


def value(ids: list[int]) -> int:
    """Of an expression, by a stack."""
    names = {FIRST_OPERATOR: min, FIRST_OPERATOR + 1: max}
    stack: list[list[int]] = [[]]
    for each in ids:
        if each == CLOSE:
            operator, *arguments = stack.pop()
            if operator in names:
                stack[-1].append(names[operator](arguments))
            elif operator == FIRST_OPERATOR + 2:
                stack[-1].append(int(statistics.median(arguments)))
            else:
                stack[-1].append(sum(arguments) % 10)
        elif each < FIRST_DIGIT:
            stack.append([each])
        else:
            stack[-1].append(each - FIRST_DIGIT)
    return stack[0][0]


def test_an_expression_has_its_value_and_an_allowed_length() -> None:
    rng = random.Random(0)
    rules = Rules(10, 60, max_depth=4)
    drawn = [rules.draw(rng) for _ in range(200)]
    assert all(value(ids) == answer for ids, answer in drawn)
    assert all(10 < len(ids) < 60 for ids, _ in drawn)
    assert len(Counter(answer for _, answer in drawn)) == 10
    ids, mask, answers = next(batches(rules, 5, seed=0))
    assert (ids[:, 0] == CLASSIFY).all()
    rows = zip(ids, mask, answers.tolist(), strict=True)
    assert all(value(row[keep][1:].tolist()) == answer for row, keep, answer in rows)


def test_a_table_replaces_what_stands_between_its_marks_and_nothing_else() -> None:
    runs = {
        f"causal/{kind}/seed={seed}": {
            "bits_per_byte": bits + seed / 10,
            "by_position": {"0-128": 1.0, "128-256": 2.0},
            "parameters": 1000,
            "cpu_seconds": 1.0,
            "settings": {"learning_rate": 0.01},
        }
        for kind, bits in (("softmax", 1.0), ("linear", 1.1))
        for seed in (1, 2)
    }
    page = "before\n<!-- table causal twins -->\nold\n<!-- end of causal twins -->\nafter"
    head, *rows, after = with_tables(page, runs).splitlines()
    assert (head, after) == ("before", "after")
    assert "old" not in rows
    # 1.2 and 1.3 beside 1.1 and 1.2: 9.1 and 8.3 percent, each against the twin of its own seed
    assert "| linear | 0.01 | 2 | 1.250 ± 0.050 | +8.7 ± 0.4 % |" in "\n".join(rows)


def test_the_tables_of_the_page_are_those_of_the_results() -> None:
    """Otherwise figures are told that no run has measured: `make report` writes them."""
    text = tables.PAGE.read_text(encoding="utf-8")
    assert text.count("<!-- table ") == len(tables.TABLES)
    assert with_tables(text, read_results()) == text
