"""Links of the pages lead somewhere, and what they name exists."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

import pytest

from cottention.server.cli.parser import COMMANDS
from tests.docs.pages import (
    ANSWERS,
    LINKED,
    PAGES,
    ROOT,
    RUN,
    anchors,
    blocks,
    code_spans,
    indented_blocks,
    links,
)

FIRST_WORDS = re.compile(r"^(?:\$ )?(?:curl|cottention|docker|kubectl|make|pip|python3?) ")


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", LINKED, ids=name_of)
def test_every_link_leads_to_a_file_and_a_heading_that_exist(page: Path) -> None:
    """A renamed page or heading breaks links that nobody follows before a reader does."""
    broken = []
    for target in links(page):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, fragment = target.partition("#")
        there = (page.parent / unquote(path)).resolve() if path else page
        if not there.exists() or (fragment and fragment not in anchors(there)):
            broken.append(target)
    assert broken == []


def test_the_index_has_every_page() -> None:
    """A page that the index lacks is found by nobody."""
    index = ROOT / "docs" / "README.md"
    linked = {(index.parent / target.partition("#")[0]).resolve() for target in links(index)}
    assert {path for path in PAGES if path not in (index, ROOT / "README.md")} <= linked


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_block_is_run_or_says_why_not(page: Path) -> None:
    """A command in another form, or an answer apart from its command, would be run by no test."""
    found = blocks(page)
    assert [
        block.name
        for block in found
        if block.language in ANSWERS and not (block.is_answer or block.not_run)
    ] == []
    assert [block.name for block in found if block.language in ("", "bash", "console")] == []
    assert [text for text in indented_blocks(page) if FIRST_WORDS.match(text)] == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_what_the_text_names_exists(page: Path) -> None:
    """Commands between backticks are not run: their targets, modules and words may be gone."""
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    shown = code_spans(page) + [block.text for block in blocks(page) if block.language in RUN]
    wrong = []
    for line in (line.strip() for text in shown for line in text.splitlines()):
        if (found := re.match(r"make ([a-z-]+)", line)) and found[1] not in targets:
            wrong.append(line)
        if (found := re.match(r"cottention ([a-z][a-z-]*)", line)) and found[1] not in COMMANDS:
            wrong.append(line)
        found = re.match(r"python -m ((?:benchmarks|cottention)[\w.]*)", line)
        if found and importlib.util.find_spec(found[1]) is None:
            wrong.append(line)
    assert wrong == []


def test_the_flags_that_the_pages_name_exist() -> None:
    """A flag that was renamed stays in the text."""
    words = [word for word, command in COMMANDS.items() if command.settings]
    told = "".join(
        subprocess.run(
            [sys.executable, "-m", "cottention.server", word, "--help"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for word in words
    )
    known = set(re.findall(r"--[a-z][a-z-]+", told)) | OTHERS
    named = {
        (name_of(page), flag)
        for page in PAGES
        for span in code_spans(page)
        for flag in re.findall(r"^--[a-z][a-z-]+", span)
    }
    assert {each for each in named if each[1] not in known} == set()


OTHERS = {
    *("--heads", "--json", "--list", "--quick"),  # of benchmarks
    "--profile",  # of docker compose
    # of the servers that coming-from.md compares with this one
    *("--block-size", "--enable-prefix-caching", "--gpu-memory-utilization", "--max-model-len"),
    *("--max-num-batched-tokens", "--max-num-seqs", "--slot-save-path", "--swap-space"),
    "--tensor-parallel-size",
}
"""Flags of other commands."""
