"""Models and engine files, ready to run on the GPU of this machine."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from lsp_deploy import console
from lsp_deploy.engines.protocol import Backend, BuildOptions, Engine, read_sidecar
from lsp_deploy.engines.tensorrt_common.loading import load_engine
from lsp_deploy.engines.tensorrt_common.messages import ModuleName
from lsp_deploy.errors import UserError

if TYPE_CHECKING:
    import onnx_ir as ir

    from lsp_deploy.hardware.target import Target

__all__ = ["build_options", "engine_shapes", "gpu_engines", "is_engine_file", "running_backend"]

_ENGINE_SUFFIXES = frozenset({".engine", ".plan"})


def is_engine_file(path: Path) -> bool:
    """Return whether `path` is a built engine by its name, and not a model."""
    return path.suffix in _ENGINE_SUFFIXES


def build_options(
    model: ir.Model | None,
    shapes: Mapping[str, tuple[int, ...]] | None,
    batches: Sequence[int],
    plugins: Sequence[Path] = (),
) -> BuildOptions:
    """Return options for an engine of `model` that runs every batch up to the largest, for which it is tuned.

    Without a model, for an engine that is built already, they name the plugins only.

    Raises:
        UserError: a given shape that does not fit, or a dynamic dimension beyond the batch that is not given.
    """
    from lsp_deploy.model import resolve_shapes, with_batch

    if model is None:
        return BuildOptions(plugins=tuple(plugins))
    resolve_shapes(model, shapes, batch=1)  # what was typed is looked at as it was typed
    low, high = (
        resolve_shapes(model, with_batch(model, shapes or {}, batch), batch=batch) for batch in (1, max(batches))
    )
    return BuildOptions(min_shapes=low, opt_shapes=high, max_shapes=high, plugins=tuple(plugins))


@contextmanager
def gpu_engines(
    paths: Mapping[str, Path], target: Target, options: BuildOptions, weights: Path | None = None
) -> Iterator[dict[str, Engine]]:
    """Open models and engine files as engines on the GPU of this machine, by label, for as long as the context lasts.

    ONNX files are built first, in a temporary folder, by the target's first builder whose engines run here. Engine
    files take the weights of the ONNX file `weights`, where one is given.

    Raises:
        UserError: the target's GPU is not here, nothing that builds for it is installed, or an engine does not load.
        EngineBuildError: a builder refused a model.
    """
    with tempfile.TemporaryDirectory(prefix="lsp-deploy-") as folder, ExitStack() as stack:
        engines = {}
        for number, (label, path) in enumerate(paths.items()):
            if is_engine_file(path):
                opened = _load(path, options.plugins, weights)
            else:
                opened = _build(path, target, options, Path(folder) / f"{number}.engine")
            engines[label] = stack.enter_context(opened)
        told = _warn(engines, frozenset())
        yield engines
        _warn(engines, told)  # what was met in running


def _warn(engines: Mapping[str, Engine], told: frozenset[str]) -> frozenset[str]:
    """Tell what engines warn of and was not told before; return all of it."""
    said = [f"{label}: {warning}" for label, engine in engines.items() for warning in engine.describe().warnings]
    for warning in said:
        if warning not in told:
            console.warn(warning)
    return told.union(said)


def engine_shapes(engine: Engine, given: Mapping[str, tuple[int, ...]] | None) -> dict[str, tuple[int, ...]]:
    """Return concrete shapes of an engine's inputs: those given, else its own at batch 1.

    Raises:
        UserError: a dimension beyond the batch is open and not given.
    """
    shapes = {}
    for name, spec in engine.inputs.items():
        if given is not None and name in given:
            shapes[name] = given[name]
            continue
        if any(isinstance(size, str) for size in spec.shape[1:]):
            raise UserError(f"input {name} is {'x'.join(map(str, spec.shape))}: give its shape with --shapes")
        shapes[name] = tuple(1 if isinstance(size, str) else size for size in spec.shape)
    return shapes


def running_backend(target: Target) -> Backend:
    """Return the target's first builder whose engines run on the GPU of this machine.

    Raises:
        UserError: the target's GPU is not here, or nothing that builds for it is installed.
    """
    from lsp_deploy.engines.backends import backends

    reasons = []
    known = {backend.name: backend for backend in backends()}
    for name in target.builders:
        backend = known.get(name)
        if backend is None or not backend.serves(target):
            continue
        status = backend.status(target)
        if status.can_build and status.can_run:
            return backend
        reasons.append(f"{name}: {status.hint}")
    raise UserError(f"{target.name} is not here: {'; '.join(reasons)}")


def _build(path: Path, target: Target, options: BuildOptions, engine: Path) -> Engine:
    backend = running_backend(target)
    # 2:4 kernels are for weights with the pattern: the others are the same with as without.
    options = options.model_copy(update={"sparse_weights": backend.name == "tensorrt"})
    with console.progress(f"building {path.name} with {backend.name} for {target.name}", 1) as advance:
        backend.build(path, engine, target, options)
        advance(1)
    return backend.load(engine)


def _load(path: Path, plugins: Sequence[Path], weights: Path | None) -> Engine:
    info = read_sidecar(path) if path.is_file() else None
    built_with = info.backend if info is not None else "tensorrt"
    if built_with not in ("tensorrt", "tensorrt_rtx"):
        raise UserError(f"{path} is an engine of {built_with}, which does not run on a GPU here")
    module: ModuleName = "tensorrt" if built_with == "tensorrt" else "tensorrt_rtx"
    return load_engine(module, path, weights=weights, plugins=plugins)
