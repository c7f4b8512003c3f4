"""One key's largest requests neither keep another from being served nor take more memory than said.

`make bounds` measures how long the other waits; here it only has to be served.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.bounds_requests import JSON, Asked, Description
from tests.server.live import Live

ROOT = Path(__file__).parents[2]
MAX_BODY_BYTES = 50_000


@pytest.fixture(scope="module")
def requests(shared: Live) -> list[Asked]:
    description = shared.client.get("/openapi.json").json()
    paths = {"session_id": "sess-1", "model_id": "m"}
    return [*Description(description, MAX_BODY_BYTES, paths, b"snapshot").requests()]


def test_each_verb_and_field_of_the_description_is_among_them(
    shared: Live, requests: list[Asked]
) -> None:
    description = shared.client.get("/openapi.json").json()
    labels = {each.label for each in requests}
    schemas = description["components"]["schemas"]
    for path, operations in description["paths"].items():
        for method, operation in operations.items():
            label = f"{method.upper()} {path}"
            names = [each["name"] for each in operation.get("parameters", [])]
            content = operation.get("requestBody", {}).get("content", {}).get(JSON, {})
            schema = content.get("schema", {})
            for each in schema.get("anyOf", [schema]):
                if "$ref" in each:
                    fields = schemas[each["$ref"].rpartition("/")[2]]["properties"]
                    names += [name for name, field in fields.items() if field != {"type": "null"}]
            assert {label, *(f"{label} {name}" for name in names)} <= labels


def test_they_are_as_large_as_they_may_be_and_no_larger(requests: list[Asked]) -> None:
    sizes = [len(each.body) for each in requests if "import" not in each.label]
    assert 0.9 * MAX_BODY_BYTES < max(sizes) <= MAX_BODY_BYTES
    completions = [each for each in requests if each.label == "POST /v1/completions n"]
    assert [json.loads(each.body)["n"] for each in completions] == [128]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_second_key_is_served_and_memory_stays_within_the_sum(
    gptj_folder: Path, tmp_path: Path
) -> None:
    report = tmp_path / "report.json"
    command = [sys.executable, "-m", "benchmarks.bounds", "--quick", "--model", str(gptj_folder)]
    command += ["--max-body-bytes", str(256 * 1024), "--flag=--chat-template=plain"]
    subprocess.run([*command, "--json", str(report)], cwd=ROOT, check=False, timeout=800)
    found = json.loads(report.read_text())["bounds"]["summary"]
    assert found["unserved"] == {}
    assert found["asked"] > 50
    assert found["peak MB"] <= found["sum MB"]
