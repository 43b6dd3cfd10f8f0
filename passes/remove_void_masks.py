"""Masks that mask nothing, as an exporter writes them for a sequence of which every token counts."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from lsp_deploy.passes.constant_inputs import constant_array, constant_scalar
from lsp_deploy.passes.known_sizes import is_same_size

__all__ = ["RemoveVoidMasksPass"]

# Masks hold the lowest float in place of infinity: a row of those may become one of infinities.
_LARGE = 1e30


class RemoveVoidMasksPass(ir.passes.InPlacePass):
    """Add(x, zeros) becomes x, and Where(IsNaN(p), 0, p) becomes p, a softmax that gives no NaN.

    PyTorch's exporter writes scaled dot product attention with a mask so, p being the softmax of scores plus
    Where(mask, 0, lowest). The mask of an image model is true everywhere, but as large as the batch, so that folding
    makes no constant of it. Without both, attention is a product, a softmax and a product, which engines fuse. The
    guard goes only where scores come from products and finite constants: NaN is then what has overflowed.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Remove the nodes of the main graph, in topological order; what made the mask stays, and is unused."""
        modified = False
        for node in model.graph:
            same = _summed_with_zeros(node) or _guarded_softmax(node)
            if same is not None and not node.outputs[0].is_graph_output():
                ir.convenience.replace_all_uses_with(node.outputs[0], same)
                model.graph.remove(node, safe=True)
                modified = True
        return ir.passes.PassResult(model, modified=modified)


def _summed_with_zeros(node: ir.Node) -> ir.Value | None:
    """Return x of x + zeros, where these are computed and do not make it larger."""
    if node.domain or node.op_type != "Add":
        return None
    for x, zeros in (node.inputs, node.inputs[::-1]):
        is_computed = zeros is not None and constant_array(zeros) is None
        if is_computed and _same_everywhere(zeros) == 0 and _same_shape(x, node.outputs[0]):
            return x
    return None


def _guarded_softmax(node: ir.Node) -> ir.Value | None:
    """Return p of Where(IsNaN(p), number, p), p being a softmax that gives no NaN."""
    if node.domain or node.op_type != "Where":
        return None
    test, number, p = node.inputs
    guard, softmax = (None if value is None else value.producer() for value in (test, p))
    if guard is None or guard.op_type != "IsNaN" or guard.inputs[0] is not p or constant_scalar(number) is None:
        return None
    return p if softmax is not None and softmax.op_type == "Softmax" and _is_finite(softmax.inputs[0]) else None


def _same_everywhere(value: ir.Value | None) -> Any:
    """Return what every entry of a value is; None if that is not known, or they differ."""
    array = constant_array(value)
    if array is not None:
        return array.flat[0] if array.size and (array == array.flat[0]).all() else None
    node = None if value is None else value.producer()
    if node is None or node.domain:
        return None
    if node.op_type == "Expand":
        return _same_everywhere(node.inputs[0])
    if node.op_type == "Where":
        chosen = _same_everywhere(node.inputs[0])
        return None if chosen is None else _same_everywhere(node.inputs[1 if chosen else 2])
    return None


def _is_finite(value: ir.Value | None) -> bool:
    """Return whether a value is made of products and finite constants."""
    array = constant_array(value)
    if array is not None:
        return bool((np.abs(array) < _LARGE).all())
    node = None if value is None else value.producer()
    if node is None or node.domain:
        return False
    return node.op_type == "MatMul" or (node.op_type in ("Add", "Mul") and all(map(_is_finite, node.inputs)))


def _same_shape(a: ir.Value | None, b: ir.Value) -> bool:
    if a is None or a.shape is None or b.shape is None or len(a.shape) != len(b.shape):
        return False
    return all(is_same_size(one, other) for one, other in zip(a.shape, b.shape, strict=True))
