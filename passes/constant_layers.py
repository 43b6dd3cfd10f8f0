"""Layers whose weight is zero: what follows from that up to the next sum with something that is not constant."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray

from lsp_deploy.graph.unit_axis import ELEMENTWISE, SAME_ORDER, Shapes, constant_ints, is_linear, shape_of
from lsp_deploy.passes.constant_inputs import constant_array
from lsp_deploy.passes.layer_weights import add_initializer

__all__ = ["replace_zero_layer"]


def replace_zero_layer(graph: ir.Graph, layer: ir.Node, shapes: Shapes) -> str | None:
    """Put a constant in place of what follows from a layer whose weight is zero: its bias, gamma times that, and so on.

    The constant is a vector over the last axis; it takes the place of the branch where an elementwise node joins it
    with a value of full shape, a residual Add say. A zero vector is not added at all. What becomes dead code stays, for
    RemoveUnusedNodesPass.

    Args:
        graph: of the layer.
        layer: linear node whose weight is zero; a Conv is left alone.
        shapes: of all values of the graph.

    Returns:
        Why nothing was replaced; None if it was.
    """
    if layer.op_type == "Conv":
        return "what follows from a convolution is left as it is"
    y = layer.outputs[0]
    width = shape_of(y, shapes)[-1]
    zero_product = _product(layer, None, width)
    if zero_product is None:
        return "its bias is not one number for each channel"
    vectors = {y: zero_product}
    joins: list[tuple[ir.Node, int]] = []
    for node in list(graph):
        read = [index for index, value in enumerate(node.inputs) if value in vectors]
        if not read:
            continue
        if (index := _join(node, read, shapes)) is not None:
            joins.append((node, index))
            continue
        result = _vector(node, vectors, shapes)
        if result is None:
            return f"{node.op_type} {node.name}, which reads its constant output, needs it in full shape"
        vectors[node.outputs[0]] = result
    for value in vectors:
        if value.is_graph_output():
            return f"{value.name} is an output of the model"
    for node, index in joins:
        joined = node.inputs[index]
        assert joined is not None and joined.dtype is not None
        _join_constant(graph, node, index, vectors[joined].astype(joined.dtype.numpy()))
    return None


def _join(node: ir.Node, read: list[int], shapes: Shapes) -> int | None:
    """Return the one input of an elementwise node that is constant, where another has the shape of the result."""
    if node.op_type not in ELEMENTWISE or node.domain != "" or len(read) != 1:
        return None
    full = shape_of(node.outputs[0], shapes)
    others = [value for index, value in enumerate(node.inputs) if index not in read and value is not None]
    running = [value for value in others if constant_array(value) is None]
    return read[0] if any(shape_of(value, shapes) == full for value in running) else None


def _vector(node: ir.Node, vectors: dict[ir.Value, NDArray[np.float64]], shapes: Shapes) -> NDArray[np.float64] | None:
    """Return what a node gives, as a vector over the last axis; None if that is no such vector, or not known to be."""
    if node.domain != "" or len(node.outputs) != 1 or node.inputs[0] is None:
        return None
    data = node.inputs[0]
    before, after = shape_of(data, shapes), shape_of(node.outputs[0], shapes)
    if node.op_type in SAME_ORDER and data in vectors:
        return vectors[data] if before[-1:] == after[-1:] else None
    if node.op_type == "Transpose":
        order = node.attributes.get_ints("perm", ())
        return vectors.get(data) if order and order[-1] == len(before) - 1 else None
    if node.op_type == "Slice" and data in vectors:
        axes = constant_ints(node.inputs[3]) if len(node.inputs) > 3 else None
        return vectors[data] if axes is not None and len(before) - 1 not in [i % len(before) for i in axes] else None
    if node.op_type == "Concat" and node.attributes.get_int("axis", 0) % len(after) != len(after) - 1:
        parts = [vectors[value] for value in node.inputs if value in vectors]
        alike = len(parts) == len(node.inputs) and all(np.array_equal(part, parts[0]) for part in parts)
        return parts[0] if alike else None
    if is_linear(node) and node.op_type != "Conv" and data in vectors:
        return _product(node, vectors[data], after[-1])
    if node.op_type == "BatchNormalization" and data in vectors and len(after) == 2:
        return _batch_normalization(node, vectors[data])
    if node.op_type in ELEMENTWISE:
        return _elementwise(node, vectors, after)
    return None


def _product(node: ir.Node, x: NDArray[np.float64] | None, width: int) -> NDArray[np.float64] | None:
    """Return x @ W + b, float64 [N], b being a Gemm's own; b alone if x is None, and None if b is not a vector."""
    product = np.zeros(width)
    weight = constant_array(node.inputs[1])
    if x is not None and weight is not None:
        matrix = weight.astype(np.float64).reshape(weight.shape[-2:])
        product = x @ (matrix.T if node.attributes.get_int("transB", 0) else matrix)
    if node.op_type == "MatMul":
        return np.asarray(product)
    product = product * node.attributes.get_float("alpha", 1.0)
    if len(node.inputs) < 3 or node.inputs[2] is None:
        return np.asarray(product)
    bias = constant_array(node.inputs[2])
    if bias is None or bias.size not in (1, width):
        return None
    return np.asarray(product + bias.astype(np.float64).reshape(-1) * node.attributes.get_float("beta", 1.0))


def _batch_normalization(node: ir.Node, x: NDArray[np.float64]) -> NDArray[np.float64] | None:
    arrays = [constant_array(value) for value in node.inputs[1:]]
    scale, bias, mean, variance = (None if array is None else array.astype(np.float64) for array in arrays)
    if scale is None or bias is None or mean is None or variance is None:
        return None
    epsilon = node.attributes.get_float("epsilon", 1e-5)
    return np.asarray((x - mean) / np.sqrt(variance + epsilon) * scale + bias)


def _elementwise(
    node: ir.Node, vectors: dict[ir.Value, NDArray[np.float64]], shape: tuple[int, ...]
) -> NDArray[np.float64] | None:
    from onnx.reference import ReferenceEvaluator

    feeds: dict[str, NDArray[Any]] = {}
    for value in node.inputs:
        if value is None:
            continue
        array = vectors[value] if value in vectors else constant_array(value)
        if array is None or value.dtype is None or any(size != 1 for size in array.shape[:-1]):
            return None
        flat = array.reshape(array.shape[-1:])
        feeds[str(value.name)] = flat if value.dtype != ir.DataType.FLOAT else flat.astype(np.float32)
    opset = 17 if node.graph is None else node.graph.opset_imports.get("", 17)
    kinds = [
        onnx.helper.make_tensor_value_info(name, onnx.helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
        for name, array in feeds.items()
    ]
    output = onnx.helper.make_tensor_value_info(str(node.outputs[0].name), onnx.TensorProto.UNDEFINED, None)
    proto = onnx.helper.make_graph([ir.to_proto(node)], "node", kinds, [output])
    model = onnx.helper.make_model(proto, opset_imports=[onnx.helper.make_opsetid("", opset)])
    (result,) = ReferenceEvaluator(model).run(None, feeds)
    vector = np.asarray(result, np.float64)
    return vector if vector.shape == shape[-1:] else None


def _join_constant(graph: ir.Graph, node: ir.Node, index: int, vector: NDArray[Any]) -> None:
    output = node.outputs[0]
    if node.op_type == "Add" and not vector.any() and not output.is_graph_output():
        other = node.inputs[1 - index]
        assert other is not None
        ir.convenience.replace_all_uses_with(output, other)
        return
    node.replace_input_with(index, add_initializer(graph, f"{node.name}/constant", vector))
