"""The constant weights of the layers that a plan names, and their orientation in the graph.

A MatMul holds W [K, N], a Gemm W or its transpose, a Conv over patches its transpose as [N, channels, height, width].
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from lsp_deploy.errors import UserError
from lsp_deploy.plan import LayerPlan

__all__ = ["add_initializer", "layer_nodes", "output_axis", "stored", "weight_value"]


def layer_nodes(graph: ir.Graph, layers: Iterable[LayerPlan]) -> dict[str, ir.Node]:
    """Return the node of each planned layer, by layer name.

    Raises:
        UserError: the graph has no such layer, or not with that weight: the plan belongs to another model.
    """
    by_name = {str(node.name): node for node in graph}
    nodes = {}
    for layer in layers:
        node = by_name.get(layer.name)
        if node is None:
            raise UserError(
                f"the plan names a layer {layer.name} that the model does not have; is it of another model?"
            )
        shape = _matrix_shape(node)
        if shape != (layer.K, layer.N):
            found = "no constant weight" if shape is None else f"a weight of K×N = {shape[0]}×{shape[1]}"
            raise UserError(
                f"the plan gives layer {layer.name} K×N = {layer.K}×{layer.N}, but the model has {found} there"
            )
        nodes[layer.name] = node
    return nodes


def weight_value(node: ir.Node) -> ir.Value:
    """Return what a layer's node reads its weight from."""
    value = node.inputs[1]
    assert value is not None
    return value


def stored(matrix: NDArray[Any], node: ir.Node, shape: tuple[int, ...]) -> NDArray[Any]:
    """Return a [K, N] array in the node's own orientation and `shape`."""
    return (matrix.T if _is_transposed(node) else matrix).reshape(shape)


def output_axis(node: ir.Node, rank: int) -> int:
    """Return the axis of the stored weight that runs along the N output channels."""
    return 0 if _is_transposed(node) else rank - 1


def add_initializer(graph: ir.Graph, name: str, array: NDArray[Any]) -> ir.Value:
    """Register `array` as an initializer called `name`, or `name_1`, ... where that is taken."""
    unique, number = name, 0
    while unique in graph.initializers:
        number += 1
        unique = f"{name}_{number}"
    tensor = ir.tensor(array, name=unique)
    value = ir.Value(name=unique, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value


class SharedInitializers:
    """Initializers added to one graph, each content once: layers that shared a weight go on sharing what it became."""

    def __init__(self, graph: ir.Graph) -> None:
        """Take the graph."""
        self.graph = graph
        self._known: dict[tuple[str, tuple[int, ...], bytes], ir.Value] = {}

    def add(self, name: str, array: NDArray[Any]) -> ir.Value:
        """Return the initializer that holds `array`, called `name` if there was none yet."""
        key = str(array.dtype), array.shape, hashlib.sha256(np.ascontiguousarray(array).tobytes()).digest()
        if key not in self._known:
            self._known[key] = add_initializer(self.graph, name, array)
        return self._known[key]


def _matrix_shape(node: ir.Node) -> tuple[int, int] | None:
    """Return (K, N), or None if the node has no constant weight matrix."""
    if node.op_type not in ("MatMul", "Gemm", "Conv") or len(node.inputs) < 2 or node.inputs[1] is None:
        return None
    tensor = node.inputs[1].const_value
    if tensor is None or len(tensor.shape) < 2:
        return None
    shape = [int(size) for size in tensor.shape.numpy()]
    n = shape[output_axis(node, len(shape))]
    return int(np.prod(shape)) // n if n else 0, n


def _is_transposed(node: ir.Node) -> bool:
    return node.op_type == "Conv" or (node.op_type == "Gemm" and node.attributes.get_int("transB", 0) == 1)
