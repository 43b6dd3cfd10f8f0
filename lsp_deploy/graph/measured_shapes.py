"""Concrete shapes of values, measured by ONNX Runtime at given input shapes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from lsp_deploy.errors import UserError
from lsp_deploy.model import model_bytes

__all__ = ["measure_shapes"]

_LARGE = 4096  # entries; a tensor this large is a weight or a table, not a shape
_FILLABLE = frozenset({"FLOAT16", "FLOAT", "DOUBLE", "INT8", "UINT8", "INT16", "INT32", "INT64", "BOOL"})


def measure_shapes(
    model: ir.Model, shapes: Mapping[str, Sequence[int]], values: Iterable[ir.Value]
) -> dict[str, tuple[int, ...]]:
    """Return the shape of each of `values`, by name, when the inputs have `shapes`.

    ONNX Runtime runs a copy of the graph that gives the shapes alone: all inputs are zeros, and so are large weights,
    which keeps the copy small. What ONNX Runtime can infer it does not compute.

    Raises:
        UserError: ONNX Runtime cannot run the model at these shapes.
    """
    import onnxruntime as ort  # type: ignore[import-untyped, unused-ignore]
    from onnxruntime.capi import onnxruntime_pybind11_state as state  # type: ignore[import-untyped, unused-ignore]

    names = sorted({str(value.name) for value in values})
    if not names:
        return {}
    probe = _probe(model, shapes, names)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    shown = ", ".join(f"{name}:{'x'.join(map(str, shape))}" for name, shape in shapes.items())
    try:
        session = ort.InferenceSession(model_bytes(probe), options, providers=["CPUExecutionProvider"])
        outputs = session.run_with_ort_values(None, _zeros(probe, shapes))
    except (
        state.Fail,
        state.InvalidArgument,
        state.InvalidGraph,
        state.InvalidProtobuf,
        state.NotImplemented,
        state.RuntimeException,
    ) as error:
        raise UserError(f"ONNX Runtime cannot run the model at {shown}: {_first_line(error)}") from error
    return {name: tuple(output.numpy().tolist()) for name, output in zip(names, outputs, strict=True)}


def _probe(model: ir.Model, shapes: Mapping[str, Sequence[int]], names: Sequence[str]) -> ir.Model:
    """Return a copy whose outputs are the shapes of the values `names`."""
    probe = model.clone()
    graph = probe.graph
    by_name = {str(value.name): value for node in graph for value in node.outputs}
    for value in by_name.values():
        value.shape = None  # as exported for other input shapes
    by_name.update({str(value.name): value for value in (*graph.inputs, *graph.initializers.values())})
    for value in graph.inputs:
        if (shape := shapes.get(str(value.name))) is not None:
            value.shape = ir.Shape(shape)
    graph.outputs.clear()
    for position, name in enumerate(names):
        node = ir.node("Shape", [by_name[name]], name=f"lsp_measure_{position}")
        node.outputs[0].name = f"lsp_measured_shape_{position}"
        node.outputs[0].type = ir.TensorType(ir.DataType.INT64)
        graph.append(node)
        graph.outputs.append(node.outputs[0])
    RemoveUnusedNodesPass()(probe)  # ONNX Runtime computes what nothing reads
    _drop_weights(graph)
    return probe


def _drop_weights(graph: ir.Graph) -> None:
    for position, value in enumerate(list(graph.initializers.values())):
        tensor = value.const_value
        if tensor is None or tensor.dtype.name not in _FILLABLE or tensor.size < _LARGE:
            continue
        shape = ir.Value(
            name=f"lsp_measure_weight_{position}", const_value=ir.tensor(np.array(tensor.shape.numpy(), np.int64))
        )
        graph.register_initializer(shape)
        zero = ir.AttrTensor("value", ir.Tensor(np.zeros(1, tensor.dtype.numpy())))
        fill = ir.Node("", "ConstantOfShape", [shape], attributes=[zero], name=f"lsp_measure_fill_{position}")
        ir.convenience.replace_all_uses_with(value, fill.outputs[0])
        first = next(iter(graph))
        graph.insert_before(first, fill)
        del graph.initializers[str(value.name)]
        if value in graph.inputs:
            graph.inputs.remove(value)


def _zeros(model: ir.Model, shapes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """Return an OrtValue of zeros for each input; numpy alone has no 16-bit brain floats to feed."""
    import onnxruntime as ort

    feeds = {}
    for value in model.graph.inputs:
        if value.is_initializer():
            continue
        if value.dtype is None or value.dtype == ir.DataType.STRING:
            raise UserError(f"input {value.name} is not a tensor of numbers; export the model without it")
        shape = shapes[str(value.name)]
        if value.dtype == ir.DataType.BFLOAT16:
            bits = np.zeros(shape, np.uint16)
            feed = ort.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, int(value.dtype))
        else:
            feed = ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, value.dtype.numpy()))
        feeds[str(value.name)] = feed
    return feeds


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
