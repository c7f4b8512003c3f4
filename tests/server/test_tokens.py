"""POST /tokenize and /detokenize, and /version, in vLLM's shapes."""

from pathlib import Path
from typing import Any

import pytest

from server.templates import find_template
from server.version import package_version
from tests.server.live import Live, serving
from tests.server.test_bad_input import refused


def tokenize(live: Live, **body: Any) -> Any:
    return live.client.post("/tokenize", json=body)


def test_a_text_s_ids(shared: Live) -> None:
    assert tokenize(shared, prompt="ab").json() == {
        "count": 2,
        "max_model_len": 512,
        "tokens": [97, 98],
        "token_strs": None,
    }
    assert tokenize(shared, prompt="ab", return_token_strs=True).json()["token_strs"] == ["a", "b"]
    assert tokenize(shared, prompt="", model="fake").json()["count"] == 0


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


def test_special_tokens_that_cannot_be_left_out() -> None:
    with serving() as live:
        tokenizer = live.engine.tokenizer
        tokenizer.encode = lambda text: [1, *text.encode()]
        assert tokenize(live, prompt="x").json()["count"] == 2
        refusal = refused(tokenize(live, prompt="x", add_special_tokens=False))
        assert refusal["param"] == "add_special_tokens"


def test_the_version(shared: Live) -> None:
    assert shared.client.get("/version").json() == {"version": package_version()}
