"""A variable that nothing reads is told of at start-up; those that something reads are known."""

import logging
import re
from pathlib import Path

import pytest

from cottention.server.cli.options import KNOWN, warn_of_unknown

ROOT = Path(__file__).parents[3]
READ = re.compile(r"""["'](COTTENTION_[A-Z_]+)["']""")
SET = re.compile(r"^[ #-]*(?:ENV |name: )?(COTTENTION_[A-Z_]+)[=: \n]", re.MULTILINE)
"""In a Dockerfile, in a compose file or a file for it, in a manifest."""


def test_what_the_code_reads_by_name_is_known() -> None:
    sources = [*(ROOT / "engine").rglob("*.py"), *(ROOT / "server").glob("*.py")]
    texts = [path.read_text() for path in (*sources, *(ROOT / "csrc").glob("*.cpp"))]
    found = {name for text in texts for name in READ.findall(text)}
    assert len(found) >= 5
    assert found <= KNOWN.keys()


def test_what_the_containers_set_is_known() -> None:
    files = [path for path in (ROOT / "docker").rglob("*") if path.is_file()]
    found = {name for path in files for name in SET.findall(path.read_text())}
    assert len(found) > 30
    assert found <= KNOWN.keys()


def test_each_unknown_one_is_told_of_without_its_value(caplog: pytest.LogCaptureFixture) -> None:
    warn_of_unknown(
        {
            "COTTENTION_MAX_SLOT": "3",
            "COTTENTION_API_KYE": "secret",
            "COTTENTION_WEATHER": "fine",
            "COTTENTION_PROT": "",
            "COTTENTION_MAX_SLOTS": "3",
            "COTTENTION_OPS": "compiled",
            "COTTENTION_TEMPERATURE": "0",
            "OTHER_MAX_SLOT": "3",
        }
    )
    assert [record.getMessage() for record in caplog.records] == [
        "there is no variable COTTENTION_API_KYE, and so it changes nothing:"
        " did you mean COTTENTION_API_KEY?",
        "there is no variable COTTENTION_MAX_SLOT, and so it changes nothing:"
        " did you mean COTTENTION_MAX_SLOTS?",
        "there is no variable COTTENTION_WEATHER, and so it changes nothing",
    ]
    assert {record.levelno for record in caplog.records} == {logging.WARNING}
