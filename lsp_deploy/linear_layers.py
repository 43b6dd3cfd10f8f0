"""The LinearLayer view: every y = x @ W + b with constant W in a graph, however it was exported."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from lsp_deploy.graph.attention_flops import attention_flops
from lsp_deploy.graph.constants import constant_values, evaluate, root_of
from lsp_deploy.graph.dataflow import DataFlow, depend_on_inputs
from lsp_deploy.graph.layer_surroundings import find_activation, find_bias, find_residual
from lsp_deploy.graph.measured_shapes import measure_shapes
from lsp_deploy.graph.roles import Role, assign_blocks, assign_roles
from lsp_deploy.model import resolve_shapes

__all__ = ["LinearLayer", "Role", "attention_flops", "linear_layers", "replace_weight"]


@dataclass(frozen=True)
class LinearLayer:
    """One linear layer: y [M, N] = x [M, K] @ W [K, N] + b [N]."""

    name: str
    """Of the node."""
    role: Role
    node: ir.Node
    """MatMul, Gemm or Conv (kernel = stride: a linear layer over patches)."""
    K: int
    N: int
    M: int
    """Rows of x at the given input shapes."""
    x: ir.Value
    y: ir.Value
    """Output of the node itself, before a separate bias Add."""
    bias: ir.Value | None
    """Constant bias."""
    bias_node: ir.Node | None
    """What adds the bias: an Add, or the node itself."""
    activation: ir.Node | None
    """The node that gives the activation that follows; the last one of a decomposed activation."""
    activation_kind: str | None
    """gelu, gelu_tanh, quick_gelu, relu, silu, ..."""
    residual: ir.Node | None
    """The residual Add that follows."""
    block: int | None
    """Index of the transformer block, from 0."""

    @property
    def weight_value(self) -> ir.Value:
        """What feeds the node's weight input."""
        value = self.node.inputs[1]
        assert value is not None
        return value

    @property
    def weight_root(self) -> str:
        """Name of the tensor at the root of the weight's constants; shared weights have the same root."""
        return str(root_of(self.weight_value).name)

    @property
    def flops(self) -> int:
        """Dense FLOPs at the given input shapes: 2·M·K·N."""
        return 2 * self.M * self.K * self.N

    def weight(self) -> NDArray[np.float32]:
        """Return W, float32 [K, N], as the mathematics sees it: transposes, scales and quantization resolved."""
        array = evaluate(self.weight_value).astype(np.float32)
        if self.node.op_type == "Conv":
            return np.ascontiguousarray(array.reshape(self.N, self.K).T)
        if self.node.op_type == "Gemm":
            array = array * np.float32(_alpha(self.node))
            return np.ascontiguousarray(array.T if _is_transposed(self.node) else array)
        return np.ascontiguousarray(array.reshape(self.K, self.N))

    def bias_vector(self) -> NDArray[np.float32]:
        """Return b, float32 [N]; zeros if there is none."""
        if self.bias is None:
            return np.zeros(self.N, np.float32)
        beta = self.node.attributes.get_float("beta", 1.0) if self.bias_node is self.node else 1.0
        array = evaluate(self.bias).astype(np.float32).reshape(-1) * np.float32(beta)
        return np.ascontiguousarray(array)


def linear_layers(model: ir.Model, shapes: Mapping[str, Sequence[int]] | None = None) -> list[LinearLayer]:
    """Return the linear layers of a graph, in graph order.

    A linear layer is a MatMul or Gemm of an activation with a constant matrix, or a Conv whose kernel equals its stride
    (no padding, groups or dilation). Constants are resolved through Identity, Transpose, Cast, Reshape,
    DequantizeLinear and the like.

    Args:
        model: canonical or as exported; it is not changed.
        shapes: concrete input shapes, for M; a dynamic batch is 1 if not given.

    Raises:
        UserError: a dynamic dimension is not given, or ONNX Runtime cannot run the model at these shapes.
    """
    candidates = list(_candidates(model.graph))
    concrete = resolve_shapes(model, shapes, batch=1)
    measured = measure_shapes(
        model, concrete, [value for node in candidates for value in (node.inputs[1], node.outputs[0]) if value]
    )
    sizes = {node: size for node in candidates if (size := _sizes(node, measured)) is not None}
    flow = DataFlow(model.graph, sizes)
    residuals = {node: find_residual(_operand(node, 0), node.outputs[0], flow) for node in sizes}
    roles = assign_roles(flow, {node: m for node, (m, _, _) in sizes.items()}, residuals)
    layers = []
    for (node, (m, k, n)), role, block in zip(sizes.items(), roles, assign_blocks(roles), strict=True):
        bias, bias_node = find_bias(node, n)
        activation, kind = find_activation(node.outputs[0], flow)
        layers.append(
            LinearLayer(
                name=str(node.name),
                role=role,
                node=node,
                K=k,
                N=n,
                M=m,
                x=_operand(node, 0),
                y=node.outputs[0],
                bias=bias,
                bias_node=bias_node,
                activation=activation,
                activation_kind=kind,
                residual=residuals[node],
                block=block,
            )
        )
    return layers


def replace_weight(layer: LinearLayer, weight: NDArray[Any]) -> None:
    """Put a new weight W [K, N] into the graph, in the node's own orientation and element type.

    Other nodes that share the old weight keep it; nodes that get the same new weight share that one. What only the old
    weight needed is removed.
    """
    node, old = layer.node, layer.weight_value
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    like = evaluate(old)
    array = np.asarray(weight, np.float32)
    if node.op_type == "Conv" or (node.op_type == "Gemm" and _is_transposed(node)):
        array = array.T
    if node.op_type == "Gemm":
        array = array / np.float32(_alpha(node))
    array = np.ascontiguousarray(array).reshape(like.shape).astype(like.dtype)
    if np.array_equal(array, like):
        return
    node.replace_input_with(1, _initializer(graph, f"{layer.weight_root}.replaced", array))
    _remove_unused(graph, old)


def _candidates(graph: ir.Graph) -> Iterator[ir.Node]:
    constants, dependent = constant_values(graph), depend_on_inputs(graph)
    for node in graph:
        if node.op_type not in ("MatMul", "Gemm", "Conv") or node.domain != "" or len(node.inputs) < 2:
            continue
        x, weight = node.inputs[:2]
        if x not in dependent or weight not in constants:
            continue
        if node.op_type != "Conv" or _is_patchwise(node):
            yield node


def _is_patchwise(conv: ir.Node) -> bool:
    attributes = conv.attributes
    weight = evaluate(_operand(conv, 1))
    kernel = list(attributes.get_ints("kernel_shape", weight.shape[2:]))
    ones = [1] * len(kernel)
    return (
        list(attributes.get_ints("strides", ones)) == kernel
        and attributes.get_int("group", 1) == 1
        and list(attributes.get_ints("dilations", ones)) == ones
        and not any(attributes.get_ints("pads", [0]))
        and attributes.get_string("auto_pad", "NOTSET") in ("NOTSET", "VALID")
    )


def _sizes(node: ir.Node, measured: Mapping[str, tuple[int, ...]]) -> tuple[int, int, int] | None:
    """Return M, K, N, or None if the constant operand is not one matrix."""
    shape = measured[str(_operand(node, 1).name)]
    if node.op_type == "Conv":
        n, k = shape[0], int(np.prod(shape[1:]))
    elif node.op_type == "Gemm":
        n, k = shape if _is_transposed(node) else shape[::-1]
    elif len(shape) >= 2 and all(size == 1 for size in shape[:-2]):
        k, n = shape[-2:]
    else:
        return None
    return int(np.prod(measured[str(node.outputs[0].name)])) // n, k, n


def _initializer(graph: ir.Graph, base: str, array: NDArray[Any]) -> ir.Value:
    name, number = base, 1
    while name in graph.initializers:
        tensor = graph.initializers[name].const_value
        if tensor is not None and tensor.shape == array.shape and np.array_equal(tensor.numpy(), array):
            return graph.initializers[name]
        number += 1
        name = f"{base}_{number}"
    value = ir.Value(name=name, const_value=ir.tensor(array, name=name))
    value.shape, value.dtype = ir.Shape(array.shape), ir.DataType.from_numpy(array.dtype)
    graph.register_initializer(value)
    return value


def _remove_unused(graph: ir.Graph, value: ir.Value) -> None:
    if value.uses() or value.is_graph_output() or value.is_graph_input():
        return
    node = value.producer()
    if node is None:
        del graph.initializers[str(value.name)]
        return
    if any(output.uses() for output in node.outputs):
        return
    operands = {operand for operand in node.inputs if operand is not None}
    graph.remove(node, safe=True)
    for operand in operands:
        _remove_unused(graph, operand)


def _operand(node: ir.Node, index: int) -> ir.Value:
    value = node.inputs[index]
    assert value is not None
    return value


def _is_transposed(gemm: ir.Node) -> bool:
    return gemm.attributes.get_int("transB", 0) == 1


def _alpha(gemm: ir.Node) -> float:
    return gemm.attributes.get_float("alpha", 1.0)
