"""What is known of the integers that a graph computes shapes with.

Exporters compute shapes in the graph: Shape, Gather, Concat, Reshape. Where only the batch is dynamic, most of the
numbers are known all the same. A partly known tensor is an object array of int, `ir.SymbolicDim` (a size, hence not
negative, and perhaps a product of others) and None (nothing is known).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from lsp_deploy.passes.constant_inputs import constant_array

__all__ = ["Size", "Sizes", "is_same_size", "known_sizes", "product", "quotient", "sizes_of"]

Size: TypeAlias = "int | ir.SymbolicDim | None"

Sizes = NDArray[np.object_]

# Shapes are short; anything longer is data.
_MAX_ELEMENTS = 64


def known_sizes(node: ir.Node, known: Mapping[ir.Value, Sizes]) -> Sizes | None:
    """Return what is known of the first output of `node`, given what is known of other values; None if nothing."""
    if node.domain:
        return None
    if node.op_type == "Shape":
        return _shape(node)
    rule = _RULES.get(node.op_type)
    inputs = [sizes_of(value, known) for value in node.inputs]
    if rule is None or any(sizes is None for sizes in inputs):
        return None
    return rule(node, *inputs)


def sizes_of(value: ir.Value | None, known: Mapping[ir.Value, Sizes]) -> Sizes | None:
    """Return what is known of a small integer or boolean tensor; None if it is none."""
    if value is None or value.dtype not in (ir.DataType.INT64, ir.DataType.INT32, ir.DataType.BOOL):
        return None
    if value in known:
        return known[value]
    if value.shape is None or not value.shape.is_static() or np.prod(value.shape.numpy(), dtype=int) > _MAX_ELEMENTS:
        return None
    array = constant_array(value)
    if array is not None:
        return _objects(array.tolist(), array.shape)
    return np.full(value.shape.numpy(), None, dtype=object)


def is_same_size(a: Any, b: Any) -> bool:
    """Return whether two known sizes are surely equal: the same number, or the same name."""
    if isinstance(a, ir.SymbolicDim) and isinstance(b, ir.SymbolicDim):
        return a.value is not None and a.value == b.value
    return isinstance(a, int) and isinstance(b, int) and a == b


def product(sizes: Iterable[Size]) -> Size:
    """Return the product of sizes, None if one is not known."""
    result: Size = 1
    for size in sizes:
        result = _multiply(result, size)
    return result


def quotient(a: Size, b: Size) -> Size:
    """Return a / b, None if it is not known to be whole."""
    if isinstance(a, int) and isinstance(b, int):
        return a // b if b and a % b == 0 else None
    if not (_is_named(a) and (isinstance(b, int) or _is_named(b))) or b == 0:
        return None
    assert isinstance(a, ir.SymbolicDim) and b is not None
    try:
        result = (a / b).evaluate({})
    except ValueError:
        # A name that a user gave need not be an expression.
        return None
    return result if isinstance(result, int) or "/" not in str(result) else None


def _multiply(a: Size, b: Size) -> Size:
    if a is None or b is None or a == 1:
        return b if a == 1 else None
    try:
        result = a * b
    except ValueError:
        return None
    return result if isinstance(result, int) or result.value is not None else None


def _is_named(size: Size) -> bool:
    return isinstance(size, ir.SymbolicDim) and size.value is not None


def _objects(values: Any, shape: tuple[int, ...]) -> Sizes:
    array = np.empty(shape, dtype=object)
    array[...] = values
    return array


def _shape(node: ir.Node) -> Sizes | None:
    value = node.inputs[0]
    if value is None or value.shape is None:
        return None
    start = node.attributes["start"].as_int() if "start" in node.attributes else 0
    end = node.attributes["end"].as_int() if "end" in node.attributes else None
    sizes = list(value.shape)[start:end]
    return _objects(sizes, (len(sizes),))


def _gather(node: ir.Node, data: Sizes, indices: Sizes) -> Sizes | None:
    if data.ndim != 1 or any(index not in range(-data.size, data.size) for index in indices.flat):
        return None
    taken = np.empty(indices.shape, dtype=object)
    for position in np.ndindex(indices.shape):
        taken[position] = data[indices[position]]
    return taken


def _slice(
    node: ir.Node, data: Sizes, starts: Sizes, ends: Sizes, axes: Sizes | None = None, steps: Sizes | None = None
) -> Sizes | None:
    bounds = [starts, ends, *([steps] if steps is not None else [])]
    if data.ndim != 1 or any(bound.size != 1 or not isinstance(bound.item(), int) for bound in bounds):
        return None
    return data[slice(*(bound.item() for bound in bounds))]


def _concat(node: ir.Node, *parts: Sizes) -> Sizes | None:
    return np.concatenate(parts) if all(part.ndim == 1 for part in parts) else None


def _unsqueeze(node: ir.Node, data: Sizes, axes: Sizes | None = None) -> Sizes | None:
    return data.reshape(1) if data.ndim == 0 else None


def _squeeze(node: ir.Node, data: Sizes, axes: Sizes | None = None) -> Sizes | None:
    return data.reshape(()) if data.size == 1 and data.ndim == 1 else None


def _reshape(node: ir.Node, data: Sizes, shape: Sizes) -> Sizes | None:
    target = shape.tolist()
    return data.reshape(target) if all(isinstance(size, int) and size for size in target) else None


def _cast(node: ir.Node, data: Sizes) -> Sizes | None:
    return data if node.attributes["to"].as_int() in (ir.DataType.INT64, ir.DataType.INT32) else None


def _equal(node: ir.Node, a: Sizes, b: Sizes) -> Sizes | None:
    return _elementwise(_is_equal, a, b)


def _where(node: ir.Node, condition: Sizes, a: Sizes, b: Sizes) -> Sizes | None:
    return _elementwise(_choose, condition, a, b)


def _mul(node: ir.Node, a: Sizes, b: Sizes) -> Sizes | None:
    return _elementwise(_multiply, a, b)


def _div(node: ir.Node, a: Sizes, b: Sizes) -> Sizes | None:
    return _elementwise(quotient, a, b)


def _elementwise(function: Callable[..., Any], *operands: Sizes) -> Sizes:
    arrays = np.broadcast_arrays(*operands)
    result = np.empty(arrays[0].shape, dtype=object)
    for index in np.ndindex(result.shape):
        result[index] = function(*(array[index] for array in arrays))
    return result


def _is_equal(a: Any, b: Any) -> bool | None:
    if is_same_size(a, b):
        return True
    both_known = isinstance(a, int) and isinstance(b, int)
    never = any(
        isinstance(size, ir.SymbolicDim) and isinstance(other, int) and other < 0 for size, other in ((a, b), (b, a))
    )
    return False if both_known or never else None


def _choose(condition: bool | None, a: Any, b: Any) -> Any:
    if condition is None:
        return a if is_same_size(a, b) else None
    return a if condition else b


_RULES: dict[str, Callable[..., Sizes | None]] = {
    "Gather": _gather,
    "Slice": _slice,
    "Concat": _concat,
    "Unsqueeze": _unsqueeze,
    "Squeeze": _squeeze,
    "Reshape": _reshape,
    "Cast": _cast,
    "Mul": _mul,
    "Div": _div,
    "Equal": _equal,
    "Where": _where,
}
