"""Python code in processes that are forked when torch has been imported, which takes longest."""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[3]
FORK = """
import json, os, sys, tempfile, traceback
import torch

def run(code, environment, out, err):
    os.dup2(out.fileno(), 1)
    os.dup2(err.fileno(), 2)
    os.environ.clear()
    os.environ.update(environment)
    try:
        exec(code, {})
    except Exception:
        traceback.print_exc()
    sys.stdout.flush()
    os._exit(0)

def text(file):
    file.seek(0)
    return file.read().decode()

cases = json.load(sys.stdin)
files = [(tempfile.TemporaryFile(), tempfile.TemporaryFile()) for _ in cases]
pids = []
for case, pair in zip(cases, files):
    pids.append(os.fork())
    if not pids[-1]:
        run(*case, *pair)
for pid in pids:
    os.waitpid(pid, 0)
print(json.dumps([[text(out), text(err)] for out, err in files]))
"""


class Printed(NamedTuple):
    """What a process wrote to standard output, and to standard error; a traceback as well."""

    out: str
    err: str


def run_forked(cases: Sequence[tuple[str, Mapping[str, str]]]) -> list[Printed]:
    """Run each code in its environment, all at once, in processes that have torch and no ops."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", FORK],
        cwd=ROOT,
        input=json.dumps([(code, dict(environment)) for code, environment in cases]),
        capture_output=True,
        text=True,
        check=True,
        timeout=250,
    )
    return [Printed(*each) for each in json.loads(done.stdout)]
