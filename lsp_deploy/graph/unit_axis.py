"""Units, the neurons or attention heads between linear layers: which axis of every value holds them."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from lsp_deploy.graph.constants import operators
from lsp_deploy.graph.dataflow import NONLINEAR

__all__ = [
    "ELEMENTWISE",
    "SAME_ORDER",
    "Axis",
    "Region",
    "Shapes",
    "UntraceableError",
    "channel_axis",
    "constant_ints",
    "is_constant_input",
    "is_linear",
    "shape_of",
    "trace_units",
]

Shapes = Mapping[str, tuple[int, ...]]
"""Concrete shapes by value name, measured at a batch of at least 2: a dimension of 1 is one that broadcasts."""

ELEMENTWISE = NONLINEAR | operators(
    "Abs Add And Cast Ceil Div Equal Exp Floor Greater GreaterOrEqual Identity IsNaN Less LessOrEqual Log Max Min Mul "
    "Neg Not Or Pow Reciprocal Round Sign Sqrt Sub Where Xor"
)
SAME_ORDER = operators("Flatten Reshape Squeeze Unsqueeze")
_REDUCING = operators("ReduceL1 ReduceL2 ReduceMax ReduceMean ReduceMin ReduceSum ReduceSumSquare")
_NORMALIZING = operators("LayerNormalization RMSNormalization")


class UntraceableError(Exception):
    """The axis cannot be followed for sure; the message says where and why."""


@dataclass(frozen=True)
class Axis:
    """Axis `index` of a value, of outer x count x inner entries, the middle factor of which counts the units."""

    index: int
    outer: int
    count: int
    inner: int

    @property
    def step(self) -> int:
        """Entries of one outer part."""
        return self.count * self.inner

    def entries(self, units: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the entries along the axis that belong to `units`, in order."""
        positions = np.arange(self.outer * self.step).reshape(self.outer, self.count, self.inner)
        return np.asarray(positions[:, units].reshape(-1), np.int64)


@dataclass
class Region:
    """The part of a graph through which units pass, each apart from all others."""

    count: int
    axes: dict[ir.Value, Axis] = field(default_factory=dict)
    """Of all values inside, the outputs of `producers` and the inputs of `consumers` included."""
    constants: dict[tuple[ir.Node, int], Axis] = field(default_factory=dict)
    """By node and input: constants with an entry for each unit, such as biases."""
    producers: list[ir.Node] = field(default_factory=list)
    """Linear layers whose columns belong to units."""
    consumers: list[ir.Node] = field(default_factory=list)
    """Linear layers whose rows belong to units."""

    def nodes(self) -> list[ir.Node]:
        """Return the nodes between the layers that read values of units, each once."""
        layers = set(self.producers) | set(self.consumers)
        return list({node: None for value in self.axes for node in value.consumers() if node not in layers})


def trace_units(start: ir.Value, axis: Axis, shapes: Shapes) -> Region:
    """Follow an axis from one value, forwards and backwards, to the linear layers around it.

    Every node on the way must treat the units apart from each other, so that dropping one changes nothing for the rest.

    Args:
        start: a value inside.
        axis: which of its axes holds the units; there are at least two.
        shapes: of all values of the graph.

    Raises:
        UntraceableError: a node mixes units or is not known not to, a graph input or output is reached, or a layer
            shares its weight.
    """
    region = Region(axis.count, {start: axis})
    waiting = deque([start])

    def assign(value: ir.Value, found: Axis, node: ir.Node) -> None:
        if is_constant_input(value):
            region.constants.update({(node, i): found for i, operand in enumerate(node.inputs) if operand is value})
        elif value not in region.axes:
            region.axes[value] = found
            waiting.append(value)
        elif region.axes[value] != found:
            raise UntraceableError(f"{node.op_type} {node.name} joins different channels")

    while waiting:
        value = waiting.popleft()
        _check_inside(value)
        for node, position in _neighbours(value):
            if _is_layer_end(node, position, region.axes[value], shapes):
                _add_layer(region, node, position)
                related = _bias(node, position, region.axes[value], shapes)
            else:
                related = _related(node, position, region.axes[value], shapes)
            for other, found in related:
                assign(other, found, node)
    return region


def is_linear(node: ir.Node) -> bool:
    """Return whether a node multiplies channels of an activation by a constant matrix: MatMul, Gemm, pointwise Conv."""
    if node.op_type not in ("MatMul", "Gemm", "Conv") or node.domain != "" or is_constant_input(node.inputs[0]):
        return False
    weight = node.inputs[1]
    if weight is None or weight.const_value is None or not is_constant_input(weight):
        return False
    sizes = [int(size) for size in weight.const_value.shape.numpy()]
    attributes = node.attributes
    if node.op_type == "Conv":
        ones = [1] * (len(sizes) - 2)
        return (
            sizes[2:] == ones
            and list(attributes.get_ints("strides", ones)) == ones
            and attributes.get_int("group", 1) == 1
            and not any(attributes.get_ints("pads", [0]))
        )
    return len(sizes) >= 2 and all(size == 1 for size in sizes[:-2]) and not attributes.get_int("transA", 0)


def channel_axis(node: ir.Node, rank: int) -> int:
    """Return the axis along which the input and output of a linear node, of `rank` axes, have their channels."""
    return 1 if node.op_type == "Conv" else rank - 1


def is_constant_input(value: ir.Value | None) -> bool:
    """Return whether a value is an initializer that no user of the model overrides."""
    return value is not None and value.is_initializer() and not value.is_graph_input()


def shape_of(value: ir.Value, shapes: Shapes) -> tuple[int, ...]:
    """Return the concrete shape of a value.

    Raises:
        UntraceableError: it is not known.
    """
    if is_constant_input(value) and value.const_value is not None:
        return tuple(int(size) for size in value.const_value.shape.numpy())
    if str(value.name) not in shapes:
        raise UntraceableError(f"the shape of {value.name} is not known")
    return shapes[str(value.name)]


def constant_ints(value: ir.Value | None) -> list[int] | None:
    """Return the integers of a constant; None for any other value."""
    if value is None or not is_constant_input(value) or value.const_value is None:
        return None
    return [int(number) for number in value.const_value.numpy().reshape(-1)]


# A value's place at a node: input number 0, 1, ..., or output number -1, -2, ...
_Related = Iterator[tuple[ir.Value, Axis]]


def _neighbours(value: ir.Value) -> Iterator[tuple[ir.Node, int]]:
    producer = value.producer()
    assert producer is not None  # _check_inside sees to it
    yield producer, -1 - producer.outputs.index(value)
    yield from value.uses()


def _check_inside(value: ir.Value) -> None:
    if value.is_graph_output():
        raise UntraceableError(f"{value.name} is an output of the model")
    if value.producer() is None:
        raise UntraceableError(f"{value.name} is an input of the model")


def _is_layer_end(node: ir.Node, position: int, axis: Axis, shapes: Shapes) -> bool:
    if not is_linear(node) or position not in (0, -1):
        return False
    return axis.index == channel_axis(node, len(shape_of(_value(node, position), shapes)))


def _add_layer(region: Region, node: ir.Node, position: int) -> None:
    weight = node.inputs[1]
    if weight is None or len(weight.uses()) != 1 or weight.is_graph_output():
        raise UntraceableError(f"layer {node.name} shares its weight with another")
    layers = region.consumers if position == 0 else region.producers
    if node not in layers:
        layers.append(node)


def _bias(node: ir.Node, position: int, axis: Axis, shapes: Shapes) -> _Related:
    """Yield the bias of a Gemm or Conv, where it has an entry for each unit."""
    if position == 0 or len(node.inputs) < 3 or node.inputs[2] is None:
        return
    bias = node.inputs[2]
    if not is_constant_input(bias):
        raise UntraceableError(f"the bias of layer {node.name} is not constant")
    sizes = shape_of(bias, shapes)
    if sizes and sizes[-1] != 1:
        yield bias, Axis(len(sizes) - 1, axis.outer, axis.count, axis.inner)


def _related(node: ir.Node, position: int, axis: Axis, shapes: Shapes) -> _Related:
    rule = _RULES.get(node.op_type)
    if rule is None or node.domain != "":
        raise UntraceableError(f"{node.op_type} {node.name} is not known to keep channels apart")
    return rule(node, position, axis, shapes)


def _elementwise(node: ir.Node, position: int, axis: Axis, shapes: Shapes, last: int = 0) -> _Related:
    """Broadcasting: axes count from the right. The `last` ones are no batch axes."""
    from_right = len(shape_of(_value(node, position), shapes)) - axis.index
    for value in (*node.inputs, node.outputs[0]):
        if value is None:
            continue
        sizes = shape_of(value, shapes)
        index = len(sizes) - from_right
        if from_right <= last or len(sizes) < last:
            raise _mixes(node)
        if index >= 0 and sizes[index] != 1:
            yield value, Axis(index, axis.outer, axis.count, axis.inner)


def _product(node: ir.Node, position: int, axis: Axis, shapes: Shapes) -> _Related:
    return _elementwise(node, position, axis, shapes, last=2)


def _transpose(node: ir.Node, position: int, axis: Axis, shapes: Shapes) -> _Related:
    rank = len(shape_of(node.outputs[0], shapes))
    order = list(node.attributes.get_ints("perm", tuple(range(rank))[::-1]))
    index = order.index(axis.index) if position >= 0 else order[axis.index]
    yield _other(node, position), Axis(index, axis.outer, axis.count, axis.inner)


def _same_order(node: ir.Node, position: int, axis: Axis, shapes: Shapes) -> _Related:
    """The entries stay in order: the units keep their stride."""
    if position > 0:
        raise _mixes(node)
    other = _other(node, position)
    sizes = shape_of(_value(node, position), shapes)
    found = _at_stride(shape_of(other, shapes), axis.count, math.prod(sizes[axis.index + 1 :]) * axis.inner)
    if found is None:
        raise UntraceableError(f"{node.op_type} {node.name} cuts the channels otherwise")
    if node.op_type == "Reshape":
        target = constant_ints(node.inputs[1])
        source, result = (axis, found) if position >= 0 else (found, axis)
        if target is None:
            raise UntraceableError(f"Reshape {node.name} computes its sizes")
        copied = [] if node.attributes.get_int("allowzero", 0) else [i for i, size in enumerate(target) if size == 0]
        if any((index == source.index) != (index == result.index) for index in copied):
            raise UntraceableError(f"Reshape {node.name} copies the size of the channels elsewhere")
    yield other, found


def _at_stride(sizes: Sequence[int], count: int, stride: int) -> Axis | None:
    after = 1
    for index in reversed(range(len(sizes))):
        if stride % after:
            return None
        inner = stride // after
        if sizes[index] % (inner * count) == 0:
            return Axis(index, sizes[index] // (inner * count), count, inner)
        after *= sizes[index]
    return None


def _softmax(node: ir.Node, position: int, axis: Axis, shapes: Shapes) -> _Related:
    rank = len(shape_of(node.outputs[0], shapes))
    if node.attributes.get_int("axis", -1) % rank == axis.index:
        raise _mixes(node)
    yield _other(node, position), axis


def _normalization(node: ir.Node, position: int, axis: Axis, shapes: Shapes) -> _Related:
    rank = len(shape_of(node.outputs[0], shapes))
    if position not in (0, -1) or axis.index >= node.attributes.get_int("axis", -1) % rank:
        raise _mixes(node)
    yield _other(node, position), axis


def _batch_normalization(node: ir.Node, position: int, axis: Axis, shapes: Shapes) -> _Related:
    if position not in (0, -1) or len(node.outputs) != 1 or not all(map(is_constant_input, node.inputs[1:])):
        raise _mixes(node)
    yield _other(node, position), axis
    if axis.index == 1:
        for value in node.inputs[1:]:
            assert value is not None
            yield value, Axis(0, axis.outer, axis.count, axis.inner)


def _reduction(node: ir.Node, position: int, axis: Axis, shapes: Shapes) -> _Related:
    rank = len(shape_of(_value(node, 0), shapes))
    axes = node.attributes.get_ints("axes", None) or constant_ints(node.inputs[1] if len(node.inputs) > 1 else None)
    if not axes or not node.attributes.get_int("keepdims", 1) or axis.index in [index % rank for index in axes]:
        raise _mixes(node)
    yield _other(node, position), axis


def _split(node: ir.Node, position: int, axis: Axis, shapes: Shapes) -> _Related:
    whole = shape_of(_value(node, 0), shapes)
    if node.attributes.get_int("axis", 0) % len(whole) != axis.index:
        yield from ((value, axis) for value in (_value(node, 0), *node.outputs))
        return
    if len(node.inputs) > 1 and node.inputs[1] is not None and constant_ints(node.inputs[1]) is None:
        raise UntraceableError(f"Split {node.name} computes its sizes")
    for value in (_value(node, 0), *node.outputs):
        yield value, _part(node, shape_of(value, shapes)[axis.index], axis)


def _slice(node: ir.Node, position: int, axis: Axis, shapes: Shapes) -> _Related:
    rank = len(shape_of(_value(node, 0), shapes))
    bounds = [constant_ints(value) for value in node.inputs[1:]]
    if None in bounds or len(bounds) < 3:
        raise UntraceableError(f"Slice {node.name} computes its bounds")
    starts, ends, axes, *steps = (bound or [] for bound in bounds)
    for number, index in enumerate(axes):
        if index % rank != axis.index:
            continue
        inside = starts[number] % axis.step == 0 and (ends[number] % axis.step == 0 or ends[number] > _END)
        if not inside or (steps and steps[0][number] != 1):
            raise _mixes(node)
    for value in (_value(node, 0), node.outputs[0]):
        yield value, _part(node, shape_of(value, shapes)[axis.index], axis)


_END = 1 << 30  # a bound beyond this means: to the end


def _gather(node: ir.Node, position: int, axis: Axis, shapes: Shapes) -> _Related:
    rank = len(shape_of(_value(node, 0), shapes))
    along = node.attributes.get_int("axis", 0) % rank
    picked = len(shape_of(_value(node, 1), shapes))
    if position == 1 or not is_constant_input(node.inputs[1]):
        raise _mixes(node)
    shift = picked - 1
    if position == 0:
        if axis.index == along:
            raise _mixes(node)
        index = axis.index + shift if axis.index > along else axis.index
    else:
        if along <= axis.index < along + picked:
            raise _mixes(node)
        index = axis.index - shift if axis.index >= along + picked else axis.index
    yield _other(node, position), Axis(index, axis.outer, axis.count, axis.inner)


def _concat(node: ir.Node, position: int, axis: Axis, shapes: Shapes) -> _Related:
    rank = len(shape_of(node.outputs[0], shapes))
    if node.attributes.get_int("axis", 0) % rank == axis.index:
        raise _mixes(node)
    yield from ((value, axis) for value in (*node.inputs, node.outputs[0]) if value is not None)


def _part(node: ir.Node, size: int, axis: Axis) -> Axis:
    if size % axis.step:
        raise _mixes(node)
    return Axis(axis.index, size // axis.step, axis.count, axis.inner)


def _value(node: ir.Node, position: int) -> ir.Value:
    value = node.inputs[position] if position >= 0 else node.outputs[-1 - position]
    assert value is not None
    return value


def _other(node: ir.Node, position: int) -> ir.Value:
    return _value(node, 0 if position < 0 else -1)


def _mixes(node: ir.Node) -> UntraceableError:
    return UntraceableError(f"{node.op_type} {node.name} mixes channels")


_RULES: dict[str, Callable[[ir.Node, int, Axis, Shapes], _Related]] = {
    **dict.fromkeys(ELEMENTWISE, _elementwise),
    **dict.fromkeys(SAME_ORDER, _same_order),
    **dict.fromkeys(_REDUCING, _reduction),
    **dict.fromkeys(_NORMALIZING, _normalization),
    "BatchNormalization": _batch_normalization,
    "Concat": _concat,
    "Gather": _gather,
    "MatMul": _product,
    "Slice": _slice,
    "Softmax": _softmax,
    "Split": _split,
    "Transpose": _transpose,
}
