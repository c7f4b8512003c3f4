"""What the engine's tests share: a model folder of one's own to damage, and a small engine.

A test marked `every_attention` runs for every feature map that is served: its `gptj_folder`, and
the engine on it, are of that kind. One marked `every_model` runs for the recurrent families too.
"""

import shutil
from pathlib import Path

import pytest

from cottention.engine import Engine, EngineConfig
from tests.engine.making import ATTENTIONS, FAMILIES, attention_folder, family_folder


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "attention" not in metafunc.fixturenames:
        return
    if metafunc.definition.get_closest_marker("every_attention"):
        metafunc.parametrize("attention", list(ATTENTIONS), indirect=True, scope="session")
    if metafunc.definition.get_closest_marker("every_model"):
        every = [*ATTENTIONS, *FAMILIES]
        metafunc.parametrize("attention", every, indirect=True, scope="session")


@pytest.fixture(scope="session")
def attention(request: pytest.FixtureRequest) -> str:
    """The kind of attention of the small model, or its family if that is another than gptj."""
    return str(getattr(request, "param", "cottention"))


@pytest.fixture(scope="session")
def gptj_folder(attention: str) -> Path:
    """The small model of the kind that a test is for."""
    return family_folder(attention) if attention in FAMILIES else attention_folder(attention)


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
