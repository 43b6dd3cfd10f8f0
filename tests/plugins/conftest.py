"""The native library, built from the sources as they are."""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import shutil
import subprocess
from pathlib import Path

import native_kernels
import pytest

from lsp_deploy.plugins import library

SOURCES = Path(__file__).parents[2] / "plugins" / "onnxruntime"


@pytest.fixture(scope="session")
def native_library(request: pytest.FixtureRequest) -> Path:
    """The path of liblsp_ort.so, built once for each state of the sources; without a compiler the installed one."""
    if not all(shutil.which(program) for program in ("cmake", "c++")):
        found = library()
        if found.path is None:
            pytest.skip(f"no compiler, and {found.why}")
        return found.path
    return built_library(Path(request.config.cache.mkdir("native_library")))


@pytest.fixture(scope="session")
def kernels(native_library: Path) -> ctypes.CDLL:
    """The C interface of the kernels."""
    return native_kernels.load(native_library)


def built_library(folder: Path) -> Path:
    """Build into `folder`, one process at a time, and keep the result under the hash of the sources."""
    digest = hashlib.sha256()
    for source in sorted(path for path in SOURCES.rglob("*") if path.is_file()):
        digest.update(source.relative_to(SOURCES).as_posix().encode() + source.read_bytes())
    built = folder / f"liblsp_ort-{digest.hexdigest()[:16]}.so"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not built.exists():
            build = folder / "build"
            _run("cmake", "-S", str(SOURCES), "-B", str(build), "-DCMAKE_BUILD_TYPE=Release")
            _run("cmake", "--build", str(build), "-j2")
            copy = built.with_suffix(".tmp")
            shutil.copy(build / "liblsp_ort.so", copy)
            copy.rename(built)
    return built


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
