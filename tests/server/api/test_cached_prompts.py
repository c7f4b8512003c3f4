"""Prompts that come again over HTTP: what was spared is told, and keys and salts are apart."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cottention.engine.config import EngineConfig
from cottention.engine.engine import Engine
from cottention.server.generation.chat_template import find_template
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


def test_a_request_may_use_no_cache(live: Live) -> None:
    ask(live, "one", cache={"write": False})
    assert ask(live, "one", cache={"read": False, "write": True})[1] == 0
    assert ask(live, "one", cache={"read": False})[1] == 0
    assert ask(live, "one", cache={})[1] == 128
    body = {"prompt": "x", "cache": {"reads": False}}
    headers = {"Authorization": "Bearer one"}
    refused = live.client.post("/v1/completions", json=body, headers=headers)
    assert refused.json()["error"]["param"] == "cache.reads"


def test_a_chat_s_messages_are_places_to_begin() -> None:
    """The ids before each message's content; not in a session, nor where a prompt is truncated."""
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": " é "},
        {"role": "assistant", "content": ""},
        {"role": "user", "content": "Go on"},
    ]
    with serving(template=find_template("plain", Path())) as live:
        ask_chat(live, messages)
        [prompt] = [bytes(each.prompt_ids).decode() for each in live.engine.seen]
        places = live.engine.seen[-1].cache.boundaries
        assert [prompt.encode()[place:].decode()[0] for place in places] == ["é", "G"]
        ask_chat(live, messages, truncate_prompt_tokens=20)
        ask_chat(live, messages[1:2])
        assert [each.cache.boundaries for each in live.engine.seen[1:]] == [(), ()]


def ask_chat(live: Live, messages: list[dict[str, str]], **more: Any) -> None:
    body = {"messages": messages, "max_tokens": 1} | more
    assert live.client.post("/v1/chat/completions", json=body).status_code == 200


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
