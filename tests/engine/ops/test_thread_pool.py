"""How long torch's threads wait awake: set when the engine is imported, before torch is loaded."""

import os
import subprocess
import sys

import pytest

CODE = "import sys, os, engine; print(os.environ['GOMP_SPINCOUNT'], 'torch' in sys.modules)"


@pytest.mark.parametrize(("given", "kept"), [(None, "1000"), ("7", "7")])
def test_threads_soon_sleep_unless_the_user_says_otherwise(given: str | None, kept: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    if given is not None:
        environment["GOMP_SPINCOUNT"] = given
    command = [sys.executable, "-c", CODE]
    printed = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert printed.stdout.split() == [kept, "False"]
