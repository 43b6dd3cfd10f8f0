"""The GPU of this machine, asked of the CUDA driver without loading a CUDA runtime."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

__all__ = ["Gpu", "first_gpu"]

_DRIVER = "libcuda.so.1"
# CUdevice_attribute
_MULTIPROCESSORS, _MAJOR, _MINOR = 16, 75, 76


@dataclass(frozen=True)
class Gpu:
    """An NVIDIA GPU."""

    name: str
    compute_capability: str
    """E.g. "8.7"."""
    multiprocessors: int


def first_gpu() -> Gpu | None:
    """Return the first GPU that CUDA shows to this process, the one that engines run on; None where there is none."""
    try:
        cuda = ctypes.CDLL(_DRIVER)
    except OSError:
        return None
    count, device = ctypes.c_int(), ctypes.c_int()
    if cuda.cuInit(0) != 0 or cuda.cuDeviceGetCount(ctypes.byref(count)) != 0 or count.value == 0:
        return None
    name = ctypes.create_string_buffer(256)
    if cuda.cuDeviceGet(ctypes.byref(device), 0) != 0 or cuda.cuDeviceGetName(name, len(name), device) != 0:
        return None
    values = []
    for attribute in (_MAJOR, _MINOR, _MULTIPROCESSORS):
        value = ctypes.c_int()
        if cuda.cuDeviceGetAttribute(ctypes.byref(value), attribute, device) != 0:
            return None
        values.append(value.value)
    major, minor, multiprocessors = values
    return Gpu(name.value.decode(errors="replace"), f"{major}.{minor}", multiprocessors)
