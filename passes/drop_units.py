"""Neurons and heads, taken out of a graph."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from lsp_deploy.graph.unit_axis import Axis, Region, constant_ints
from lsp_deploy.passes.layer_weights import add_initializer, output_axis, weight_value

__all__ = ["drop_units"]

_END = 1 << 30  # a bound of a Slice beyond this means: to the end


def drop_units(graph: ir.Graph, region: Region, kept: NDArray[np.int64], shapes: dict[str, tuple[int, ...]]) -> None:
    """Take all units but `kept` out of a region: weights, biases and other constants, and the sizes of its nodes.

    Constants that other nodes read stay as they are for them.

    Args:
        graph: of the region.
        region: as traced on the graph as it stands.
        kept: units, ascending.
        shapes: of all values; those inside the region are updated.
    """
    for node, axis in ((node, region.axes[node.outputs[0]]) for node in region.producers):
        _take(graph, node, 1, output_axis(node, _rank(node)), axis.entries(kept))
    for node in region.consumers:
        x = node.inputs[0]
        assert x is not None
        rows = 1 if output_axis(node, _rank(node)) == 0 else _rank(node) - 2
        _take(graph, node, 1, rows, region.axes[x].entries(kept))
    taken: dict[tuple[ir.Value, Axis], ir.Value] = {}
    for (node, index), axis in region.constants.items():
        value = node.inputs[index]
        assert value is not None
        if (value, axis) in taken:
            node.replace_input_with(index, taken[value, axis])
        else:
            taken[value, axis] = _take(graph, node, index, axis.index, axis.entries(kept))
    for node in region.nodes():
        _resize(graph, node, region, len(kept))
    for value, axis in region.axes.items():
        size = axis.outer * len(kept) * axis.inner
        sizes = list(shapes[str(value.name)])
        sizes[axis.index] = size
        shapes[str(value.name)] = tuple(sizes)
        if value.shape is not None:
            known = isinstance(value.shape[axis.index], int)
            dimensions = list(value.shape)
            dimensions[axis.index] = size if known else ir.SymbolicDim(None)
            value.shape = ir.Shape(dimensions)


def _take(graph: ir.Graph, node: ir.Node, index: int, axis: int, entries: NDArray[np.int64]) -> ir.Value:
    value = node.inputs[index]
    assert value is not None and value.const_value is not None
    array = np.ascontiguousarray(value.const_value.numpy().take(entries, axis))
    return _replace(graph, node, index, array)


def _replace(graph: ir.Graph, node: ir.Node, index: int, array: NDArray[Any]) -> ir.Value:
    """Change a constant for one node: in place if nothing else reads it."""
    value = node.inputs[index]
    assert value is not None
    if len(value.uses()) == 1 and not value.is_graph_output():
        value.const_value, value.shape = ir.tensor(array, name=value.name), ir.Shape(array.shape)
        return value
    own = add_initializer(graph, f"{node.name}/{value.name}", array)
    node.replace_input_with(index, own)
    if not value.uses() and not value.is_graph_output():
        del graph.initializers[str(value.name)]
    return own


def _resize(graph: ir.Graph, node: ir.Node, region: Region, kept: int) -> None:
    """Correct the sizes that a Reshape, Split or Slice holds."""
    data = node.inputs[0]
    assert data is not None
    if data not in region.axes:
        return
    source, result = region.axes[data], region.axes[node.outputs[0]]
    if node.op_type == "Reshape":
        sizes = constant_ints(node.inputs[1])
        assert sizes is not None  # as traced
        if sizes[result.index] > 0:
            sizes[result.index] = result.outer * kept * result.inner
            _replace(graph, node, 1, np.array(sizes, np.int64))
    elif node.op_type == "Split" and _axis_of(node, data) == source.index and len(node.inputs) > 1:
        sizes = constant_ints(node.inputs[1])
        if sizes is not None:
            _replace(graph, node, 1, np.array([size // source.count * kept for size in sizes], np.int64))
    elif node.op_type == "Slice":
        axes = [axis % _rank_of(data) for axis in constant_ints(node.inputs[3]) or []]
        if source.index in axes:
            number = axes.index(source.index)
            for index in (1, 2):
                bounds = constant_ints(node.inputs[index])
                assert bounds is not None  # as traced
                if abs(bounds[number]) <= _END:
                    bounds[number] = bounds[number] // source.count * kept
                dtype = node.inputs[index].dtype  # type: ignore[union-attr]
                _replace(graph, node, index, np.array(bounds, np.int64 if dtype is None else dtype.numpy()))


def _axis_of(node: ir.Node, data: ir.Value) -> int:
    return int(node.attributes.get_int("axis", 0)) % _rank_of(data)


def _rank_of(value: ir.Value) -> int:
    assert value.shape is not None
    return len(value.shape)


def _rank(node: ir.Node) -> int:
    tensor = weight_value(node).const_value
    assert tensor is not None
    return len(tensor.shape)
