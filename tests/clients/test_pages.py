"""What the pages show for a client is run as it stands there, in the clients' environment."""

import os
import subprocess

import pytest

from tests.clients.conftest import Served, python
from tests.docs.pages import PAGES, Block, blocks

SHOWN = [block for page in PAGES for block in blocks(page) if block.run_by == "make test-clients"]


@pytest.mark.parametrize("block", SHOWN, ids=lambda block: block.name)
def test_it_runs_as_it_stands(block: Block, served: Served) -> None:
    """With this server's address, model and key in place of those on the page."""
    text = block.text.replace("http://127.0.0.1:8000", served.url)
    text = text.replace('"cottention-python-7m"', f'"{served.model}"')
    text = text.replace('api_key="any"', f'api_key="{served.key}"')
    done = subprocess.run(
        [python(), "-c", text], env=os.environ, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout
