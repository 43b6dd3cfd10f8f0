"""What linear layers take on the GPU of this machine: each shape is timed once and remembered.

An engine of one layer each, in every form that the layer could be given in; all engines of a shape run in turns. Times
are kept in the cache by shape, GPU, builder and the plugin's library.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from lsp_deploy import console
from lsp_deploy.allocation.gpu_execution import gpu_too_old
from lsp_deploy.allocation.precision import COMPRESSIBLE_ROLES
from lsp_deploy.cache import cache_folder, content_key, drop_old_entries
from lsp_deploy.errors import UserError
from lsp_deploy.files import sha256_of, write_text
from lsp_deploy.hardware.cpu_timings import LayerTimes, LinearShape
from lsp_deploy.hardware.gpu_timings import GPU_DENSITIES, GpuTimings
from lsp_deploy.steps.timing import layer_shape

if TYPE_CHECKING:
    import onnx_ir as ir
    from numpy.typing import NDArray

    from lsp_deploy.engines.protocol import Backend, Engine
    from lsp_deploy.hardware.target import ElementType, Target
    from lsp_deploy.recipe import Recipe
    from lsp_deploy.sensitivity.quantization import ComputeType
    from lsp_deploy.steps.preparation import PreparedModel

__all__ = ["EngineTimer", "GpuLayerTimer", "engine_timer", "gpu_candidates", "time_gpu_layers"]

_FORMAT = 1  # of what is kept, and of the models that are timed
_AT = " @ "
_ROUNDS, _RUNS, _WARM_UP = 5, 40, 10


class GpuLayerTimer(Protocol):
    """Times one layer."""

    device: str
    """The GPU's name."""
    versions: Mapping[str, str]
    """Of what builds the engines."""
    has_operator: bool
    """Whether lsp::BlockSparseLinear can be timed."""

    def curves(
        self, shape: LinearShape, names: Sequence[str], compute_type: ComputeType
    ) -> dict[str, dict[float, float]]:
        """Return microseconds by candidate and density."""
        ...


def time_gpu_layers(
    prepared: PreparedModel, recipe: Recipe, target: Target, plugins: Sequence[Path] = (), *,
    timer: GpuLayerTimer | None = None,
) -> GpuTimings | None:  # fmt: skip
    """Return what the layers of transformer blocks take on the target's GPU at the opt shapes, where it is here.

    Args:
        prepared: the model.
        recipe: which candidates there are; without a choice between them nothing is timed.
        target: a GPU.
        plugins: libraries with the operator for TensorRT; without one it is not timed, and the user is told.
        timer: what times; the default builds engines and remembers.

    Returns:
        None where the GPU is elsewhere, there is nothing to choose, or an engine is not built; the last is told.
    """
    from lsp_deploy.engines.protocol import EngineBuildError

    if not (recipe.precision == "auto" or recipe.sparsity == "auto" or recipe.max_latency_ms is not None):
        return None
    try:
        timer = timer or engine_timer(target, plugins)
    except UserError:
        return None  # the usual case: engines are built here for a GPU elsewhere
    names = gpu_candidates(recipe, target, prepared.compute_type, operator=timer.has_operator)
    shapes = {
        layer.name: layer_shape(layer, recipe.block_shape)
        for layer in prepared.layers
        if layer.role in COMPRESSIBLE_ROLES and layer.node.op_type != "Conv"
    }
    distinct = list(dict.fromkeys(shapes.values()))
    if not timer.has_operator and recipe.sparsity in ("auto", "block"):
        console.say("lsp::BlockSparseLinear is not timed: name liblsp_block_sparse.so with --plugin")
    curves = {}
    try:
        with console.progress(f"timing layers on the {timer.device}", len(distinct)) as advance:
            for shape in distinct:
                curves[shape] = timer.curves(shape, names, prepared.compute_type)
                advance(1)
    except EngineBuildError as error:
        console.warn(f"layers were not timed, what they take is estimated: {error}")
        return None
    return GpuTimings(
        timer.device,
        {name: LayerTimes(shape, _without_two_four(curves[shape])) for name, shape in shapes.items()},
        {name: _two_four(curves[shape]) for name, shape in shapes.items()},
    )


def gpu_candidates(recipe: Recipe, target: Target, compute_type: ComputeType, *, operator: bool) -> list[str]:
    """Return the ways to run a layer that the recipe leaves open, dense ones first.

    Args:
        recipe: what was asked for.
        target: a GPU.
        compute_type: of what is not quantized.
        operator: whether lsp::BlockSparseLinear can be run.
    """
    types: list[str] = [compute_type]
    if "int8" in target.types and recipe.precision in ("auto", "int8"):
        types.append("int8")
    kernels = ["matmul"]
    if recipe.sparsity in ("auto", "2:4"):
        kernels.append("two_four")
    if recipe.sparsity in ("auto", "block") and operator and gpu_too_old(target) is None:
        kernels.append("block_sparse")
    return [f"{kernel} {dtype}" for kernel in kernels for dtype in types if (kernel, dtype) != ("block_sparse", "fp32")]


def engine_timer(target: Target, plugins: Sequence[Path] = ()) -> EngineTimer:
    """Return what times layers on the target's GPU.

    Raises:
        UserError: it is not here, or nothing that builds for it is.
    """
    from lsp_deploy.gpu_engines import running_backend

    return EngineTimer(target, running_backend(target), plugins)


class EngineTimer:
    """Times layers in engines of their own and remembers."""

    def __init__(self, target: Target, backend: Backend, plugins: Sequence[Path] = ()) -> None:
        """Take a builder whose engines run here, and libraries with the operator."""
        from lsp_deploy.engines.tensorrt_common.gpu import first_gpu

        gpu = first_gpu()
        self.device = gpu.name if gpu is not None else target.title
        self.versions: Mapping[str, str] = {backend.name: backend.status(target).version or "unknown"}
        self.has_operator = bool(plugins)
        self._target, self._backend, self._plugins = target, backend, tuple(plugins)

    def curves(
        self, shape: LinearShape, names: Sequence[str], compute_type: ComputeType
    ) -> dict[str, dict[float, float]]:
        """Return microseconds by candidate and density, from the cache where they were measured before.

        Raises:
            EngineBuildError: the builder refuses a candidate.
        """
        folder = cache_folder() / "gpu-timings"
        machine = {"device": self.device, **self.versions, "plugins": [sha256_of(path) for path in self._plugins]}
        what: dict[str, Any] = {**vars(shape), "names": list(names), "compute_type": compute_type}
        entry = folder / content_key(format=_FORMAT, machine=machine, **what)
        drop_old_entries(folder, entry)
        path = entry / "times.json"
        if not path.is_file():
            write_text(path, json.dumps(self._measured(shape, names, compute_type), indent=1) + "\n")
        known: dict[str, float] = json.loads(path.read_text())
        curves: dict[str, dict[float, float]] = {name: {} for name in names}
        for label, time in known.items():
            name, density = label.split(_AT)
            curves[name][float(density)] = time
        return curves

    def _measured(self, shape: LinearShape, names: Sequence[str], compute_type: ComputeType) -> dict[str, float]:
        from lsp_deploy.steps.layer_candidates import gpu_candidate_model, layer_feeds

        with tempfile.TemporaryDirectory(prefix="lsp-deploy-") as folder, ExitStack() as stack:
            calls: dict[str, Callable[[], float]] = {}
            for name in names:
                for density in GPU_DENSITIES if name.startswith("block_sparse") else (1.0,):
                    model = gpu_candidate_model(shape, name, density, compute_type)
                    engine = stack.enter_context(self._engine(model, Path(folder) / f"{len(calls)}.onnx"))
                    calls[f"{name}{_AT}{density:g}"] = _timed(engine, layer_feeds(shape))
            return _least_us(calls)

    def _engine(self, model: ir.Model, path: Path) -> Engine:
        from lsp_deploy.engines.protocol import BuildOptions
        from lsp_deploy.model import save_model

        save_model(model, path)
        options = BuildOptions(sparse_weights=self._backend.name == "tensorrt", plugins=self._plugins)
        engine = path.with_suffix(".engine")
        self._backend.build(path, engine, self._target, options)
        return self._backend.load(engine)


def _timed(engine: Engine, feeds: Mapping[str, NDArray[Any]]) -> Callable[[], float]:
    """Return a call that runs the engine once on feeds of its own types, and gives milliseconds on the GPU."""
    from lsp_deploy.engines.protocol import DeviceTimed

    assert isinstance(engine, DeviceTimed)
    typed = {
        name: np.clip(np.rint(feeds[name] * 32), -127, 127) if spec.dtype == np.int8 else feeds[name]
        for name, spec in engine.inputs.items()
    }
    call = engine.timed_run({name: value.astype(engine.inputs[name].dtype) for name, value in typed.items()})
    for _ in range(_WARM_UP):
        call()
    return call


def _least_us(calls: Mapping[str, Callable[[], float]]) -> dict[str, float]:
    """Return the least microseconds of each call; they take turns, so that a change of clocks meets all alike."""
    least = dict.fromkeys(calls, float("inf"))
    for _ in range(_ROUNDS):
        for name, call in calls.items():
            least[name] = min(least[name], *(call() * 1000 for _ in range(_RUNS)))
    return {name: round(time, 3) for name, time in least.items()}


def _without_two_four(curves: Mapping[str, Mapping[float, float]]) -> dict[str, Mapping[float, float]]:
    return {name: curve for name, curve in curves.items() if not name.startswith("two_four")}


def _two_four(curves: Mapping[str, Mapping[float, float]]) -> dict[ElementType, float]:
    types: tuple[ElementType, ...] = ("fp32", "fp16", "bf16", "int8")
    return {dtype: curves[name][1.0] for dtype in types if (name := f"two_four {dtype}") in curves}
