"""OpenAI's own client for Node, where there is Node and `make test-clients` has installed it."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.clients.conftest import Served
from tests.clients.expected import PROMPT, SAID, WAYS, texts

HERE = Path(__file__).parent
MODULES = Path(
    os.environ.get("COTTENTION_TEST_NODE", HERE.parents[1] / ".venv-clients/node/node_modules")
)


@pytest.mark.skipif(not shutil.which("node"), reason="there is no node here")
@pytest.mark.skipif(not MODULES.is_dir(), reason=f"{MODULES} is not there; npm install failed")
def test_node(served: Served) -> None:
    asked = {
        "prompt": PROMPT,
        "messages": [{"role": "user", "content": SAID}],
        "ways": WAYS,
    }
    done = subprocess.run(
        ["node", "client.cjs", served.base_url, served.key, served.model, json.dumps(asked)],
        cwd=HERE,
        env=os.environ | {"NODE_PATH": str(MODULES)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    heard = json.loads(done.stdout)
    for (kind, way), text in texts().items():
        assert heard["texts"][way][kind] == [text, text]
    assert heard["models"] == [served.model]
    assert heard["errors"] == {
        "refused": ["BadRequestError", 400, "temperature", None],
        "unknown": ["NotFoundError", 404, "model", "model_not_found"],
        "stranger": ["AuthenticationError", 401, None, "invalid_api_key"],
    }
