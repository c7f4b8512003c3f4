"""schemathesis against the published description: no 500, nothing that is not described.

A short run; COTTENTION_FUZZ_SECONDS makes it as long as that (`make fuzz`).
"""

import os
import subprocess
from pathlib import Path

import pytest

from tests.clients.conftest import python, serving

SECONDS = os.environ.get("COTTENTION_FUZZ_SECONDS")
EFFORT = ("--max-time", SECONDS, "--max-examples", "2000") if SECONDS else ("--max-examples", "15")

CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
    "unsupported_method",
    "allow_header_conformance",
    "ignored_auth",
)


CONFIG = """\
[checks]
not_a_server_error.expected-statuses = ["2xx", "3xx", "4xx", "504"]
"""
"""A request that asks for a `timeout` of almost nothing gets the 504 that is described."""


@pytest.mark.timeout(0 if SECONDS else 1200)
def test_the_description_holds(tmp_path: Path) -> None:
    (tmp_path / "schemathesis.toml").write_text(CONFIG)
    with serving("--max-tokens-limit", "40", "--default-max-tokens", "8") as served:
        command = [
            *(python(), "-m", "schemathesis.cli", "run", f"{served.url}/openapi.json"),
            *("--header", f"Authorization: Bearer {served.key}"),
            *("--checks", ",".join(CHECKS), "--warnings", "off", "--workers", "2"),
            *("--request-timeout", "30", "--continue-on-failure", *EFFORT),
            *("--suppress-health-check", "too_slow"),  # of the machine, not of the description
        ]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    print(done.stdout[-1500:])
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr
