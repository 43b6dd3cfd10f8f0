"""NVML: the energy counter of an NVIDIA GPU (Volta and later), through nvidia-ml-py."""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

__all__ = ["NvmlMeter", "open_nvml"]

_CUDA = "libcuda.so.1"
# The power sensor of these GPUs (A100, H100) sees a quarter of the time.
_SAMPLED = {(8, 0), (9, 0)}
# Bits of nvmlDeviceGetCurrentClocksThrottleReasons that slow a GPU down; the others are settings, or idleness.
_SLOWED_BY = {
    "nvmlClocksThrottleReasonSwPowerCap": "power limit",
    "nvmlClocksThrottleReasonHwSlowdown": "hardware slowdown",
    "nvmlClocksThrottleReasonSwThermalSlowdown": "temperature (driver)",
    "nvmlClocksThrottleReasonHwThermalSlowdown": "temperature (hardware)",
    "nvmlClocksThrottleReasonHwPowerBrakeSlowdown": "power brake",
}


class NvmlMeter:
    """Energy of one GPU since the driver was loaded, less what it was when the meter was opened."""

    name = "NVML energy counter"
    window_s = 10.0  # the counter moves every 20 to 100 ms

    def __init__(self, nvml: ModuleType, device: Any) -> None:
        """Begin at zero joules; `nvml` is nvidia-ml-py, initialised, and `device` a handle of it."""
        self._nvml, self._device = nvml, device
        gpu = nvml.nvmlDeviceGetName(device)
        self.covers = f"the GPU board, {gpu.decode() if isinstance(gpu, bytes) else gpu}; not the host"
        caveats = []
        if tuple(nvml.nvmlDeviceGetCudaComputeCapability(device)) in _SAMPLED:
            caveats.append("this GPU's power sensor sees 25 of every 100 ms, so a load of that period may be misread")
        if _has_mig(nvml, device):
            caveats.append("MIG is on, and the board's other instances are in it")
        self.caveat = "; ".join(caveats)
        self._start_mj = nvml.nvmlDeviceGetTotalEnergyConsumption(device)
        self._readings = 1

    @property
    def readings(self) -> int:
        """Return how often the counter was read."""
        return self._readings

    def energy_j(self) -> dict[str, float]:
        """Return the joules of the GPU since the meter was opened."""
        try:
            now_mj = self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._device)
        except self._nvml.NVMLError as error:
            raise OSError(f"NVML: {error}") from error
        self._readings += 1
        return {"GPU": (now_mj - self._start_mj) / 1000}

    def state(self) -> dict[str, str]:
        """Return clock, temperature, power limit, what slows the GPU down, and the processes on it."""
        nvml, device = self._nvml, self._device
        asks: dict[str, Callable[[], str]] = {
            "SM clock": lambda: f"{nvml.nvmlDeviceGetClockInfo(device, nvml.NVML_CLOCK_SM)} MHz",
            "temperature": lambda: f"{nvml.nvmlDeviceGetTemperature(device, nvml.NVML_TEMPERATURE_GPU)} °C",
            "power limit": lambda: f"{nvml.nvmlDeviceGetEnforcedPowerLimit(device) / 1000:.0f} W",
            "slowed by": lambda: _slowed_by(nvml, nvml.nvmlDeviceGetCurrentClocksThrottleReasons(device)),
            "processes": lambda: str(len(nvml.nvmlDeviceGetComputeRunningProcesses(device))),
        }
        found = {}
        for name, ask in asks.items():
            try:
                found[name] = ask()
            except nvml.NVMLError as error:  # not every GPU has every sensor
                found[name] = f"unknown: {error}"
        return found

    def close(self) -> None:
        """Let NVML go."""
        self._nvml.nvmlShutdown()


def open_nvml() -> tuple[NvmlMeter | None, str]:
    """Return the meter of the GPU that CUDA gives this process first, or None and why there is none."""
    try:
        nvml = importlib.import_module("pynvml")
    except ImportError:
        return None, "NVML cannot be asked without nvidia-ml-py; pip install nvidia-ml-py"
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        return None, f"NVML does not start: {error}"
    bus_id = _first_gpu()
    if bus_id is None:
        nvml.nvmlShutdown()
        return None, "CUDA shows no GPU"
    try:
        return NvmlMeter(nvml, nvml.nvmlDeviceGetHandleByPciBusId(bus_id)), ""
    except nvml.NVMLError as error:
        nvml.nvmlShutdown()
        return None, f"this GPU's energy counter cannot be read: {error}"


def _first_gpu() -> bytes | None:
    """Return the PCI bus id of the GPU that engines run on: CUDA and NVML number GPUs differently."""
    try:
        cuda = ctypes.CDLL(_CUDA)
    except OSError:
        return None
    device, bus_id = ctypes.c_int(), ctypes.create_string_buffer(32)
    if cuda.cuInit(0) or cuda.cuDeviceGet(ctypes.byref(device), 0):
        return None
    return None if cuda.cuDeviceGetPCIBusId(bus_id, len(bus_id), device) else bus_id.value


def _has_mig(nvml: ModuleType, device: Any) -> bool:
    try:
        current, _pending = nvml.nvmlDeviceGetMigMode(device)
    except nvml.NVMLError:  # GPUs without MIG do not know the question
        return False
    return bool(current)


def _slowed_by(nvml: ModuleType, reasons: int) -> str:
    return ", ".join(words for name, words in _SLOWED_BY.items() if reasons & getattr(nvml, name)) or "nothing"
