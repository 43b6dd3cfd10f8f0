"""Constant parts of a graph: which values are constant, what they hold, and which tensor they come from."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

__all__ = ["constant_values", "evaluate", "is_constant", "operators", "root_of"]


def operators(names: str) -> frozenset[str]:
    """Return the names in one string, of operators say, as a set."""
    return frozenset(names.split())


# What exporters and quantizers put between an initializer and the node that reads it.
_FOLDABLE = operators(
    "Add Cast CastLike Concat DequantizeLinear Div Expand Flatten Gather Identity Mul Neg Pow QuantizeLinear "
    "ReduceL2 Reshape Slice Split Sqrt Squeeze Sub Transpose Unsqueeze"
)
_CONSTANT_ATTRIBUTES = operators("value value_float value_floats value_int value_ints")


def constant_values(graph: ir.Graph) -> set[ir.Value]:
    """Return all constants of a graph: initializers and what is computed from them alone."""
    constants = set(graph.initializers.values())
    for node in graph:
        inputs = [value for value in node.inputs if value is not None]
        if _is_constant_node(node) or (
            inputs and node.op_type in _FOLDABLE and all(value in constants for value in inputs)
        ):
            constants.update(node.outputs)
    return constants


def is_constant(value: ir.Value | None) -> bool:
    """Return whether a value is an initializer or computed from initializers alone."""
    if value is None:
        return False
    node = value.producer()
    if node is None or _is_constant_node(node):
        return value.is_initializer() or node is not None
    inputs = [operand for operand in node.inputs if operand is not None]
    return bool(inputs) and node.op_type in _FOLDABLE and all(is_constant(operand) for operand in inputs)


def evaluate(value: ir.Value) -> NDArray[Any]:
    """Return what a constant value holds (see `is_constant`), in its own element type; do not write into it."""
    tensor = ir.convenience.get_const_tensor(value)
    if tensor is not None:
        return tensor.numpy()
    node = value.producer()
    assert node is not None, f"{value.name} is not constant"
    return _run(node, value)


def root_of(value: ir.Value) -> ir.Value:
    """Return the largest tensor among those that a constant value is computed from."""
    node = value.producer()
    if node is None or _is_constant_node(node):
        return value
    return max((root_of(operand) for operand in node.inputs if operand is not None), key=_size)


def _run(node: ir.Node, output: ir.Value) -> NDArray[Any]:
    from onnx.reference import ReferenceEvaluator

    opset = 17 if node.graph is None else node.graph.opset_imports.get("", 17)
    proto = ir.to_proto(node)
    if node.domain:
        # com.microsoft holds 16-bit twins of the standard (de)quantizers, which the standard has since opset 21.
        proto.domain, opset = "", 21
    feeds = {str(operand.name): evaluate(operand) for operand in node.inputs if operand is not None}
    (result,) = ReferenceEvaluator(proto, opsets={"": opset}).run([str(output.name)], feeds)
    return np.asarray(result)


def _is_constant_node(node: ir.Node) -> bool:
    return node.op_type == "Constant" and node.domain == "" and not _CONSTANT_ATTRIBUTES.isdisjoint(node.attributes)


def _size(value: ir.Value) -> int:
    tensor = ir.convenience.get_const_tensor(value)
    return 0 if tensor is None else int(np.prod(tensor.shape.numpy()))
