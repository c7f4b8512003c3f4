"""What the engine's tests share: a model folder of one's own to damage, and a small engine.

A test marked `every_feature_map` runs for every kind of attention that is served: its
`gptj_folder`, and the engine on it, are of that kind. One marked `every_attention` runs for those
whose states differ in more than their size, one marked `every_session` for families whose sessions
keep more than the recurrence as well. One marked `every_model` runs for every feature map and every
family. Of several marks the closest one counts. Coverage, which doubles the time of a test, is
measured with the first of the kinds alone: what is particular to another has tests of its own.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from cottention.engine import Engine, EngineConfig
from cottention.engine.models.gptj.attention_kinds import RECURRENT_KINDS
from tests.engine.making import ATTENTIONS, FAMILIES, SESSION_FAMILIES, model_folder

_MODELS_OF = {
    "every_feature_map": RECURRENT_KINDS,
    "every_attention": ATTENTIONS,
    "every_session": (*ATTENTIONS, *SESSION_FAMILIES),
    "every_model": (*RECURRENT_KINDS, *FAMILIES),
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    marks = [mark.name for mark in metafunc.definition.iter_markers() if mark.name in _MODELS_OF]
    if marks and "attention" in metafunc.fixturenames:
        first, *others = _MODELS_OF[marks[0]]
        every = [first, *(pytest.param(each, marks=pytest.mark.no_cover) for each in others)]
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
def engine(gptj_folder: Path) -> Iterator[Engine]:
    """An engine of four slots and a budget of eight tokens a step, so that both run out."""
    engine = Engine(gptj_folder, EngineConfig(max_slots=4, max_batch_tokens=8))
    yield engine
    engine.close()  # a grammar leaves a process and threads
