"""What can be removed from a transformer as a whole: neurons between two layers, heads of an attention."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from lsp_deploy.graph.consumer_input import attention_values, consumer_input
from lsp_deploy.graph.measured_shapes import measure_shapes
from lsp_deploy.graph.unit_axis import Axis, Region, Shapes, UntraceableError, is_linear, shape_of, trace_units
from lsp_deploy.linear_layers import LinearLayer
from lsp_deploy.model import resolve_shapes

__all__ = ["StructureGroup", "Unit", "graph_shapes", "structure_groups", "unit_starts"]

Unit = Literal["neuron", "head"]


@dataclass
class StructureGroup:
    """Blocks that are removed together, because they hold the same neurons or the same heads."""

    unit: Unit
    members: tuple[int, ...]
    """Which neurons or heads, from 0."""
    blocks: dict[str, NDArray[np.int64]] = field(default_factory=dict)
    """By layer: indices of the blocks, row-major over [ceil(K / block_k), ceil(N / block_n)]. They are columns of fc1
    and rows of fc2, or columns of v and rows of proj. The group is dead once the blocks of one side of it are zero."""
    free: dict[str, NDArray[np.int64]] = field(default_factory=dict)
    """Likewise: the columns of q and k, which nothing reads any more once the head is dead."""


def structure_groups(
    model: ir.Model,
    layers: Sequence[LinearLayer],
    block: tuple[int, int],
    shapes: Mapping[str, Sequence[int]] | None = None,
) -> list[StructureGroup]:
    """Return the groups of blocks whose removal makes the matrices smaller, in graph order.

    Neurons or heads that share a block are in one group: with blocks of 32, a head of 48 channels and its neighbour.
    Blocks of one layer that belong to several parts of a unit (q, k and v of one head where the weight is fused) count
    as v's if any of their columns are v's.

    Args:
        model: canonical; it is not changed.
        layers: of the model; groups name no others.
        block: (block_k, block_n).
        shapes: concrete input shapes; a dynamic batch is 2 if not given.

    Raises:
        UserError: a dynamic dimension is not given, or ONNX Runtime cannot run the model at these shapes.
    """
    measured = graph_shapes(model, shapes)
    by_node = {layer.node: layer for layer in layers}
    groups: list[StructureGroup] = []
    seen: set[frozenset[ir.Node]] = set()
    for unit, value, axis in unit_starts(model.graph, measured):
        try:
            region = trace_units(value, axis, measured)
        except UntraceableError:
            continue
        key = frozenset(region.producers + region.consumers)
        if key in seen or not key <= by_node.keys() or not region.producers:
            continue
        seen.add(key)
        groups += _groups(unit, region, by_node, block, measured)
    return groups


def graph_shapes(model: ir.Model, shapes: Mapping[str, Sequence[int]] | None = None) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all values that nodes compute, by name, at a batch of 2 where it is dynamic.

    Raises:
        UserError: another dynamic dimension is not given, or ONNX Runtime cannot run the model at these shapes.
    """
    concrete = resolve_shapes(model, shapes, batch=2)
    measured = measure_shapes(model, concrete, [value for node in model.graph for value in node.outputs if value.name])
    return {**concrete, **measured}


def unit_starts(graph: ir.Graph, shapes: Shapes) -> Iterator[tuple[Unit, ir.Value, Axis]]:
    """Yield a value and the axis of its units for each place where units may pass: heads first, then neurons.

    Heads are the batch axis of the product of attention probabilities and v; neurons the input channels of a layer.
    """
    for node in list(graph):
        if node.graph is None or node.op_type != "MatMul" or attention_values(node) is None:
            continue
        sizes = shape_of(node.outputs[0], shapes)
        if len(sizes) >= 4 and sizes[-3] > 1:
            yield "head", node.outputs[0], Axis(len(sizes) - 3, 1, sizes[-3], 1)
    for node in list(graph):
        if node.graph is None or not is_linear(node):
            continue
        x = node.inputs[0]
        assert x is not None  # is_linear sees to it
        sizes = shape_of(x, shapes)
        if len(sizes) >= 2 and sizes[-1] > 1:
            yield "neuron", x, Axis(len(sizes) - 1, 1, sizes[-1], 1)


def _groups(
    unit: Unit,
    region: Region,
    layers: Mapping[ir.Node, LinearLayer],
    block: tuple[int, int],
    shapes: Shapes,
) -> list[StructureGroup]:
    deciding: dict[str, list[list[NDArray[np.int64]]]] = {}
    following: dict[str, list[list[NDArray[np.int64]]]] = {}
    sources = {part for node in region.consumers for part in consumer_input(region, node, shapes).sources}
    for node in region.consumers:
        found = _blocks_of_units(layers[node], region.axes[_x(node)], block, rows=True)
        deciding.setdefault(layers[node].name, []).append(found)
    for node in region.producers:
        axis = region.axes[node.outputs[0]]
        for part in range(axis.outer):
            found = _blocks_of_units(layers[node], axis, block, rows=False, part=part)
            kind = deciding if (node, part) in sources else following
            kind.setdefault(layers[node].name, []).append(found)
    groups = []
    for members in _together(region.count, [found for parts in deciding.values() for found in parts]):
        group = StructureGroup(unit, tuple(members))
        for name, parts in deciding.items():
            group.blocks[name] = _union(found[member] for found in parts for member in members)
        for name, parts in following.items():
            free = np.setdiff1d(
                _union(found[member] for found in parts for member in members),
                _union(found[member] for found in deciding.get(name, ()) for member in range(region.count)),
            )
            others = set(range(region.count)) - set(members)
            group.free[name] = np.setdiff1d(free, _union(found[other] for found in parts for other in others))
        groups.append(group)
    return groups


def _blocks_of_units(
    layer: LinearLayer, axis: Axis, block: tuple[int, int], *, rows: bool, part: int | None = None
) -> list[NDArray[np.int64]]:
    """Return the indices of the blocks that hold any row (or column, of one outer part) of each unit."""
    block_k, block_n = block
    down, across = -(-layer.K // block_k), -(-layer.N // block_n)
    parts = range(axis.outer) if part is None else (part,)
    indices = np.arange(down * across).reshape(down, across)
    found = []
    for unit in range(axis.count):
        starts = np.array([outer * axis.step + unit * axis.inner for outer in parts])
        entries = (starts[:, None] + np.arange(axis.inner)).reshape(-1)
        touched = np.unique(entries // (block_k if rows else block_n))
        found.append(np.asarray((indices[touched] if rows else indices[:, touched]).reshape(-1), np.int64))
    return found


def _together(count: int, blocks: Sequence[Sequence[NDArray[np.int64]]]) -> list[list[int]]:
    """Return the units in groups, such that those that share a block of any layer are in one."""
    leader = list(range(count))

    def find(unit: int) -> int:
        while leader[unit] != unit:
            unit = leader[unit]
        return unit

    for of_layer in blocks:
        owner: dict[int, int] = {}
        for unit, found in enumerate(of_layer):
            for index in found.tolist():
                first, second = sorted((find(owner.setdefault(index, unit)), find(unit)))
                leader[second] = first
    groups: dict[int, list[int]] = {}
    for unit in range(count):
        groups.setdefault(find(unit), []).append(unit)
    return list(groups.values())


def _union(arrays: Iterable[NDArray[np.int64]]) -> NDArray[np.int64]:
    return np.unique(np.concatenate([np.zeros(0, np.int64), *arrays]))


def _x(node: ir.Node) -> ir.Value:
    value = node.inputs[0]
    assert value is not None
    return value
