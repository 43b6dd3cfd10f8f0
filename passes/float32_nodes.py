"""Which nodes a 16-bit model keeps in float32, and why."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import ml_dtypes
import onnx_ir as ir

__all__ = ["nodes_kept_in_float32"]

# Sums over long axes: they overflow, or lose small terms, where a runtime accumulates in the tensor's own type.
_SUMS = {"CumSum", "GlobalAveragePool", "GlobalLpPool", "ReduceL1", "ReduceLogSum", "ReduceMean", "ReduceSum"}
_NORMS = {"GroupNormalization", "InstanceNormalization", "LpNormalization", "MeanVarianceNormalization"}
_NORMS_OF_SQUARES = {"ReduceL2", "ReduceLogSumExp", "ReduceSumSquare"}
# The type of their result is that of no tensor they read: `dtype`, or float32 where it is not given.
_GENERATORS = {"Bernoulli", "EyeLike", "RandomNormalLike", "RandomUniformLike"}
# What lies between a sum of squares and the division by its root.
_RESHAPING = {"Expand", "Reshape", "Squeeze", "Unsqueeze"}
_TO_ROOT = {"Abs", "Add", "Clip", "Max", "Min", "Pow", "Reciprocal", "ReduceMean", "ReduceSum", "Sqrt", "Sub", "Where"}
_DIVISION = {"Div", "Mul"}
# How sizes and coordinates are computed from integers.
_ROUNDING = {"Ceil", "Floor", "Round"}
_ARITHMETIC = {
    "Add",
    "Concat",
    "Div",
    "Exp",
    "Gather",
    "Log",
    "Mul",
    "Neg",
    "Pow",
    "Reciprocal",
    "Slice",
    "Sqrt",
    "Sub",
}


def nodes_kept_in_float32(graph: ir.Graph, dtype: ir.DataType) -> set[ir.Node]:
    """Return the nodes that must compute in float32 although the graph computes in `dtype` (FLOAT16 or BFLOAT16).

    * Sums over long axes, and normalizations that are not fused to `LayerNormalization`: squares, their mean, the root
      and the division by it. In float16 a square overflows above 255 (a ViT-B fell from 85 % to 19 % top-1).
    * Additions of an epsilon that `dtype` cannot hold, up to the division they guard.
    * Arithmetic on sizes: from a Cast of integers to one back to integers, or to the scales of a Resize.
    * Control flow, with everything in it.

    `LayerNormalization` is not among them: its `stash_type` keeps the statistics in float32 whatever x is. Nor is
    `Softmax`: TensorRT and ONNX Runtime subtract the maximum first, and TensorRT fuses a 16-bit attention only.

    Constants must be initializers.
    """
    kept = {node for node in graph if node.op_type in _SUMS | _NORMS | _NORMS_OF_SQUARES | _GENERATORS}
    kept.update(_norm_nodes(graph))
    kept.update(_guarded_divisions(graph, dtype))
    kept.update(_index_arithmetic(graph))
    kept.update(node for node in graph if any(_holds_graphs(attribute) for attribute in node.attributes.values()))
    kept.update(node for subgraph in graph.subgraphs() for node in subgraph)
    return kept


def _norm_nodes(graph: ir.Graph) -> Iterator[ir.Node]:
    squares = [node for node in graph if node.op_type in _NORMS_OF_SQUARES]
    for node in graph:
        if _is_square(node) and any(consumer.op_type in _SUMS for consumer in node.outputs[0].consumers()):
            squares.append(node)
            # The difference from the mean, where that is what is squared.
            yield from (producer for producer in node.predecessors() if producer.op_type == "Sub")
    yield from _up_to_division(squares)


def _is_square(node: ir.Node) -> bool:
    if node.op_type == "Mul":
        return node.inputs[0] is node.inputs[1]
    exponent = _scalar(node.inputs[1]) if node.op_type == "Pow" else None
    return exponent is not None and exponent >= 2


def _guarded_divisions(graph: ir.Graph, dtype: ir.DataType) -> Iterator[ir.Node]:
    smallest = float(ml_dtypes.finfo(dtype.numpy()).smallest_subnormal)  # type: ignore[no-untyped-call]

    def vanishes(value: ir.Value | None) -> bool:
        return 0 < abs(_scalar(value) or 0.0) < smallest / 2

    yield from _up_to_division(node for node in graph if any(vanishes(value) for value in node.inputs))


def _up_to_division(start: Iterable[ir.Node]) -> set[ir.Node]:
    """Return `start` and what follows, the division (or multiplication with the reciprocal) included."""
    waiting = list(start)
    found = set(waiting)
    while waiting:
        for node in waiting.pop().successors():
            if node in found or node.op_type not in _TO_ROOT | _RESHAPING | _DIVISION:
                continue
            alone = all(_is_constant(value) or value.producer() in found for value in _float_inputs(node))
            if alone or node.op_type in _DIVISION:
                found.add(node)
            if alone:
                waiting.append(node)
    return found


def _index_arithmetic(graph: ir.Graph) -> Iterator[ir.Node]:
    for node in graph:
        if node.op_type == "Resize":
            scales = [value for value in node.inputs[2:3] if value is not None]
            yield from (found for value in scales for found in _from_integers(value) or ())
        elif node.op_type == "Range" or (node.op_type == "Cast" and not _is_float(node.outputs[0])):
            chains = [_from_integers(value) for value in _float_inputs(node)]
            if None not in chains:
                yield from (found for chain in chains for found in (node, *(chain or ())))


def _from_integers(value: ir.Value) -> set[ir.Node] | None:
    """Return the nodes that compute `value` from integers and constants alone; None if it is not computed so."""
    node = value.producer()
    if node is None:
        return set() if _is_constant(value) else None
    if node.op_type == "Cast" and not _is_float(node.inputs[0]):
        return {node}
    if node.op_type not in _ARITHMETIC | _ROUNDING | _RESHAPING:
        return None
    found = {node}
    for operand in _float_inputs(node):
        chain = _from_integers(operand)
        if chain is None:
            return None
        found |= chain
    return found


def _float_inputs(node: ir.Node) -> list[ir.Value]:
    return [value for value in node.inputs if value is not None and _is_float(value)]


def _is_float(value: ir.Value | None) -> bool:
    return value is not None and value.dtype == ir.DataType.FLOAT


def _is_constant(value: ir.Value) -> bool:
    return value.is_initializer()


def _scalar(value: ir.Value | None) -> float | None:
    """Return a float32 constant of one entry."""
    tensor = value.const_value if value is not None and value.is_initializer() else None
    if tensor is None or tensor.size != 1 or tensor.dtype != ir.DataType.FLOAT:
        return None
    return float(tensor.numpy().reshape(()))


def _holds_graphs(attribute: ir.Attr) -> bool:
    return attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
