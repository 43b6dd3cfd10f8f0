"""Fused int8 q, k and v projections, cut before TensorRT cuts them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from lsp_deploy.passes.layer_weights import add_initializer

__all__ = ["SplitQkvPass"]


class SplitQkvPass(ir.passes.InPlacePass):
    """x @ W, cut into q, k and v behind it, becomes Concat(x @ Wq, x @ Wk, x @ Wv), where W is dequantized from int8.

    For TensorRT, as the last rewrite. Its builder moves the cut into the weight, behind the DequantizeLinear, and then
    computes in floating point. Where the weight comes in parts, it merges them into one int8 gemm and drops the Concat
    (TensorRT-RTX 1.7.1, DeiT-Tiny: 36 int8 gemms without this pass, 48 with it). The outputs are the same, since a
    column of W takes part in one column of the result only.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Cut the weights."""
        modified = False
        for node in list(model.graph):
            sizes = _parts(node)
            if sizes is not None:
                _split(model.graph, node, sizes)
                modified = True
        return ir.passes.PassResult(model, modified=modified)


def _parts(node: ir.Node) -> list[int] | None:
    """Return how many columns each part of an int8 MatMul's result has, None if it is not cut into parts."""
    dequantize = node.inputs[1].producer() if node.op_type == "MatMul" and node.inputs[1] is not None else None
    if dequantize is None or dequantize.op_type != "DequantizeLinear" or dequantize.inputs[0] is None:
        return None
    weight, scale = dequantize.inputs[0].const_value, dequantize.inputs[1]
    if weight is None or weight.dtype != ir.DataType.INT8 or len(weight.shape) != 2 or scale is None:
        return None
    n = int(weight.shape.numpy()[1])
    if scale.const_value is None or scale.const_value.size != n or dequantize.attributes.get_int("axis", 1) % 2 != 1:
        return None
    chain = _moves(node)
    cut = _cut(chain[-1].outputs[0])
    if cut is None or len(cut[1]) < 2:
        return None
    axis, lengths = cut
    columns = _columns(chain, axis, n)
    return [length * columns for length in lengths] if columns and columns * sum(lengths) == n else None


def _moves(node: ir.Node) -> list[ir.Node]:
    """Return `node`, its bias Add, and the Reshapes and Transposes up to the cut."""
    chain = [node]
    while True:
        readers = [reader for reader in chain[-1].outputs[0].consumers() if reader.op_type != "Shape"]
        if len(readers) != 1 or readers[0].op_type not in ("Add", "Reshape", "Transpose"):
            return chain
        chain.append(readers[0])


def _cut(value: ir.Value) -> tuple[int, list[int]] | None:
    """Return the axis along which all readers of a value cut it, and the length of each part, in their order there."""
    found = [_pieces(reader, value.shape) for reader in value.consumers() if reader.op_type != "Shape"]
    pieces = sorted({piece for of_reader in found if of_reader for piece in of_reader})
    if value.shape is None or not pieces or None in found or len({axis for axis, _, _ in pieces}) > 1:
        return None
    axis = pieces[0][0]
    ends = [start + length for _, start, length in pieces]
    adjoining = [start for _, start, _ in pieces] == [0, *ends[:-1]] and ends[-1] == value.shape[axis]
    return (axis, [length for _, _, length in pieces]) if adjoining else None


def _pieces(node: ir.Node, shape: ir.Shape | None) -> list[tuple[int, int, int]] | None:
    """Return axis, start and length of each piece that a Split, Gather or Slice takes; None if it is none of these."""
    if shape is None:
        return None
    axis = node.attributes.get_int("axis", 0) % shape.rank()
    if node.op_type == "Split":
        lengths = _known([None if output.shape is None else output.shape[axis] for output in node.outputs])
        return None if lengths is None else [(axis, sum(lengths[:i]), length) for i, length in enumerate(lengths)]
    bounds = [_single(value) for value in node.inputs[1:]]
    if node.op_type == "Gather" and bounds[0] is not None:
        return [(axis, bounds[0], 1)]
    if node.op_type == "Slice" and len(bounds) in (3, 4) and None not in bounds and bounds[3:] in ([], [1]):
        start, end, axis = (bound for bound in bounds[:3] if bound is not None)
        dimension = shape[axis]
        if isinstance(dimension, int) and start >= 0:
            end = min(end, dimension) if end >= 0 else dimension + end
            return [(axis % shape.rank(), start, end - start)]
    return None


def _columns(chain: Sequence[ir.Node], axis: int, n: int) -> int | None:
    """Return how many columns of the weight one step along `axis` of the chain's result spans.

    None where the parts do not lie one behind the other in the weight.
    """
    for node in reversed(chain):
        if node.op_type == "Transpose":
            axis = node.attributes.get_ints("perm", ())[axis]
        elif node.op_type == "Reshape":
            shape = node.outputs[0].shape
            factors = None if shape is None else _known(list(shape)[axis:])
            return math.prod(factors[1:]) if factors and math.prod(factors) == n else None
    shape = chain[-1].outputs[0].shape
    return 1 if shape is not None and axis == shape.rank() - 1 else None


def _split(graph: ir.Graph, node: ir.Node, sizes: Sequence[int]) -> None:
    x, weight = node.inputs
    assert x is not None and weight is not None
    dequantize = weight.producer()
    assert dequantize is not None
    ends = np.cumsum(sizes)
    parts = []
    for number, (end, size) in enumerate(zip(ends, sizes, strict=True)):
        columns = slice(int(end) - size, int(end))
        operands = [_columns_of(graph, value, columns, number) for value in dequantize.inputs if value is not None]
        own = ir.Node("", "DequantizeLinear", operands, [ir.AttrInt64("axis", 1)], name=f"{dequantize.name}/{number}")
        _describe(own.outputs[0], weight, number, size)
        product = ir.Node("", "MatMul", [x, own.outputs[0]], name=f"{node.name}/{number}")
        _describe(product.outputs[0], node.outputs[0], number, size)
        graph.insert_before(node, [own, product])
        parts.append(product.outputs[0])
    old = node.outputs[0]
    concat = ir.Node("", "Concat", parts, [ir.AttrInt64("axis", -1)], name=f"{node.name}/Concat")
    whole = concat.outputs[0]
    whole.name, whole.shape, whole.type = old.name, old.shape, old.type
    graph.insert_before(node, concat)
    ir.convenience.replace_all_uses_with(old, whole, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    if not weight.uses():
        operands = [value for value in dequantize.inputs if value is not None]
        graph.remove(dequantize, safe=True)
        for value in operands:
            if not value.uses():
                del graph.initializers[str(value.name)]


def _columns_of(graph: ir.Graph, value: ir.Value, columns: slice, number: int) -> ir.Value:
    tensor = value.const_value
    assert tensor is not None  # _parts sees to it
    return add_initializer(graph, f"{value.name}/{number}", np.ascontiguousarray(tensor.numpy()[..., columns]))


def _describe(value: ir.Value, whole: ir.Value, number: int, size: int) -> None:
    value.name, value.type = f"{whole.name}/{number}", whole.type
    value.shape = None if whole.shape is None else ir.Shape([*whole.shape[:-1], size])


def _single(value: ir.Value | None) -> int | None:
    """Return a constant of one entry."""
    tensor = ir.convenience.get_const_tensor(value) if value is not None else None
    return int(tensor.numpy().reshape(())) if tensor is not None and tensor.size == 1 else None


def _known(dimensions: Sequence[int | ir.SymbolicDim | None]) -> list[int] | None:
    known = [dimension for dimension in dimensions if isinstance(dimension, int)]
    return known if len(known) == len(dimensions) else None
