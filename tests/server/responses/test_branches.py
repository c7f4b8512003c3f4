"""Many branches of one answer, and a server that is killed under them.

COTTENTION_BRANCHES says how many; CI takes some.
"""

import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from cottention.engine.models.model_folder import resolve_model
from tests.server.process import served

pytestmark = pytest.mark.slow

NUM_BRANCHES = int(os.environ.get("COTTENTION_BRANCHES", "64"))
FLAGS = ("--generation-config", "vllm", "--max-slots", "32", "--chat-template", "plain")

STARTS = tuple(f"class {letter}:" for letter in "ABCDEFGHIJKLMNOPQRSTUVWXYZ")
"""Of which the first is taken whose answer is read as the tokens that were generated."""


def ask(client: httpx.Client, said: str, previous: str | None) -> Any:
    body = {"input": said, "previous_response_id": previous, "temperature": 0}
    answer = client.post("/v1/responses", json=body | {"max_output_tokens": 8})
    assert answer.status_code == 200, answer.text
    return answer.json()


def text_of(response: Any) -> str:
    return "".join(item["content"][0]["text"] for item in response["output"])


def question(number: int) -> str:
    return f"class Case{number}:"


def is_read_alike(client: httpx.Client, said: str, response: Any) -> bool:
    """Whether a chat reads the response's text as the tokens that were generated."""
    messages = [
        {"role": "user", "content": said},
        {"role": "assistant", "content": text_of(response)},
        {"role": "user", "content": "y = 1"},
    ]
    body = {"messages": messages, "temperature": 0, "max_tokens": 1}
    chat = client.post("/v1/chat/completions", json=body).json()
    continued = ask(client, "y = 1", response["id"])
    return bool(chat["usage"]["prompt_tokens"] == continued["usage"]["input_tokens"])


def test_none_is_lost_and_none_is_other_than_a_chat(tmp_path: Path) -> None:
    """Branches share a state: one that changed it would change all others."""
    model = resolve_model(None).folder
    with served(model, tmp_path, *FLAGS) as (popen, client), ThreadPoolExecutor(16) as pool:
        begun = ((said, ask(client, said, None)) for said in STARTS)
        start, root = next(each for each in begun if is_read_alike(client, *each))

        def branch(number: int) -> Any:
            return ask(client, question(number), root["id"])

        branches = list(pool.map(branch, range(NUM_BRANCHES)))
        popen.send_signal(signal.SIGKILL)
        popen.wait()
    with served(model, tmp_path, *FLAGS) as (_, client), ThreadPoolExecutor(16) as pool:

        def is_as_a_chat(number: int) -> bool | None:
            """Whether a continuation is that of a chat with all messages; None: they differ.

            A chat reads texts as tokens anew, which may be others than those that were generated.
            """
            response = branches[number]
            assert client.get(f"/v1/responses/{response['id']}").json() == response
            continued = ask(client, "y = 1", response["id"])
            said = [start, text_of(root), question(number), text_of(response), "y = 1"]
            messages = [
                {"role": "assistant" if place % 2 else "user", "content": text}
                for place, text in enumerate(said)
            ]
            body = {"messages": messages, "temperature": 0, "max_tokens": 8}
            chat = client.post("/v1/chat/completions", json=body).json()
            if chat["usage"]["prompt_tokens"] != continued["usage"]["input_tokens"]:
                return None
            return bool(chat["choices"][0]["message"]["content"] == text_of(continued))

        found = list(pool.map(is_as_a_chat, range(NUM_BRANCHES)))
    assert False not in found
    assert found.count(True) >= NUM_BRANCHES / 4, "too few have the same tokens to compare"
