"""Clients for Node, OpenAI's own and the AI SDK, where `make test-clients` has installed them."""

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.clients.conftest import Served
from tests.clients.expected import PROMPT, SAID, WAYS, texts

HERE = Path(__file__).parent
MODULES = Path(
    os.environ.get("COTTENTION_TEST_NODE", HERE.parents[1] / ".venv-clients/node/node_modules")
)


pytestmark = [
    pytest.mark.skipif(not shutil.which("node"), reason="there is no node here"),
    pytest.mark.skipif(not MODULES.is_dir(), reason=f"{MODULES} is not there; npm install failed"),
]


def heard_by(script: str, served: Served, *more: str) -> Any:
    done = subprocess.run(
        ["node", script, served.base_url, served.key, served.model, *more],
        cwd=HERE,
        env=os.environ | {"NODE_PATH": str(MODULES)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_node(served: Served) -> None:
    asked = {
        "prompt": PROMPT,
        "messages": [{"role": "user", "content": SAID}],
        "ways": WAYS,
    }
    heard = heard_by("client.cjs", served, json.dumps(asked))
    for (kind, way), text in texts().items():
        assert heard["texts"][way][kind] == [text, text]
    assert heard["models"] == [served.model]
    assert heard["errors"] == {
        "refused": ["BadRequestError", 400, "temperature", None],
        "unknown": ["NotFoundError", 404, "model", "model_not_found"],
        "stranger": ["AuthenticationError", 401, None, "invalid_api_key"],
    }


def is_weather(value: Any) -> bool:
    is_city = value["city"] in ("Rome", "Oslo") and 0 <= value["level"] <= 99
    return is_city and len(value["notes"]) <= 2


def test_agents(served: Served) -> None:
    """zod validates what was heard; it is looked at again here."""
    heard = heard_by("agents.cjs", served)
    answers = [heard["openai"]["parsed"], heard["sdk"]["object"]]
    assert all(map(is_weather, answers))
    for client in heard.values():
        assert client["called"]
        assert all(map(is_weather, client["called"]))
        assert client["streamed"] == client["called"]
    assert heard["sdk"]["results"] == [each["level"] + 1 for each in heard["sdk"]["called"]]
    assert heard["sdk"]["reason"] == "tool-calls"


def test_responses(served: Served) -> None:
    heard = heard_by("responses.cjs", served)
    assert len(set(heard["texts"])) == 1
    assert len(set(heard["branches"])) == 1
    assert heard["same"]
    assert heard["kinds"][0] == "response.created"
    assert heard["kinds"][-1] in ("response.completed", "response.incomplete")
    assert (heard["input"], heard["gone"]) == (["and?"], 404)
