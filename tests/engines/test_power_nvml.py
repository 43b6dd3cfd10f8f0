"""NVML: a made-up GPU behind functions that take what nvidia-ml-py's take."""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pynvml
import pytest

from lsp_deploy.engines.power import nvml
from lsp_deploy.engines.power.nvml import NvmlMeter, open_nvml

BUS_ID = b"0000:3b:00.0"


class NVMLError(Exception):
    """As nvidia-ml-py's, which wants a number."""


class Gpu:
    """What NVML says of a GPU; an answer that is an exception is raised."""

    def __init__(self, **answers: Any) -> None:
        self.energy_mj = 5_000_000
        self.running = 0
        self.answers = {
            "nvmlDeviceGetName": "NVIDIA A100-SXM4-80GB",
            "nvmlDeviceGetCudaComputeCapability": (8, 0),
            "nvmlDeviceGetMigMode": [0, 0],
            "nvmlDeviceGetClockInfo": 1410,
            "nvmlDeviceGetTemperature": 54,
            "nvmlDeviceGetEnforcedPowerLimit": 400_000,
            "nvmlDeviceGetCurrentClocksThrottleReasons": 0,
            "nvmlDeviceGetComputeRunningProcesses": ["this one"],
            **answers,
        }

    def nvmlInit(self):
        self.running += 1

    def nvmlShutdown(self):
        self.running -= 1

    def nvmlDeviceGetHandleByPciBusId(self, bus_id):
        assert bus_id == BUS_ID
        return "handle"

    def nvmlDeviceGetTotalEnergyConsumption(self, handle):
        return self.energy_mj


def library(gpu: Gpu) -> ModuleType:
    """Return a module with `gpu` in it; a call that nvidia-ml-py would not take is an error."""
    module = ModuleType("pynvml")

    def add(name: str) -> None:
        signature = inspect.signature(getattr(pynvml, name))

        def function(*arguments):
            signature.bind(*arguments)
            answer = gpu.answers[name] if name in gpu.answers else getattr(gpu, name)(*arguments)
            if isinstance(answer, Exception):
                raise answer
            return answer

        setattr(module, name, function)

    for name in [*gpu.answers, *(name for name in dir(gpu) if name.startswith("nvml"))]:
        add(name)
    for name in (*nvml._SLOWED_BY, "NVML_CLOCK_SM", "NVML_TEMPERATURE_GPU"):
        setattr(module, name, getattr(pynvml, name))
    module.NVMLError = NVMLError
    return module


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """A CUDA driver whose first GPU is at BUS_ID; the results of its functions by name, 0 unless said otherwise."""
    results: dict[str, int] = {}

    class Driver:
        def cuInit(self, flags):
            return results.get("cuInit", 0)

        def cuDeviceGet(self, device, ordinal):
            assert ordinal == 0
            return results.get("cuDeviceGet", 0)

        def cuDeviceGetPCIBusId(self, buffer, size, device):
            buffer.value = BUS_ID
            return results.get("cuDeviceGetPCIBusId", 0)

    monkeypatch.setattr(nvml.ctypes, "CDLL", lambda name: Driver())
    return results


def opened(monkeypatch: pytest.MonkeyPatch, gpu: Gpu) -> NvmlMeter:
    monkeypatch.setitem(sys.modules, "pynvml", library(gpu))
    meter, reason = open_nvml()
    assert meter is not None, reason
    return meter


def refused(monkeypatch: pytest.MonkeyPatch, gpu: Gpu) -> str:
    monkeypatch.setitem(sys.modules, "pynvml", library(gpu))
    meter, reason = open_nvml()
    assert meter is None
    assert gpu.running == 0
    return reason


def test_every_name_that_is_used_is_one_of_nvidia_ml_pys():
    source = Path(nvml.__file__).read_text()
    names = {*re.findall(r"nvml\.(\w+)", source), *nvml._SLOWED_BY}
    assert {"nvmlInit", "nvmlDeviceGetTotalEnergyConsumption", "NVMLError"} <= names
    assert [name for name in sorted(names) if not hasattr(pynvml, name)] == []


def test_energy_since_the_meter_was_opened(monkeypatch, cuda):
    gpu = Gpu()
    meter = opened(monkeypatch, gpu)
    assert meter.energy_j() == {"GPU": 0}
    gpu.energy_mj += 2_345_678
    assert meter.energy_j() == {"GPU": pytest.approx(2345.678)}
    assert meter.readings == 3
    assert meter.window_s >= 10
    meter.close()
    assert gpu.running == 0


def test_what_a_reader_must_know(monkeypatch, cuda):
    meter = opened(monkeypatch, Gpu(nvmlDeviceGetName=b"NVIDIA A100-SXM4-80GB"))  # bytes in old releases
    assert meter.covers == "the GPU board, NVIDIA A100-SXM4-80GB; not the host"
    assert "25 of every 100 ms" in meter.caveat
    ada = Gpu(nvmlDeviceGetCudaComputeCapability=(8, 9), nvmlDeviceGetMigMode=NVMLError("Not Supported"))
    assert opened(monkeypatch, ada).caveat == ""
    split = Gpu(nvmlDeviceGetCudaComputeCapability=(10, 0), nvmlDeviceGetMigMode=[1, 1])
    assert opened(monkeypatch, split).caveat.startswith("MIG is on")


def test_state(monkeypatch, cuda):
    reasons = pynvml.nvmlClocksThrottleReasonSwPowerCap | pynvml.nvmlClocksThrottleReasonHwThermalSlowdown
    gpu = Gpu(
        nvmlDeviceGetCurrentClocksThrottleReasons=reasons, nvmlDeviceGetEnforcedPowerLimit=NVMLError("Not Supported")
    )
    assert opened(monkeypatch, gpu).state() == {
        "SM clock": "1410 MHz",
        "temperature": "54 °C",
        "power limit": "unknown: Not Supported",
        "slowed by": "power limit, temperature (hardware)",
        "processes": "1",
    }
    idle = Gpu(nvmlDeviceGetCurrentClocksThrottleReasons=pynvml.nvmlClocksThrottleReasonGpuIdle)
    assert opened(monkeypatch, idle).state()["slowed by"] == "nothing"


def test_a_gpu_without_a_counter(monkeypatch, cuda):
    gpu = Gpu(nvmlDeviceGetTotalEnergyConsumption=NVMLError("Not Supported"))
    assert refused(monkeypatch, gpu) == "this GPU's energy counter cannot be read: Not Supported"


def test_a_gpu_that_is_lost_meanwhile(monkeypatch, cuda):
    gpu = Gpu()
    meter = opened(monkeypatch, gpu)
    gpu.answers["nvmlDeviceGetTotalEnergyConsumption"] = NVMLError("GPU is lost")
    with pytest.raises(OSError, match="NVML: GPU is lost"):
        meter.energy_j()


@pytest.mark.parametrize("function", ["cuInit", "cuDeviceGet", "cuDeviceGetPCIBusId"])
def test_cuda_without_a_gpu(monkeypatch, cuda, function):
    cuda[function] = 100
    assert refused(monkeypatch, Gpu()) == "CUDA shows no GPU"


def test_no_cuda(monkeypatch):
    monkeypatch.setattr(nvml, "_CUDA", "libnosuchcuda.so.1")
    assert refused(monkeypatch, Gpu()) == "CUDA shows no GPU"


def test_no_driver(monkeypatch):
    gpu = Gpu(nvmlInit=NVMLError("NVML Shared Library Not Found"))
    assert refused(monkeypatch, gpu) == "NVML does not start: NVML Shared Library Not Found"


def test_no_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    meter, reason = open_nvml()
    assert meter is None
    assert "pip install nvidia-ml-py" in reason
