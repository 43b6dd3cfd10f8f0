"""The residual streams of a graph: all that one hidden basis reaches, through Adds, LayerNorms and reordering.

A stream may be rotated where every node that touches it either does not look at single channels (Add, Reshape, Concat
of tokens), is a LayerNormalization over all of them, or is a linear layer, which takes the rotation into its weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import onnx_ir as ir

from lsp_deploy.graph.constants import evaluate, operators
from lsp_deploy.linear_layers import LinearLayer

__all__ = ["Constant", "Stream", "find_streams"]

_SAME_AXIS = operators("Identity Cast Dropout Concat Slice Gather Split Expand Pad")
_LOOKS_AT_SHAPE = operators("Shape Size")


@dataclass(frozen=True)
class Constant:
    """A constant operand that lives in the stream: a position embedding, say."""

    node: ir.Node
    index: int
    axis: int
    """Of the channels, counted from the end (-1: the last)."""


@dataclass
class Stream:
    """What a rotation of one stream has to touch."""

    channels: int
    norms: list[ir.Node] = field(default_factory=list)
    """LayerNormalization nodes over it."""
    readers: list[tuple[LinearLayer, ir.Node | None]] = field(default_factory=list)
    """Layers whose rows are in its basis, and the LayerNormalization in front of them, if there is one."""
    writers: list[tuple[LinearLayer, ir.Node | None]] = field(default_factory=list)
    """Layers whose columns are in its basis, and the Mul by a constant per channel behind them, if there is one."""
    constants: list[Constant] = field(default_factory=list)


class _CannotRotateError(Exception):
    """Why a stream has to keep its basis."""


def find_streams(graph: ir.Graph, layers: Sequence[LinearLayer]) -> tuple[list[Stream], list[str]]:
    """Return the streams that can be rotated, and in words why others cannot.

    Args:
        graph: canonical, with shapes.
        layers: its linear layers.
    """
    streams, reasons = [], []
    seen: set[ir.Value] = set()
    for node in graph:
        if not _is_norm(node) or node.inputs[0] is None or node.inputs[0] in seen:
            continue
        walk = _Walk(layers)
        try:
            streams.append(walk.stream_of(node))
        except _CannotRotateError as error:
            reasons.append(str(error))
        seen |= walk.values.keys()
    return streams, list(dict.fromkeys(reasons))


class _Walk:
    """Everything that is reached from one LayerNormalization's input."""

    def __init__(self, layers: Sequence[LinearLayer]) -> None:
        self.by_node = {layer.node: layer for layer in layers}
        self.by_output = {_output(layer): layer for layer in layers}
        self.values: dict[ir.Value, int] = {}
        """Values of the stream and the axis of its channels, counted from the end."""
        self.normed: dict[ir.Value, tuple[int, ir.Node]] = {}
        """Values behind a LayerNormalization, likewise."""
        self.waiting: list[ir.Value] = []
        self.joins: list[tuple[ir.Node, ir.Node]] = []
        """Nodes that join values behind a LayerNormalization, and which one that must be."""

    def stream_of(self, norm: ir.Node) -> Stream:
        value = _operand(norm, 0)
        size = _size(value, -1)
        if size is None:
            raise _CannotRotateError(f"{norm.name}: its width is not known")
        self.stream = Stream(size)
        self._reach(value, -1)
        while self.waiting:
            value = self.waiting.pop()
            if value in self.normed:
                axis, of = self.normed[value]
                self._forward_normed(value, axis, of)
            else:
                axis = self.values[value]
                self._backward(value, axis)
                self._forward(value, axis)
        for node, of in self.joins:
            if any(value not in self.normed or self.normed[value][1] is not of for value in node.inputs if value):
                raise _CannotRotateError(f"{node.name} joins what is behind {of.name} with something else")
        if not self.stream.readers or not self.stream.writers:
            raise _CannotRotateError(f"{norm.name}: no linear layer reads or writes what it normalizes")
        return self.stream

    def _reach(self, value: ir.Value, axis: int) -> None:
        if value in self.normed:
            raise _CannotRotateError(f"{value.name} is both normalized and part of the stream")
        if value not in self.values:
            if _size(value, axis) != self.stream.channels or value.is_graph_output() or value.is_graph_input():
                raise _CannotRotateError(
                    f"{value.name} is seen from outside, or its channels are not those of the stream"
                )
            self.values[value] = axis
            self.waiting.append(value)
        elif self.values[value] != axis:
            raise _CannotRotateError(f"{value.name} holds the channels on two axes")

    def _backward(self, value: ir.Value, axis: int) -> None:
        node = value.producer()
        if node is None:
            raise _CannotRotateError(f"{value.name} is given from outside")
        if (layer := self.by_output.get(value)) is not None:
            self._write(layer, axis, None)
        elif node.op_type == "Mul":
            self._through_scale(node, axis)
        elif node.op_type in ("Add", "Sub"):
            for index in range(2):
                self._operand_of_sum(node, index, axis)
        else:
            for index in _data_inputs(node):
                self._enter(node, index, _axis_before(node, index, axis))

    def _forward(self, value: ir.Value, axis: int) -> None:
        for node, index in _uses(value):
            if node.op_type in _LOOKS_AT_SHAPE:
                continue
            if node in self.by_node and index == 0:
                self._read(self.by_node[node], axis, None)
            elif _is_norm(node) and index == 0:
                if axis != -1:
                    raise _CannotRotateError(f"{node.name} does not normalize over the stream's channels")
                self.stream.norms.append(node)
                self.normed[node.outputs[0]] = -1, node
                self.waiting.append(node.outputs[0])
            elif node.op_type in ("Add", "Sub"):
                self._reach(node.outputs[0], axis)
            else:
                for output in _outputs(node):
                    self._reach(output, _axis_after(node, index, axis))

    def _forward_normed(self, value: ir.Value, axis: int, norm: ir.Node) -> None:
        if value.is_graph_output() or value in self.values:
            raise _CannotRotateError(f"{value.name}, behind {norm.name}, is used as it is")
        for node, index in _uses(value):
            if node.op_type in _LOOKS_AT_SHAPE:
                continue
            if node in self.by_node and index == 0:
                self._read(self.by_node[node], axis, norm)
                continue
            after = _axis_after(node, index, axis)
            if len(_data_inputs(node)) > 1:
                self.joins.append((node, norm))
            for output in _outputs(node):
                if output not in self.normed:
                    self.normed[output] = after, norm
                    self.waiting.append(output)

    def _read(self, layer: LinearLayer, axis: int, norm: ir.Node | None) -> None:
        # A convolution of single pixels has its input channels on the second axis.
        expected = 1 - _rank(layer.x) if layer.node.op_type == "Conv" else -1
        if axis != expected or self.stream.channels != layer.K:
            raise _CannotRotateError(f"{layer.name} does not read the stream's channels as its rows")
        self.stream.readers.append((layer, norm))

    def _write(self, layer: LinearLayer, axis: int, scale: ir.Node | None) -> None:
        expected = 1 - _rank(_output(layer)) if layer.node.op_type == "Conv" else -1
        if axis != expected or self.stream.channels != layer.N:
            raise _CannotRotateError(f"{layer.name} does not write the stream's channels as its columns")
        self.stream.writers.append((layer, scale))

    def _through_scale(self, node: ir.Node, axis: int) -> None:
        """Take y · γ behind a writer, γ a constant per channel, for a part of it."""
        operands = [_operand(node, index) for index in range(2)]
        layer = next((self.by_output[value] for value in operands if value in self.by_output), None)
        if layer is None or len(_output(layer).uses()) != 1 or (layer.bias is None and layer.node.op_type == "Conv"):
            raise _CannotRotateError(f"{node.name} scales single channels")
        factor = next(value for value in operands if value is not _output(layer))
        if (
            factor.const_value is None
            or _size(factor, -1) != self.stream.channels
            or factor.const_value.size != layer.N
        ):
            raise _CannotRotateError(f"{node.name} scales single channels")
        self._write(layer, axis, node)

    def _operand_of_sum(self, node: ir.Node, index: int, axis: int) -> None:
        if -axis > _rank(_operand(node, index)):  # broadcast over the channels: the same number in each
            if _operand(node, index).const_value is None:
                raise _CannotRotateError(f"{node.name} adds what has no channels")
            return
        self._enter(node, index, axis)

    def _enter(self, node: ir.Node, index: int, axis: int) -> None:
        value = _operand(node, index)
        if value.const_value is None:
            self._reach(value, axis)
        elif _size(value, axis) == self.stream.channels:
            self.stream.constants.append(Constant(node, index, axis))
        elif _size(value, axis) != 1:
            raise _CannotRotateError(f"{value.name} does not have the stream's channels")


def _axis_after(node: ir.Node, index: int, axis: int) -> int:
    """Return the channels' axis behind a node that does not look at single channels, counted from the end."""
    before, after = _operand(node, index), node.outputs[0]
    positive = _rank(before) + axis
    if node.op_type == "Transpose":
        return list(node.attributes.get_ints("perm", range(_rank(before))[::-1])).index(positive) - _rank(after)
    if node.op_type == "Reshape":
        return _kept(node, before, after, axis)
    if node.op_type in ("Squeeze", "Unsqueeze") and _size(after, axis) == _size(before, axis) and axis == -1:
        return axis
    if (node.op_type in _SAME_AXIS and index == _data_inputs(node)[0]) or node.op_type == "Concat":
        if _acts_on(node, positive, _rank(before)):
            raise _CannotRotateError(f"{node.name} takes the channels apart")
        if node.op_type == "Gather" and axis != -1:
            raise _CannotRotateError(f"{node.name} moves the channels")
        return axis
    if node.op_type == "ReduceMean" and axis == -1 and _size(after, -1) == _size(before, -1):
        return axis
    raise _CannotRotateError(f"{node.op_type} {node.name} looks at single channels of the stream")


def _axis_before(node: ir.Node, index: int, axis: int) -> int:
    """Return the channels' axis in front of a node, given the one behind it."""
    before, after = _operand(node, index), node.outputs[0]
    if node.op_type == "Transpose":
        perm = list(node.attributes.get_ints("perm", range(_rank(after))[::-1]))
        return int(perm[_rank(after) + axis]) - _rank(before)
    if node.op_type == "Reshape":
        return _kept(node, after, before, axis)
    return axis if _axis_after(node, index, axis) == axis else 0


def _kept(node: ir.Node, one: ir.Value, other: ir.Value, axis: int) -> int:
    """Return the axis of the channels on the other side of a Reshape that keeps them whole."""
    if axis == -1 and _size(other, -1) == _size(one, -1):
        return -1
    second = 1 - _rank(one)
    if axis == second and _rank(other) >= 2 and _size(other, 1 - _rank(other)) == _size(one, axis):
        return 1 - _rank(other)  # [batch, channels, ...]
    raise _CannotRotateError(f"{node.name} takes the channels apart")


def _acts_on(node: ir.Node, axis: int, rank: int) -> bool:
    """Whether a node cuts, joins or picks along an axis."""
    if node.op_type in ("Concat", "Gather", "Split"):
        return node.attributes.get_int("axis", 0) % rank == axis
    if node.op_type == "Slice":
        axes = node.inputs[3] if len(node.inputs) > 3 else None
        if axes is None:
            return axis < evaluate(_operand(node, 1)).size if _operand(node, 1).const_value is not None else True
        return axes.const_value is None or any(int(one) % rank == axis for one in evaluate(axes).reshape(-1))
    if node.op_type == "Pad":
        pads = _operand(node, 1)
        return pads.const_value is None or bool(evaluate(pads)[axis] or evaluate(pads)[axis + rank])
    return False


def _is_norm(node: ir.Node) -> bool:
    """Whether a node is a LayerNormalization over the last axis with constants that can be changed."""
    return (
        node.op_type == "LayerNormalization"
        and node.attributes.get_int("axis", -1) in (-1, _rank(_operand(node, 0)) - 1)
        and len(node.inputs) == 3
        and all(value is not None and value.const_value is not None for value in node.inputs[1:])
        and len(node.outputs) == 1
    )


def _output(layer: LinearLayer) -> ir.Value:
    """Return a layer's output, bias included."""
    if layer.bias_node is not None and layer.bias_node is not layer.node:
        return layer.bias_node.outputs[0]
    return layer.y


def _data_inputs(node: ir.Node) -> list[int]:
    if node.op_type == "Concat":
        return list(range(len(node.inputs)))
    return [0]


def _outputs(node: ir.Node) -> Iterable[ir.Value]:
    return [value for value in node.outputs if value.uses() or value.is_graph_output()]


def _uses(value: ir.Value) -> list[tuple[ir.Node, int]]:
    return [(use.node, use.idx) for use in value.uses()]


def _operand(node: ir.Node, index: int) -> ir.Value:
    value = node.inputs[index]
    assert value is not None
    return value


def _rank(value: ir.Value) -> int:
    if value.shape is None:
        raise _CannotRotateError(f"the shape of {value.name} is not known")
    return len(value.shape)


def _size(value: ir.Value, axis: int) -> int | None:
    if value.shape is None or -axis > len(value.shape):
        return None
    size = value.shape[axis]
    return size if isinstance(size, int) else None
