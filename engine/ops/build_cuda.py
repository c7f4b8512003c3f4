"""Builds the CUDA ops with nvcc, as a library of its own beside the CPU's.

Owns when that is worth trying, the flags of the device code and what is linked. How a library is
found, cached and shared between processes is `build.py`'s. Needs no GPU and no torch with CUDA.
"""

import os
import platform
import shutil
from pathlib import Path

import torch
from cottention.engine.ops.build import (
    BuildError,
    build_dir,
    build_library,
    compiler,
    digest,
    find_library,
    flags,
    source_dir,
)

CHOICE_VARIABLE = "COTTENTION_CUDA"
USUAL_HOME = "/usr/local/cuda"
DEVICE_FLAGS = (
    "-std=c++17 -O3 -Xcompiler=-fPIC,-fvisibility=hidden --threads=2"
    " -gencode=arch=compute_80,code=sm_80 -gencode='arch=compute_90,code=[sm_90,compute_90]'"
)


def is_wanted() -> bool:
    """Whether torch can use a GPU, or COTTENTION_CUDA=1 asks for the library all the same.

    COTTENTION_CUDA=0 says no.
    """
    choice = os.environ.get(CHOICE_VARIABLE) or "auto"
    if choice not in ("auto", "0", "1"):
        raise ValueError(f"{CHOICE_VARIABLE}={choice}: must be 0 or 1")
    return torch.version.cuda is not None if choice == "auto" else choice == "1"


def build_cuda(target_dir: Path | None = None) -> Path:
    """Build into `target_dir` (default: the cache) unless the library lies there; return its path.

    Raises BuildError, in particular where nvcc is missing.
    """
    folder = target_dir or build_dir()
    return build_library(folder / cuda_library_name(), lambda: _ninja_file(nvcc(), compiler()))


def find_cuda() -> Path | None:
    """The library built ahead, or the cached one; None where neither exists."""
    return find_library(cuda_library_name())


def cuda_library_name() -> str:
    """File name of the library that these sources and flags give on this kind of machine."""
    sources = [*(source_dir() / "cuda").iterdir(), *source_dir().glob("*.h")]
    how = f"{flags()} {DEVICE_FLAGS} {torch.version.cuda is None} {platform.machine()}"
    return f"cottention-cuda-{digest(how, sources)}.so"


def nvcc() -> str:
    """Path of CUDA's compiler. Raises BuildError where there is none."""
    homes = [os.environ.get("CUDA_HOME"), USUAL_HOME]
    candidates = [shutil.which("nvcc"), *(f"{home}/bin/nvcc" for home in homes if home)]
    for path in candidates:
        if path and os.access(path, os.X_OK):
            return path
    raise BuildError(f"no nvcc on the PATH, in CUDA_HOME or in {USUAL_HOME}")


def _ninja_file(nvcc_path: str, command: str) -> str:
    """The kernels by nvcc, what torch sees by the C++ compiler, linked with a static runtime."""
    root, folder = Path(torch.__file__).parent, source_dir() / "cuda"
    torch_cuda = "-Xlinker=--no-as-needed -ltorch_cuda" if torch.version.cuda else ""
    lines = [
        f"rule host\n  command = {command} {flags()} -isystem {root / 'include'} -c $in -o $out",
        f"rule device\n  command = {nvcc_path} {DEVICE_FLAGS} -isystem {root / 'include'}"
        " -c $in -o $out",
        f"rule link\n  command = {nvcc_path} -shared -cudart=static $in -o $out"
        f" -L{root / 'lib'} -ltorch_cpu -lc10 {torch_cuda}",
    ]
    objects = dict.fromkeys(sorted(folder.glob("*.cpp")), "host")
    objects |= dict.fromkeys(sorted(folder.glob("*.cu")), "device")
    lines += [f"build {path.name}.o: {rule} {path}" for path, rule in objects.items()]
    names = " ".join(f"{path.name}.o" for path in objects)
    return "\n".join([*lines, f"build library.so: link {names}", ""])
