"""The TensorRT backend: engines built on the GPU that is present, with any TensorRT from 10.3 on."""

from __future__ import annotations

import importlib.util
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
    LayerRecord,
    write_sidecar,
)
from lsp_deploy.engines.tensorrt.inspector import InspectionError, parse_inspection
from lsp_deploy.engines.tensorrt_common import build_log
from lsp_deploy.engines.tensorrt_common.child import build_in_child
from lsp_deploy.engines.tensorrt_common.gpu import Gpu, first_gpu
from lsp_deploy.engines.tensorrt_common.loading import load_engine

if TYPE_CHECKING:
    from lsp_deploy.hardware.target import Target

__all__ = ["TensorRtBackend"]

_INSTALL = "pip install 'lsp-deploy[tensorrt]'; on a Jetson it comes with JetPack"


class TensorRtBackend:
    """Builds engines with TensorRT, each in a fresh child process, for the first GPU of this machine."""

    name = "tensorrt"

    def status(self, target: Target | None = None) -> BackendStatus:
        """Return whether TensorRT is here and a GPU to build on and for: the target's, where one is named."""
        installed = _version()
        gpu = first_gpu()
        wanted = f"an NVIDIA GPU of compute capability {target.compute_capability}" if target else "an NVIDIA GPU"
        elsewhere = f"copy model.onnx to a machine with {wanted} and build it there with trtexec --stronglyTyped"
        if gpu is None or not _fits(gpu, target):
            here = "none" if gpu is None else f"{gpu.name}, {gpu.compute_capability}"
            detail = f"builds on {wanted}, and here is {here}"
            return BackendStatus(
                can_build=False,
                can_run=gpu is not None and installed is not None,
                version=installed,
                detail=detail,
                hint=elsewhere,
            )
        if installed is None:
            return BackendStatus(can_build=False, can_run=False, detail="is not installed", hint=_INSTALL)
        return BackendStatus(can_build=True, can_run=True, version=installed, detail=f"builds for the {gpu.name} here")

    def serves(self, target: Target) -> bool:
        """Return whether the target names this builder."""
        return self.name in target.builders

    def build(self, model_path: Path, engine_path: Path, target: Target, options: BuildOptions) -> EngineInfo:
        """Build `model_path` for the GPU of this machine into `engine_path`, with its sidecar.

        Raises:
            EngineBuildError: this machine is not the target's, or the builder refused the model, crashed, or ran out
                of time; nothing is written.
        """
        status, gpu = self.status(target), first_gpu()
        if not status.can_build or gpu is None:
            raise EngineBuildError(f"TensorRT {status.detail}: {status.hint}")
        built = build_in_child("tensorrt", model_path, engine_path, options, inspect=True)
        layers, remarks = _layers(built.inspection)
        sparse = build_log.sparse_tactics(built.messages)
        if layers:
            remarks += unmet_requests(model_path, layers, sparse_weights=options.sparse_weights, sparse_tactics=sparse)
        if target.sm_count is not None and gpu.multiprocessors != target.sm_count:
            remarks.append(
                f"built on {gpu.name} with {gpu.multiprocessors} multiprocessors, where {target.title} has "
                f"{target.sm_count}: kernels were chosen for the former"
            )
        info = EngineInfo(
            backend=self.name,
            target=target.name,
            compute_capability=gpu.compute_capability,
            device=gpu.name,
            versions=built.response.versions,
            build_seconds=built.response.seconds,
            options=options.for_sidecar(),
            layers=layers,
            memory=build_log.memory(built.messages),
            sparse_tactics=sparse,
            warnings=[*build_log.warning_lines(built.messages), *built.response.remarks, *remarks],
        )
        return write_sidecar(info, engine_path)

    def load(self, engine_path: Path, *, weights: Path | None = None, plugins: Sequence[Path] = ()) -> Engine:
        """Return the engine in `engine_path` on the GPU of this machine.

        Args:
            engine_path: the engine.
            weights: ONNX file whose weights go into an engine that is refittable or was built without.
            plugins: libraries of the plugins in it that it does not hold itself.

        Raises:
            UserError: there is no such file, no GPU, or the GPU is not the one that the engine is built for.
        """
        return load_engine("tensorrt", engine_path, weights=weights, plugins=plugins)


def _fits(gpu: Gpu, target: Target | None) -> bool:
    return target is None or gpu.compute_capability == target.compute_capability


def _layers(inspection: str | None) -> tuple[list[LayerRecord], list[str]]:
    """Return the layers, and what the user should know where there are none."""
    if inspection is None:
        return [], ["TensorRT could not load the engine that it built, so its layers are not known"]
    try:
        return parse_inspection(inspection), []
    except InspectionError as error:
        return [], [f"the engine's layers are not known: {error}"]


def _version() -> str | None:
    if importlib.util.find_spec("tensorrt") is None:
        return None
    for distribution in ("tensorrt", "tensorrt_cu13", "tensorrt_cu12"):
        try:
            return version(distribution)
        except PackageNotFoundError:
            continue
    return "of unknown version"
