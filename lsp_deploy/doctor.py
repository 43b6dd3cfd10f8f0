"""What is usable on this machine, and what to install for the rest.

Nothing here fails because something is broken: what cannot be asked becomes a row that says why.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from lsp_deploy import __version__

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["Diagnosis", "Finding", "Roots", "diagnose", "diagnosis_table"]

Status = Literal["usable", "missing", "unusable"]
Section = Literal["runtime", "gpu", "compiler", "power meter", "target", "cpu", "memory"]

_COLOURS: dict[Status, str] = {"usable": "green", "missing": "dim", "unusable": "yellow"}

# Instruction sets that decide how fast int8 and bf16 run, as /proc/cpuinfo spells them on x86 and ARM.
_INT8_INSTRUCTIONS = ("avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm")
_OTHER_INSTRUCTIONS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "bf16", "sve")


class Finding(BaseModel):
    """One thing that was looked for."""

    model_config = ConfigDict(frozen=True)

    section: Section
    name: str
    status: Status
    detail: str = Field("", description="version and what it offers, or why it is not usable")
    hint: str = Field("", description="what to install or run to make it usable")


class Diagnosis(BaseModel):
    """What was found on this machine."""

    version: str = Field(description="of lsp-deploy")
    python: str
    system: str
    findings: list[Finding]


@dataclass(frozen=True)
class Roots:
    """Where the kernel's file systems are mounted."""

    proc: Path = Path("/proc")
    sys: Path = Path("/sys")


def diagnose(roots: Roots | None = None) -> Diagnosis:
    """Look for runtimes, GPUs, compilers, power meters, and which targets engines can be built for here."""
    at = roots or Roots()
    findings: list[Finding] = []
    probes: dict[Section, Callable[[], Iterator[Finding]]] = {
        "gpu": lambda: _gpus(at),
        "runtime": lambda: _runtimes(any(f.section == "gpu" and f.status == "usable" for f in findings)),
        "compiler": _compilers,
        "power meter": lambda: _power_meters(at),
        "target": _targets,
        "cpu": lambda: _cpu(at),
        "memory": lambda: _memory(at),
    }
    for section, probe in probes.items():
        try:
            findings.extend(probe())
        except Exception as error:  # a diagnosis goes on whatever it meets
            findings.append(Finding(section=section, name=section, status="unusable", detail=_one_line(error)))
    system = f"{platform.system()} {platform.release()} {platform.machine()}"
    return Diagnosis(version=__version__, python=platform.python_version(), system=system, findings=findings)


def diagnosis_table(diagnosis: Diagnosis) -> Table:
    """Return the diagnosis as `lsp-deploy doctor` prints it."""
    from rich.markup import escape
    from rich.table import Table

    title = f"lsp-deploy {diagnosis.version}, Python {diagnosis.python}, {diagnosis.system}"
    table = Table("", "name", "status", "detail", title=title, title_justify="left", box=None)
    table.columns[1].no_wrap = True
    table.columns[3].overflow = "fold"
    section = ""
    for finding in diagnosis.findings:
        heading = "" if finding.section == section else f"[bold]{finding.section}[/bold]"
        section = finding.section
        status = f"[{_COLOURS[finding.status]}]{finding.status}[/]"
        lines = [line for line in (finding.detail, finding.hint and f"→ {finding.hint}") if line]
        table.add_row(heading, escape(finding.name), status, escape("\n".join(lines)))
    return table


def _runtimes(gpu_here: bool) -> Iterator[Finding]:
    yield _imported("onnxruntime", "pip install onnxruntime", _providers)
    yield _native_operators()
    yield _imported("tensorrt_rtx", "pip install 'lsp-deploy[tensorrt-rtx]'", lambda _: "builds engines without a GPU")
    tensorrt = _imported("tensorrt", "pip install 'lsp-deploy[tensorrt]'", lambda _: "builds engines for the GPU here")
    if tensorrt.status == "usable" and not gpu_here:
        reason = f"{tensorrt.detail.partition(':')[0]}: builds and runs only where an NVIDIA GPU is"
        tensorrt = tensorrt.model_copy(update={"status": "unusable", "detail": reason})
    yield tensorrt
    for name, extra in (("polygraphy", "tensorrt-rtx"), ("torch", "torch"), ("timm", "torch")):
        yield _installed(name, f"pip install 'lsp-deploy[{extra}]'")


def _native_operators() -> Finding:
    """Look for the library of operators for ONNX Runtime on CPUs, and load it."""
    from lsp_deploy.plugins import instruction_sets, library

    name = "native operators"
    path, why = library()
    if path is None:
        return Finding(section="runtime", name=name, status="missing", detail=why or "")
    try:
        detail = f"{path.name}, for {', '.join(instruction_sets(path))}"
    except OSError as error:
        hint = "install lsp-deploy again on this machine"
        return Finding(section="runtime", name=name, status="unusable", detail=_one_line(error), hint=hint)
    return Finding(section="runtime", name=name, status="usable", detail=detail)


def _installed(name: str, hint: str) -> Finding:
    """Look for a package without importing it, which for torch takes seconds."""
    if importlib.util.find_spec(name) is None:
        return Finding(section="runtime", name=name, status="missing", hint=hint)
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        detail = "a folder of this name is in the way of the package"
        return Finding(section="runtime", name=name, status="unusable", detail=detail, hint=hint)
    return Finding(section="runtime", name=name, status="usable", detail=version)


def _imported(name: str, hint: str, offers: Callable[[Any], str]) -> Finding:
    if importlib.util.find_spec(name) is None:
        return Finding(section="runtime", name=name, status="missing", hint=hint)
    try:
        module = importlib.import_module(name)
        detail = f"{module.__version__}: {offers(module)}"
    except Exception as error:  # a broken installation may raise anything
        return Finding(section="runtime", name=name, status="unusable", detail=_one_line(error), hint=hint)
    return Finding(section="runtime", name=name, status="usable", detail=detail)


def _providers(onnxruntime: Any) -> str:
    return ", ".join(name.removesuffix("ExecutionProvider") for name in onnxruntime.get_available_providers())


def _gpus(at: Roots) -> Iterator[Finding]:
    model = at.proc / "device-tree/model"
    if model.is_file() and "Jetson" in (name := model.read_text(errors="replace").strip("\0 \n")):
        yield Finding(section="gpu", name=name, status="usable", detail="integrated GPU; see the target agx-orin")
    if importlib.util.find_spec("pynvml") is None:
        if (at.proc / "driver/nvidia/version").exists():
            detail, hint = "there is a driver, but no library to ask it", "pip install nvidia-ml-py"
            yield Finding(section="gpu", name="NVIDIA GPU", status="unusable", detail=detail, hint=hint)
        else:
            yield Finding(section="gpu", name="NVIDIA GPU", status="missing", detail="no NVIDIA driver")
        return
    nvml = importlib.import_module("pynvml")
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        hint = "TensorRT engines run only where a GPU with NVIDIA's driver is; TensorRT-RTX builds them without"
        detail = f"no NVIDIA driver ({_one_line(error)})"
        yield Finding(section="gpu", name="NVIDIA GPU", status="missing", detail=detail, hint=hint)
        return
    try:
        for index in range(nvml.nvmlDeviceGetCount()):
            yield _gpu(nvml, index)
    finally:
        nvml.nvmlShutdown()


def _gpu(nvml: Any, index: int) -> Finding:
    try:
        device = nvml.nvmlDeviceGetHandleByIndex(index)
        major, minor = nvml.nvmlDeviceGetCudaComputeCapability(device)
        memory = nvml.nvmlDeviceGetMemoryInfo(device).total / 1e9
        driver = _text(nvml.nvmlSystemGetDriverVersion())
        detail = f"compute capability {major}.{minor}, {memory:.0f} GB, driver {driver}"
        return Finding(section="gpu", name=_text(nvml.nvmlDeviceGetName(device)), status="usable", detail=detail)
    except nvml.NVMLError as error:
        return Finding(section="gpu", name=f"NVIDIA GPU {index}", status="unusable", detail=_one_line(error))


def _compilers() -> Iterator[Finding]:
    found = {name: shutil.which(name) for name in ("g++", "clang++", "nvcc")}
    hints = {
        "g++": "" if found["clang++"] else "a C++17 compiler, for the CPU kernels: apt install g++",
        "clang++": "" if found["g++"] else "or apt install clang",
        "nvcc": "the CUDA toolkit, for the TensorRT plugin only",
    }
    for name, path in found.items():
        if path is None:
            yield Finding(section="compiler", name=name, status="missing", hint=hints[name])
            continue
        try:
            yield Finding(section="compiler", name=name, status="usable", detail=f"{_compiler_version(path)} ({path})")
        except (OSError, subprocess.SubprocessError) as error:
            detail = f"{path} --version: {_one_line(error)}"
            yield Finding(section="compiler", name=name, status="unusable", detail=detail, hint=hints[name])


def _compiler_version(path: str) -> str:
    environment = {**os.environ, "LC_ALL": "C"}
    command = [path, "--version"]
    text = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True, env=environment).stdout
    named = re.search(r"(?:release|version) (\d[\w.]*)", text)
    listed = re.findall(r"\d+\.\d[\w.]*", text.partition("\n")[0])
    return named[1] if named else listed[-1] if listed else "version unknown"


def _power_meters(at: Roots) -> Iterator[Finding]:
    yield _nvml_energy()
    yield _ina3221(at)
    yield _rapl(at)


def _nvml_energy() -> Finding:
    name = "NVML energy counter"
    if importlib.util.find_spec("pynvml") is None:
        return Finding(section="power meter", name=name, status="missing", hint="pip install nvidia-ml-py")
    nvml = importlib.import_module("pynvml")
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        return Finding(section="power meter", name=name, status="missing", detail="no NVIDIA driver")
    try:
        nvml.nvmlDeviceGetTotalEnergyConsumption(nvml.nvmlDeviceGetHandleByIndex(0))
    except nvml.NVMLError as error:
        return Finding(section="power meter", name=name, status="unusable", detail=_one_line(error))
    finally:
        nvml.nvmlShutdown()
    return Finding(section="power meter", name=name, status="usable", detail="energy of GPU 0, in mJ since its start")


def _ina3221(at: Roots) -> Finding:
    """Look for the current sensors of a Jetson module; hwmon numbers vary, labels do not."""
    name = "INA3221 (Jetson rails)"
    rails, unreadable = [], ""
    for label in sorted(at.sys.glob("bus/i2c/drivers/ina3221*/*/hwmon/hwmon*/in*_label")):
        rail = label.read_text(errors="replace").strip()
        channel = label.name.removeprefix("in").removesuffix("_label")
        if rail == "NC" or "sum" in rail:
            continue
        try:
            int((label.parent / f"in{channel}_input").read_text())
            int((label.parent / f"curr{channel}_input").read_text())
            rails.append(rail)
        except (OSError, ValueError) as error:
            unreadable = _one_line(error)
    if rails:
        return Finding(section="power meter", name=name, status="usable", detail=", ".join(rails))
    if unreadable:
        return Finding(section="power meter", name=name, status="unusable", detail=unreadable, hint="run as root")
    return Finding(section="power meter", name=name, status="missing", detail="not a Jetson")


def _rapl(at: Roots) -> Finding:
    """Look for the CPU's energy counters; AMD's appear under Intel's name as well."""
    name = "RAPL (CPU package)"
    domains, unreadable = [], ""
    for counter in sorted(at.sys.glob("class/powercap/intel-rapl:*/energy_uj")):
        try:
            int(counter.read_text())
            domains.append((counter.parent / "name").read_text().strip())
        except (OSError, ValueError) as error:
            unreadable = _one_line(error)
    if domains:
        return Finding(section="power meter", name=name, status="usable", detail=", ".join(dict.fromkeys(domains)))
    if unreadable:
        hint = f"sudo chmod a+r {at.sys}/class/powercap/intel-rapl:*/energy_uj"
        return Finding(section="power meter", name=name, status="unusable", detail=unreadable, hint=hint)
    detail = "no counter (a virtual machine, or a CPU without one)"
    return Finding(section="power meter", name=name, status="missing", detail=detail)


def _targets() -> Iterator[Finding]:
    """Ask for every target which builder on this machine serves it."""
    from lsp_deploy.engines.backends import builder_for
    from lsp_deploy.hardware.target import list_targets

    for target in list_targets():
        backend, reason = builder_for(target)
        if backend is not None:
            yield Finding(section="target", name=target.name, status="usable", detail=f"built here by {backend.name}")
        else:
            hint = f"lsp-deploy targets show {target.name} has the commands to run on the device"
            yield Finding(section="target", name=target.name, status="missing", detail=reason, hint=hint)


def _cpu(at: Roots) -> Iterator[Finding]:
    text = (at.proc / "cpuinfo").read_text(errors="replace")
    processors = [dict(_key_values(block)) for block in text.strip().split("\n\n")]
    first = processors[0]
    name = first.get("model name") or platform.processor() or platform.machine()
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    logical = [processor for processor in processors if "processor" in processor]
    cores = {(p.get("physical id", ""), p.get("core id", p["processor"])) for p in logical}
    detail = f"{len(cores)} cores, {len(logical)} threads, {usable} usable by this process"
    yield Finding(section="cpu", name=name, status="usable", detail=detail)
    flags = (first.get("flags") or first.get("Features") or "").split()
    present = [name for name in (*_OTHER_INSTRUCTIONS, *_INT8_INSTRUCTIONS) if name in flags]
    detail = ", ".join(present) or "no vector extension that was looked for"
    if not any(name in _INT8_INSTRUCTIONS for name in present):
        detail += "; no int8 dot product (VNNI, AMX, i8mm), so int8 gains less here"
    yield Finding(section="cpu", name="instructions", status="usable", detail=detail)


def _memory(at: Roots) -> Iterator[Finding]:
    values = dict(_key_values((at.proc / "meminfo").read_text()))
    total, free = (int(values[key].split()[0]) * 1024 / 1e9 for key in ("MemTotal", "MemAvailable"))
    detail = f"{total:.1f} GB, {free:.1f} GB free"
    limit = at.sys / "fs/cgroup/memory.max"
    if limit.is_file() and (text := limit.read_text().strip()).isdigit():
        detail += f", {int(text) / 1e9:.1f} GB allowed to this container"
    yield Finding(section="memory", name="memory", status="usable", detail=detail)


def _key_values(text: str) -> Iterator[tuple[str, str]]:
    for line in text.splitlines():
        key, colon, value = line.partition(":")
        if colon:
            yield key.strip(), value.strip()


def _text(value: str | bytes) -> str:
    """Decode what older releases of nvidia-ml-py return as bytes."""
    return value.decode() if isinstance(value, bytes) else value


def _one_line(error: BaseException) -> str:
    message = " ".join(str(error).split())
    return f"{type(error).__name__}: {message}" if message else type(error).__name__
