"""The verb `build`: an ONNX file becomes a target's engine, or a statement of what to run where."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lsp_deploy.engines.protocol import BuildOptions
from lsp_deploy.errors import UserError

if TYPE_CHECKING:
    import onnx_ir as ir

    from lsp_deploy.hardware.target import Target
    from lsp_deploy.steps.building import Built
    from lsp_deploy.steps.preparation import Shapes

__all__ = ["BuildRequest", "build_model", "built_json", "built_lines", "model_in", "shapes_for"]


_FLAGS = {"plugins": "--plugin", "hardware_compatibility": "--hardware-compatible"}
"""Of options whose flag is no plain copy of their name."""


@dataclass(frozen=True)
class BuildRequest:
    """How an engine is built, as typed."""

    target: str
    output: Path | None = None
    builder: str | None = None
    shapes: Mapping[str, str | None] = field(default_factory=dict)
    """min_shapes, opt_shapes and max_shapes, each as x:1x3x224x224."""
    sparse_weights: bool | None = None
    """None: where a weight has the 2:4 pattern."""
    options: BuildOptions = field(default_factory=BuildOptions)
    """Everything else; shapes and sparse_weights in it are not read."""


def build_model(source: Path, request: BuildRequest) -> Built:
    """Build `source`, an ONNX file or an output folder of `compress`, for a target.

    What is not built comes back with its reason: the target refuses the model, no builder here serves it, or the
    builder failed.

    Raises:
        UserError: no usable model, no such target, shapes that do not fit, options that the target's builder does
            not have, or an output that the engine is built from.
    """
    from lsp_deploy.hardware.target import load_target
    from lsp_deploy.model import load_model
    from lsp_deploy.passes.validate_target import TargetRefusesError, ValidateTargetPass
    from lsp_deploy.plugins.operators import operator_nodes
    from lsp_deploy.steps.building import Built, build_from

    target, path = load_target(request.target), model_in(source)
    if target.kind == "cpu":
        _refuse_tensorrt_options(request)
    model = load_model(path)
    _refuse_to_overwrite(request, path, model)
    shapes = shapes_for(path, model, request.shapes)
    try:
        ValidateTargetPass(target.rules())(model)
    except TargetRefusesError as error:
        return Built(not_built=str(error), failures=[str(error)])
    sparse = request.sparse_weights
    options = request.options.model_copy(
        update={
            "min_shapes": shapes.min,
            "opt_shapes": shapes.opt,
            "max_shapes": shapes.max,
            "sparse_weights": has_two_four(path, shapes) if sparse is None else sparse,
        }
    )
    operators = bool(operator_nodes(model))
    return build_from(
        *(path, target, options, lambda backend: request.output or _default_engine(path, backend, target)),
        builder=request.builder,
        operators=operators,
    )


def model_in(source: Path) -> Path:
    """Return the ONNX file that `source` names: itself, or that of an output folder of `compress`.

    Raises:
        UserError: a folder without one.
    """
    if not source.is_dir():
        return source
    if not (model := source / "model.onnx").is_file():
        raise UserError(f"{source} holds no model.onnx; name an output folder of compress, or an ONNX file")
    return model


def shapes_for(path: Path, model: ir.Model, given: Mapping[str, str | None]) -> Shapes:
    """Return the shapes to build for: those given, else those that the plan beside `path` was made for, else defaults.

    Args:
        path: of the model.
        model: what is in it.
        given: min_shapes, opt_shapes and max_shapes, each as x:1x3x224x224.

    Raises:
        UserError: a shape that does not fit, or that is needed and not given.
    """
    from lsp_deploy.plan import load_plan
    from lsp_deploy.recipe import parse_shapes
    from lsp_deploy.steps.preparation import shape_bounds

    typed = {name: given.get(name) for name in ("min_shapes", "opt_shapes", "max_shapes")}
    for name, text in typed.items():
        try:
            parse_shapes(text) if text else None
        except ValueError as error:
            raise UserError(f"--{name.replace('_', '-')} {error}") from error
    plan = path.with_name("plan.json")
    if not any(typed.values()) and path.name == "model.onnx" and plan.is_file():
        recipe = load_plan(plan).recipe
        typed = {name: recipe.get(name) for name in typed}
    return shape_bounds(model, **typed)


def has_two_four(path: Path, shapes: Shapes) -> bool:
    """Return whether a linear layer of the model in `path` has 2:4 zeros."""
    from lsp_deploy.inspection import inspect_model

    return any(layer.pattern == "2:4" for layer in inspect_model(path, shapes.opt).layers)


def built_lines(built: Built, source: Path, target: str) -> list[str]:
    """Return what `build` prints of an engine, warnings apart; of one that was not built, why and what else to do."""
    from lsp_deploy.engines.protocol import layer_counts
    from lsp_deploy.hardware.target import load_target

    if built.info is None:
        command = f"lsp-deploy bundle {shlex.quote(str(source))} --target {shlex.quote(target)} -o bundle.tar.zst"
        packs = built.commands is not None and load_target(target).build_on_device
        return [str(built.not_built), *([f"all that the device needs, in one archive: {command}"] if packs else [])]
    info = built.info
    size_mb = (info.size_bytes or 0) / 1e6
    version = ", ".join(f"{name} {number}" for name, number in info.versions.items())
    counts = ", ".join(f"{count} {name}" for name, count in list(layer_counts(info.layers).items())[:6])
    lines = [f"{built.path}: {size_mb:.1f} MB for {target}, built by {info.backend} in {info.build_seconds or 0:.1f} s"]
    return [*lines, f"versions: {version}", *([f"layers: {counts}"] if counts else [])]


def built_json(built: Built, target: str) -> dict[str, Any]:
    """Return the same for `--json`."""
    return {
        "target": target,
        "built": built.info is not None,
        "engine": None if built.path is None else str(built.path),
        "info": None if built.info is None else built.info.model_dump(mode="json"),
        "not_built_reason": built.not_built,
        "commands": built.commands,
    }


def _refuse_tensorrt_options(request: BuildRequest) -> None:
    """Refuse what ONNX Runtime would not heed."""
    usual = BuildOptions(timeout_seconds=request.options.timeout_seconds)
    given = [name for name in BuildOptions.model_fields if getattr(request.options, name) != getattr(usual, name)]
    if request.sparse_weights is not None:
        given.append("sparse_weights")
    if given:
        flags = [_FLAGS.get(name, f"--{name.replace('_', '-')}") for name in given]
        raise UserError(f"{request.target} is built by ONNX Runtime, which has no {', '.join(flags)}")


def _refuse_to_overwrite(request: BuildRequest, path: Path, model: ir.Model) -> None:
    """Refuse to write over what the build reads."""
    import onnx_ir as ir

    weights = [value.const_value for graph in model.graphs() for value in graph.initializers.values()]
    external = {Path(tensor.path) for tensor in weights if isinstance(tensor, ir.ExternalTensor)}
    written = {"-o": request.output, "--timing-cache": request.options.timing_cache}
    for flag, target in written.items():
        if target is not None and target.exists():
            for read in (path, *external, *request.options.plugins):
                if target.samefile(read):
                    raise UserError(f"{flag} {target} is a file that the engine is built from; choose another")


def _default_engine(path: Path, backend: str, target: Target) -> Path:
    """Return where an engine goes: in an output folder where compress puts it, else beside where the user is."""
    from lsp_deploy.steps.output_folder import OutputFolder

    folder = OutputFolder(path.parent)
    if path.name == folder.model.name and folder.plan.is_file():
        return folder.engine(backend, target.name)
    return Path(f"{path.stem}-{backend}-{target.name}.engine")
