"""The TensorRT-RTX backend: real engines for a GPU's compute capability, built on any x86-64 machine."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from lsp_deploy.engines.asked_layers import unmet_requests
from lsp_deploy.engines.protocol import (
    BackendStatus,
    BuildOptions,
    Engine,
    EngineBuildError,
    EngineInfo,
    write_sidecar,
)
from lsp_deploy.engines.tensorrt_common import build_log
from lsp_deploy.engines.tensorrt_common.child import build_in_child
from lsp_deploy.engines.tensorrt_common.gpu import first_gpu
from lsp_deploy.engines.tensorrt_common.loading import load_engine
from lsp_deploy.engines.tensorrt_rtx.layer_table import read_layer_table

if TYPE_CHECKING:
    from lsp_deploy.hardware.target import Target

__all__ = ["COMPUTE_CAPABILITIES", "TensorRtRtxBackend"]

# The ComputeCapability enum of TensorRT-RTX 1.7. There is no 8.7 (Orin), 9.0 (H100) or 10.0.
COMPUTE_CAPABILITIES = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")
_INSTALL = "pip install 'lsp-deploy[tensorrt-rtx]'"


class TensorRtRtxBackend:
    """Builds engines with TensorRT-RTX, each in a fresh child process, for one compute capability."""

    name = "tensorrt_rtx"

    def status(self, target: Target | None = None) -> BackendStatus:
        """Return whether TensorRT-RTX is here, and a GPU that its engines run on: the target's, where one is named."""
        if importlib.util.find_spec("tensorrt_rtx") is None:
            return BackendStatus(can_build=False, can_run=False, detail="is not installed", hint=_INSTALL)
        gpu = first_gpu()
        runs = gpu is not None and (target is None or gpu.compute_capability == target.compute_capability)
        wanted = f" of compute capability {target.compute_capability}" if target is not None else ""
        return BackendStatus(
            can_build=True,
            can_run=runs,
            version=_version(),
            detail="builds without a GPU; for SM75 (T4) FP16 and INT8 only, it refuses FP32 matrix products there",
            hint="" if runs else f"its engines run where an NVIDIA GPU{wanted} is",
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
        if options.hardware_compatibility != "none" or options.version_compatible:
            raise EngineBuildError(
                "TensorRT-RTX has no engines for other GPUs or later releases; leave hardware_compatibility and "
                "version_compatible out"
            )
        if (options.refittable or options.strip_weights) and first_gpu() is None:
            # Its builder would end with a CHECK that failed, in a file of its own.
            raise EngineBuildError(
                "TensorRT-RTX builds engines that are refittable, or without weights, only where an NVIDIA GPU is; "
                "leave refittable and strip_weights out here"
            )
        major, minor = target.compute_capability.split(".")
        built = build_in_child(
            "tensorrt_rtx",
            model_path,
            engine_path,
            options,
            compute_capability=(int(major), int(minor)),
            environment=_environment,
        )
        layers, unread = read_layer_table(built.messages)
        info = EngineInfo(
            backend=self.name,
            target=target.name,
            compute_capability=target.compute_capability,
            versions=built.response.versions,
            build_seconds=built.response.seconds,
            options=options.for_sidecar(),
            layers=layers,
            memory=build_log.memory(built.messages),
            warnings=[
                *build_log.warning_lines(built.messages),
                *built.response.remarks,
                *_remarks(options, len(layers), len(unread)),
                *unmet_requests(model_path, layers),
            ],
        )
        return write_sidecar(info, engine_path)

    def load(self, engine_path: Path, *, plugins: Sequence[Path] = ()) -> Engine:
        """Return the engine in `engine_path` on the GPU of this machine.

        Args:
            engine_path: the engine.
            plugins: libraries of the plugins in it that it does not hold itself.

        Raises:
            UserError: there is no such file, no GPU, or the GPU is not the one that the engine is built for.
        """
        return load_engine("tensorrt_rtx", engine_path, plugins=plugins)


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


def _remarks(options: BuildOptions, layers: int, unread: int) -> list[str]:
    remarks = []
    if options.sparse_weights:
        remarks.append("TensorRT-RTX 1.7 builds the same engine with sparse_weights as without: 2:4 zeros gain nothing")
    if options.optimization_level is not None:
        remarks.append("optimization_level does not change what TensorRT-RTX 1.7 builds")
    if unread or not layers:
        remarks.append(f"{unread} lines of the builder's layer table could not be read; {layers} could")
    return remarks


def _version() -> str | None:
    for distribution in ("tensorrt_rtx", "tensorrt_rtx_cu13"):
        try:
            return version(distribution)
        except PackageNotFoundError:
            continue
    return None
