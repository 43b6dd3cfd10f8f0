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
from lsp_deploy.graph.unit_axis import (
    Axis,
    Region,
    Shapes,
    UntraceableError,
    channel_axis,
    is_linear,
    shape_of,
    trace_units,
)
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
    readers: frozenset[str] = frozenset()
    """Of the layers of `blocks`, those behind the units: their blocks are rows."""


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
        index = channel_axis(node, len(sizes))
        if len(sizes) >= 2 and sizes[index] > 1:
            yield "neuron", x, Axis(index, 1, sizes[index], 1)


@dataclass(frozen=True, eq=False)
class _Strips:
    """Which strips of blocks of one layer, block rows or block columns, each unit is in."""

    layer: LinearLayer
    rows: bool
    of_unit: Sequence[NDArray[np.int64]]

    def blocks(self, units: Iterable[int], block: tuple[int, int]) -> NDArray[np.int64]:
        """Return the indices of all blocks of the strips that `units` are in."""
        down, across = -(-self.layer.K // block[0]), -(-self.layer.N // block[1])
        strips = np.unique(np.concatenate([np.zeros(0, np.int64), *(self.of_unit[unit] for unit in units)]))
        indices = np.arange(down * across).reshape(down, across)
        return np.asarray((indices[strips] if self.rows else indices[:, strips]).reshape(-1), np.int64)


def _groups(
    unit: Unit,
    region: Region,
    layers: Mapping[ir.Node, LinearLayer],
    block: tuple[int, int],
    shapes: Shapes,
) -> list[StructureGroup]:
    sources = {part for node in region.consumers for part in consumer_input(region, node, shapes).sources}
    deciding: list[_Strips] = []
    following: list[_Strips] = []
    for node in region.producers:
        axis = region.axes[node.outputs[0]]
        for part in range(axis.outer):
            strips = _Strips(layers[node], False, _strips(axis, block[1], (part,)))
            (deciding if (node, part) in sources else following).append(strips)
    for node in region.consumers:
        axis = region.axes[_x(node)]
        deciding.append(_Strips(layers[node], True, _strips(axis, block[0], range(axis.outer))))
    everyone = set(range(region.count))
    readers = frozenset(layers[node].name for node in region.consumers)
    groups = []
    for members in _together(region.count, [strips.of_unit for strips in deciding]):
        group = StructureGroup(unit, tuple(members), readers=readers)
        for strips in deciding:
            _add(group.blocks, strips.layer.name, strips.blocks(members, block))
        for strips in following:
            _add(group.free, strips.layer.name, strips.blocks(members, block))
        for strips in (*following, *deciding):  # a block that holds something else too is not free
            if strips.layer.name in group.free:
                others = everyone if strips in deciding else everyone - set(members)
                taken = strips.blocks(others, block)
                group.free[strips.layer.name] = np.setdiff1d(group.free[strips.layer.name], taken)
        groups.append(group)
    return groups


def _add(blocks: dict[str, NDArray[np.int64]], name: str, more: NDArray[np.int64]) -> None:
    blocks[name] = np.union1d(blocks.get(name, np.zeros(0, np.int64)), more)


def _strips(axis: Axis, size: int, parts: Iterable[int]) -> list[NDArray[np.int64]]:
    """Return the strips, `size` channels each, that hold channels of each unit in some outer parts of an axis."""
    found = []
    for unit in range(axis.count):
        starts = [part * axis.step + unit * axis.inner for part in parts]
        found.append(
            np.concatenate([np.arange(start // size, (start + axis.inner - 1) // size + 1) for start in starts])
        )
    return found


def _together(count: int, strips: Sequence[Sequence[NDArray[np.int64]]]) -> list[list[int]]:
    """Return the units in groups, such that those that share a strip of any layer are in one."""
    leader = list(range(count))

    def find(unit: int) -> int:
        while leader[unit] != unit:
            unit = leader[unit]
        return unit

    for of_layer in strips:
        owner: dict[int, int] = {}
        for unit, found in enumerate(of_layer):
            for index in found.tolist():
                first, second = sorted((find(owner.setdefault(index, unit)), find(unit)))
                leader[second] = first
    groups: dict[int, list[int]] = {}
    for unit in range(count):
        groups.setdefault(find(unit), []).append(unit)
    return list(groups.values())


def _x(node: ir.Node) -> ir.Value:
    value = node.inputs[0]
    assert value is not None
    return value
