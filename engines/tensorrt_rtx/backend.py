"""The TensorRT-RTX backend: real engines for a GPU's compute capability, built on any x86-64 machine."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from lsp_deploy.engines.protocol import (
    BackendStatus,
    BuildOptions,
    Engine,
    EngineBuildError,
    EngineInfo,
    read_sidecar,
    write_sidecar,
)
from lsp_deploy.engines.tensorrt_rtx import build_log
from lsp_deploy.engines.tensorrt_rtx.messages import BuildRequest, BuildResponse, LogMessage
from lsp_deploy.errors import UserError
from lsp_deploy.files import atomic_path

if TYPE_CHECKING:
    from lsp_deploy.hardware.target import Target

__all__ = ["COMPUTE_CAPABILITIES", "TensorRtRtxBackend"]

# The ComputeCapability enum of TensorRT-RTX 1.7. There is no 8.7 (Orin), 9.0 (H100) or 10.0.
COMPUTE_CAPABILITIES = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")
_CHILD = "lsp_deploy.engines.tensorrt_rtx.build_child"
_PACKAGES = ("tensorrt_rtx", "polygraphy")
_INSTALL = "pip install 'lsp-deploy[tensorrt-rtx]'"


class TensorRtRtxBackend:
    """Builds engines with TensorRT-RTX, each in a fresh child process, for one compute capability."""

    name = "tensorrt_rtx"

    def status(self) -> BackendStatus:
        """Return whether TensorRT-RTX is installed, and whether there is a GPU to run its engines on."""
        missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
        if missing:
            return BackendStatus(
                can_build=False, can_run=False, detail=f"not installed: {', '.join(missing)}", hint=_INSTALL
            )
        gpu = _has_gpu()
        return BackendStatus(
            can_build=True,
            can_run=gpu,
            version=_version("tensorrt_rtx"),
            detail="builds without a GPU; for SM75 (T4) FP16 and INT8 only, it refuses FP32 matrix products there",
            hint="" if gpu else "its engines run where an NVIDIA GPU is",
        )

    def serves(self, target: Target) -> bool:
        """Return whether the target names this builder and has a compute capability that it knows."""
        return self.name in target.builders and target.compute_capability in COMPUTE_CAPABILITIES

    def build(self, model_path: Path, engine_path: Path, target: Target, options: BuildOptions) -> EngineInfo:
        """Build `model_path` for the target's compute capability into `engine_path`, with its sidecar.

        Raises:
            EngineBuildError: the builder refused the model, crashed, or ran out of time; nothing is written.
        """
        if not self.serves(target) or target.compute_capability is None:
            raise EngineBuildError(
                f"TensorRT-RTX does not build for {target.name}; it knows the compute capabilities "
                f"{', '.join(COMPUTE_CAPABILITIES)}"
            )
        major, minor = target.compute_capability.split(".")
        with tempfile.TemporaryDirectory(prefix="lsp-deploy-") as name:
            folder = Path(name)
            request = BuildRequest(
                model=model_path.resolve(),
                engine=folder / "engine",
                log=folder / "log.jsonl",
                response=folder / "response.json",
                compute_capability=(int(major), int(minor)),
                options=options,
            )
            response = _run_child(request, folder)
            messages = build_log.read_log(request.log)
            if not response.built:
                raise _refusal(response, messages)
            with atomic_path(engine_path) as temporary:
                shutil.copyfile(request.engine, temporary)
        layers, unread = build_log.layer_table(messages)
        info = EngineInfo(
            backend=self.name,
            target=target.name,
            compute_capability=target.compute_capability,
            versions=response.versions,
            build_seconds=response.seconds,
            options=options,
            layers=layers,
            memory=build_log.memory(messages),
            warnings=[*build_log.warning_lines(messages), *_remarks(options, len(layers), len(unread))],
        )
        return write_sidecar(info, engine_path)

    def load(self, engine_path: Path) -> Engine:
        """Return the engine in `engine_path` on the GPU of this machine.

        Raises:
            UserError: there is no such file, no GPU, or the GPU is not the one that the engine is built for.
        """
        if not engine_path.is_file():
            raise UserError(f"{engine_path} does not exist; build the engine first")
        info = read_sidecar(engine_path)
        if not _has_gpu():
            needed = f" of compute capability {info.compute_capability}" if info and info.compute_capability else ""
            raise UserError(f"{engine_path} runs on an NVIDIA GPU{needed}, and this machine has none")
        from lsp_deploy.engines.tensorrt_rtx.engine import load_engine

        return load_engine(engine_path, info)


def _run_child(request: BuildRequest, folder: Path) -> BuildResponse:
    """Run the build in a child process; `subprocess.run` ends it on Ctrl-C and when its time is over."""
    request_path, output_path = folder / "request.json", folder / "output.txt"
    request_path.write_text(request.model_dump_json())
    # -I: neither the working folder nor PYTHON* variables may put other code in place of the installed package.
    command = [sys.executable, "-I", "-m", _CHILD, str(request_path)]
    timeout = request.options.timeout_seconds
    with output_path.open("wb") as output:
        try:
            code = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=_environment(folder),
                timeout=timeout,
                check=False,
            ).returncode
        except subprocess.TimeoutExpired:
            raise _death(f"took longer than {timeout:g} s and was ended", request, output_path) from None
    try:
        return BuildResponse.model_validate_json(request.response.read_bytes())
    except (FileNotFoundError, ValidationError):
        raise _death(f"ended without an answer ({_ending(code)})", request, output_path) from None


def _environment(folder: Path) -> dict[str, str]:
    """Return the child's environment, in which `libtensorrt_rtx.so` can be found.

    At a plugin node the ONNX parser opens the library by that name, but the wheel ships `libtensorrt_rtx.so.1` only;
    the parser then ends the process.
    """
    environment = dict(os.environ)
    spec = importlib.util.find_spec("tensorrt_rtx_libs")
    for location in (spec.submodule_search_locations or ()) if spec is not None else ():
        library = next(iter(sorted(Path(location).glob("libtensorrt_rtx.so.*"))), None)
        if library is not None:
            links = folder / "libraries"
            links.mkdir()
            (links / "libtensorrt_rtx.so").symlink_to(library)
            paths = [str(links), environment.get("LD_LIBRARY_PATH", "")]
            environment["LD_LIBRARY_PATH"] = os.pathsep.join(path for path in paths if path)
    return environment


def _refusal(response: BuildResponse, messages: list[LogMessage]) -> EngineBuildError:
    said = [build_log.parser_error_line(error) for error in response.parser_errors]
    lines = [response.refusal] if response.refusal is not None else (said or build_log.error_lines(messages))
    first = lines[0] if lines else "the builder gave no engine and no reason"
    return EngineBuildError(f"TensorRT-RTX refuses the model: {first}", lines[1:])


def _death(what: str, request: BuildRequest, output_path: Path) -> EngineBuildError:
    messages = build_log.read_log(request.log)
    printed = [line.strip() for line in output_path.read_text(errors="replace").splitlines() if line.strip()]
    node = build_log.last_node(messages)
    known = [
        f"at node {node}" if node is not None else "",
        next(iter(build_log.error_lines(messages)), printed[-1] if printed else ""),
    ]
    detail = ": ".join(part for part in known if part)
    return EngineBuildError(f"the TensorRT-RTX builder {what}{', ' + detail if detail else ''}", printed)


def _ending(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"


def _remarks(options: BuildOptions, layers: int, unread: int) -> list[str]:
    remarks = []
    if options.sparse_weights:
        remarks.append("TensorRT-RTX 1.7 builds the same engine with sparse_weights as without: 2:4 zeros gain nothing")
    if options.optimization_level is not None:
        remarks.append("optimization_level does not change what TensorRT-RTX 1.7 builds")
    if unread or not layers:
        remarks.append(f"{unread} lines of the builder's layer table could not be read; {layers} could")
    return remarks


def _version(name: str) -> str | None:
    for distribution in (name, f"{name}_cu13"):
        try:
            return version(distribution)
        except PackageNotFoundError:
            continue
    return None


def _has_gpu() -> bool:
    """Ask the CUDA driver, without loading a CUDA runtime."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    count = ctypes.c_int()
    return cuda.cuInit(0) == 0 and cuda.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0
