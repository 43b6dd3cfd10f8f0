"""The diagnosis, on fake machines: it finds what is there, names what is missing, and never fails itself."""

from __future__ import annotations

import io
import shlex
import stat
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from rich.console import Console

from lsp_deploy import doctor, plugins
from lsp_deploy.doctor import Diagnosis, Finding, Roots, diagnose, diagnosis_table
from lsp_deploy.hardware.target import list_targets
from lsp_deploy.plugins import NativeLibrary

XEON = """\
processor\t: {number}
model name\t: Intel(R) Xeon(R) Platinum 8480+
physical id\t: 0
core id\t\t: {core}
flags\t\t: fpu avx2 avx512f avx512_vnni avx512_bf16 amx_tile amx_int8 amx_bf16
"""
MEMORY = "MemTotal:       32000000 kB\nMemFree:         1000000 kB\nMemAvailable:   16000000 kB\n"


@pytest.fixture
def machine(tmp_path, monkeypatch) -> Roots:
    """Two cores with two threads each, 32 GB, no GPU, no sensor, no compiler, no builder."""
    roots = Roots(tmp_path / "proc", tmp_path / "sys")
    cpus = [XEON.format(number=number, core=number // 2) for number in range(4)]
    write(roots.proc / "cpuinfo", "\n".join(cpus))
    write(roots.proc / "meminfo", MEMORY)
    roots.sys.mkdir()
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    builders(monkeypatch, lambda target: (None, f"no builder on this machine serves {target.name}"))
    without(monkeypatch, "pynvml")
    return roots


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def builders(monkeypatch, builder_for) -> None:
    backends = ModuleType("lsp_deploy.engines.backends")
    backends.builder_for = builder_for
    monkeypatch.setitem(sys.modules, "lsp_deploy.engines.backends", backends)


def without(monkeypatch, *packages: str) -> None:
    """Hide packages; whether they are installed where the test runs does not matter."""
    find_spec = doctor.importlib.util.find_spec
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None if name in packages else find_spec(name))


def package(folder: Path, monkeypatch, name: str, code: str) -> None:
    write(folder / "packages" / f"{name}.py", code)
    monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(folder / "packages")


def nvml(monkeypatch, **functions) -> None:
    """Put a library in place of nvidia-ml-py: one A100, unless `functions` say otherwise."""
    module = ModuleType("pynvml")
    module.__spec__ = SimpleNamespace(name="pynvml")
    module.NVMLError = type("NVMLError", (Exception,), {})
    answers = {
        "nvmlInit": lambda: None,
        "nvmlShutdown": lambda: None,
        "nvmlDeviceGetCount": lambda: 1,
        "nvmlDeviceGetHandleByIndex": lambda index: index,
        "nvmlDeviceGetName": lambda device: b"NVIDIA A100-SXM4-80GB",
        "nvmlDeviceGetCudaComputeCapability": lambda device: (8, 0),
        "nvmlDeviceGetMemoryInfo": lambda device: SimpleNamespace(total=85_899_345_920),
        "nvmlSystemGetDriverVersion": lambda: "580.65.06",
        "nvmlDeviceGetTotalEnergyConsumption": lambda device: 123_456,
    }
    for name, function in (answers | functions).items():
        setattr(module, name, function)
    monkeypatch.setitem(sys.modules, "pynvml", module)
    find_spec = doctor.importlib.util.find_spec
    monkeypatch.setattr(
        doctor.importlib.util, "find_spec", lambda name: module.__spec__ if name == "pynvml" else find_spec(name)
    )


def refuse(monkeypatch, **functions) -> None:
    """As `nvml`, where the named calls raise NVMLError with the given text."""

    def raising(text):
        def call(*arguments):
            raise sys.modules["pynvml"].NVMLError(text)

        return call

    nvml(monkeypatch, **{name: raising(text) for name, text in functions.items()})


def rail(at: Roots, chip: str, channel: int, label: str) -> Path:
    folder = at.sys / f"bus/i2c/drivers/ina3221/{chip}/hwmon/hwmon3"
    write(folder / f"in{channel}_label", f"{label}\n")
    write(folder / f"in{channel}_input", "5000\n")
    write(folder / f"curr{channel}_input", "1200\n")
    return folder


def find(roots: Roots, section: str, name: str = "") -> Finding:
    found = [one for one in diagnose(roots).findings if one.section == section and name in one.name]
    assert found, f"nothing found under {section} {name}"
    return found[0]


def test_a_bare_machine_has_a_row_for_everything(machine):
    diagnosis = diagnose(machine)
    assert {one.section for one in diagnosis.findings} == {
        "gpu", "runtime", "compiler", "power meter", "target", "cpu", "memory"
    }  # fmt: skip
    assert Diagnosis.model_validate_json(diagnosis.model_dump_json()) == diagnosis
    assert diagnosis.version
    for one in diagnosis.findings:
        assert "\n" not in one.detail + one.hint
        assert one.status == "usable" or one.detail or one.hint or one.name == "clang++", one


def test_cpu_and_memory(machine):
    cpu = find(machine, "cpu", "Xeon")
    assert cpu.name == "Intel(R) Xeon(R) Platinum 8480+"
    assert cpu.detail.startswith("2 cores, 4 threads")
    assert find(machine, "cpu", "instructions").detail == (
        "avx2, avx512f, avx512_bf16, amx_bf16, avx512_vnni, amx_int8"
    )  # fmt: skip
    assert find(machine, "memory").detail == "32.8 GB, 16.4 GB free"


def test_a_cpu_without_int8_instructions_is_said_to_be_one(machine):
    write(machine.proc / "cpuinfo", "processor\t: 0\nmodel name\t: Old\nflags\t\t: avx2\n")
    assert "int8 gains less" in find(machine, "cpu", "instructions").detail


def test_an_arm_cpu(machine):
    write(machine.proc / "cpuinfo", "processor\t: 0\nFeatures\t: fp asimd asimddp sve i8mm bf16\n\nprocessor\t: 1\n")
    assert find(machine, "cpu", "instructions").detail == "bf16, sve, asimddp, i8mm"
    assert find(machine, "cpu").detail.startswith("2 cores, 2 threads")


def test_the_limit_of_a_container(machine):
    write(machine.sys / "fs/cgroup/memory.max", "8000000000\n")
    assert find(machine, "memory").detail.endswith("8.0 GB allowed to this container")
    write(machine.sys / "fs/cgroup/memory.max", "max\n")
    assert "container" not in find(machine, "memory").detail


def test_a_section_that_cannot_be_read_is_a_row(machine):
    (machine.proc / "meminfo").unlink()
    memory = find(machine, "memory")
    assert memory.status == "unusable"
    assert memory.detail.startswith("FileNotFoundError")
    assert find(machine, "cpu", "Xeon").status == "usable"


def test_runtimes_that_are_missing_say_what_to_install(machine, monkeypatch):
    without(monkeypatch, "tensorrt_rtx", "tensorrt", "torch", "timm")
    assert find(machine, "runtime", "tensorrt_rtx").hint == "pip install 'lsp-deploy[tensorrt-rtx]'"
    assert find(machine, "runtime", "torch").hint == "pip install 'lsp-deploy[torch]'"
    assert find(machine, "runtime", "timm").status == "missing"


def test_onnxruntime_and_its_providers(machine):
    import onnxruntime

    found = find(machine, "runtime", "onnxruntime")
    assert found.status == "usable"
    assert found.detail.startswith(f"{onnxruntime.__version__}: ")
    assert "CPU" in found.detail


def test_native_operators(machine, monkeypatch, tmp_path):
    monkeypatch.setattr(plugins, "library", lambda: NativeLibrary(None, "no C++ compiler was there"))
    found = find(machine, "runtime", "native operators")
    assert (found.status, found.detail) == ("missing", "no C++ compiler was there")
    (tmp_path / "liblsp_ort.so").write_text("of another machine")
    monkeypatch.setattr(plugins, "library", lambda: NativeLibrary(tmp_path / "liblsp_ort.so", None))
    assert find(machine, "runtime", "native operators").status == "unusable"


def test_native_operators_of_this_installation(machine):
    native, found = plugins.library(), find(machine, "runtime", "native operators")
    if native.path is None:
        assert (found.status, found.detail) == ("missing", native.why)
    else:
        assert found.status == "usable"
        assert found.detail.startswith("liblsp_ort.so, for ")
        assert found.detail.endswith("portable")


def test_a_broken_runtime_is_a_row(machine, monkeypatch, tmp_path):
    package(
        tmp_path, monkeypatch, "tensorrt_rtx", 'raise OSError("libtensorrt_rtx.so.1:\\n cannot open shared object")'
    )
    found = find(machine, "runtime", "tensorrt_rtx")
    assert found.status == "unusable"
    assert found.detail == "OSError: libtensorrt_rtx.so.1: cannot open shared object"
    assert found.hint


def test_tensorrt_needs_a_gpu(machine, monkeypatch, tmp_path):
    package(tmp_path, monkeypatch, "tensorrt", '__version__ = "10.16.1"')
    found = next(one for one in diagnose(machine).findings if one.name == "tensorrt")
    assert found.status == "unusable"
    assert "GPU" in found.detail
    nvml(monkeypatch)
    found = next(one for one in diagnose(machine).findings if one.name == "tensorrt")
    assert found.status == "usable"
    assert found.detail.startswith("10.16.1")


def test_a_folder_in_the_way_of_a_package(machine, monkeypatch, tmp_path):
    package(tmp_path, monkeypatch, "timm", "")
    monkeypatch.setattr(doctor.importlib.metadata, "version", not_found)
    found = find(machine, "runtime", "timm")
    assert found.status == "unusable"
    assert "in the way" in found.detail


def not_found(name: str) -> str:
    raise doctor.importlib.metadata.PackageNotFoundError(name)


def test_a_gpu(machine, monkeypatch):
    nvml(monkeypatch)
    gpu = find(machine, "gpu")
    assert gpu.name == "NVIDIA A100-SXM4-80GB"
    assert gpu.status == "usable"
    assert gpu.detail == "compute capability 8.0, 86 GB, driver 580.65.06"
    assert find(machine, "power meter", "NVML").status == "usable"


def test_no_driver(machine, monkeypatch):
    refuse(monkeypatch, nvmlInit="NVML Shared Library Not Found")
    gpu = find(machine, "gpu")
    assert gpu.status == "missing"
    assert "no NVIDIA driver" in gpu.detail
    assert find(machine, "power meter", "NVML").status == "missing"


def test_a_gpu_that_fell_off_the_bus(machine, monkeypatch):
    refuse(monkeypatch, nvmlDeviceGetHandleByIndex="GPU is lost")
    assert find(machine, "gpu").status == "unusable"
    assert "GPU is lost" in find(machine, "gpu").detail
    assert find(machine, "power meter", "NVML").status == "unusable"


def test_a_gpu_without_an_energy_counter(machine, monkeypatch):
    refuse(monkeypatch, nvmlDeviceGetTotalEnergyConsumption="Not Supported")
    assert find(machine, "gpu").status == "usable"
    assert find(machine, "power meter", "NVML").detail == "NVMLError: Not Supported"


def test_a_driver_that_cannot_be_asked(machine):
    write(machine.proc / "driver/nvidia/version", "NVRM version: 580.65.06\n")
    gpu = find(machine, "gpu")
    assert gpu.status == "unusable"
    assert gpu.hint == "pip install nvidia-ml-py"


def test_a_jetson_and_its_rails(machine):
    write(machine.proc / "device-tree/model", "NVIDIA Jetson AGX Orin Developer Kit\0")
    rail(machine, "1-0040", 1, "VDD_GPU_SOC")
    rail(machine, "1-0040", 2, "VDD_CPU_CV")
    rail(machine, "1-0040", 3, "VIN_SYS_5V0")
    rail(machine, "1-0041", 1, "NC")
    rail(machine, "1-0041", 2, "VDDQ_VDD2_1V8AO")
    rail(machine, "1-0041", 7, "sum of shunt voltages")
    assert find(machine, "gpu").name == "NVIDIA Jetson AGX Orin Developer Kit"
    meter = find(machine, "power meter", "INA3221")
    assert meter.status == "usable"
    assert meter.detail == "VDD_GPU_SOC, VDD_CPU_CV, VIN_SYS_5V0, VDDQ_VDD2_1V8AO"


def test_rails_that_cannot_be_read(machine):
    folder = rail(machine, "1-0040", 1, "VDD_GPU_SOC")
    (folder / "curr1_input").unlink()
    meter = find(machine, "power meter", "INA3221")
    assert meter.status == "unusable"
    assert "curr1_input" in meter.detail


def test_rapl(machine):
    for number, domain in (("0", "package-0"), ("0:0", "dram"), ("1", "package-1")):
        write(machine.sys / f"class/powercap/intel-rapl:{number}/energy_uj", "262143328850\n")
        write(machine.sys / f"class/powercap/intel-rapl:{number}/name", f"{domain}\n")
    meter = find(machine, "power meter", "RAPL")
    assert meter.status == "usable"
    assert set(meter.detail.split(", ")) == {"package-0", "dram", "package-1"}


def test_rapl_that_only_root_may_read(machine):
    # A folder in the counter's place cannot be read as a file, whoever asks.
    (machine.sys / "class/powercap/intel-rapl:0/energy_uj").mkdir(parents=True)
    meter = find(machine, "power meter", "RAPL")
    assert meter.status == "unusable"
    assert meter.hint.startswith("sudo chmod a+r")


def compiler(tmp_path: Path, name: str, script: str) -> None:
    path = tmp_path / "bin" / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.mark.parametrize(("name", "says", "version"), [
    ("g++", "g++ (Debian 12.2.0-14) 12.2.0", "12.2.0"),
    ("g++", "g++ (Ubuntu 13.3.0-6ubuntu2~24.04) 13.3.0", "13.3.0"),
    ("clang++", "Ubuntu clang version 18.1.3 (1ubuntu1)", "18.1.3"),
    ("nvcc", "nvcc: NVIDIA (R) Cuda compiler driver\nCuda compilation tools, release 12.6, V12.6.68", "12.6"),
])  # fmt: skip
def test_compilers(machine, tmp_path, name, says, version):
    compiler(tmp_path, name, f"printf '%s' {shlex.quote(says)}")
    found = find(machine, "compiler", name)
    assert found.status == "usable"
    assert found.detail == f"{version} ({tmp_path / 'bin' / name})"


def test_a_compiler_that_does_not_run(machine, tmp_path):
    compiler(tmp_path, "g++", "exit 3")
    found = find(machine, "compiler", "g++")
    assert found.status == "unusable"
    assert "exit status 3" in found.detail


def test_missing_compilers_say_what_for(machine):
    assert "apt install g++" in find(machine, "compiler", "g++").hint
    assert "CUDA toolkit" in find(machine, "compiler", "nvcc").hint


def test_one_row_a_target(machine, monkeypatch):
    def builder_for(target):
        served = "tensorrt_rtx" in target.builders
        return (SimpleNamespace(name="tensorrt_rtx"), "") if served else (None, f"no builder serves {target.name}")

    builders(monkeypatch, builder_for)
    rows = {one.name: one for one in diagnose(machine).findings if one.section == "target"}
    assert set(rows) == {target.name for target in list_targets()}
    assert rows["a100"].status == "usable"
    assert rows["a100"].detail == "built here by tensorrt_rtx"
    assert rows["agx-orin-64gb"].status == "missing"
    assert rows["agx-orin-64gb"].detail == "no builder serves agx-orin-64gb"
    assert "lsp-deploy targets show agx-orin-64gb" in rows["agx-orin-64gb"].hint


def test_a_broken_backend_is_a_row(machine, monkeypatch):
    def builder_for(target):
        raise RuntimeError("broken")

    builders(monkeypatch, builder_for)
    assert find(machine, "target").detail == "RuntimeError: broken"


def test_the_table_cuts_nothing_off(machine, monkeypatch):
    without(monkeypatch, "tensorrt")
    console = Console(file=io.StringIO(), width=80)
    console.print(diagnosis_table(diagnose(machine)))
    text = console.file.getvalue()
    assert "…" not in text
    assert "'lsp-deploy[tensorrt]'" in text
    assert max(len(line) for line in text.splitlines()) <= 80


def test_this_machine():
    diagnosis = diagnose()
    assert any(one.name == "onnxruntime" and one.status == "usable" for one in diagnosis.findings)
    assert any(one.section == "cpu" for one in diagnosis.findings)
