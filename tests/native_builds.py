"""Builds of the native library for tests, each kept for as long as its sources stay the same."""

from __future__ import annotations

import fcntl
import hashlib
import shutil
import subprocess
from pathlib import Path

# Set by the test that runs other tests on a build with sanitizers.
LIBRARY_VARIABLE = "LSP_TEST_LIBRARY"
SOURCES = Path(__file__).parents[1] / "plugins" / "onnxruntime"


def built_library(folder: Path, name: str, *options: str) -> Path:
    """Build liblsp_ort.so in `folder` with CMake's `options`, one process at a time."""
    digest = hashlib.sha256()
    for source in sorted(path for path in SOURCES.rglob("*") if path.is_file()):
        digest.update(source.relative_to(SOURCES).as_posix().encode() + source.read_bytes())
    built = folder / f"liblsp_ort-{name}-{digest.hexdigest()[:16]}.so"
    with (folder / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not built.exists():
            build = folder / name
            _run("cmake", "-S", str(SOURCES), "-B", str(build), "-DCMAKE_BUILD_TYPE=Release", *options)
            _run("cmake", "--build", str(build), "-j2")
            copy = built.with_suffix(".tmp")
            shutil.copy(build / "liblsp_ort.so", copy)
            copy.rename(built)
    return built


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
