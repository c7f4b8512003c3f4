"""The pages that users read, taken apart: their links and headings, and what they show to be run.

A fenced block of sh or python is run as it stands, unless a comment before it says otherwise:

    <!-- not run: REASON -->        it cannot run in a test
    <!-- run by: make TARGET -->    another environment runs it

A block of json or text right after one is what that prints; in it an ellipsis (…) stands for
anything, such as an id, a time, or lines that are left out.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).parents[2]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
LINKED = (*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md")
"""Pages whose links are followed."""

RUN = ("sh", "python")
ANSWERS = ("json", "text")

_NOTE = re.compile(r"<!-- (?P<kind>not run|run by): (?P<why>.+) -->")
_SOURCE = re.compile(r'<img [^>]*src="([^"]+)"')


@dataclass(frozen=True)
class Block:
    """A fenced block.

    line: of its first line in the page, from 1. not_run, run_by: what its comment says.
    answer: what it prints, if that is shown. is_answer: it is what another block prints.
    """

    page: Path
    line: int
    language: str
    text: str
    not_run: str | None = None
    run_by: str | None = None
    answer: str | None = None
    is_answer: bool = False

    @property
    def name(self) -> str:
        """PAGE:LINE, as failures name it."""
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page, in order."""
    found: list[Block] = []
    tokens = _tokens(page)
    for place, token in enumerate(tokens):
        if token.type != "fence":
            continue
        before = tokens[place - 1] if place else token
        language = token.info.split(" ", 1)[0]
        is_answer = before.type == "fence" and before.info in RUN and language in ANSWERS
        if is_answer:
            last = found[-1]
            found[-1] = Block(**{**vars(last), "answer": token.content})
        note = _NOTE.search(before.content) if before.type == "html_block" else None
        kind, why = (note["kind"], note["why"]) if note else (None, None)
        found.append(
            Block(
                page,
                (token.map or [0])[0] + 2,
                language,
                token.content,
                not_run=why if kind == "not run" else None,
                run_by=why if kind == "run by" else None,
                is_answer=is_answer,
            )
        )
    return found


def indented_blocks(page: Path) -> list[str]:
    """Blocks that are set off by four spaces."""
    return [token.content for token in _tokens(page) if token.type == "code_block"]


def links(page: Path) -> list[str]:
    """Targets of all links and pictures of a page."""
    found: list[str] = []
    for token in _inline(page):
        target = token.attrGet("href") or token.attrGet("src")
        found += [str(target)] if target else _SOURCE.findall(token.content)
    return found


def code_spans(page: Path) -> list[str]:
    """Texts between backticks."""
    return [token.content for token in _inline(page) if token.type == "code_inline"]


def anchors(page: Path) -> set[str]:
    """The fragments by which GitHub links to a page's headings."""
    seen: dict[str, int] = {}
    found = set()
    tokens = _tokens(page)
    for place, token in enumerate(tokens):
        if token.type == "heading_open":
            plain = re.sub(r"[^\w\- ]", "", tokens[place + 1].content.lower())
            slug = plain.replace(" ", "-")
            count = seen.get(slug, 0)
            seen[slug] = count + 1
            found.add(f"{slug}-{count}" if count else slug)
    return found


def matches(expected: str, printed: str) -> bool:
    """Whether a text is the one that a page shows, with anything in place of an ellipsis."""
    parts = (re.escape(part) for part in expected.strip().split("…"))
    return re.fullmatch(".*?".join(parts), printed.strip(), re.DOTALL) is not None


def _tokens(page: Path) -> list[Token]:
    return MarkdownIt("commonmark").enable("table").parse(page.read_text(encoding="utf-8"))


def _inline(page: Path) -> Iterator[Token]:
    """What paragraphs, headings and cells are made of; markup of HTML stands by itself."""
    for token in _tokens(page):
        yield from [token] if token.type == "html_block" else token.children or ()
