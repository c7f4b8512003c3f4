"""Building and loading the compiled ops: every instruction set, two builders, no compiler."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cottention.engine.ops import BuildError, backend
from cottention.engine.ops.build import build, find, library_name
from tests.engine.ops.forked import run_forked

ROOT = Path(__file__).parents[3]
SAY_BACKEND = "from cottention.engine import ops; print(ops.backend(), ops.backend())"
COMPARE = """
import torch
from cottention.engine import ops
from cottention.engine.ops import reference
torch.manual_seed(0)
def close(got, want): torch.testing.assert_close(got.double(), want.double(), rtol=1e-5, atol=1e-5)
x, w = torch.randn(13, 72), torch.randn(100, 72) / 9
close(ops.FixedOrderLinear(w)(x), x.double() @ w.double().T)
close(ops.gelu_new(x), reference.gelu_new(x.double()))
q, k, v = torch.rand(13, 3, 2, 24).unbind(1)
at = torch.arange(13)
table = ops.rotary_table(at, 8, 1e4, torch.float32)
args = q, k, v, at, torch.rand(2).double(), *table
for got, want in zip(ops.cottention_features(*args), reference.cottention_features(*args)):
    close(got, want)
state, z = torch.randn(3, 2, 24, 24), torch.rand(3, 2, 24)
pools = state.double(), z.double()
indices, ends = torch.tensor([2, 0], dtype=torch.int32), torch.tensor([0, 6, 13], dtype=torch.int32)
want = reference.recurrent_step(q.double(), k.double(), v.double(), *pools, indices, ends)
close(ops.recurrent_step(q, k, v, state, z, indices, ends), want)
for width in 24, 64:  # rows of 64 keys with a term are held in registers
    held = torch.rand(13, 3, 2, width).unbind(1)
    start, key = torch.randn(3, 2, width, width), held[1]
    for decay in (None, torch.rand(13, 2), torch.rand(13, 2, width)):
        for a, b in ((None, None), (-key / 9, key / 9)):
            pool, new = start.double(), start.clone()
            wide = [None if y is None else y.double() for y in (decay, a, b)]
            exact = *(y.double() for y in held), pool, None, indices, ends
            want = reference.recurrent_step(*exact, w=wide[0], a=wide[1], b=wide[2])
            got = ops.recurrent_step(*held, new, None, indices, ends, w=decay, a=a, b=b)
            close(got, want)
            close(new, pool)
u, rows = torch.rand(13, 20), torch.randn(3, 20, 24)
scan = u, u, -torch.rand(20, 24), k[:, 0], q[:, 0], rows
want = reference.selective_scan(*(y.double() for y in scan), indices, ends)
close(ops.selective_scan(*scan, indices, ends), want)
print(ops.backend())
"""
COMPARE_COMPILED = f"""{COMPARE}
half = w.bfloat16()
close(ops.FixedOrderLinear(half)(x), x.bfloat16().double() @ half.double().T)
norm = torch.nn.functional.layer_norm(x.double(), (72,))
close(ops.FixedOrderNorm(torch.ones(72), torch.zeros(72), 1e-5)(x), norm)
mixed, pool = torch.empty(13, 58), state.clone()
joined = torch.cat([q.flatten(1), k.flatten(1), v.flatten(1), x[:, :10]], 1)
mapped = reference.cottention_features(*(a.double() for a in args[:3]), *args[3:])
want = reference.recurrent_step(*mapped, pool.double(), None, indices, ends).flatten(1)
ops.cottention_attention_gelu(joined, *args[3:], pool, indices, ends, mixed)
close(mixed, torch.cat([want, reference.gelu_new(x[:, :10].double())], 1))
"""


def _environment(**changes: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name != "COTTENTION_OPS"}
    return kept | changes


def _start(code: str, **changes: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", code],
        cwd=ROOT,
        env=_environment(**changes),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_every_instruction_set_agrees_with_the_reference() -> None:
    backend()
    sets = ["plain", "avx2", "avx512", "avx512_bf16", "avx1024"]
    cases = [(COMPARE_COMPILED, _environment(COTTENTION_CPU_ISA=isa)) for isa in sets]
    answers = dict(zip(sets, run_forked(cases), strict=True))
    for isa, (out, err) in answers.items():
        if f"COTTENTION_CPU_ISA={isa}: not one of" not in err:
            assert (isa, out, err) == (isa, "compiled\n", "")
    assert answers["plain"][0]
    assert not answers["avx1024"][0]


@pytest.mark.slow
def test_two_processes_build_at_once_into_an_empty_cache(tmp_path: Path) -> None:
    changes = {"COTTENTION_CACHE": str(tmp_path), "COTTENTION_CXXFLAGS": "-O1 -DTWO_AT_ONCE"}
    both = [_start(SAY_BACKEND, **changes) for _ in range(2)]
    answers = [process.communicate(timeout=250) for process in both]
    assert [(out.strip(), err) for out, err in answers] == [("compiled compiled", "")] * 2
    (folder,) = tmp_path.iterdir()
    assert sorted(path.suffix for path in folder.iterdir()) == ["", ".so"]


@pytest.mark.slow
def test_without_a_compiler_the_reference_runs_with_one_warning(tmp_path: Path) -> None:
    bare = {"PATH": "", "CXX": "", "XDG_CACHE_HOME": str(tmp_path), "COTTENTION_CACHE": ""}
    environments = [_environment(**bare), _environment(**bare, COTTENTION_OPS="compiled")]
    missing, required = run_forked([(SAY_BACKEND, each) for each in environments])
    assert missing.out == "reference reference\n"
    assert missing.err.count("the torch reference runs") == 1
    assert "no C++ compiler" in missing.err
    assert "BuildError: COTTENTION_OPS=compiled: no C++ compiler" in required.err


@pytest.mark.slow
def test_the_reference_computes_the_same() -> None:
    same, unknown = run_forked(
        [
            (COMPARE, _environment(COTTENTION_OPS="reference")),
            (SAY_BACKEND, _environment(COTTENTION_OPS="fast")),
        ]
    )
    assert same == ("reference\n", "")
    assert "must be compiled or reference" in unknown.err


def test_a_cache_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(BuildError, match="cannot write"):
        build(file / "folder")


def test_a_user_without_a_home_has_the_prebuilt_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a container whose user is a bare number."""
    for name in ("HOME", "XDG_CACHE_HOME", "COTTENTION_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    with pytest.raises(BuildError, match="set COTTENTION_CACHE"):
        build()
    monkeypatch.setattr("cottention.engine.ops.build.PREBUILT_DIR", tmp_path)
    assert find() is None
    (tmp_path / library_name()).write_bytes(b"")
    assert find() == tmp_path / library_name()


def test_a_failed_compilation_names_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COTTENTION_CXXFLAGS", "-no-such-flag")
    with pytest.raises(BuildError, match="no-such-flag"):
        build(tmp_path)
    assert not list(tmp_path.glob("*.so"))


def test_what_was_built_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COTTENTION_CACHE", str(tmp_path / "first"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "second"))
    assert find() is None
    folder = tmp_path / "second" / "cottention" / f"torch-{torch.__version__}"
    folder.mkdir(parents=True)
    (folder / library_name()).write_bytes(b"")
    assert find() == folder / library_name()
    monkeypatch.setattr("cottention.engine.ops.build.PREBUILT_DIR", tmp_path)
    (tmp_path / library_name()).write_bytes(b"")
    assert find() == tmp_path / library_name()
