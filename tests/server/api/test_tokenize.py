"""POST /tokenize and /detokenize, and /version, in vLLM's shapes."""

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from cottention.engine.config import EngineConfig
from cottention.engine.engine import Engine
from cottention.server.generation.chat_template import find_template
from cottention.server.version import package_version
from tests.server.http.test_bad_input import refused
from tests.server.live import Live, serving


def tokenize(live: Live, **body: Any) -> Any:
    return live.client.post("/tokenize", json=body)


def test_a_text_s_ids(shared: Live) -> None:
    assert tokenize(shared, prompt="ab").json() == {
        "count": 2,
        "max_model_len": 512,
        "tokens": [97, 98],
        "token_strs": None,
    }
    answer = tokenize(shared, prompt="ab", return_token_strs=True).json()
    assert answer["token_strs"] == ["<61>", "<62>"]
    assert tokenize(shared, prompt="", model="fake").json()["count"] == 0


PIECES = ["a\u00e9", "\N{HUGGING FACE} x", "\u6771\u4eac", " \t\n", "a<|endoftext|>b", "\x00"]


@pytest.mark.parametrize("text", PIECES)
def test_token_strs_are_the_tokenizer_s_own_pieces(gptj_folder: Path, text: str) -> None:
    """Parts of characters would all be U+FFFD as text; clients count and align by these."""
    with serving(Engine(gptj_folder, EngineConfig(max_slots=1))) as live:
        answer = tokenize(live, prompt=text, return_token_strs=True).json()
        backend = Tokenizer.from_file(str(gptj_folder / "tokenizer.json"))
        assert answer["token_strs"] == backend.encode(text).tokens
        tokens = [backend.token_to_id(each) for each in answer["token_strs"]]
        assert tokens == answer["tokens"]


def test_a_chat_s_ids(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "x"}]
    with serving(template=find_template("plain", tmp_path)) as live:
        answer = tokenize(live, messages=messages).json()
        assert bytes(answer["tokens"]) == b"User: x\n\nAssistant:"
        answer = tokenize(live, messages=messages, add_generation_prompt=False).json()
        assert bytes(answer["tokens"]) == b"User: x\n\n"


def test_ids_text(shared: Live) -> None:
    response = shared.client.post("/detokenize", json={"tokens": list("aé".encode())})
    assert response.json() == {"prompt": "aé"}
    assert shared.client.post("/detokenize", json={"tokens": []}).json() == {"prompt": ""}


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": ["x"]}, "prompt"),
        ("/tokenize", {"messages": [{"role": "user", "content": "x"}]}, "messages"),
        ("/tokenize", {"prompt": "x", "messages": [{}]}, "prompt"),
        ("/detokenize", {"tokens": [256]}, "tokens"),
        ("/detokenize", {"tokens": "x"}, "tokens"),
        ("/detokenize", {"tokens": [1], "extra": 1}, "extra"),
    ],
)
def test_bad_fields_are_named(shared: Live, path: str, body: Any, param: str) -> None:
    assert refused(shared.client.post(path, json=body))["param"] == param


def test_another_model_is_not_here(shared: Live) -> None:
    assert tokenize(shared, prompt="x", model="gpt-9").status_code == 404


def test_special_tokens_of_a_tokenizer_that_adds_some(tmp_path: Path) -> None:
    """Texts are framed unless the client says no; chats are not: their template writes it."""
    (tmp_path / "chat_template.jinja").write_text("\x01{{ messages[-1].content }}")
    with serving(template=find_template(None, tmp_path)) as live:
        live.engine.tokenizer.before = (1,)
        chat = {"messages": [{"role": "user", "content": "x"}]}
        for path in ("/tokenize", "text", "chat"):
            for wanted in (None, True, False):
                more = {"add_special_tokens": wanted}
                if path == "/tokenize":
                    assert tokenize(live, prompt="x", **more).json()["count"] == 2 - (
                        wanted is False
                    )
                    count = tokenize(live, **chat, **more).json()["count"]
                    assert count == 2 + (wanted is True)
                elif path == "text":
                    live.complete(prompt="x", max_tokens=1, **more)
                    assert [*live.engine.seen[-1].prompt_ids] == [1, 120][wanted is False :]
                else:
                    live.chat("x", max_tokens=1, **more)
                    assert [*live.engine.seen[-1].prompt_ids] == [1, 1, 120][wanted is not True :]


def test_a_session_s_first_turn_alone_is_framed() -> None:
    with serving() as live:
        live.engine.tokenizer.before = (1,)
        read = live.opened("x")
        empty, appended, bare = (live.opened() for _ in range(3))
        for each in (read, empty):
            for _ in range(2):
                answer = live.complete(prompt="y", session_id=each, max_tokens=1)
        assert answer.json()["usage"]["prompt_tokens"] == 1
        for _ in range(2):
            live.client.post(f"/v1/sessions/{appended}/append", json={"prompt": "z"})
        wish = {"session_id": bare, "max_tokens": 1}
        live.complete(prompt="y", add_special_tokens=False, **wish)
        live.complete(prompt="y", add_special_tokens=True, **wish)
        live.complete(**wish)
        texts = [live.text_of(each) for each in (read, empty, appended, bare)]
        assert texts == ["\x01xyaya", "\x01yaya", "\x01zz", "ya\x01yaa"]


def test_a_chat_s_turns_are_framed_where_that_is_asked(tmp_path: Path) -> None:
    with serving(template=find_template("plain", tmp_path)) as live:
        live.engine.tokenizer.before = (1,)
        session_id = live.opened()
        for text in ("\x01User: x\n\nAssistant:", "\x01\n\nUser: x\n\nAssistant:"):
            live.chat("x", session_id=session_id, add_special_tokens=True, max_tokens=1)
            assert bytes(live.engine.seen[-1].prompt_ids).decode() == text
        live.chat("x", session_id=session_id, max_tokens=1)
        assert bytes(live.engine.seen[-1].prompt_ids).decode() == text.removeprefix("\x01")


def test_the_version(shared: Live) -> None:
    assert shared.client.get("/version").json() == {"version": package_version()}
