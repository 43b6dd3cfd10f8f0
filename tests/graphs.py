"""Small graphs as text, and the two questions to ask of a rewrite: what is left, and does it compute the same?"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
from numpy.typing import NDArray


def graph(
    nodes: str,
    *,
    x: str = "float[2, 5, 8] x",
    y: str = "float[2, 5, 8] y",
    opset: int = 17,
    weights: Mapping[str, Any] | None = None,
) -> ir.Model:
    """Return the model with these nodes (ONNX text), inputs, outputs, and those of the weights that it names."""
    header = f'<ir_version: 8, opset_import: ["": {opset}, "com.microsoft": 1]>'
    named = {name: array for name, array in (weights or {}).items() if re.search(rf"\b{name}\b", nodes)}
    proto = onnx.parser.parse_model(f"{header} g ({x}) => ({y}) {{ {nodes} }}")
    proto.graph.initializer.extend(
        ir.to_proto(ir.tensor(np.asarray(array), name=name)) for name, array in named.items()
    )
    return ir.from_proto(proto)


def operators(model: ir.Model) -> Counter[str]:
    """Count the nodes by operator."""
    return Counter(node.op_type for node in model.graph.all_nodes())


def only(model: ir.Model, op_type: str) -> ir.Node:
    """Return the one node of an operator."""
    (node,) = (node for node in model.graph.all_nodes() if node.op_type == op_type)
    return node


def signature(model: ir.Model) -> list[tuple[str | None, str, str]]:
    """Return names, types and shapes of inputs and outputs, in order."""
    return [(value.name, str(value.dtype), str(value.shape)) for value in (*model.graph.inputs, *model.graph.outputs)]


def random_feeds(model: ir.Model, *, batch: int = 2, seed: int = 0) -> dict[str, NDArray[Any]]:
    """Return normal numbers, or ones for integers, for each input; dynamic dimensions are `batch`."""
    random = np.random.default_rng(seed)
    feeds = {}
    for value in model.graph.inputs:
        shape = [size if isinstance(size, int) else batch for size in value.shape or ()]
        dtype = value.dtype.numpy() if value.dtype is not None else np.dtype(np.float32)
        numbers = random.standard_normal(shape) if value.dtype and value.dtype.is_floating_point() else np.ones(shape)
        feeds[str(value.name)] = numbers.astype(dtype)
    return feeds


def run(model: ir.Model, feeds: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
    """Run a model in ONNX Runtime as it is, without graph optimizations."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    content = ir.to_proto(model).SerializeToString()
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"]).run(None, dict(feeds))


def assert_same_outputs(before: ir.Model, after: ir.Model, *, relative: float = 1e-5, batch: int = 2) -> None:
    """Both are valid, take the same inputs and give the same outputs, to a part of each output's largest magnitude."""
    onnx.checker.check_model(ir.to_proto(after), full_check=True)
    assert signature(after) == signature(before)
    feeds = random_feeds(before, batch=batch)
    for expected, actual in zip(run(before, feeds), run(after, feeds), strict=True):
        assert actual.dtype == expected.dtype and actual.shape == expected.shape
        scale = np.abs(expected.astype(np.float64)).max(initial=1e-12)
        np.testing.assert_allclose(actual.astype(np.float64), expected, rtol=0, atol=relative * scale)


def move_weights(model: ir.Model, *, seed: int = 0) -> None:
    """Move every weight off its initial value, so that no scale is one and no bias zero."""
    random = np.random.default_rng(seed)
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if tensor is not None and tensor.dtype.is_floating_point() and tensor.size >= 8:
            array = tensor.numpy().astype(np.float32)
            moved = array * random.uniform(0.8, 1.2, array.shape) + 0.02 * random.standard_normal(array.shape)
            value.const_value = ir.tensor(moved.astype(tensor.dtype.numpy()), name=value.name)
