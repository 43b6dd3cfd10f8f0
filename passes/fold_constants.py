"""Whatever can be computed before the model runs."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx.reference import ops as reference

from lsp_deploy.passes.constant_inputs import constant_array
from lsp_deploy.passes.infer_shapes import ShapeInference, reshaped, standard_opset
from lsp_deploy.passes.known_sizes import is_same_size
from lsp_deploy.passes.layer_weights import add_initializer

__all__ = ["FoldConstantsPass"]

_logger = logging.getLogger(__name__)

# Folding a node that makes a tensor larger than its inputs would grow the file: only up to this size.
_MAX_GROWTH_BYTES = 1 << 20

_RANDOM = frozenset(
    {"Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"}
)

# How a constant reaches the weight input of a linear layer.
_WEIGHT_PATH = frozenset(
    {"Cast", "DequantizeLinear", "Identity", "QuantizeLinear", "Reshape", "Squeeze", "Transpose", "Unsqueeze"}
)
_LINEAR = frozenset({"Conv", "Gemm", "MatMul"})


class FoldConstantsPass(ir.passes.InPlacePass):
    """Nodes of constants, and of sizes that are known, become constants; Reshape gets constant sizes.

    Weights behind Transpose, Cast, Reshape or DequantizeLinear become direct initializers. Nothing above 1 MB is
    expanded unless it is a linear layer's weight. A Reshape copies or computes the one size that is not known before
    the model runs. Element types and shapes are inferred on the way.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Fold the nodes of the main graph in topological order."""
        inference = ShapeInference(model)
        modified = False
        for node in model.graph:
            modified |= inference.infer(node)
            if _is_foldable(node):
                opset = standard_opset(node, model.opset_imports)
                arrays = _computed_result(node, opset) or _known_result(node, inference)
                if arrays is not None:
                    _replace(node, arrays)
                    modified = True
                    continue
            if node.op_type == "Reshape" and node.domain == "":
                modified |= _fix_reshape(node, inference)
        return ir.passes.PassResult(model, modified=modified)


def _is_foldable(node: ir.Node) -> bool:
    if node.op_type in _RANDOM or any(output.is_graph_output() for output in node.outputs):
        return False
    return not any(
        attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for attribute in node.attributes.values()
    )


def _known_result(node: ir.Node, inference: ShapeInference) -> list[NDArray[Any]] | None:
    """Return the output of a node that computes sizes, all of which are known."""
    output = node.outputs[0]
    sizes = inference.sizes(output)
    if (
        sizes is None
        or len(node.outputs) != 1
        or output.dtype is None
        or not all(isinstance(size, int) for size in sizes.flat)
    ):
        return None
    return [sizes.astype(output.dtype.numpy())]


def _computed_result(node: ir.Node, opset: int | None) -> list[NDArray[Any]] | None:
    """Return the outputs of a node whose inputs are all constant; None if it has others or is not worth folding."""
    operands = [constant_array(value) for value in node.inputs]
    if any(value is not None and array is None for value, array in zip(node.inputs, operands, strict=True)):
        return None
    if opset is None or not _is_worth_folding(node):
        return None
    attributes = {
        name: ir.to_proto(attribute.as_tensor()) if attribute.type == ir.AttributeType.TENSOR else attribute.value
        for name, attribute in node.attributes.items()
    }
    try:
        operator = reference.load_op("", node.op_type, opset)
        # Infinities in masks are meant.
        with np.errstate(all="ignore"):
            results = operator.eval(*operands, n_outputs=len(node.outputs), **attributes)
    except (
        ArithmeticError, AssertionError, LookupError, NotImplementedError, RuntimeError, TypeError, ValueError,
    ) as error:  # fmt: skip
        # The reference implementation does not cover every form of every operator: such a node stays.
        _logger.debug("%s %s is not folded: %r", node.op_type, node.name, error)
        return None
    results = results if isinstance(results, (list, tuple)) else (results,)
    arrays = [np.asarray(result) for result in results]
    return arrays if all(_agrees(array, output) for array, output in zip(arrays, node.outputs, strict=True)) else None


def _is_worth_folding(node: ir.Node) -> bool:
    read = [value.const_value for value in node.inputs if value is not None and value.const_value is not None]
    if any(output.dtype is None or output.shape is None or not output.shape.is_static() for output in node.outputs):
        return sum(tensor.nbytes for tensor in read) <= _MAX_GROWTH_BYTES
    written = sum(_elements(output) for output in node.outputs)
    if written <= sum(tensor.size for tensor in read):
        return True
    size = sum(_elements(output) * output.dtype.itemsize for output in node.outputs if output.dtype is not None)
    return size <= _MAX_GROWTH_BYTES or any(_feeds_weight(output) for output in node.outputs)


def _elements(value: ir.Value) -> int:
    return int(np.prod(value.shape.numpy(), dtype=np.int64)) if value.shape is not None else 0


def _feeds_weight(value: ir.Value) -> bool:
    return any(
        (node.op_type in _LINEAR and index == 1)
        or (node.op_type in _WEIGHT_PATH and index == 0 and _feeds_weight(node.outputs[0]))
        for node, index in value.uses()
    )


def _agrees(array: NDArray[Any], output: ir.Value) -> bool:
    """Return whether an evaluated array has the type and shape that ONNX defines for it."""
    if output.dtype is None or array.dtype != output.dtype.numpy():
        return False
    if output.shape is None:
        return True
    return array.ndim == len(output.shape) and all(
        not isinstance(size, int) or size == actual for size, actual in zip(output.shape, array.shape, strict=True)
    )


def _replace(node: ir.Node, arrays: list[NDArray[Any]]) -> None:
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    read = {value for value in node.inputs if value is not None}
    for output, array in zip(node.outputs, arrays, strict=True):
        if output.uses():
            ir.convenience.replace_all_uses_with(output, add_initializer(graph, str(output.name), array))
    graph.remove(node, safe=True)
    for value in read:
        # A weight and its transpose need not be in memory at once.
        if value.is_initializer() and not value.uses() and not value.is_graph_output() and not value.is_graph_input():
            graph.initializers.pop(str(value.name), None)


def _fix_reshape(node: ir.Node, inference: ShapeInference) -> bool:
    """Give a Reshape whose sizes are computed constant ones, where at most one of them has to be found at run time."""
    data, shape = node.inputs[:2]
    sizes = inference.sizes(shape)
    allows_zero = "allowzero" in node.attributes and node.attributes["allowzero"].as_int()
    if (
        data is None
        or shape is None
        or sizes is None
        or sizes.ndim != 1
        or constant_array(shape) is not None
        or allows_zero
    ):
        return False
    declared = list(data.shape) if data.shape is not None else []
    fixed = [
        size if isinstance(size, int) else 0 if axis < len(declared) and is_same_size(size, declared[axis]) else -1
        for axis, size in enumerate(reshaped(node, sizes))
    ]
    if fixed.count(-1) > 1:
        return False
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    node.replace_input_with(1, add_initializer(graph, f"{node.outputs[0].name}_shape", np.array(fixed, dtype=np.int64)))
    inference.infer(node)
    return True
