"""The engine of a run: built where a builder on this machine serves the target, explained where none does."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lsp_deploy import console

if TYPE_CHECKING:
    from lsp_deploy.engines.protocol import EngineInfo
    from lsp_deploy.hardware.target import Target
    from lsp_deploy.plan import Plan
    from lsp_deploy.steps.output_folder import OutputFolder
    from lsp_deploy.steps.preparation import Shapes

__all__ = ["Built", "build_engine"]


@dataclass
class Built:
    """An engine, or why there is none."""

    info: EngineInfo | None = None
    not_built: str | None = None
    failures: list[str] = field(default_factory=list)
    """Filled when a builder that serves the target failed (exit code 1)."""


def build_engine(output: OutputFolder, target: Target, plan: Plan, shapes: Shapes, *, wanted: bool) -> Built:
    """Build the target's engine from the written model, in the first builder of the target that is usable here.

    `wanted` is False where the user asked for none.
    """
    from lsp_deploy.engines.backends import builder_for
    from lsp_deploy.engines.protocol import BuildOptions, EngineBuildError

    sparse = any(layer.sparsity.pattern == "2:4" for layer in plan.layers)
    if not wanted:
        return Built(not_built="not built: --no-build")
    backend, reason = builder_for(target)
    if backend is None:
        return Built(not_built=f"{reason}; on the device run:\n{_commands(target, shapes, sparse)}")
    path = output.engine(backend.name, target.name)
    path.parent.mkdir(exist_ok=True)
    build_options = BuildOptions(
        min_shapes=shapes.min, opt_shapes=shapes.opt, max_shapes=shapes.max, sparse_weights=sparse
    )
    try:
        with console.progress(f"building the {backend.name} engine for {target.name}", 1) as advance:
            info = backend.build(output.model, path, target, build_options)
            advance(1)
    except EngineBuildError as error:
        path.unlink(missing_ok=True)
        return Built(
            not_built=f"the build failed: {error}", failures=[f"{backend.name} engine for {target.name}: {error}"]
        )
    return Built(info=info)


def _commands(target: Target, shapes: Shapes, sparse_weights: bool) -> str:
    dynamic = shapes.min != shapes.max
    return target.commands_on_device(
        shapes={"min": shapes.min, "opt": shapes.opt, "max": shapes.max} if dynamic else None,
        sparse_weights=sparse_weights,
    )
