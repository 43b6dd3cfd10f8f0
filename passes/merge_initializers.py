"""Constants that hold the same."""

from __future__ import annotations

import hashlib
from collections import defaultdict

import onnx_ir as ir

__all__ = ["MergeInitializersPass"]


# So many leading elements tell most weights apart.
_SAMPLE = 64


class MergeInitializersPass(ir.passes.InPlacePass):
    """Initializers of equal type, shape and content become one.

    One that is a graph input or output stays.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Merge the initializers of each graph."""
        merged = [_merge(graph) for graph in model.graphs()]
        return ir.passes.PassResult(model, modified=any(merged))


def _merge(graph: ir.Graph) -> bool:
    alike: dict[tuple[object, ...], list[ir.Value]] = defaultdict(list)
    for value in graph.initializers.values():
        tensor = value.const_value
        if tensor is not None and not value.is_graph_input() and not value.is_graph_output():
            sample = repr(tensor.numpy().flat[:_SAMPLE].tolist())
            alike[(tensor.dtype, tuple(tensor.shape), sample)].append(value)
    modified = False
    for values in alike.values():
        first: dict[bytes, ir.Value] = {}
        # Reading all of a weight takes its time: only those that begin alike are hashed.
        for value in values if len(values) > 1 else ():
            kept = first.setdefault(_digest(value), value)
            if kept is not value:
                ir.convenience.replace_all_uses_with(value, kept)
                del graph.initializers[str(value.name)]
                modified = True
    return modified


def _digest(value: ir.Value) -> bytes:
    tensor = value.const_value
    assert tensor is not None
    content = repr(tensor.numpy().tolist()).encode() if tensor.dtype == ir.DataType.STRING else tensor.tobytes()
    return hashlib.sha256(content).digest()
