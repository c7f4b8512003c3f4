"""Builds the compiled ops with ninja, and finds those that were built before.

The CPU and the CUDA ops are two libraries. The file name of a library has the hash of its sources
and flags; the cache has a folder for each version of torch. A library that was built ahead
(`PREBUILT_DIR`) serves several versions, since the ABI is stable. Building the CUDA ops needs nvcc,
but neither a GPU nor a torch with CUDA.

Errors:
    BuildError    no sources, no compiler, no ninja, no writable cache, or a failed compilation
"""

import fcntl
import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

Report = Callable[[int, int], None]

CHOICE_VARIABLE = "COTTENTION_OPS"
_DONE = re.compile(r"\[(\d+)/(\d+)\]")

PREBUILT_DIR = Path(__file__).parent / "_prebuilt"
KERNEL_SOURCE = "kernels.cpp"
_AVX512 = "-mavx2 -mfma -mavx512f -mavx512bw -mavx512dq -mavx512vl"
KERNEL_FLAGS = {
    "plain": "",
    "avx2": "-mavx2 -mfma",
    "avx512": _AVX512,
    "avx512_bf16": f"{_AVX512} -mavx512bf16 -mavx512vnni",
}
FLAGS = (
    "-std=c++17 -O3 -fPIC -fvisibility=hidden -ffp-contract=off -fno-math-errno"
    " -fno-trapping-math -DTORCH_TARGET_VERSION=0x020a000000000000"
)


class BuildError(RuntimeError):
    """The compiled ops could not be built; the message says why."""


def build(target_dir: Path | None = None, report: Report | None = None) -> Path:
    """Build the CPU ops into `target_dir` (default: the cache) unless they exist; return the path.

    report: takes the number of files that are done, and of all. Raises BuildError.
    """
    folder = target_dir or build_dir()
    return build_library(folder / library_name(), lambda: _ninja_file(compiler()), report)


def build_library(
    library: Path, ninja_file: Callable[[], str], report: Report | None = None
) -> Path:
    """Build `library` unless it exists, from a ninja file whose target is `library.so`.

    Concurrent builds in one folder run one after the other; a library is moved into place as a
    whole. report: as in `build`. Raises BuildError.
    """
    with _locked(library.parent):
        if not library.exists():
            _build_into(library, ninja_file(), report)
    return library


def is_wanted() -> bool:
    """Whether the compiled ops are used where there are some: COTTENTION_OPS does not say no."""
    return os.environ.get(CHOICE_VARIABLE) != "reference"


def find() -> Path | None:
    """The CPU ops that were built ahead, or the cached ones; None if neither exists."""
    return find_library(library_name())


def find_library(name: str) -> Path | None:
    """The file of this name that was built ahead, or the cached one; None if neither exists."""
    candidates = (folder / name for folder in (PREBUILT_DIR, *cache_dirs()))
    return next((path for path in candidates if path.exists()), None)


def cache_dirs() -> list[Path]:
    """Folders of built libraries in search order, builds go to the first.

    $COTTENTION_CACHE, then $XDG_CACHE_HOME or ~/.cache; empty for a user without a home directory.
    Raises BuildError for a ~ that stands for no directory.
    """
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    own = None if home.startswith("~") else Path(home, "cottention")
    given = os.path.expanduser(os.environ.get("COTTENTION_CACHE", ""))
    if given.startswith("~"):
        raise BuildError(f"COTTENTION_CACHE={given}: there is no home directory for this ~")
    roots = [given, own]
    return [Path(root, f"torch-{torch.__version__}") for root in roots if root]


def build_dir() -> Path:
    """The folder that libraries are built in. Raises BuildError if there is none."""
    folders = cache_dirs()
    if not folders:
        raise BuildError("no cache folder: the user has no home directory, set COTTENTION_CACHE")
    return folders[0]


def library_name() -> str:
    """File name of the CPU ops with these sources and flags on this architecture."""
    sources = (path for path in source_dir().iterdir() if path.suffix in (".cpp", ".h"))
    settings = f"{flags()} {KERNEL_FLAGS} {platform.machine()}"
    return f"cottention-{digest(settings, sources)}.so"


def digest(settings: str, sources: Iterable[Path]) -> str:
    """Hash of the build settings and of the names and contents of the sources: 16 hex digits."""
    total = hashlib.sha256(settings.encode())
    for path in sorted(sources):
        total.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return total.hexdigest()[:16]


def source_dir() -> Path:
    """The C++ sources: beside `engine` in a checkout and in an installation. Raises BuildError."""
    folder = Path(__file__).parents[2] / "csrc"
    if not (folder / KERNEL_SOURCE).exists():
        raise BuildError(f"no sources in {folder}")
    return folder


def flags() -> str:
    """Compiler flags of every C++ source, with $COTTENTION_CXXFLAGS."""
    return f"{FLAGS} {os.environ.get('COTTENTION_CXXFLAGS', '')}".strip()


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock. The lock ends with the process, so none is left behind."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("w")
    except OSError as error:
        raise BuildError(f"cannot write to {folder}: {error}") from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _build_into(library: Path, ninja_file: str, report: Report | None) -> None:
    with tempfile.TemporaryDirectory(dir=library.parent, prefix=".build-") as work:
        Path(work, "build.ninja").write_text(ninja_file)
        status, output = _run([_ninja(), "-C", work], report)
        if status:
            raise BuildError(f"compilation failed:\n{output[-5000:]}")
        os.replace(Path(work, "library.so"), library)


def _run(command: Sequence[str], report: Report | None) -> tuple[int, str]:
    """Exit status and output of ninja; an exception ends it.

    Ninja ends its compilers at SIGTERM; killed, it would leave them running.
    """
    lines = []
    environ = os.environ | {"NINJA_STATUS": "[%f/%t] "}  # a line when a file is done
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=environ,
    ) as popen:
        assert popen.stdout is not None
        try:
            for line in popen.stdout:
                lines.append(line)
                if report is not None and (found := _DONE.match(line)):
                    report(int(found[1]), int(found[2]))
            popen.wait()
        except BaseException:
            popen.terminate()
            raise
    return popen.returncode, "".join(lines)


def compiler() -> str:
    """Command of the C++ compiler: $CXX, c++, g++ or clang++. Raises BuildError without one."""
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if name and shutil.which(shlex.split(name)[0]):
            return name
    raise BuildError("no C++ compiler (CXX, c++, g++ or clang++) on the PATH")


def _ninja() -> str:
    beside_python = Path(sys.executable).parent / "ninja"
    found = shutil.which("ninja") or (beside_python if beside_python.exists() else None)
    if found is None:
        raise BuildError("ninja is not installed")
    return str(found)


def _ninja_file(command: str) -> str:
    """One object per source, kernels.cpp once per instruction set, one shared library."""
    root = Path(torch.__file__).parent
    objects = {f"{path.stem}.o": (path, "") for path in sorted(source_dir().glob("*.cpp"))}
    kernels, _ = objects.pop("kernels.o")
    for isa in KERNEL_FLAGS if platform.machine() in ("x86_64", "AMD64") else ("plain",):
        objects[f"kernels_{isa}.o"] = (kernels, f"{KERNEL_FLAGS[isa]} -DCOTTENTION_ISA={isa}")
    rules = [
        f"rule compile\n  command = {command} {flags()} -isystem {root / 'include'}"
        " $flags -c $in -o $out",
        f"rule link\n  command = {command} {flags()} -shared $in -o $out"
        f" -L{root / 'lib'} -ltorch_cpu -lc10",
    ]
    edges = [
        f"build {name}: compile {source}\n  flags = {extra}"
        for name, (source, extra) in objects.items()
    ]
    return "\n".join([*rules, *edges, f"build library.so: link {' '.join(objects)}", ""])


CUDA_VARIABLE = "COTTENTION_CUDA"
DEFAULT_CUDA_HOME = "/usr/local/cuda"
DEVICE_FLAGS = (
    "-std=c++17 -O3 -Xcompiler=-fPIC,-fvisibility=hidden --threads=2"
    " -gencode=arch=compute_80,code=sm_80 -gencode='arch=compute_90,code=[sm_90,compute_90]'"
)


def is_cuda_wanted() -> bool:
    """Whether the CUDA ops should be built or loaded.

    COTTENTION_CUDA=1 and =0 decide; by default, whether torch was built with CUDA. Raises
    ValueError for other values.
    """
    choice = os.environ.get(CUDA_VARIABLE) or "auto"
    if choice not in ("auto", "0", "1"):
        raise ValueError(f"{CUDA_VARIABLE}={choice}: must be 0 or 1")
    return torch.version.cuda is not None if choice == "auto" else choice == "1"


def build_cuda(target_dir: Path | None = None) -> Path:
    """Build the CUDA ops into `target_dir` (default: the cache) unless they exist; return the path.

    Raises BuildError, in particular without nvcc.
    """
    folder = target_dir or build_dir()
    return build_library(folder / cuda_library_name(), lambda: _cuda_ninja_file(nvcc(), compiler()))


def find_cuda() -> Path | None:
    """The CUDA ops that were built ahead, or the cached ones; None if neither exists."""
    return find_library(cuda_library_name())


def cuda_library_name() -> str:
    """File name of the CUDA ops with these sources and flags on this architecture."""
    sources = [*(source_dir() / "cuda").iterdir(), *source_dir().glob("*.h")]
    settings = f"{flags()} {DEVICE_FLAGS} {torch.version.cuda is None} {platform.machine()}"
    return f"cottention-cuda-{digest(settings, sources)}.so"


def nvcc() -> str:
    """Path of nvcc: on the PATH, in $CUDA_HOME or in /usr/local/cuda. Raises BuildError."""
    homes = [os.environ.get("CUDA_HOME"), DEFAULT_CUDA_HOME]
    candidates = [shutil.which("nvcc"), *(f"{home}/bin/nvcc" for home in homes if home)]
    for path in candidates:
        if path and os.access(path, os.X_OK):
            return path
    raise BuildError(f"no nvcc on the PATH, in CUDA_HOME or in {DEFAULT_CUDA_HOME}")


def _cuda_ninja_file(nvcc_path: str, command: str) -> str:
    """Kernels by nvcc, host code by the C++ compiler, linked with the static CUDA runtime."""
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
