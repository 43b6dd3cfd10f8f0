"""The user's model made ready for analysis: loaded, canonical, in float32, its linear layers found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from lsp_deploy.errors import UserError
from lsp_deploy.files import sha256_of
from lsp_deploy.recipe import Recipe, parse_shapes
from lsp_deploy.sensitivity.quantization import ComputeType

if TYPE_CHECKING:
    import onnx_ir as ir

    from lsp_deploy.hardware.target import Target
    from lsp_deploy.linear_layers import LinearLayer

__all__ = ["BATCHES", "PreparedModel", "Shapes", "prepare", "shape_bounds"]

_COMPUTE_TYPES: dict[str, ComputeType] = {"fp32": "fp32", "fp16": "fp16", "bf16": "bf16"}
BATCHES = {"min": 1, "opt": 8, "max": 32}


@dataclass(frozen=True)
class Shapes:
    """Input shapes by name that an engine must take (min to max) and is tuned for (opt)."""

    min: dict[str, tuple[int, ...]]
    opt: dict[str, tuple[int, ...]]
    max: dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class PreparedModel:
    """A model ready for analysis."""

    path: Path
    sha256: str
    original: ir.Model
    """As the user gave it."""
    canonical: ir.Model
    """Canonical form, computing in float32; node names are the layer names of the plan."""
    original_io: dict[str, ir.DataType]
    shapes: Shapes
    layers: Sequence[LinearLayer]
    weights: dict[str, NDArray[np.float32]]
    """W [K, N] by layer name."""
    attention_flops: int
    compute_type: ComputeType
    opset: int

    @property
    def fixed_batch(self) -> bool:
        """Whether the model takes one batch size only."""
        first = next(iter(self.shapes.opt))
        return self.shapes.min[first][0] == self.shapes.max[first][0]


def prepare(path: Path, recipe: Recipe, target: Target) -> PreparedModel:
    """Load `path`, bring it into canonical form and find its linear layers.

    Raises:
        UserError: a file that is not a usable model, a type the target does not have, shapes that are missing or do
            not fit, or no constant weight matrix at all.
    """
    from lsp_deploy.linear_layers import attention_flops, linear_layers
    from lsp_deploy.model import load_model
    from lsp_deploy.passes.canonicalize import canonicalize
    from lsp_deploy.passes.set_io_types import io_types
    from lsp_deploy.passes.to_float32 import ToFloat32Pass
    from lsp_deploy.plugins.operators import refuse_operators

    compute_type = _compute_type(recipe, target)
    original = load_model(path)
    refuse_operators(original, path)
    shapes = shape_bounds(
        original, min_shapes=recipe.min_shapes, opt_shapes=recipe.opt_shapes, max_shapes=recipe.max_shapes
    )
    original_io = io_types(original)
    # Q/DQ scales of 16 bit need opset 19.
    needed = 19 if compute_type != "fp32" and recipe.precision in ("auto", "int8") else 17
    canonical = canonicalize(original.clone(), max_opset=target.max_opset, needed_opset=needed)
    ToFloat32Pass()(canonical)
    layers = linear_layers(canonical, shapes.opt)
    if not layers:
        raise UserError(
            f"{path}: no MatMul, Gemm or patch-embedding Conv with a constant weight was found; "
            "there is nothing to compress (is it a vision transformer?)"
        )
    return PreparedModel(
        path=path,
        sha256=sha256_of(path),
        original=original,
        canonical=canonical,
        original_io=original_io,
        shapes=shapes,
        layers=layers,
        weights={layer.name: layer.weight() for layer in layers},
        attention_flops=attention_flops(canonical, shapes.opt),
        compute_type=compute_type,
        opset=canonical.opset_imports[""],
    )


def shape_bounds(
    model: ir.Model, *, min_shapes: str | None = None, opt_shapes: str | None = None, max_shapes: str | None = None
) -> Shapes:
    """Return the shapes that an engine of `model` must take and is tuned for; a batch that is not given is 1, 8, 32.

    Args:
        model: as the user gave it.
        min_shapes: smallest, as x:1x3x224x224,y:1x77; likewise the others.
        opt_shapes: what the engine is tuned for.
        max_shapes: largest.

    Raises:
        UserError: a shape that does not fit, that is needed and not given, or bounds out of order.
    """
    from lsp_deploy.model import resolve_shapes, with_batch

    given = {"min": min_shapes, "opt": opt_shapes, "max": max_shapes}
    parsed = {which: parse_shapes(text) if text else None for which, text in given.items()}
    # A dimension that is given once and not varied need not be typed three times.
    fallback = parsed["opt"] or parsed["max"] or parsed["min"]
    # What was typed is looked at first, so that what is wrong with it is said of it and not of what follows from it.
    for which, shapes in parsed.items():
        if shapes is not None:
            resolve_shapes(model, shapes, batch=BATCHES[which], flag="--opt-shapes")
    resolved = {}
    for which, batch in BATCHES.items():
        shapes = parsed[which]
        if shapes is None and fallback is not None:
            shapes = with_batch(model, fallback, batch)
        resolved[which] = resolve_shapes(model, shapes, batch=batch, flag="--opt-shapes")
    for name in resolved["opt"]:
        triples = zip(resolved["min"][name], resolved["opt"][name], resolved["max"][name], strict=True)
        if any(not low <= tuned <= high for low, tuned, high in triples):
            raise UserError(
                f"input {name}: min {_text(resolved['min'][name])}, opt {_text(resolved['opt'][name])} and max "
                f"{_text(resolved['max'][name])} are not in order; give --min-shapes, --opt-shapes and --max-shapes"
            )
    return Shapes(min=resolved["min"], opt=resolved["opt"], max=resolved["max"])


def _compute_type(recipe: Recipe, target: Target) -> ComputeType:
    asked = recipe.precision
    if asked in ("auto", "int8"):
        if asked == "int8" and "int8" not in target.types:
            raise UserError(f"--precision int8: {target.name} has no int8; it has {', '.join(target.types)}")
        return target.compute_type
    if asked not in target.types:
        raise UserError(f"--precision {asked}: {target.name} has no {asked}; it has {', '.join(target.types)}")
    # On a CPU the operator alone multiplies in bf16; what is between its nodes stays in float32.
    return target.compute_type if target.kind == "cpu" else _COMPUTE_TYPES[asked]


def _text(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))
