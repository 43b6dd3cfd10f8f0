"""The float32 twin of a 16-bit model, for measuring it."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

__all__ = ["ToFloat32Pass"]

_SIXTEEN_BITS = frozenset({ir.DataType.FLOAT16, ir.DataType.BFLOAT16})
# Integer attributes that name an element type.
_TYPE_ATTRIBUTES = ("to", "dtype", "output_dtype", "stash_type", "softmax_precision", "precision")


class ToFloat32Pass(ir.passes.InPlacePass):
    """Every float16 or bfloat16 tensor becomes float32, with exactly the same values in weights, constants and scales.

    The twin computes what the 16-bit model computes but for the rounding of its activations. It exists because
    ONNX Runtime's CPU provider runs 16-bit Q/DQ about ten times slower than float32, and has few bfloat16 kernels.
    Inputs and outputs become float32 too. Casts that no longer change anything are removed.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Widen all graphs of the model."""
        modified = False
        for graph in model.graphs():
            for value in _values(graph):
                modified = _widen_value(value) or modified
            for node in list(graph):
                modified = _widen_attributes(node) or modified
                modified = _drop_noop_cast(graph, node) or modified
        return ir.passes.PassResult(model, modified=modified)


def _values(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph.inputs
    yield from graph.initializers.values()
    for node in graph:
        yield from node.outputs


def _widen_value(value: ir.Value) -> bool:
    tensor = value.const_value
    if tensor is not None and tensor.dtype in _SIXTEEN_BITS:
        value.const_value = _widen(tensor)
    if value.dtype not in _SIXTEEN_BITS:
        return False
    value.type = ir.TensorType(ir.DataType.FLOAT)  # never its `dtype`: clones share the type object
    return True


def _widen_attributes(node: ir.Node) -> bool:
    modified = False
    for name, attribute in list(node.attributes.items()):
        if attribute.type == ir.AttributeType.TENSOR and attribute.as_tensor().dtype in _SIXTEEN_BITS:
            node.attributes[name] = ir.AttrTensor(name, _widen(attribute.as_tensor()))
            modified = True
        elif name in _TYPE_ATTRIBUTES and attribute.value in _SIXTEEN_BITS:
            node.attributes[name] = ir.AttrInt64(name, ir.DataType.FLOAT.value)
            modified = True
    return modified


def _widen(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    return ir.Tensor(tensor.numpy().astype(np.float32), name=tensor.name)


def _drop_noop_cast(graph: ir.Graph, node: ir.Node) -> bool:
    """Remove a Cast from float32 to float32, unless the names of inputs and outputs need it."""
    source = node.inputs[0] if node.op_type == "Cast" else None
    if source is None or source.dtype != ir.DataType.FLOAT or node.attributes.get_int("to", 0) != ir.DataType.FLOAT:
        return False
    output = node.outputs[0]
    if output.is_graph_output():
        if source.producer() is None or source.is_graph_output() or source.graph is not graph:
            return False
        source.name, output.name = output.name, None
    ir.convenience.replace_all_uses_with(output, source, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    return True
