"""The CPU kernels of BlockSparseLinear under sanitizers, and on AArch64 under emulation."""

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


def _run(*command: str | Path, **environment: str) -> str:
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, env={**os.environ, **environment}, check=False
    )
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-8000:]}"
    return done.stdout


@pytest.fixture
def builds(request: pytest.FixtureRequest) -> Path:
    if not all(shutil.which(program) for program in ("cmake", "g++")):
        pytest.skip("no compiler")
    return Path(request.config.cache.mkdir("native_library"))


def test_no_sanitizer_complains(builds: Path) -> None:
    """All tests of the kernels once more, with memory and undefined behaviour watched."""
    runtimes = [_run("g++", f"-print-file-name={name}").strip() for name in ("libasan.so", "libubsan.so")]
    if not all(Path(runtime).is_absolute() for runtime in runtimes):
        pytest.skip("the compiler has no sanitizers")
    library = built_library(builds, "sanitized", "-DCMAKE_CXX_COMPILER=g++", "-DLSP_SANITIZE=address,undefined")
    tests = HERE / "test_linear_kernels.py"
    _run(
        sys.executable, "-m", "pytest", "-q", "-x", "-n", "0", "-p", "no:cacheprovider", tests,
        LD_PRELOAD=" ".join(runtimes), ASAN_OPTIONS="detect_leaks=0", **{LIBRARY_VARIABLE: str(library)},
    )  # fmt: skip


@pytest.mark.skipif(platform.machine() == "aarch64", reason="the other tests run here as they are")
def test_aarch64(builds: Path, tmp_path: Path) -> None:
    compiler, emulator = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
    if compiler is None or emulator is None:
        pytest.skip("no aarch64-linux-gnu-g++ and qemu-aarch64")
    library = built_library(
        builds, "aarch64", f"-DCMAKE_CXX_COMPILER={compiler}", "-DCMAKE_SYSTEM_NAME=Linux",
        "-DCMAKE_SYSTEM_PROCESSOR=aarch64",
    )  # fmt: skip
    program = tmp_path / "check_linear"
    _run(
        compiler, "-std=c++17", "-O1", "-pthread", f"-I{SOURCES / 'include'}", HERE / "native" / "check_linear.cpp",
        library, f"-Wl,-rpath,{library.parent}", "-o", program,
    )  # fmt: skip
    root = _run(compiler, "-print-sysroot").strip().rstrip("/") or "/usr/aarch64-linux-gnu"
    kernels = {cpu: _run(emulator, "-L", root, "-cpu", cpu, program).split("\n") for cpu in ("max", "cortex-a57")}
    assert {"neon 6x16", "neon_dot 6x16", "portable 2x16"} <= set(kernels["max"])
    assert {"neon 6x16", "portable 2x16"} <= set(kernels["cortex-a57"])
    assert "neon_dot 6x16" not in kernels["cortex-a57"]
