"""INT8 linear layers in the form that ONNX Runtime runs in int8 on CPUs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from lsp_deploy.passes.center_activations import CenterActivationsPass
from lsp_deploy.passes.insertion import insert_after
from lsp_deploy.passes.int8_scales import activation_scale, int8_weight, weight_scale
from lsp_deploy.passes.layer_weights import add_initializer, layer_nodes
from lsp_deploy.passes.linear_node import LinearNode, read_linear_node, replace_nodes
from lsp_deploy.plan import LayerPlan, Plan

__all__ = ["QgemmFormPass"]

MIN_OPSET = 15  # Shape without the last dimension
_LARGEST_BIAS = 1 << 30  # leaves as much room again for the sum of products


class QgemmFormPass(ir.passes.InPlacePass):
    """x @ W + b becomes a Gemm between Q/DQ, with x as a matrix, where the plan's execution.kernel says qgemm.

    x is uint8, W int8, b int32; ONNX Runtime makes one QGemm of it, whatever the options of the session. Of a MatMul of
    fixed shape it makes a Gemm first if those are the default ones, and computes that in float32 (slower than without
    int8), or refuses the model if x is int8 and the opset 21 or later. An int8 x that two layers read stays float32,
    too. The integers are those of symmetric int8 plus 128; an activation_offset becomes part of the zero point, rounded
    to whole steps, and costs no subtraction.
    """

    def __init__(self, plan: Plan) -> None:
        """Take the plan whose int8 layers are rewritten."""
        super().__init__()
        self.plan = plan

    def requires(self, model: ir.Model) -> None:
        """Check that the opset has the operators that are inserted."""
        if (opset := model.opset_imports.get("", 0)) < MIN_OPSET:
            raise ir.passes.PreconditionError(f"a QGemm in its form needs opset {MIN_OPSET}, the model has {opset}")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite the layers.

        Raises:
            UserError: the plan does not belong to this model, or lacks a scale.
        """
        layers = [
            layer for layer in self.plan.layers if layer.execution.kernel == "qgemm" and layer.precision.dtype == "int8"
        ]
        zero_points = {layer.name: _zero_point(layer) for layer in layers}
        self._center(model, [layer for layer in layers if zero_points[layer.name] is None])
        nodes = layer_nodes(model.graph, layers)
        position = {node: index for index, node in enumerate(model.graph)}
        inputs = _Inputs(model.graph)
        # In the graph's order, so that what a layer reads has already been replaced.
        for layer in sorted(layers, key=lambda layer: position[nodes[layer.name]]):
            linear = read_linear_node(model.graph, nodes[layer.name])
            zero_point = zero_points[layer.name]
            x = inputs.quantized(linear.x, layer, 128 if zero_point is None else zero_point)
            _replace(model.graph, linear, layer, x, weight_scale(self.plan, layer))
        return ir.passes.PassResult(model, modified=bool(layers))

    def _center(self, model: ir.Model, layers: list[LayerPlan]) -> None:
        """Subtract the offsets that no zero point can express."""
        centered = self.plan.branch()
        centered.layers = layers
        CenterActivationsPass(centered)(model)


class _Inputs:
    """The Q/DQ pairs of one graph: layers that read one tensor with one scale share a pair."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self.pairs: dict[tuple[ir.Value, float, int], ir.Value] = {}

    def quantized(self, x: ir.Value, layer: LayerPlan, zero_point: int) -> ir.Value:
        """Return x as a matrix [M, K], quantized and dequantized."""
        key = x, activation_scale(layer), zero_point
        if key not in self.pairs:
            self.pairs[key] = self._insert_pair(*key, layer)
        return self.pairs[key]

    def _insert_pair(self, x: ir.Value, scale: float, zero_point: int, layer: LayerPlan) -> ir.Value:
        name, nodes, matrix = layer.name, [], x
        if x.shape is None or len(x.shape) != 2:
            rows = None if x.shape is None else _product([*x.shape][:-1])
            nodes.append(_reshape(self.graph, x, [-1, layer.K], ir.Shape([rows, layer.K]), f"{name}/x"))
            matrix = nodes[-1].outputs[0]
        grid = [
            add_initializer(self.graph, f"{name}/x_scale", np.array(scale, np.float32)),
            add_initializer(self.graph, f"{name}/x_zero_point", np.array(zero_point, np.uint8)),
        ]
        quantize = ir.Node("", "QuantizeLinear", [matrix, *grid], name=f"{name}/x/QuantizeLinear")
        _describe(quantize.outputs[0], f"{name}/x_q", matrix.shape, ir.DataType.UINT8)
        dequantize = ir.Node("", "DequantizeLinear", [quantize.outputs[0], *grid], name=f"{name}/x/DequantizeLinear")
        _describe(dequantize.outputs[0], f"{name}/x_dq", matrix.shape)
        insert_after(self.graph, x, [*nodes, quantize, dequantize])
        return dequantize.outputs[0]


def _zero_point(layer: LayerPlan) -> int | None:
    """Return the uint8 that stands for zero in the layer's input; None if zero is too far outside its range."""
    if layer.precision.activation_offset == 0:
        return 128
    zero_point = 128 - round(layer.precision.activation_offset / activation_scale(layer))
    return zero_point if 0 <= zero_point <= 255 else None


def _replace(graph: ir.Graph, linear: LinearNode, layer: LayerPlan, x: ir.Value, scale: NDArray[np.float32]) -> None:
    name = layer.name
    weight = _dequantized(graph, f"{name}/weight", int8_weight(linear.weight, scale), scale, axis=1)
    nodes, operands = [weight], [x, weight.outputs[0]]
    step = np.float32(activation_scale(layer)) * scale
    bias = np.rint(linear.bias / step.astype(np.float64))
    fits = bool((np.abs(bias) <= _LARGEST_BIAS).all())
    if fits:
        nodes.append(_dequantized(graph, f"{name}/bias", bias.astype(np.int32), step, axis=0))
        operands.append(nodes[-1].outputs[0])
    nodes.append(ir.Node("", "Gemm", operands, name=name))
    _describe(nodes[-1].outputs[0], f"{name}/matrix", None if x.shape is None else ir.Shape([x.shape[0], layer.N]))
    if linear.x.shape is None or len(linear.x.shape) != 2:
        nodes += _as_before(graph, linear.x, nodes[-1].outputs[0], layer)
    if not fits:
        value = add_initializer(graph, f"{name}/bias", linear.bias)
        nodes.append(ir.Node("", "Add", [nodes[-1].outputs[0], value], name=f"{name}/bias/Add"))
    replace_nodes(graph, linear.nodes, linear.y, nodes, nodes[-1].outputs[0])


def _dequantized(
    graph: ir.Graph, name: str, array: NDArray[np.int8 | np.int32], scale: NDArray[np.float32], *, axis: int
) -> ir.Node:
    operands = [
        add_initializer(graph, f"{name}_q", array),
        add_initializer(graph, f"{name}_scale", scale),
    ]
    if array.dtype == np.int8:  # int32 has none
        operands.append(add_initializer(graph, f"{name}_zero_point", np.zeros(scale.size, np.int8)))
    node = ir.Node("", "DequantizeLinear", operands, [ir.AttrInt64("axis", axis)], name=f"{name}/DequantizeLinear")
    _describe(node.outputs[0], f"{name}_dq", ir.Shape(array.shape))
    return node


def _as_before(graph: ir.Graph, x: ir.Value, matrix: ir.Value, layer: LayerPlan) -> list[ir.Node]:
    """Return the nodes that give a matrix [M, N] the leading dimensions of x."""
    if x.shape is not None:
        sizes = [dim if isinstance(dim, int) else -1 for dim in [*x.shape][:-1]]
        if sizes.count(-1) <= 1:
            shape = ir.Shape([*[*x.shape][:-1], layer.N])
            return [_reshape(graph, matrix, [*sizes, layer.N], shape, f"{layer.name}/y")]
    leading = ir.Node("", "Shape", [x], [ir.AttrInt64("end", -1)], name=f"{layer.name}/y/Shape")
    columns = add_initializer(graph, f"{layer.name}/columns", np.array([layer.N]))
    axis = ir.AttrInt64("axis", 0)
    whole = ir.Node("", "Concat", [leading.outputs[0], columns], [axis], name=f"{layer.name}/y/Concat")
    for node, name in ((leading, "leading"), (whole, "y_shape")):
        _describe(node.outputs[0], f"{layer.name}/{name}", None, ir.DataType.INT64)
    reshape = ir.Node("", "Reshape", [matrix, whole.outputs[0]], name=f"{layer.name}/y/Reshape")
    _describe(reshape.outputs[0], f"{layer.name}/y_reshaped", None)
    return [leading, whole, reshape]


def _reshape(graph: ir.Graph, value: ir.Value, sizes: Sequence[int], shape: ir.Shape, name: str) -> ir.Node:
    target = add_initializer(graph, f"{name}_shape", np.array(sizes, np.int64))
    node = ir.Node("", "Reshape", [value, target], name=f"{name}/Reshape")
    _describe(node.outputs[0], f"{name}_reshaped", shape)
    return node


def _product(sizes: Sequence[int | ir.SymbolicDim]) -> int | None:
    known = [size for size in sizes if isinstance(size, int)]
    return int(np.prod(known)) if len(known) == len(sizes) else None


def _describe(value: ir.Value, name: str, shape: ir.Shape | None, dtype: ir.DataType = ir.DataType.FLOAT) -> None:
    value.name, value.shape, value.type = name, shape, ir.TensorType(dtype)
