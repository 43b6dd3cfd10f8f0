"""How data flows between the linear layers of a graph: by operators, never by names."""

from __future__ import annotations

import heapq
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import onnx_ir as ir

from lsp_deploy.graph.constants import constant_values, evaluate, operators

__all__ = ["NONLINEAR", "DataFlow", "Reach", "data_inputs", "depend_on_inputs", "is_depthwise"]

NONLINEAR = operators(
    "BiasGelu Celu Clip Elu Erf FastGelu Gelu HardSigmoid HardSwish LeakyRelu Mish PRelu QuickGelu Relu Selu "
    "Sigmoid Softplus Softsign Swish Tanh ThresholdedRelu"
)
_ATTENTION = frozenset({"Attention", "GroupQueryAttention", "MultiHeadAttention"})
# Data passes through these from the first input; the other inputs are shapes, indices, scales or parameters.
_FIRST_INPUT = NONLINEAR | operators(
    "Abs BatchNormalization Cast DepthToSpace DequantizeLinear Dropout Expand Flatten Gather GatherElements GatherND "
    "GroupNormalization Identity InstanceNormalization LayerNormalization LpNormalization Neg Pad Pow QuantizeLinear "
    "RMSNormalization Reciprocal Reshape SimplifiedLayerNormalization Slice SpaceToDepth Split Sqrt Squeeze Tile "
    "Transpose Unsqueeze"
)
_SCALING = frozenset({"Mul", "Div"})  # gates: whatever the other operand is
_ADDING = frozenset({"Add", "Sub", "Min", "Max", "Where"})
_REDUCING = frozenset({"ReduceL2", "ReduceMean", "ReduceSum"})
_SHAPES = frozenset({"Shape", "Size"})


@dataclass
class Reach:
    """What data reaches from a start without passing a linear layer, an attention product or a residual Add."""

    values: dict[ir.Value, bool] = field(default_factory=dict)
    """True where a nonlinearity lies on the way."""
    stops: list[ir.Node] = field(default_factory=list)
    """The nodes where it ended, in graph order."""


class DataFlow:
    """The graph as data sees it: order, constants, and what lies before and after linear layers."""

    def __init__(self, graph: ir.Graph, linear: Iterable[ir.Node]) -> None:
        self.graph = graph
        self.linear = set(linear)
        self.position = {node: index for index, node in enumerate(graph)}
        self.constants = constant_values(graph)
        self.after_linear = self._after_linear()
        """Values that depend on some linear layer's output."""
        self.before_linear = self._before_linear()
        """Values that some linear layer depends on."""

    def attention_products(self) -> list[ir.Node]:
        """Return the products of two activations (MatMul, Einsum, fused attention) that lead to a linear layer.

        One that leads to none is no attention: the similarity of CLIP's two towers, say.
        """
        return [node for node in self.graph if self.is_product(node) and node.outputs[0] in self.before_linear]

    def is_product(self, node: ir.Node) -> bool:
        """Return whether a node multiplies two activations."""
        if node.op_type in _ATTENTION:
            return True
        if node.op_type not in ("MatMul", "Einsum", "Gemm") or node in self.linear or len(node.inputs) < 2:
            return False
        return not any(value in self.constants for value in node.inputs[:2])

    def reach(self, *start: ir.Value, beside: Container[ir.Value] = ()) -> Reach:
        """Follow data from `start` through elementwise, normalizing and reordering nodes.

        What is added on the way from the values `beside` is no residual.
        """
        reach = Reach(dict.fromkeys(start, False))
        waiting: list[tuple[int, ir.Node]] = []
        seen: set[ir.Node] = set()

        def wait_for_consumers(value: ir.Value) -> None:
            for node in value.consumers():
                if node in self.position and node not in seen:
                    seen.add(node)
                    heapq.heappush(waiting, (self.position[node], node))

        for value in start:
            wait_for_consumers(value)
        while waiting:
            _, node = heapq.heappop(waiting)
            if not any(value in reach.values for value in data_inputs(node)):
                continue
            if not self._passes(node, reach, beside):
                reach.stops.append(node)
                continue
            nonlinear = node.op_type in NONLINEAR or any(reach.values.get(value, False) for value in data_inputs(node))
            for value in node.outputs:
                reach.values[value] = nonlinear
                wait_for_consumers(value)
        return reach

    def users_of(self, values: Iterable[ir.Value]) -> list[ir.Node]:
        """Return the nodes of the graph that read any of `values`, in graph order."""
        users = {node for value in values for node in value.consumers() if node in self.position}
        return sorted(users, key=self.position.__getitem__)

    def is_ancestor(self, value: ir.Value, of: ir.Value) -> bool:
        """Return whether `of` is `value`, or is computed from it."""
        first = -1 if (producer := value.producer()) is None else self.position.get(producer, -1)
        waiting, seen = [of], {of}
        while waiting:
            current = waiting.pop()
            if current is value:
                return True
            node = current.producer()
            if node is None or self.position.get(node, -1) <= first:
                continue
            for operand in data_inputs(node):
                if operand not in seen:
                    seen.add(operand)
                    waiting.append(operand)
        return False

    def _passes(self, node: ir.Node, reach: Reach, beside: Container[ir.Value]) -> bool:
        if node in self.linear:
            return False
        op = node.op_type
        if op in _FIRST_INPUT or op in _SCALING or op == "Concat":
            return True
        if op in _ADDING:
            # A mask or a position bias may be computed, but not from activations: that is a residual.
            return all(
                value in reach.values or value in beside or value not in self.after_linear
                for value in data_inputs(node)
            )
        if op == "Conv":
            # A depthwise convolution mixes tokens inside an MLP or before attention; after a nonlinearity it is the
            # middle of a convolutional block.
            return is_depthwise(node) and not reach.values.get(next(data_inputs(node)), False)
        return op in _REDUCING and _axes(node) in ([-1], (-1,))

    def _after_linear(self) -> set[ir.Value]:
        after: set[ir.Value] = set()
        for node in self.graph:
            if node in self.linear or any(value in after for value in data_inputs(node)):
                after.update(node.outputs)
        return after

    def _before_linear(self) -> set[ir.Value]:
        before: set[ir.Value] = set()
        for node in reversed(self.graph):
            if node in self.linear or any(value in before for value in node.outputs):
                before.update(data_inputs(node))
        return before


def data_inputs(node: ir.Node) -> Iterator[ir.Value]:
    """Yield the inputs that carry data, as opposed to shapes, indices and scales."""
    if node.op_type in _SHAPES:
        return
    inputs: Sequence[ir.Value | None] = node.inputs[:1] if node.op_type in _FIRST_INPUT else node.inputs
    for value in inputs:
        if value is not None:
            yield value


def depend_on_inputs(graph: ir.Graph) -> set[ir.Value]:
    """Return the values that carry data of the graph's inputs; tables and position biases do not."""
    dependent = {value for value in graph.inputs if not value.is_initializer()}
    for node in graph:
        if node.op_type not in _SHAPES and any(value in dependent for value in node.inputs):
            dependent.update(node.outputs)
    return dependent


def is_depthwise(conv: ir.Node) -> bool:
    """Return whether each output channel of a Conv reads one input channel."""
    weight = conv.inputs[1]
    tensor = None if weight is None else ir.convenience.get_const_tensor(weight)
    return tensor is not None and conv.attributes.get_int("group", 1) > 1 and tensor.shape[1] == 1


def _axes(node: ir.Node) -> Sequence[int] | None:
    if "axes" in node.attributes:
        return node.attributes["axes"].as_ints()
    if len(node.inputs) > 1 and node.inputs[1] is not None and ir.convenience.get_const_tensor(node.inputs[1]):
        axes: list[int] = evaluate(node.inputs[1]).reshape(-1).tolist()
        return axes
    return None
