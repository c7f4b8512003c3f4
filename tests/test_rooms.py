"""The rules of the house that a machine can check: who may know whom.

Imports are read from the source, not made: a rule holds for lines that no test runs, too.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]

WEB = {"fastapi", "starlette", "uvicorn", "pydantic", "pydantic_settings", "httpx", "asyncio"}


class Import(NamedTuple):
    """One imported module, absolute; `at_start` where importing the file imports it."""

    module: str
    line: int
    at_start: bool


@cache
def modules() -> dict[str, Path]:
    """Every module of the two packages by its dotted name."""
    found = {}
    for package in ("engine", "server"):
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found["cottention." + ".".join(parts).removesuffix(".__init__")] = path
    return found


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def names_of(node: ast.stmt, module: str) -> Iterator[str]:
    """Modules that an import statement names; `from a import b` may mean a.b."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, f"{module}:{node.lineno} imports relatively"
        assert node.module is not None
        for alias in node.names:
            whole = f"{node.module}.{alias.name}"
            yield whole if whole in modules() else node.module


def is_type_checking(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def walk(body: list[ast.stmt], module: str, at_start: bool = True) -> Iterator[Import]:
    """All imports below; those in functions and for type checkers are not made at the start."""
    for node in body:
        yield from (Import(name, node.lineno, at_start) for name in names_of(node, module))
        inside = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) or is_type_checking(node)
        children = [child for child in ast.walk(node) if child is not node]
        nested = [child for child in children if isinstance(child, (ast.Import, ast.ImportFrom))]
        if isinstance(node, ast.ClassDef):
            yield from walk(node.body, module, at_start)
        else:
            yield from walk(nested, module, at_start and not inside)


@cache
def imports(module: str) -> list[Import]:
    return list(walk(tree(modules()[module]).body, module))


def within(name: str, room: str) -> bool:
    return name == room or name.startswith(f"{room}.")


def offences(room: str, forbidden: set[str]) -> list[str]:
    """Imports of forbidden modules anywhere in a room."""
    return [
        f"{module}:{item.line} imports {item.module}"
        for module in modules()
        if within(module, room)
        for item in imports(module)
        if any(within(item.module, name) for name in forbidden)
    ]


def test_there_are_rooms() -> None:
    """What follows would pass on nothing."""
    assert {
        "cottention.engine.engine",
        "cottention.engine.ops",
        "cottention.server.api.app",
    } <= modules().keys()
    assert any(item.module == "torch" for item in imports("cottention.engine.sampling.sampler"))
    assert Import("cottention.engine.models.attention", 0, False)._replace(line=0) in [
        item._replace(line=0) for item in imports("cottention.engine.state.spec")
    ]


@pytest.mark.parametrize(
    ("room", "forbidden"),
    [
        ("cottention.engine", {"cottention.server", "tests", "benchmarks", *WEB}),
        ("cottention.server", {"torch", "safetensors", "tokenizers", "tests", "benchmarks"}),
    ],
)
def test_arrows_point_down(room: str, forbidden: set[str]) -> None:
    assert offences(room, forbidden) == []


def test_ops_know_nothing_above_them() -> None:
    """Models, sessions and scheduling are the rooms above: ops import themselves alone."""
    outside = [
        f"{module}:{item.line} imports {item.module}"
        for module in modules()
        if within(module, "cottention.engine.ops")
        for item in imports(module)
        if item.module.startswith("engine.") and not within(item.module, "cottention.engine.ops")
    ]
    assert outside == []


def test_serving_does_not_know_training() -> None:
    above = [
        f"{module}:{item.line} imports {item.module}"
        for module in modules()
        if not within(module, "cottention.engine.training")
        for item in imports(module)
        if within(item.module, "cottention.engine.training")
    ]
    assert above == []


LIGHT = [
    "config",
    "detokenizer",
    "errors",
    "options",
    "outputs",
    "params",
    "request",
    "scheduler",
    "store",
]


@pytest.mark.parametrize("name", [f"cottention.engine.{name}" for name in LIGHT])
def test_rooms_without_torch(name: str) -> None:
    assert (
        offences(
            name,
            {
                "torch",
                "cottention.engine.ops",
                "cottention.engine.models.gptj",
                "cottention.engine.state.pool",
            },
        )
        == []
    )


@pytest.mark.parametrize(
    "statement",
    [
        "; ".join(f"import cottention.engine.{name}" for name in LIGHT),
        "from cottention.engine import EngineConfig, SamplingParams, EngineStats, Output",
        "; ".join(f"import {name}" for name in modules() if name.startswith("cottention.server")),
    ],
)
def test_they_do_not_load_it_through_others_either(statement: str) -> None:
    statement = statement.replace("import cottention.server.__main__; ", "")  # which would start it
    code = f"import sys; {statement}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_the_engine_loads_no_web_framework() -> None:
    """It also runs where only torch, tokenizers and safetensors are installed.

    torch itself may load asyncio and numpy; the names below are ours alone to bring in.
    """
    names = sorted(WEB - {"asyncio"})
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({names}))\n"
        "from cottention.engine import Engine; from cottention.engine.worker import EngineWorker"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_no_circles() -> None:
    """Imports made at the start, followed through both packages, never come back."""
    path: list[str] = []
    done: set[str] = set()

    def visit(module: str) -> None:
        assert module not in path, " → ".join([*path[path.index(module) :], module])
        if module in done:
            return
        path.append(module)
        for item in imports(module):
            if item.at_start and item.module in modules() and item.module != module:
                visit(item.module)
        done.add(path.pop())

    for module in modules():
        visit(module)


def test_modules_say_what_they_own() -> None:
    assert [m for m, path in modules().items() if not ast.get_docstring(tree(path))] == []
