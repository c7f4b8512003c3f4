"""lm-eval's `local-completions` over data of our own: its numbers are the engine's own."""

import json
from pathlib import Path
from typing import Any

import pytest
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

from tests.clients.conftest import MODEL, Served
from tests.clients.expected import in_process

TASKS = Path(__file__).parent / "tasks"
MAX_TOKENS = 12

CHOICES: dict[str, Any] = {
    "task": "cottention_choices",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": str(TASKS / "choices.jsonl")}},
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "choices",
    "doc_to_target": "answer",
    "target_delimiter": "",
    "metric_list": [{"metric": "acc"}],
}

LINES: dict[str, Any] = {
    "task": "cottention_lines",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": str(TASKS / "lines.jsonl")}},
    "test_split": "test",
    "output_type": "generate_until",
    "doc_to_text": "{{line}}",
    "doc_to_target": "{{target}}",
    "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": MAX_TOKENS, "temperature": 0.0},
    "metric_list": [{"metric": "exact_match"}],
}


@pytest.fixture(scope="module")
def evaluated(served: Served, tmp_path_factory: pytest.TempPathFactory) -> Any:
    patch = pytest.MonkeyPatch()
    patch.setenv("OPENAI_API_KEY", served.key)
    patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("hub")))
    settings = {
        "model": served.model,
        "base_url": f"{served.base_url}/completions",
        "tokenizer_backend": "huggingface",
        "tokenizer": str(MODEL),
        "num_concurrent": 2,
        "max_retries": 1,
    }
    yield simple_evaluate(
        model="local-completions",
        model_args=settings,
        tasks=[CHOICES, LINES],
        task_manager=TaskManager(include_defaults=False),
        batch_size=2,
        log_samples=True,
        bootstrap_iters=0,
    )
    patch.undo()


def records(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (TASKS / name).read_text().splitlines()]


def test_loglikelihoods_are_the_engine_s_own(evaluated: Any) -> None:
    docs = records("choices.jsonl")
    requests = [
        {"context": doc["question"], "continuation": choice}
        for doc in docs
        for choice in doc["choices"]
    ]
    own = iter(in_process(requests))
    num_right = 0
    samples = sorted(evaluated["samples"]["cottention_choices"], key=lambda each: each["doc_id"])
    for doc, sample in zip(docs, samples, strict=True):
        expected = [next(own) for _ in doc["choices"]]
        heard = [(float(total), is_greedy) for total, is_greedy in sample["filtered_resps"]]
        for (total, is_greedy), (own_total, own_is_greedy) in zip(heard, expected, strict=True):
            assert total == pytest.approx(own_total, abs=1e-5)
            assert is_greedy == own_is_greedy
        totals = [total for total, _ in expected]
        num_right += totals.index(max(totals)) == doc["answer"]
    accuracy = evaluated["results"]["cottention_choices"]["acc,none"]
    assert accuracy == pytest.approx(num_right / len(docs))


def test_generated_texts_are_the_engine_s_own(evaluated: Any) -> None:
    docs = records("lines.jsonl")
    params = {"temperature": 0.0, "max_tokens": MAX_TOKENS, "stop": ["\n\n"]}
    own = in_process([{"prompt": doc["line"], "params": params} for doc in docs])
    samples = sorted(evaluated["samples"]["cottention_lines"], key=lambda each: each["doc_id"])
    assert [sample["resps"][0][0] for sample in samples] == own
