"""What tests of several rooms share: where the golden cases are."""

import os
from pathlib import Path

import pytest

_OWN_COPY = Path(__file__).parent / "data" / "golden"


@pytest.fixture(scope="session")
def golden() -> Path:
    """Folder of golden cases for the tests of that name: COTTENTION_GOLDEN, or our own copy."""
    return Path(os.environ.get("COTTENTION_GOLDEN", _OWN_COPY))


@pytest.fixture(scope="session")
def gptj_folder() -> Path:
    """A small causal Cottention model with random weights, as a Hugging Face folder."""
    return _OWN_COPY / "cottention-gptj"
