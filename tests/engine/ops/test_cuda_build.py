"""Building and loading the CUDA ops: with nvcc alone, without a GPU, and without nvcc."""

import os
from pathlib import Path

import pytest
import torch

from cottention.engine.ops import BuildError, build
from tests.engine.ops.forked import run_forked

OURS = ("COTTENTION_OPS", "COTTENTION_CUDA")
LOAD = """
import torch
from cottention.engine.ops import build, loader
from tests.engine import step_cases
from tests.engine.ops import test_attention_gelu
build.DEVICE_FLAGS += " -Xptxas=--warn-on-spills,--warning-as-error"
build.build_cuda()
print(loader.is_cuda_ready(), loader.is_cuda_ready())
print(torch._C._dispatch_has_kernel_for_dispatch_key("cottention::recurrent_step", "CUDA"))
on_cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
ops = torch.ops.cottention
for op, case in (
    (ops.recurrent_step, step_cases.make([2], [1], 16, 16)),
    (
        ops.cottention_attention_gelu,
        test_attention_gelu.make([1], [1], 16)._replace(cu_seqlens=None),
    ),
):
    try:
        op.default.redispatch(on_cuda, *case)
    except RuntimeError as error:
        print(str(error).split(", ")[-1])
"""


def _environment(**changes: str) -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in OURS} | changes


def _nvcc_or_skip() -> None:
    try:
        build.nvcc()
    except BuildError as error:
        pytest.skip(str(error))


@pytest.mark.slow
def test_they_compile_register_and_refuse_cpu_tensors(tmp_path: Path) -> None:
    """For sm_80, sm_90 and PTX, without a register that is kept in memory.

    Loading needs neither a GPU nor a torch that could use one.
    """
    _nvcc_or_skip()
    changes = {"COTTENTION_CUDA": "1", "COTTENTION_CACHE": str(tmp_path)}
    [(out, err)] = run_forked([(LOAD, _environment(**changes, COTTENTION_OPS="compiled"))])
    refused = [f"{name} must be on the CUDA device of the others" for name in ("q", "joined")]
    assert (out.splitlines(), err) == (["True True", "True", *refused], "")
    (folder,) = tmp_path.iterdir()
    assert len(list(folder.glob("cottention-cuda-*.so"))) == 1


def test_they_are_not_built_for_a_torch_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COTTENTION_CUDA", raising=False)
    assert build.is_cuda_wanted() == (torch.version.cuda is not None)
    for choice in ("0", "1"):
        monkeypatch.setenv("COTTENTION_CUDA", choice)
        assert build.is_cuda_wanted() == (choice == "1")
    monkeypatch.setenv("COTTENTION_CUDA", "yes")
    with pytest.raises(ValueError, match="must be 0 or 1"):
        build.is_cuda_wanted()


def test_without_nvcc_torch_runs_with_one_warning(tmp_path: Path) -> None:
    changes = {"COTTENTION_CUDA": "1", "COTTENTION_CACHE": str(tmp_path)}
    raising = (
        "from cottention.engine.ops import build, loader\n"
        "from cottention.engine.ops.build import BuildError\n"
        "def missing(): raise BuildError('no nvcc here')\n"
        "build.nvcc = missing\n"
        "loader.find_cuda = lambda: None\n"
        "print(loader.is_cuda_ready(), loader.is_cuda_ready())\n"
    )
    choices: list[dict[str, str]] = [{}, {"COTTENTION_OPS": "compiled"}]
    choices.append({"COTTENTION_OPS": "reference"})
    unset, compiled, chosen = run_forked([(raising, _environment(**changes | x)) for x in choices])
    assert unset.out == "False False\n"
    assert unset.err.count("no nvcc here") == 1
    assert "BuildError: the CUDA ops: no nvcc here" in compiled.err
    assert chosen == ("False False\n", "")


def test_nvcc_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setattr(build, "DEFAULT_CUDA_HOME", str(tmp_path))
    with pytest.raises(BuildError, match="no nvcc"):
        build.nvcc()
    compiler = tmp_path / "bin" / "nvcc"
    compiler.parent.mkdir()
    compiler.touch(mode=0o755)
    assert build.nvcc() == str(compiler)


def test_the_name_follows_the_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    name = build.cuda_library_name()
    assert name == build.cuda_library_name()
    monkeypatch.setattr(build, "DEVICE_FLAGS", "-O0")
    assert name != build.cuda_library_name()
