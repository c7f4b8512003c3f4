"""Requests that every client makes, and what the engine itself says to them."""

import json
import subprocess
from functools import cache
from typing import Any

from tests.clients.conftest import MODEL, ROOT, SERVER_PYTHON

PROMPT = "def f(x):"
SAID = "Write a loop."
CHAT_PROMPT = f"User: {SAID}\n\nAssistant:"
STOP = ["\nUser:"]

GREEDY: dict[str, Any] = {"temperature": 0.0, "max_tokens": 24}
SEEDED: dict[str, Any] = {"temperature": 0.9, "top_p": 0.95, "seed": 1235, "max_tokens": 24}
WAYS = {"greedy": GREEDY, "seeded": SEEDED}


def in_process(requests: list[dict[str, Any]]) -> list[Any]:
    """Answers of the engine in a process of the project's own environment."""
    done = subprocess.run(
        [SERVER_PYTHON, "-m", "tests.clients.in_process", str(MODEL)],
        cwd=ROOT,
        input=json.dumps(requests),
        capture_output=True,
        text=True,
        check=True,
    )
    answers: list[Any] = json.loads(done.stdout)
    return answers


@cache
def texts() -> dict[tuple[str, str], str]:
    """What is to be said, by ("completion" or "chat", way)."""
    asked = [
        (kind, way, {"prompt": prompt, "params": params | ({"stop": STOP} if stop else {})})
        for way, params in WAYS.items()
        for kind, prompt, stop in (("completion", PROMPT, False), ("chat", CHAT_PROMPT, True))
    ]
    answers = in_process([request for _, _, request in asked])
    return {(kind, way): text for (kind, way, _), text in zip(asked, answers, strict=True)}
