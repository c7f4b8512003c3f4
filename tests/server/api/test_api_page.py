"""The page on the interface is true: its table has every parameter, as the schemas have it."""

import re
from pathlib import Path

import pytest

from cottention.server.schemas.base import RequestModel
from cottention.server.schemas.chat import ChatRequest
from cottention.server.schemas.completions import CompletionRequest
from cottention.server.schemas.unsupported import ANY
from tests.server.live import Live

PAGE = (Path(__file__).parents[3] / "docs" / "api.md").read_text(encoding="utf-8")
ROW = re.compile(r"^\| `(\w+)` \| ([^|]*) \| ([^|]*) \| ([^|]+) \|$", re.MULTILINE)


def standing(body: type[RequestModel], name: str) -> str:
    """What becomes of a parameter, in the page's words."""
    if name in body.model_fields:
        return "supported"
    if name not in body.neutral:
        return "–"
    values = body.neutral[name]
    return "ignored" if ANY in values else "neutral only" if values else "refused"


def test_the_table_has_every_parameter_once() -> None:
    names = [name for name, *_ in ROW.findall(PAGE)]
    bodies = (CompletionRequest, ChatRequest)
    assert set(names) == {name for body in bodies for name in (*body.model_fields, *body.neutral)}
    assert len(names) == len(set(names))


@pytest.mark.parametrize("row", ROW.findall(PAGE), ids=lambda row: row[0])
def test_the_table_is_true(row: tuple[str, str, str, str]) -> None:
    name, completions, chat, _ = row
    assert completions == standing(CompletionRequest, name)
    assert chat == standing(ChatRequest, name)


def test_every_endpoint_is_on_the_page(shared: Live) -> None:
    for path in shared.client.get("/openapi.json").json()["paths"]:
        assert path.partition("{")[0].rstrip("/") in PAGE
