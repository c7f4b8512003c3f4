"""`make gpu-check` on a bare machine: what it imports, and what it says where there is no GPU."""

import os
import re
import subprocess
import sys
from importlib.metadata import packages_distributions, requires
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / ".ci" / "gpu-check"
GIVEN = {"torch", "ninja", "numpy", "pytest", "tokenizers", "safetensors"}
"""All that is installed there, with what torch and pytest need themselves."""

REFUSE = """
import sys
from importlib.abc import MetaPathFinder

class Refuse(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {refused}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Refuse())
"""


def closure(names: set[str]) -> set[str]:
    """Distributions and all that they ask for, extras left out."""
    found: set[str] = set()
    left = set(names)
    while left:
        found |= left
        asked = [line for name in left for line in _requires(name) if "extra ==" not in line]
        left = {_normal(re.split(r"[^\w.-]", line)[0]) for line in asked} - found
    return found


def _requires(name: str) -> list[str]:
    try:
        return requires(name) or []
    except ModuleNotFoundError:  # for another platform or Python
        return []


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment in which Python finds nothing that the machine does not have."""
    there = GIVEN | closure({"torch", "pytest"})
    refused = {
        module
        for module, owners in packages_distributions().items()
        if not there & {_normal(owner) for owner in owners}
        and not (ROOT / module).is_dir()
        and module != "cottention"
    }
    assert {"fastapi", "pydantic", "rich", "huggingface_hub"} <= refused
    folder = tmp_path_factory.mktemp("bare")
    (folder / "sitecustomize.py").write_text(REFUSE.format(refused=refused))
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, (folder, ROOT, ROOT / "namespace"))),
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "COTTENTION_OPS": "reference",
    }


@pytest.mark.slow
def test_what_it_runs_needs_nothing_else(bare: dict[str, str]) -> None:
    """The modules that it names are imported, its tests collected, a table is drawn."""
    script = SCRIPT.read_text(encoding="utf-8")
    benchmarks = re.findall(r"-m (benchmarks\.\w+)", script)
    tests = re.search(r"tests=\(([\w/\s]+)\)", script)
    assert benchmarks
    assert tests is not None
    files = [f"tests/engine/{name}.py" for name in tests[1].split()]
    assert [file for file in files if not (ROOT / file).is_file()] == []
    options = ["-c", "/dev/null", "--rootdir=.", "--collect-only", "-q", "-p", "no:cacheprovider"]
    code = f"""
import sys, pytest, {", ".join(benchmarks)}
from benchmarks.common import show
show("A table", [{{"shape": "300M", "GB/s": 1234.5}}])
sys.exit(pytest.main({options + files}))"""
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=bare,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    assert "shape   GB/s\n" in run.stdout
    assert " 300M  1,234\n" in run.stdout


def test_a_dry_run_tells_what_would_run_and_stays_within_six_minutes() -> None:
    """Machines with a GPU are lent by the minute: what runs there must fit, and be known before."""
    run = subprocess.run(
        [SCRIPT, "--dry-run"],
        env=os.environ | {"OUT": "/nowhere"},
        capture_output=True,
        text=True,
        check=True,
    )
    *parts, last = run.stdout.splitlines()
    limits = [int(seconds) for seconds in re.findall(r"at most +(\d+) s  ", run.stdout)]
    assert len(limits) == len(parts) >= 4
    assert last == f"at most {sum(limits)} s in all; results in /nowhere"
    assert sum(limits) <= 360
    assert all("/nowhere/" in part for part in parts[1:])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so() -> None:
    run = subprocess.run(
        [SCRIPT],
        env=os.environ | {"PYTHON": sys.executable},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 2
    assert "sees no CUDA device; nothing was checked" in run.stderr
