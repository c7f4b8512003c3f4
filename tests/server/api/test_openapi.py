"""/openapi.json is true: references lead somewhere; fields and statuses are those there are."""

import json
import re
from typing import Any

import pytest

from cottention.server.api.app import BODIES
from cottention.server.schemas.base import RequestModel
from tests.server.live import Live


@pytest.fixture(scope="module")
def description(shared: Live) -> Any:
    return shared.client.get("/openapi.json").json()


def test_every_reference_leads_somewhere(description: Any) -> None:
    names = set(re.findall(r'"\$ref": "([^"]*)"', json.dumps(description)))
    assert names
    for name in names:
        found = description
        for part in name.removeprefix("#/").split("/"):
            found = found[part]


@pytest.mark.parametrize("body", BODIES)
def test_every_field_is_published(description: Any, body: type[RequestModel]) -> None:
    schema = description["components"]["schemas"][body.__name__]
    assert schema["properties"].keys() == body.model_fields.keys() | body.neutral.keys()
    assert schema["additionalProperties"] is False


@pytest.mark.parametrize("body", BODIES)
def test_no_field_is_both_built_and_neutral(body: type[RequestModel]) -> None:
    assert not body.neutral.keys() & body.model_fields.keys()


def test_what_can_grow_and_is_bounded_says_so(description: Any, shared: Live) -> None:
    """And the bound is kept: what is looked up or kept is not as long as a body may be."""
    schemas = description["components"]["schemas"]
    fields = schemas["CompletionRequest"]["properties"]
    for name in ("model", "session_id", "cache_salt"):
        [text] = [each for each in fields[name]["anyOf"] if each["type"] == "string"]
        longest = "x" * text["maxLength"]
        refused = shared.complete(prompt="x", **{name: longest + "x"})
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == name
        assert shared.complete(prompt="x", **{name: longest}).status_code in (200, 404)
    metadata = schemas["SessionRequest"]["properties"]["metadata"]["anyOf"][0]
    assert metadata["maxProperties"] == 16
    assert metadata["additionalProperties"]["maxLength"] == 512


def test_every_error_has_the_one_form(description: Any) -> None:
    """Anthropic's own on its endpoints."""
    for path, operations in description["paths"].items():
        form = "MessagesErrorBody" if path.startswith("/v1/messages") else "ErrorBody"
        for method, operation in operations.items():
            statuses = operation["responses"].keys()
            described = operation["responses"].get("422", {}).get("description")
            assert described != "Validation Error"  # FastAPI's own, which is never sent
            for status in statuses - {"200", "204"}:
                (content,) = operation["responses"][status]["content"].items()
                assert content == (
                    "application/json",
                    {"schema": {"$ref": f"#/components/schemas/{form}"}},
                ), (path, method, status)


def test_streams_are_published_beside_whole_answers(description: Any) -> None:
    for path in ("/v1/completions", "/v1/chat/completions"):
        content = description["paths"][path]["post"]["responses"]["200"]["content"]
        assert content.keys() == {"application/json", "text/event-stream"}
