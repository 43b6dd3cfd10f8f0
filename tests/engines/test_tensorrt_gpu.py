from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from lsp_deploy.engines.tensorrt_common import gpu

DRIVER = """
#include <string.h>
static int devices = {devices};
int cuInit(unsigned flags) {{ return 0; }}
int cuDeviceGetCount(int* count) {{ *count = devices; return 0; }}
int cuDeviceGet(int* device, int ordinal) {{ *device = 5 + ordinal; return 0; }}
int cuDeviceGetName(char* name, int size, int device) {{ strncpy(name, "Orin", size); return device == 5 ? 0 : 1; }}
int cuDeviceGetAttribute(int* value, int attribute, int device) {{
  *value = attribute == 75 ? 8 : attribute == 76 ? 7 : attribute == 16 ? 16 : -1;
  return device == 5 ? 0 : 1;
}}
"""


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Put a driver of so many devices in the place of CUDA's."""

    if shutil.which("cc") is None:
        pytest.skip("there is no C compiler for the driver")

    def install(devices: int) -> None:
        source, library = tmp_path / "driver.c", tmp_path / f"libcuda{devices}.so"
        source.write_text(DRIVER.format(devices=devices))
        subprocess.run(["cc", "-shared", "-fPIC", "-o", str(library), str(source)], check=True)
        monkeypatch.setattr(gpu, "_DRIVER", str(library))

    return install


def test_the_first_gpu_is_asked_of_the_driver(driver, monkeypatch: pytest.MonkeyPatch):
    driver(2)
    assert gpu.first_gpu() == gpu.Gpu("Orin", "8.7", 16)
    driver(0)
    assert gpu.first_gpu() is None
    monkeypatch.setattr(gpu, "_DRIVER", "libcuda.so.none")
    assert gpu.first_gpu() is None
