"""What TensorRT and TensorRT-RTX refuse in Q/DQ models, or take without computing in the quantized type."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from lsp_deploy.plugins.block_sparse import operator as block_sparse

__all__ = ["tensorrt_refusals"]

_INTEGER_OPERATORS = {"ConvInteger", "DynamicQuantizeLinear", "MatMulInteger", "QLinearConv", "QLinearMatMul"}
_QUANTIZABLE = {"Conv", "ConvTranspose", "Gemm", "MatMul"}
# The builder looks through these, between DequantizeLinear and what computes.
_TRANSPARENT = {"Cast", "Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"}
_EIGHT_BITS = {ir.DataType.INT8, ir.DataType.UINT8}
_UNREADABLE = {
    ir.DataType.INT16,
    ir.DataType.UINT16,
    ir.DataType.UINT4,
    ir.DataType.FLOAT8E5M2,
    ir.DataType.FLOAT8E4M3FNUZ,
    ir.DataType.FLOAT8E5M2FNUZ,
}
_DEQUANTIZABLE = {*_EIGHT_BITS, ir.DataType.INT4, ir.DataType.FLOAT8E4M3FN, ir.DataType.FLOAT4E2M1}


def tensorrt_refusals(model: ir.Model) -> list[str]:
    """Return what TensorRT cannot take or would not quantize, one line each: "node: reason".

    Parser and builder refusals were observed with TensorRT-RTX 1.7.1; so was what builds, but dequantizes and then
    computes in floating point.
    """
    found = [
        f"{value.name}: TensorRT reads no {value.dtype.name} initializers"
        for graph in model.graphs()
        for value in graph.initializers.values()
        if value.dtype in _UNREADABLE
    ]
    for node in model.graph.all_nodes():
        found += [f"{node.name}: {reason}" for reason in _reasons(node)]
    return found + _scale_conflicts(model)


def _reasons(node: ir.Node) -> Iterator[str]:
    if node.domain == "com.microsoft":
        yield f"TensorRT has no com.microsoft::{node.op_type}"
    elif node.domain == block_sparse.DOMAIN:
        yield from _operator(node)
    elif node.op_type in _INTEGER_OPERATORS:
        yield f"TensorRT has no {node.op_type}; it takes QuantizeLinear and DequantizeLinear"
    elif node.op_type == "QuantizeLinear":
        yield from _grid(node)
        yield from _quantize(node)
    elif node.op_type == "DequantizeLinear":
        yield from _grid(node)
        yield from _dequantize(node)
    elif node.op_type in _QUANTIZABLE:
        yield from _mixed_int4(node)


def _operator(node: ir.Node) -> Iterator[str]:
    """Check an operator of ours: the plugin has one of them, and reads x in the type of the values."""
    if node.op_type != block_sparse.OP_TYPE:
        yield f"TensorRT has no lsp::{node.op_type}; `lsp-deploy lower` writes it in standard operators"
        return
    if node.attributes.get_string("layout", "canonical") != "bsl16.v1":
        yield "its values are stored for CPUs; compress the model for a GPU target"
        return
    types = [None if value is None or value.dtype is None else value.dtype.name for value in node.inputs[:2]]
    if None not in types and len(set(types)) > 1:
        found, wanted = types
        yield f"it reads {found}, which TensorRT's plugin does not make {wanted}; compress the model for a GPU target"


def _grid(node: ir.Node) -> Iterator[str]:
    """Check scale and zero point."""
    scale = _constant(node.inputs[1])
    if scale is None:
        yield "its scale is not a constant"
    elif not (scale > 0).all():
        yield "its scale is not positive everywhere"
    zero_value = node.inputs[2] if len(node.inputs) > 2 else None
    zero = _constant(zero_value)
    if zero_value is not None and zero is None:
        yield "its zero point is not a constant"
    elif zero is not None and zero.any():
        yield "its zero point is not 0; TensorRT quantizes symmetrically"


def _quantize(node: ir.Node) -> Iterator[str]:
    output = node.outputs[0]
    if not _is_weight(node.inputs[0]):
        if output.dtype == ir.DataType.INT4:
            yield "it quantizes an activation to int4; int4 is for weights"
        scale = _constant(node.inputs[1])
        if scale is not None and scale.size > 1:
            yield "it gives an activation several scales; activations have one a tensor"
    readers = _readers(output)
    unpaired = [
        reader for reader in readers if reader.op_type != "DequantizeLinear" and reader.domain in ("", "ai.onnx")
    ]
    if not readers or unpaired or output.is_graph_output():
        yield "no DequantizeLinear follows it"


def _dequantize(node: ir.Node) -> Iterator[str]:
    data = node.inputs[0]
    assert data is not None
    if data.dtype is not None and data.dtype not in _DEQUANTIZABLE:
        yield f"it dequantizes {data.dtype.name.lower()}, which TensorRT cannot"
        return
    readers = _readers(node.outputs[0])
    strangers = [
        reader for reader in readers if reader.domain in ("", "ai.onnx") and reader.op_type not in _QUANTIZABLE
    ]
    if strangers:
        yield f"it feeds {strangers[0].op_type} {strangers[0].name}, which does not compute in a quantized type"
    elif not readers or node.outputs[0].is_graph_output():
        yield "it feeds no MatMul, Gemm or Conv"
    if data.dtype in _EIGHT_BITS:
        scale = _constant(node.inputs[1])
        if node.attributes.get_int("block_size", 0) or (scale is not None and scale.ndim > 1):
            yield "TensorRT has no int8 with a scale for each block"
        elif scale is not None and scale.size > 1 and _is_weight(data):
            yield from _along_k(node, data)


def _along_k(node: ir.Node, data: ir.Value) -> Iterator[str]:
    """Check that a weight's scales lie along the output channels of what reads it."""
    rank = None if data.shape is None else data.shape.rank()
    if rank is None:
        return
    axis = node.attributes.get_int("axis", 1) % rank
    for use in node.outputs[0].uses():
        reader, index = use.node, use.idx
        along = axis
        if reader.op_type == "Transpose":
            perm = list(reader.attributes.get_ints("perm", range(rank)[::-1]))
            along = perm.index(axis)
            uses = reader.outputs[0].uses()
            reader, index = next(((use.node, use.idx) for use in uses), (reader, index))
        if reader.op_type in _QUANTIZABLE and along != _output_axis(reader, index, rank):
            yield f"its scales lie along K of {reader.name}; for int8 arithmetic there is one for each output channel"


def _output_axis(node: ir.Node, index: int, rank: int) -> int:
    if node.op_type == "MatMul":
        return rank - 1 if index == 1 else rank - 2
    if node.op_type == "Gemm":
        transposed = node.attributes.get_int("transB" if index == 1 else "transA", 0) == 1
        return int(transposed != (index == 1))
    return 1 if node.op_type == "ConvTranspose" else 0


def _mixed_int4(node: ir.Node) -> Iterator[str]:
    sources = [_dequantized(value) for value in node.inputs[:2]]
    if len(sources) == 2 and None not in sources and ir.DataType.INT4 in sources:
        yield "an int4 weight with a quantized activation; TensorRT takes int4 with floating-point activations only"


def _scale_conflicts(model: ir.Model) -> list[str]:
    """Return the quantized weights that are shared between layers, but not their scales."""
    by_weight: dict[ir.Value, list[ir.Node]] = defaultdict(list)
    for node in model.graph.all_nodes():
        if node.op_type == "DequantizeLinear" and node.inputs[0] is not None and node.inputs[0].is_initializer():
            by_weight[node.inputs[0]].append(node)
    found = []
    for value, nodes in by_weight.items():
        scales = [_constant(node.inputs[1]) for node in nodes]
        first = scales[0]
        if any(first is None or scale is None or not np.array_equal(first, scale) for scale in scales[1:]):
            found.append(f"{nodes[1].name}: it shares {value.name} with {nodes[0].name}, but has other scales")
    return found


def _readers(value: ir.Value) -> list[ir.Node]:
    """Return what reads a value, looked at through nodes that only move data."""
    readers = []
    for node in value.consumers():
        readers += _readers(node.outputs[0]) if node.op_type in _TRANSPARENT else [node]
    return readers


def _dequantized(value: ir.Value | None) -> ir.DataType | None:
    """Return the type that a value is dequantized from, None if it is not."""
    node = value.producer() if value is not None else None
    while node is not None and node.op_type in _TRANSPARENT:
        node = node.inputs[0].producer() if node.inputs[0] is not None else None
    if node is None or node.op_type != "DequantizeLinear" or node.inputs[0] is None:
        return None
    return node.inputs[0].dtype


def _is_weight(value: ir.Value | None) -> bool:
    """Return whether a value is a constant, or a constant quantized in the graph."""
    producer = value.producer() if value is not None else None
    if producer is not None and producer.op_type == "QuantizeLinear":
        value = producer.inputs[0]
    return _constant(value) is not None


def _constant(value: ir.Value | None) -> NDArray[Any] | None:
    tensor = ir.convenience.get_const_tensor(value) if value is not None else None
    return None if tensor is None else tensor.numpy()
