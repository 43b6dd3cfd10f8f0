"""The CPU kernels of Attention under sanitizers, and on AArch64 under emulation."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from native_builds import LIBRARY_VARIABLE, SOURCES, built_library

HERE = Path(__file__).parent


@pytest.fixture
def builds(request: pytest.FixtureRequest) -> Path:
    if not all(shutil.which(program) for program in ("cmake", "g++")):
        pytest.skip("no compiler")
    return Path(request.config.cache.mkdir("native_library"))


def test_no_sanitizer_complains(builds: Path) -> None:
    """All tests of the kernels once more, with memory and undefined behaviour watched."""
    runtimes = [run("g++", f"-print-file-name={name}").strip() for name in ("libasan.so", "libubsan.so")]
    if not all(Path(runtime).is_absolute() for runtime in runtimes):
        pytest.skip("the compiler has no sanitizers")
    library = built_library(builds, "sanitized", "-DCMAKE_CXX_COMPILER=g++", "-DLSP_SANITIZE=address,undefined")
    tests = HERE / "test_attention_kernels.py"
    environment = {"ASAN_OPTIONS": "detect_leaks=0", LIBRARY_VARIABLE: str(library)}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-n", "0", "-p", "no:cacheprovider", tests]
    run(*command, LD_PRELOAD=" ".join(runtimes), **environment)


@pytest.mark.skipif(platform.machine() == "aarch64", reason="the other tests run here as they are")
def test_aarch64(builds: Path, tmp_path: Path) -> None:
    compiler, emulator = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
    if compiler is None or emulator is None:
        pytest.skip("no aarch64-linux-gnu-g++ and qemu-aarch64")
    options = ("-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64")
    library = built_library(builds, "aarch64", f"-DCMAKE_CXX_COMPILER={compiler}", *options)
    program, source = tmp_path / "check_attention", HERE / "native" / "check_attention.cpp"
    linked = (library, f"-Wl,-rpath,{library.parent}")
    run(compiler, "-std=c++17", "-O1", "-pthread", f"-I{SOURCES / 'include'}", source, *linked, "-o", program)
    root = run(compiler, "-print-sysroot").strip().rstrip("/") or "/usr/aarch64-linux-gnu"
    kernels = run(emulator, "-L", root, program).split("\n")
    assert {"neon float32", "neon float32, rounded to bfloat16", "portable float32"} <= set(kernels)


def run(*command: str | Path, **environment: str) -> str:
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, env={**os.environ, **environment}, check=False
    )
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-8000:]}"
    return done.stdout
