"""Prompts that come again over HTTP: what was spared is told, and keys and salts are apart."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cottention.engine.config import EngineConfig
from cottention.engine.engine import Engine
from tests.server.live import Live, serving

PROMPT = list(range(20, 180))


@pytest.fixture
def live(gptj_folder: Path) -> Iterator[Live]:
    engine = Engine(gptj_folder, EngineConfig(max_slots=2, context_policy="exact"))
    with serving(engine, api_key=("one", "two")) as live:
        yield live


def ask(live: Live, key: str, **more: Any) -> tuple[str, int]:
    """The text, and how many ids of the prompt were not read again."""
    body = {"prompt": PROMPT, "max_tokens": 8, "temperature": 0, "ignore_eos": True} | more
    headers = {"Authorization": f"Bearer {key}"}
    answer = live.client.post("/v1/completions", json=body, headers=headers).json()
    details = answer["usage"]["prompt_tokens_details"]
    return answer["choices"][0]["text"], details["cached_tokens"] if details else 0


def test_what_was_spared_is_told_and_changes_nothing(live: Live) -> None:
    cold, spared = ask(live, "one")
    assert spared == 0
    assert ask(live, "one") == (cold, 128)


def test_keys_and_salts_are_apart(live: Live) -> None:
    ask(live, "one")
    assert ask(live, "two")[1] == 0
    assert ask(live, "one", cache_salt="mine")[1] == 0
    assert ask(live, "one", cache_salt="mine")[1] == 128


def test_a_stream_tells_it_in_its_usage(live: Live) -> None:
    ask(live, "one")
    body = {"prompt": PROMPT, "max_tokens": 2, "stream": True}
    body |= {"stream_options": {"include_usage": True}}
    headers = {"Authorization": "Bearer one"}
    text = live.client.post("/v1/completions", json=body, headers=headers).text
    assert '"prompt_tokens_details":{"cached_tokens":128}' in text


def test_figures_count_it(live: Live) -> None:
    ask(live, "one")
    ask(live, "one")
    figures = live.client.get("/metrics").text
    assert 'cottention:prefix_cache_hits_total{model_name="cottention-gptj"} 128.0' in figures
    assert 'cottention:prefix_cache_queries_total{model_name="cottention-gptj"} 320.0' in figures
