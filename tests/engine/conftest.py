"""What the engine's tests share: a model folder of one's own to damage, and a small engine.

A test marked `every_attention` runs for every feature map that is served: its `gptj_folder`, and
the engine on it, are of that kind. One marked `every_model` runs for the recurrent families too,
one marked `every_session` for those of them whose sessions keep more than the recurrence. Of
several marks the closest one counts.
"""

import shutil
from pathlib import Path

import pytest

from cottention.engine import Engine, EngineConfig
from tests.engine.making import ATTENTIONS, FAMILIES, SESSION_FAMILIES, model_folder

_FAMILIES_OF = {"every_attention": (), "every_session": SESSION_FAMILIES, "every_model": FAMILIES}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    marks = [mark.name for mark in metafunc.definition.iter_markers() if mark.name in _FAMILIES_OF]
    if marks and "attention" in metafunc.fixturenames:
        every = [*ATTENTIONS, *_FAMILIES_OF[marks[0]]]
        metafunc.parametrize("attention", every, indirect=True, scope="session")


@pytest.fixture(scope="session")
def attention(request: pytest.FixtureRequest) -> str:
    """The kind of attention of the small model, or its family if that is another than gptj."""
    return str(getattr(request, "param", "cottention"))


@pytest.fixture(scope="session")
def gptj_folder(attention: str) -> Path:
    """The small model of the kind that a test is for."""
    return model_folder(attention)


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
