"""Attention in elementary operators, for parsers that stop before opset 23."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import NameFixPass

from lsp_deploy.passes.layer_weights import add_initializer
from lsp_deploy.passes.node_names import name_beside

__all__ = ["DecomposeAttentionPass"]

_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


class DecomposeAttentionPass(ir.passes.InPlacePass):
    """Attention(q, k, v, mask) becomes Softmax(q √s @ (k √s)ᵀ + mask) @ v, as TorchScript exports write it.

    That is the attention of vision transformers: q, k and v [batch, heads, tokens, size] with as many heads each, a
    mask that is added or none. One that is causal, capped, or keeps keys and values for later stays.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite the nodes of the main graph."""
        modified = False
        for node in model.graph:
            if node.op_type == "Attention" and node.domain == "" and _is_plain(node):
                _decompose(model.graph, node)
                modified = True
        if modified:
            NameFixPass()(model)
        return ir.passes.PassResult(model, modified=modified)


def _is_plain(node: ir.Node) -> bool:
    q, k, v, mask = ([*node.inputs, None])[:4]
    if len(node.outputs) > 1 or any(value is not None for value in node.inputs[4:]):
        return False
    for name in ("is_causal", "softcap", "softmax_precision"):
        if name in node.attributes and node.attributes[name].value:
            return False
    if any(value is None or value.dtype not in _FLOATS or len(value.shape or ()) != 4 for value in (q, k, v)):
        return False
    if mask is not None and mask.dtype not in _FLOATS:
        return False
    return _heads(q) == _heads(k) == _heads(v) and _size(q) is not None


def _heads(value: ir.Value | None) -> int | ir.SymbolicDim | None:
    return value.shape[1] if value is not None and value.shape is not None else None


def _size(value: ir.Value | None) -> int | None:
    size = value.shape[3] if value is not None and value.shape is not None else None
    return size if isinstance(size, int) else None


def _decompose(graph: ir.Graph, node: ir.Node) -> None:
    q, k, v, mask = ([*node.inputs, None])[:4]
    y = node.outputs[0]
    size = _size(q)
    assert q is not None and q.dtype is not None and size is not None
    scale = node.attributes["scale"].as_float() if "scale" in node.attributes else 1 / math.sqrt(size)
    # Half of the scale on each side: in half precision the products stay small.
    factor = add_initializer(graph, f"{y.name}_root_of_scale", np.array(math.sqrt(scale), dtype=q.dtype.numpy()))
    transposed = _insert(node, "Transpose", [k], {"perm": [0, 1, 3, 2]})
    scores = _insert(node, "MatMul", [_insert(node, "Mul", [q, factor]), _insert(node, "Mul", [transposed, factor])])
    if mask is not None:
        scores = _insert(node, "Add", [scores, mask])
    result = _insert(node, "MatMul", [_insert(node, "Softmax", [scores], {"axis": -1}), v])
    result.shape, result.type = y.shape, y.type
    ir.convenience.replace_all_uses_with(y, result, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    result.name = y.name


def _insert(
    before: ir.Node, op_type: str, inputs: list[ir.Value | None], attributes: dict[str, int | list[int]] | None = None
) -> ir.Value:
    node = ir.node(op_type, inputs, attributes, name=name_beside(before, op_type))
    assert before.graph is not None
    before.graph.insert_before(before, node)
    return node.outputs[0]
