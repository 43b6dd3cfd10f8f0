"""lsp::Attention in standard operators."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from lsp_deploy.errors import UserError
from lsp_deploy.passes.layer_weights import add_initializer
from lsp_deploy.plugins.attention.operator import bias_of, from_node

__all__ = ["lower"]


def lower(graph: ir.Graph, node: ir.Node) -> None:
    """Replace an lsp::Attention by Reshape, Transpose, MatMul, Add, Softmax of opset 13 or later.

    In float32, whatever the node computes in: bfloat16 only rounds what this keeps. The output keeps its name.

    Raises:
        UserError: the node is not valid, or its bias repeats along the batch without a known shape.
    """
    writer = _Writer(graph, node)
    operator = from_node(node)
    heads = operator.num_heads
    if operator.packed_qkv:
        q, k, v = writer.split(node.inputs[0], heads)
    else:
        q, k, v = (writer.heads(value, heads) for value in node.inputs[:3])
    scale = writer.constant("scale", np.array(operator.scale, np.float32))
    scores = writer.insert("MatMul", [writer.insert("Mul", [q, scale]), writer.transpose(k, [0, 1, 3, 2])])
    bias = bias_of(node)
    if bias is not None:
        batch = node.inputs[0].shape[0] if node.inputs[0] is not None and node.inputs[0].shape is not None else None
        scores = writer.biased(scores, bias, batch, heads)
    weights = writer.insert("Softmax", [scores], [ir.AttrInt64("axis", -1)])
    rows = writer.transpose(writer.insert("MatMul", [weights, v]), [0, 2, 1, 3])
    y = writer.reshape(rows, [0, 0, -1])
    old = node.outputs[0]
    y.shape, y.type = old.shape, old.type
    ir.convenience.replace_all_uses_with(old, y, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    y.name = old.name


class _Writer:
    """Inserts nodes in front of the one that they replace."""

    def __init__(self, graph: ir.Graph, node: ir.Node) -> None:
        self._graph, self._node, self._count = graph, node, 0

    def split(self, qkv: ir.Value | None, heads: int) -> list[ir.Value]:
        """Return q, k and v [B, H, S, D] of qkv [B, S, 3·H·D]."""
        packed = self.transpose(self.reshape(qkv, [0, 0, 3, heads, -1]), [2, 0, 3, 1, 4])
        ones, first = self.constant("ones", np.ones(3, np.int64)), self.constant("first", np.zeros(1, np.int64))
        parts = self.insert_all("Split", [packed, ones], [ir.AttrInt64("axis", 0)], outputs=3)
        return [self.insert("Squeeze", [part, first]) for part in parts]

    def heads(self, x: ir.Value | None, heads: int) -> ir.Value:
        """Return x [B, S, H·D] as [B, H, S, D]."""
        return self.transpose(self.reshape(x, [0, 0, heads, -1]), [0, 2, 1, 3])

    def biased(self, scores: ir.Value, bias: ir.Value, batch: Any, heads: int) -> ir.Value:
        """Return scores [B, H, S, T] + bias, which repeats along a batch that is a multiple of its own."""
        shape = list(bias.shape or ())
        if not shape or shape[0] in (1, batch) or not isinstance(shape[0], int):
            return self.insert("Add", [scores, bias])
        tokens = [size for size in shape[2:] if isinstance(size, int)]
        if len(tokens) != 2:
            raise UserError(f"{self._node.name}: its bias repeats along the batch, but its shape {shape} is not known")
        images = self.reshape(scores, [-1, shape[0], heads, *tokens])
        return self.reshape(self.insert("Add", [images, bias]), [-1, heads, *tokens])

    def reshape(self, x: ir.Value | None, shape: Sequence[int]) -> ir.Value:
        return self.insert("Reshape", [x, self.constant("shape", np.asarray(shape, np.int64))])

    def transpose(self, x: ir.Value, permutation: Sequence[int]) -> ir.Value:
        return self.insert("Transpose", [x], [ir.AttrInt64s("perm", permutation)])

    def constant(self, what: str, array: NDArray[Any]) -> ir.Value:
        return add_initializer(self._graph, f"{self._node.name}/{what}", array)

    def insert(self, op_type: str, inputs: Sequence[ir.Value | None], attributes: Sequence[ir.Attr] = ()) -> ir.Value:
        return self.insert_all(op_type, inputs, attributes)[0]

    def insert_all(
        self, op_type: str, inputs: Sequence[ir.Value | None], attributes: Sequence[ir.Attr] = (), outputs: int = 1
    ) -> Sequence[ir.Value]:
        self._count += 1
        name = f"{self._node.name}/{op_type}_{self._count}"
        node = ir.Node("", op_type, inputs, attributes, num_outputs=outputs, name=name)
        for number, value in enumerate(node.outputs):
            value.name = f"{name}/{number}"
        self._graph.insert_before(self._node, node)
        return node.outputs
