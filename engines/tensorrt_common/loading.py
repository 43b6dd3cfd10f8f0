"""An engine file onto the GPU of this machine."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from lsp_deploy.engines.protocol import EngineInfo, read_sidecar
from lsp_deploy.engines.tensorrt_common.configuration import NotInThisVersionError, load_plugins
from lsp_deploy.engines.tensorrt_common.cuda import Cuda, CudaError
from lsp_deploy.engines.tensorrt_common.engine import TensorRtEngine
from lsp_deploy.engines.tensorrt_common.gpu import Gpu, first_gpu
from lsp_deploy.engines.tensorrt_common.logger import make_logger
from lsp_deploy.engines.tensorrt_common.messages import ModuleName
from lsp_deploy.errors import UserError

__all__ = ["load_engine"]

# Plugin libraries of this process: TensorRT refuses one whose plugins it knows already.
_LOADED: set[tuple[ModuleName, Path]] = set()


def load_engine(
    module: ModuleName, path: Path, *, weights: Path | None = None, plugins: Sequence[Path] = ()
) -> TensorRtEngine:
    """Read the engine in `path` onto the GPU of this machine.

    Args:
        module: what it was built with.
        path: the engine; its sidecar says which GPU it is for.
        weights: ONNX file whose weights go into it; an engine that was built without weights needs them.
        plugins: libraries of the plugins in it; those that it holds itself are not loaded again.

    Raises:
        UserError: there is no such file, no GPU or another one, or TensorRT does not take the engine.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist; build the engine first")
    info = read_sidecar(path) or EngineInfo(backend=module, target="unknown", file=path.name)
    gpu = _fitting_gpu(path, info)
    if info.options is not None and info.options.strip_weights and weights is None:
        raise UserError(f"{path} has no weights in it; name the ONNX file that it was built from (--weights)")
    if importlib.util.find_spec(module) is None:
        raise UserError(f"{path} runs with {module}, which is not installed here")
    trt: Any = importlib.import_module(module)
    logger, errors = _logger(module)
    errors.clear()
    held = {library.name for library in info.options.plugins} if info.options is not None else set()
    wanted = [library for library in plugins if library.name not in held]  # the engine brings its own
    new = [library for library in wanted if (module, library.resolve()) not in _LOADED]
    try:
        load_plugins(trt, logger, new)
    except NotInThisVersionError as error:
        raise UserError(str(error)) from None
    _LOADED.update((module, library.resolve()) for library in new)
    engine = _deserialized(trt, logger, path, info)
    if engine is None:
        raise UserError(f"{module} {trt.__version__} cannot load {path} on {gpu.name}{_reason(errors)}")
    if weights is not None and not _refit(trt, logger, engine, weights):
        raise UserError(f"{path} does not take the weights of {weights}{_reason(errors)}")
    try:
        cuda = Cuda()
    except CudaError as error:
        raise UserError(f"{path} cannot run on {gpu.name}: {error}") from None
    try:
        return TensorRtEngine(trt, engine, info.model_copy(update={"device": gpu.name}), cuda)
    except UserError:
        cuda.close()
        raise


def _fitting_gpu(path: Path, info: EngineInfo) -> Gpu:
    gpu = first_gpu()
    if gpu is None:
        needed = f" of compute capability {info.compute_capability}" if info.compute_capability else ""
        raise UserError(f"{path} runs on an NVIDIA GPU{needed}, and this machine has none")
    portable = info.options is not None and info.options.hardware_compatibility == "ampere-plus"
    if not portable and info.compute_capability not in (None, gpu.compute_capability):
        raise UserError(
            f"{path} is built for compute capability {info.compute_capability}; this machine's {gpu.name} has "
            f"{gpu.compute_capability}: build the engine for it"
        )
    return gpu


@cache
def _logger(module: ModuleName) -> tuple[Any, list[str]]:
    """Return the process's logger, since TensorRT hears the first one only, and the list that it puts errors into."""
    errors: list[str] = []
    trt: Any = importlib.import_module(module)
    return make_logger(trt, lambda severity, text: errors.append(text) if "ERROR" in severity else None), errors


def _deserialized(trt: Any, logger: Any, path: Path, info: EngineInfo) -> Any:
    runtime = trt.Runtime(logger)
    options = info.options
    # Such engines hold libraries. The sidecar, whose hash is the file's, says that we put them there.
    runtime.engine_host_code_allowed = options is not None and bool(options.plugins or options.version_compatible)
    return runtime.deserialize_cuda_engine(path.read_bytes())


def _refit(trt: Any, logger: Any, engine: Any, weights: Path) -> bool:
    refitter = trt.Refitter(engine, logger)
    taken: bool = trt.OnnxParserRefitter(refitter, logger).refit_from_file(str(weights))
    return taken and bool(refitter.refit_cuda_engine())


def _reason(errors: Sequence[str]) -> str:
    return f": {' '.join(errors[0].split())}" if errors else ""
