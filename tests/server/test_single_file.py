"""A single .pth file of an RWKV-7 over HTTP: nothing beside its weights says anything but bytes."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cottention.engine import Engine, EngineConfig
from cottention.server.config import ServerConfig
from cottention.server.generation.chat_template import find_template
from cottention.server.sessions.storage import open_sessions
from tests.engine.making import rwkv7_file
from tests.server.live import Live, serving


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return rwkv7_file(tmp_path_factory.mktemp("single"))


@pytest.fixture(scope="module")
def live(file: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    engine = Engine(file, EngineConfig(max_slots=4))
    folder = tmp_path_factory.mktemp("sessions")
    with open_sessions(engine, ServerConfig(session_dir=str(folder))) as sessions:
        template = find_template("plain", file)
        with serving(engine, template, sessions) as live:
            yield live


def test_the_length_that_it_was_trained_on_is_not_known(live: Live) -> None:
    [model] = live.client.get("/v1/models").json()["data"]
    assert model["id"] == "small"
    assert model["max_model_len"] is None
    told = live.client.post("/tokenize", json={"prompt": "the thing in there"}).json()
    assert told["count"] == len(told["tokens"]) == 8
    assert told["max_model_len"] is None
    whole = live.complete(prompt="a" * 100, max_tokens=1, truncate_prompt_tokens=-1)
    assert whole.json()["usage"]["prompt_tokens"] == 100, "there is nothing to truncate to"


def test_capacity_itemises_every_tensor(live: Live) -> None:
    told = live.client.get("/v1/capacity").json()["bytes_per_session"]
    assert told["state"] == 3 * 64 * 32 * 4
    assert told["att_shift"] == told["ffn_shift"] == 3 * 64 * 4
    assert told["spare"] == 0


def test_a_character_that_a_turn_cuts_is_told_whole(live: Live) -> None:
    """Ids are bytes, and a turn ends inside of one character: the next turn tells it."""
    said = "你好é"
    first, second = said.encode()[:4], said.encode()[4:]
    session_id = live.opened([byte + 1 for byte in first])
    body = {"session_id": session_id, "max_tokens": 1, "ignore_eos": True}
    texts, forced = [], [second[0], *second[1:]]
    for byte in forced:
        answer = live.complete(prompt="", **body, logit_bias={str(byte + 1): 100}).json()
        texts.append(answer["choices"][0]["text"])
    assert "".join(texts).endswith("é")
    assert live.session(session_id)["position"] == len(said.encode())


def test_a_chat_by_turns_is_the_chat_as_a_whole(live: Live) -> None:
    """With a template that is given by name, since the file has none."""
    params: dict[str, Any] = {"max_tokens": 6, "seed": 3, "logit_bias": {"0": -100}}
    params |= {"return_token_ids": True}
    told = live.chat("hi", **params, session_id=live.opened("")).json()
    alone = live.chat("hi", **params).json()
    assert told["choices"][0]["token_ids"] == alone["choices"][0]["token_ids"]


def test_it_cannot_be_renewed(live: Live) -> None:
    answer = live.complete(prompt="a", max_tokens=1, context_policy="renew")
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "context_policy"
    assert "context window is not known" in answer.json()["error"]["message"]
