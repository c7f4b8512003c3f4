"""The structure that import contracts cannot say: what loads torch, and what is installed.

Who may import whom is in pyproject.toml, for `lint-imports` in `make check`.
"""

import ast
import subprocess
import sys
import tomllib
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PATHS = sorted(path for top in ("engine", "server") for path in (ROOT / top).rglob("*.py"))
MAX_MODULES = 18
"""In one package: more are not taken in at a glance."""

WITHOUT_TORCH = [
    "config",
    "errors",
    "models.config",
    "models.gptj.attention_kinds",
    "models.registry",
    "outputs",
    "sampling_params",
    "scheduling.batch",
    "scheduling.output_processor",
    "scheduling.request",
    "scheduling.scheduler",
    "sessions.store",
    "settings",
    "state.spec",
    "text.detokenizer",
    "text.files",
    "text.special_tokens",
]
"""Modules of the engine that load no torch."""


def module_of(path: Path) -> str:
    """The name that a file is imported under."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return "cottention." + ".".join(parts).removesuffix(".__init__")


def run(code: str) -> None:
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize(
    "statement",
    [
        "; ".join(f"import cottention.engine.{name}" for name in WITHOUT_TORCH),
        "from cottention.engine import EngineConfig, EngineStats, FinishReason, ModelConfig;"
        "from cottention.engine import Output, SamplingParams, StateSpec;"
        "assert not {'huggingface_hub', 'safetensors', 'tokenizers'} & {*sys.modules}",
        "from cottention.engine.models.model_folder import DEFAULT_MODEL;"
        "from cottention.engine.models.registry import read_config;"
        "config = read_config(DEFAULT_MODEL);"
        "config.state_spec().itemised_bytes(), config.arithmetic()",
        "; ".join(
            f"import {module_of(path)}"
            for path in PATHS
            if path.is_relative_to(ROOT / "server") and path.name not in ("__main__.py", "ray.py")
        ),
    ],
    ids=["engine modules", "public names", "a model's configuration", "server"],
)
def test_no_torch_is_loaded(statement: str) -> None:
    """`--help` stays quick, and the scheduler is tested without it."""
    run(f"import sys; {statement}; assert 'torch' not in sys.modules")


def test_the_engine_loads_no_web_framework() -> None:
    """It also runs where only torch, tokenizers and safetensors are installed."""
    names = ["fastapi", "starlette", "uvicorn", "pydantic", "httpx"]
    run(
        f"import sys; sys.modules.update(dict.fromkeys({names}))\n"
        "from cottention.engine import Engine; from cottention.engine.worker import EngineWorker"
    )


def test_opening_a_model_does_not_load_torch_s_compiler() -> None:
    """Some operations on tensors without memory load it, which takes as long as torch itself."""
    run(
        "import sys\n"
        "from cottention.engine import EngineConfig\n"
        "from cottention.engine.models.gptj.attention_kinds import RECURRENT_KINDS\n"
        "from cottention.engine.opening import open_engine\n"
        "from tests.engine.encoders import encoder_folder\n"
        "from tests.engine.making import FAMILIES, model_folder\n"
        "kinds = map(model_folder, (*RECURRENT_KINDS, *FAMILIES))\n"
        "for folder in (None, encoder_folder(), *kinds):\n"
        "    open_engine(folder, EngineConfig(max_slots=1))\n"
        "    assert 'torch._dynamo' not in sys.modules, folder\n"
    )


def test_every_package_is_installed() -> None:
    """A wheel without one of them fails where it is installed, and nowhere else."""
    table = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    packages = {module_of(path.parent / "__init__.py") for path in PATHS}
    assert set(table["packages"]) == packages | {"cottention.csrc", "cottention.csrc.cuda"}


def test_no_package_has_too_many_modules() -> None:
    counts = Counter(path.parent for path in PATHS if path.name != "__init__.py")
    assert {str(folder): n for folder, n in counts.items() if n > MAX_MODULES} == {}


def test_every_module_has_a_docstring() -> None:
    silent = [path for path in PATHS if not ast.get_docstring(ast.parse(path.read_text()))]
    assert silent == []
