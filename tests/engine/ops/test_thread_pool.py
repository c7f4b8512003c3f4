"""How long torch's threads wait awake: set when the engine is imported, before torch is loaded."""

import os
import subprocess
import sys

import pytest

NAMES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
CODE = f"import sys, os, engine; print(*map(os.environ.get, {NAMES}), 'torch' in sys.modules)"


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ({}, ["1000", "active"]),
        ({"GOMP_SPINCOUNT": "7"}, ["7", "active"]),
        ({"OMP_WAIT_POLICY": "passive"}, ["1000", "passive"]),
    ],
)
def test_threads_soon_sleep_unless_the_user_says_otherwise(
    given: dict[str, str], kept: list[str]
) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in NAMES}
    command = [sys.executable, "-c", CODE]
    printed = subprocess.run(
        command, env=environment | given, capture_output=True, text=True, check=True
    )
    assert printed.stdout.split() == [*kept, "False"]
