"""An engine: built where a builder on this machine serves the target, explained where none does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from lsp_deploy import console
from lsp_deploy.files import make_folder
from lsp_deploy.steps.trtexec import trtexec_flags

if TYPE_CHECKING:
    from lsp_deploy.engines.protocol import BuildOptions, EngineInfo
    from lsp_deploy.hardware.target import Target
    from lsp_deploy.plan import Plan
    from lsp_deploy.steps.output_folder import OutputFolder
    from lsp_deploy.steps.preparation import Shapes

__all__ = ["Built", "build_engine", "build_from"]


@dataclass
class Built:
    """An engine, or why there is none."""

    info: EngineInfo | None = None
    path: Path | None = None
    """Where the engine lies."""
    not_built: str | None = None
    """Why there is none, in one line, with `commands` behind it where there are some."""
    commands: str | None = None
    """What to run on the device, where nothing here builds for it."""
    failures: list[str] = field(default_factory=list)
    """Filled when a builder that serves the target failed (exit code 1)."""


def build_engine(
    output: OutputFolder, target: Target, plan: Plan, shapes: Shapes, *, wanted: bool, plugins: Sequence[Path] = ()
) -> Built:
    """Build the target's engine from the written model, in the first builder of the target that is usable here.

    `wanted` is False where the user asked for none; `plugins` are libraries for TensorRT.
    """
    from lsp_deploy.engines.protocol import BuildOptions

    if not wanted:
        return Built(not_built="not built: --no-build")
    options = BuildOptions(
        min_shapes=shapes.min,
        opt_shapes=shapes.opt,
        max_shapes=shapes.max,
        sparse_weights=any(layer.sparsity.pattern == "2:4" for layer in plan.layers),
        plugins=tuple(plugins),
    )
    operators = any(layer.execution.kernel == "block_sparse" for layer in plan.layers)
    return build_from(
        output.model, target, options, lambda backend: output.engine(backend, target.name), operators=operators
    )


def build_from(
    model: Path,
    target: Target,
    options: BuildOptions,
    engine: Callable[[str], Path],
    *,
    builder: str | None = None,
    operators: bool = False,
) -> Built:
    """Build `model` for `target` in the first of its builders that is usable here.

    Args:
        model: ONNX file.
        target: what to build for.
        options: with the shapes of all inputs.
        engine: where the engine goes, by the builder's name.
        builder: the one builder to use; none: any of the target's.
        operators: whether the model holds operators of ours, which TensorRT finds in a plugin.

    Raises:
        UserError: the engine's folder cannot be made.
    """
    from lsp_deploy.engines.backends import builder_for
    from lsp_deploy.engines.protocol import EngineBuildError

    backend, reason = builder_for(target, builder)
    commands = _commands(model, target, options, operators) if "tensorrt" in target.builders else None
    if backend is None:
        return Built(not_built=f"{reason}; on the device run:\n{commands}" if commands else reason, commands=commands)
    path = engine(backend.name)
    make_folder(path.parent)
    try:
        with console.progress(f"building the {backend.name} engine for {target.name}", 1) as advance:
            info = backend.build(model, path, target, options)
            advance(1)
    except EngineBuildError as error:
        built = Built(not_built=f"the build failed: {error}")
        built.failures = [f"{backend.name} engine for {target.name}: {error}"]
        if backend.name != "tensorrt" and commands:
            built.not_built = f"{built.not_built}; to try TensorRT, on the device run:\n{commands}"
            built.commands = commands
        return built
    return Built(info=info, path=path)


def _commands(model: Path, target: Target, options: BuildOptions, operators: bool) -> str:
    shapes = {"min": options.min_shapes, "opt": options.opt_shapes, "max": options.max_shapes}
    plugins = [f"./{path.name}" for path in options.plugins]
    build_flags, run_flags = trtexec_flags(options, model.name)
    return target.commands_on_device(
        *(model.name, f"{model.stem}.engine"),
        shapes=shapes if options.min_shapes != options.max_shapes else None,
        sparse_weights=options.sparse_weights,
        plugins=plugins or (["./liblsp_block_sparse.so"] if operators else []),
        build_flags=build_flags,
        run_flags=run_flags,
    )
