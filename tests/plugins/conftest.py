"""The native library, built from the sources as they are."""

from __future__ import annotations

import ctypes
import os
import shutil
from pathlib import Path

import native_kernels
import pytest
from native_builds import LIBRARY_VARIABLE, built_library

from lsp_deploy.plugins import library


@pytest.fixture(scope="session")
def native_library(request: pytest.FixtureRequest) -> Path:
    """The path of liblsp_ort.so, built once for each state of the sources; without a compiler the installed one."""
    if LIBRARY_VARIABLE in os.environ:
        return Path(os.environ[LIBRARY_VARIABLE])
    if not all(shutil.which(program) for program in ("cmake", "c++")):
        found = library()
        if found.path is None:
            pytest.skip(f"no compiler, and {found.why}")
        return found.path
    return built_library(Path(request.config.cache.mkdir("native_library")), "release")


@pytest.fixture(scope="session")
def kernels(native_library: Path) -> ctypes.CDLL:
    """The C interface of the kernels."""
    return native_kernels.load(native_library)
