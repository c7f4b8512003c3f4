"""Chats that are a session's turns: what begins a chat, and what a template writes in it."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cottention.engine.config import EngineConfig
from cottention.engine.engine import Engine
from cottention.server.config import ServerConfig
from cottention.server.generation.chat_template import find_template
from cottention.server.sessions.storage import open_sessions
from tests.server.live import Live, serving

BOS = "<|endoftext|>"
ONCE = "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
EACH = "{% for m in messages %}{{ bos_token }}{{ m.role }}: {{ m.content }}\n{% endfor %}"


@contextlib.contextmanager
def chatting(gptj_folder: Path, folder: Path, template: str, **options: Any) -> Iterator[Live]:
    """The real engine with a template that writes its tokenizer's own beginning."""
    config = {"bos_token": BOS, "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    engine = Engine(gptj_folder, EngineConfig(max_slots=2))
    settings = ServerConfig(session_dir=str(folder / "sessions"))
    with (
        open_sessions(engine, settings) as sessions,
        serving(engine, find_template(None, folder), sessions, **options) as live,
    ):
        yield live


@pytest.fixture
def live(gptj_folder: Path, tmp_path: Path) -> Iterator[Live]:
    with chatting(gptj_folder, tmp_path, ONCE) as live:
        yield live


def read(live: Live, said: str, session_id: str, **more: Any) -> list[int]:
    """The ids of a turn's prompt, as the answer tells them."""
    body = {"session_id": session_id, "max_tokens": 2, "return_token_ids": True, "temperature": 0}
    before = live.session(session_id)["position"]
    answer = live.chat(said, **body | more).json()
    ids: list[int] = answer["prompt_token_ids"]
    num_new = len(answer["choices"][0]["token_ids"])
    assert answer["usage"]["prompt_tokens"] == len(ids)
    assert answer["session"]["position"] == before + len(ids) + num_new
    return ids


def ids_of(live: Live, text: str) -> list[int]:
    ids: list[int] = live.engine.tokenizer.encode(text)
    return ids


def test_the_first_turn_begins_the_text_and_the_second_goes_on(live: Live) -> None:
    session_id = live.opened()
    assert read(live, "one", session_id) == ids_of(live, BOS + "user: one\n")
    assert read(live, "two", session_id) == ids_of(live, "\nuser: two\n")
    live.client.post(f"/v1/sessions/{session_id}/rewind")
    assert read(live, "again", session_id) == ids_of(live, "\nuser: again\n")
    for _ in range(2):
        live.client.post(f"/v1/sessions/{session_id}/rewind")
    assert live.session(session_id)["position"] == 0
    assert read(live, "anew", session_id) == ids_of(live, BOS + "user: anew\n")


def test_a_session_that_was_opened_with_a_prompt_has_begun(live: Live) -> None:
    """What the template writes after an answer is not read again, where that ends so."""
    assert read(live, "one", live.opened("def f(x):")) == ids_of(live, "\nuser: one\n")
    assert read(live, "one", live.opened("def f(x):\n")) == ids_of(live, "user: one\n")
    assert read(live, "one", live.opened("\nuser: ")) == ids_of(live, "one\n")


def test_streams_too(live: Live) -> None:
    session_id = live.opened("x")
    body = {"session_id": session_id, "max_tokens": 2, "return_token_ids": True, "stream": True}
    first = live.chat("one", **body).text.partition("\n\n")[0]
    assert json.loads(first.removeprefix("data: "))["prompt_token_ids"] == ids_of(
        live, "\nuser: one\n"
    )


def test_what_the_client_says_itself_stays(live: Live) -> None:
    """One in the middle of a message is no beginning, and a message is not what is known."""
    session_id = live.opened("x")
    ids = read(live, BOS, session_id)
    assert live.engine.tokenizer.decode(ids) == f"\nuser: {BOS}\n"
    assert set(ids_of(live, BOS)).isdisjoint(ids), "what a client writes is text"
    known = live.opened("\nuser: one")
    assert read(live, "one", known) == ids_of(live, "\nuser: one\n")
    chat = live.chat("one", max_tokens=2, return_token_ids=True).json()
    assert chat["prompt_token_ids"] == ids_of(live, BOS + "user: one\n")


def test_a_template_that_begins_each_turn_is_followed(gptj_folder: Path, tmp_path: Path) -> None:
    with chatting(gptj_folder, tmp_path, EACH) as live:
        session_id = live.opened()
        assert read(live, "one", session_id) == ids_of(live, f"{BOS}user: one\n")
        assert read(live, "two", session_id) == ids_of(live, f"\n{BOS}user: two\n")


@pytest.mark.parametrize("is_allowed", [False, True])
def test_whether_messages_may_write_control_tokens(
    gptj_folder: Path, tmp_path: Path, is_allowed: bool
) -> None:
    """In chats, their turns and /tokenize alike; prompts of completions always may."""
    option = {"allow_special_tokens_in_messages": is_allowed}
    with chatting(gptj_folder, tmp_path, ONCE, **option) as live:
        (bos,) = ids_of(live, BOS)
        said = f"one{BOS}\nuser: two"
        body = {"messages": [{"role": "user", "content": said}]}
        whole = live.chat(said, max_tokens=1, return_token_ids=True).json()["prompt_token_ids"]
        assert live.client.post("/tokenize", json=body).json()["tokens"] == whole
        session_id = live.opened()
        first, second = (read(live, said, session_id) for _ in range(2))
        assert whole == first
        assert first.count(bos) == 1 + is_allowed, "the template's own stays"
        assert second.count(bos) == is_allowed
        rest = f"user: {said}\n"
        if is_allowed:
            assert (first, second) == (ids_of(live, BOS + rest), ids_of(live, "\n" + rest))
        written = live.engine.tokenizer.written_bytes
        texts = [b"".join(written[each] for each in ids).decode() for ids in (first, second)]
        assert texts == [BOS + rest, "\n" + rest]
        prompt = live.client.post("/tokenize", json={"prompt": said}).json()["tokens"]
        assert prompt.count(bos) == 1
