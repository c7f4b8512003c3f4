"""What the engine's tests share: a model folder of one's own to damage, and a small engine."""

import shutil
from pathlib import Path

import pytest

from engine import Engine, EngineConfig


@pytest.fixture
def folder(gptj_folder: Path, tmp_path: Path) -> Path:
    """A writable copy of the small model's folder, without what it is expected to answer."""
    target = tmp_path / "model"
    shutil.copytree(gptj_folder, target, ignore=shutil.ignore_patterns("expected.*"))
    return target


@pytest.fixture
def engine(gptj_folder: Path) -> Engine:
    """An engine of four slots and a budget of eight tokens a step, so that both run out."""
    return Engine(gptj_folder, EngineConfig(max_slots=4, max_batch_tokens=8))
