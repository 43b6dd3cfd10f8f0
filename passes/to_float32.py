"""The float32 twin of a 16-bit model, for measuring it."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from lsp_deploy.passes.block_layout import relayout_node
from lsp_deploy.plugins.block_sparse.operator import OP_TYPE as BLOCK_SPARSE
from lsp_deploy.plugins.block_sparse.operator import from_node
from lsp_deploy.plugins.operators import operator_nodes

__all__ = ["ToFloat32Pass"]

_SIXTEEN_BITS = frozenset({ir.DataType.FLOAT16, ir.DataType.BFLOAT16})
# Integer attributes that name an element type.
_TYPE_ATTRIBUTES = ("to", "dtype", "output_dtype", "out_type", "stash_type", "softmax_precision", "precision")


class ToFloat32Pass(ir.passes.InPlacePass):
    """Every float16 or bfloat16 tensor becomes float32, with exactly the same values in weights, constants and scales.

    The twin computes what the 16-bit model computes but for the rounding of its activations. It exists because
    ONNX Runtime's CPU provider runs 16-bit Q/DQ about ten times slower than float32, and has few bfloat16 kernels.
    Inputs and outputs become float32 too. Casts that no longer change anything are removed.

    An lsp::BlockSparseLinear with bfloat16 values that reads and gives float32 stays as it is: that is the form for
    CPUs, which have a kernel for it. In others the values become float32 and with them, where necessary, canonical.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Widen all graphs of the model.

        Raises:
            UserError: an operator of ours that is not valid.
        """
        modified = False
        kept = _kept_values(model)
        for graph in model.graphs():
            for value in _values(graph):
                modified = (value not in kept and _widen_value(value)) or modified
            for node in list(graph):
                modified = _widen_attributes(node) or modified
                modified = _drop_noop_cast(graph, node) or modified
        return ir.passes.PassResult(model, modified=modified)


def _kept_values(model: ir.Model) -> set[ir.Value]:
    """Return the block-sparse values that stay 16-bit; give canonical layout to those that do not."""
    kept = set()
    for node in operator_nodes(model):
        if node.op_type != BLOCK_SPARSE:
            continue
        operator, x, values = from_node(node), node.inputs[0], node.inputs[1]
        assert x is not None and values is not None
        if values.dtype == ir.DataType.BFLOAT16 and ir.DataType.BFLOAT16 not in (x.dtype, operator.out_type):
            kept.add(values)
        elif values.dtype in _SIXTEEN_BITS:
            relayout_node(node, "canonical")
    return kept


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
