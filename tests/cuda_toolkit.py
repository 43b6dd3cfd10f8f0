"""CUDA's compiler where there is one, and what it makes of the GPU kernels for all architectures."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
import sysconfig
import tempfile
from dataclasses import dataclass
from pathlib import Path

from cuda_emulation import SOURCES, source_hash

ARCHITECTURES = (80, 86, 87, 89, 90, 100, 120)

# Template arguments of Tile in a mangled name: type, M, N, five more integers, ragged.
_ENTRY = re.compile(
    r"Compiling entry function '\w*4TileINS_\d+(\w+?)ELi(\d+)ELi(\d+)E(?:Li\d+E){5}Lb([01])\w*' for 'sm_(\d+)'"
)
_USE = re.compile(r"(\d+) bytes spill stores.*?Used (\d+) registers", re.DOTALL)


def find_nvcc() -> Path | None:
    """Return nvcc: the machine's, else that of the package nvidia-cuda-nvcc."""
    candidates = [shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"]
    packages = Path(sysconfig.get_path("purelib")) / "nvidia"
    candidates += [str(path) for path in sorted(packages.glob("*/bin/nvcc"), reverse=True)]
    return next((Path(path) for path in candidates if path is not None and Path(path).exists()), None)


def release(nvcc: Path) -> str:
    """Return the toolkit's release, as in "13.0"."""
    text = subprocess.run([nvcc, "--version"], check=True, capture_output=True, text=True).stdout
    found = re.search(r"release (\d+\.\d+)", text)
    assert found is not None, text
    return found[1]


def known_architectures(nvcc: Path) -> list[int]:
    """Return those of ARCHITECTURES that a toolkit compiles for."""
    text = subprocess.run([nvcc, "--list-gpu-code"], check=True, capture_output=True, text=True).stdout
    return [number for number in ARCHITECTURES if f"sm_{number}" in text.split()]


@dataclass(frozen=True)
class Build:
    """The shared library, and by kernel and architecture what one thread of it takes: registers, bytes spilled."""

    library: Path
    use: dict[str, dict[str, tuple[int, int]]]


def build(nvcc: Path, cache: Path) -> Build:
    """Return the kernels, compiled for all architectures once for each state of their sources and of the toolkit.

    Raises:
        AssertionError: they do not compile, with what the compiler said.
    """
    architectures = known_architectures(nvcc)
    recipe = (SOURCES / "CMakeLists.txt").read_text()
    key = source_hash("include", "src", extra=f"{nvcc} {release(nvcc)} {architectures} {recipe}")
    with (cache / "kernels.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        folder = cache / f"kernels-{key}"
        library, log = folder / "liblsp_cuda.so", folder / "build.log"
        if not library.exists():
            for old in cache.glob("kernels-*"):
                shutil.rmtree(old)
            folder.mkdir()
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                log.write_text(_run_cmake(nvcc, architectures, Path(scratch)))
                (Path(scratch) / library.name).replace(library)
    return Build(library, _use(log.read_text()))


def _run_cmake(nvcc: Path, architectures: list[int], folder: Path) -> str:
    # The packages have lib, where nvcc looks for lib64.
    flags = f"-Xptxas=-v -L{nvcc.resolve().parents[1] / 'lib'}"
    options = [
        *("-DLSP_CUDA_SHARED=ON", f"-DCMAKE_CUDA_COMPILER={nvcc}", f"-DCMAKE_CUDA_FLAGS={flags}"),
        f"-DCMAKE_CUDA_ARCHITECTURES={';'.join(f'{number}-real' for number in architectures)}",
    ]
    jobs = min(os.cpu_count() or 1, 2)
    _run("cmake", "-S", SOURCES, "-B", folder, *options)
    return _run("nice", "-n", "10", "cmake", "--build", folder, f"-j{jobs}", "--target", "lsp_cuda_shared")


def _run(*command: str | Path) -> str:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


def _use(log: str) -> dict[str, dict[str, tuple[int, int]]]:
    """Return what ptxas -v said."""
    use: dict[str, dict[str, tuple[int, int]]] = {}
    for entry in _ENTRY.finditer(log):
        found = _USE.search(log, entry.end())
        assert found is not None, log[entry.start() :][:500]
        name = f"{entry[1].lower()} {entry[2]}x{entry[3]}{' ragged' if entry[4] == '1' else ''}"
        use.setdefault(name, {})[entry[5]] = int(found[2]), int(found[1])
    return use
