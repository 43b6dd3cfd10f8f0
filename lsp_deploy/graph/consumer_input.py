"""What the layer behind a region of units reads from units whose columns before it are zero."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray

from lsp_deploy.graph.constants import operators
from lsp_deploy.graph.unit_axis import (
    SAME_ORDER,
    Region,
    Shapes,
    UntraceableError,
    channel_axis,
    is_constant_input,
    shape_of,
)

__all__ = ["ConsumerInput", "attention_values", "consumer_input"]

_POLYNOMIAL = SAME_ORDER | operators(
    "Add BatchNormalization Concat Div Gather MatMul Mul Neg Slice Split Sub Transpose"
)


@dataclass(frozen=True)
class ConsumerInput:
    """Where a layer's input comes from, and what it is where that gives nothing but its bias."""

    sources: frozenset[tuple[ir.Node, int]]
    """Producers, and the outer part of their columns, on which the input depends in more than the weights of a mean
    over tokens: v but not q and k. Empty if `obstacle` says why that is not known."""
    constant: NDArray[np.float64] | None = None
    """[K]: the input, where the columns of all sources are zero; None if tokens differ even so."""
    obstacle: str | None = None


def consumer_input(region: Region, consumer: ir.Node, shapes: Shapes) -> ConsumerInput:
    """Evaluate what a consumer of `region` reads when its producers' products are zero.

    ONNX Runtime runs the nodes between. Attention is a mean of v over the tokens, whatever the scores: where v is the
    same for all tokens, so is the result, and the probabilities are replaced by those that pick the first token.

    Args:
        region: as traced.
        consumer: one of its consumers.
        shapes: of all values of the graph.
    """
    x, graph = consumer.inputs[0], consumer.graph
    assert x is not None and graph is not None
    try:
        walk = _walk(region, x, graph)
        constant = _constant(walk, x, channel_axis(consumer, len(shape_of(x, shapes))), shapes)
        sources = frozenset(source for node in walk.producers for source in _sources(walk, node, region, x, shapes))
    except UntraceableError as error:
        return ConsumerInput(frozenset(), obstacle=str(error))
    obstacle = None if constant is not None else f"what layer {consumer.name} reads differs from token to token"
    return ConsumerInput(sources, constant, obstacle)


def attention_values(node: ir.Node) -> ir.Value | None:
    """Return v where a MatMul is softmax(scores) @ v, the softmax over the keys; None for any other node."""
    if node.op_type != "MatMul" or node.domain != "":
        return None
    softmax = None if node.inputs[0] is None else node.inputs[0].producer()
    if softmax is None or softmax.op_type != "Softmax" or softmax.domain != "":
        return None
    shape = softmax.outputs[0].shape
    axis = softmax.attributes.get_int("axis", -1)
    return node.inputs[1] if axis == -1 or (shape is not None and axis == len(shape) - 1) else None


@dataclass
class _Walk:
    """The nodes through which producers reach a consumer, leaving attention scores out."""

    nodes: list[ir.Node]
    producers: list[ir.Node]
    probabilities: list[ir.Value]
    attended: list[ir.Value]
    """The v of each attention."""


def _walk(region: Region, x: ir.Value, graph: Iterable[ir.Node]) -> _Walk:
    nodes: set[ir.Node] = set()
    walk = _Walk([], [], [], [])
    waiting, seen = [x], {x}
    while waiting:
        value = waiting.pop()
        node = value.producer()
        if node is None or value not in region.axes:
            raise UntraceableError(f"{value.name} joins from elsewhere")
        if node in region.producers:
            walk.producers.append(node)
            continue
        nodes.add(node)
        operands: Sequence[ir.Value | None] = node.inputs
        if (attended := attention_values(node)) is not None and node.inputs[0] is not None:
            walk.probabilities.append(node.inputs[0])
            walk.attended.append(attended)
            operands = [attended]
        elif node.op_type == "Softmax":
            raise UntraceableError(f"Softmax {node.name} is not followed by the product with v")
        for operand in operands:
            if operand is not None and operand not in seen and not is_constant_input(operand):
                seen.add(operand)
                waiting.append(operand)
    walk.nodes = [node for node in graph if node in nodes]
    return walk


def _constant(walk: _Walk, x: ir.Value, channels: int, shapes: Shapes) -> NDArray[np.float64] | None:
    result, *attended = _run(walk, _at_rest(walk, shapes), [x, *walk.attended], shapes)
    if any(not _is_same_along(array, array.ndim - 2) for array in attended):
        return None
    rows = np.moveaxis(result, channels, -1).reshape(-1, result.shape[channels])
    return rows[0].astype(np.float64) if _is_same_along(rows, 0) else None


def _at_rest(walk: _Walk, shapes: Shapes) -> dict[ir.Value, NDArray[np.float32]]:
    """Return what producers give where their products are zero: a Gemm or Conv its bias."""
    rest = {}
    for node in walk.producers:
        output = np.zeros(shape_of(node.outputs[0], shapes), np.float32)
        if len(node.inputs) > 2 and node.inputs[2] is not None:
            tensor = node.inputs[2].const_value
            assert tensor is not None  # as traced
            bias = tensor.numpy() * np.float32(node.attributes.get_float("beta", 1.0))
            output += bias.reshape(-1, *[1] * (output.ndim - 2)) if node.op_type == "Conv" else bias
        rest[node.outputs[0]] = output
    return rest


def _is_same_along(array: NDArray[Any], axis: int) -> bool:
    first = array.take([0], axis)
    return bool(np.allclose(array, first, rtol=1e-6, atol=1e-7 * float(np.abs(array).max(initial=0))))


def _sources(walk: _Walk, producer: ir.Node, region: Region, x: ir.Value, shapes: Shapes) -> list[tuple[ir.Node, int]]:
    """Return the outer parts of a producer's columns that reach x.

    Through nodes that move, add and multiply x is a polynomial of them: a random value shows whether it depends on
    them.
    """
    axis = region.axes[producer.outputs[0]]
    parts = [(producer, part) for part in range(axis.outer)]
    if axis.outer == 1 or any(node.op_type not in _POLYNOMIAL for node in walk.nodes):
        return parts
    random = np.random.default_rng(0)
    feeds = _at_rest(walk, shapes)
    (before,) = _run(walk, feeds, [x], shapes)
    reaching = []
    for part in range(axis.outer):
        moved = feeds[producer.outputs[0]].copy()
        columns = np.moveaxis(moved, axis.index, -1)[..., part * axis.step : (part + 1) * axis.step]
        columns[...] = random.standard_normal(columns.shape)
        (after,) = _run(walk, {**feeds, producer.outputs[0]: moved}, [x], shapes)
        if not np.array_equal(before, after):
            reaching.append((producer, part))
    return reaching


def _run(
    walk: _Walk, feeds: Mapping[ir.Value, NDArray[np.float32]], results: Sequence[ir.Value], shapes: Shapes
) -> list[NDArray[Any]]:
    import onnxruntime as ort  # type: ignore[import-untyped, unused-ignore]

    arrays = {str(value.name): array for value, array in feeds.items()}
    for value in walk.probabilities:
        first = np.zeros(shape_of(value, shapes), np.float32)
        first[..., 0] = 1
        arrays[str(value.name)] = first
    if any(value.dtype != ir.DataType.FLOAT for value in (*feeds, *walk.probabilities, *results)):
        raise UntraceableError("the model does not compute in float32 here")
    # v may be what a producer gives.
    computed = list({str(value.name): None for value in results if str(value.name) not in arrays})
    if computed:
        options = ort.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = 1
        content = _model(walk, arrays, computed).SerializeToString()
        session = ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        read = {value.name for value in session.get_inputs()}
        outputs = session.run(computed, {name: array for name, array in arrays.items() if name in read})
        arrays.update(zip(computed, outputs, strict=True))
    return [arrays[str(value.name)] for value in results]


def _model(walk: _Walk, inputs: Mapping[str, NDArray[Any]], outputs: Sequence[str]) -> onnx.ModelProto:
    constants = {
        str(value.name): ir.to_proto(ir.tensor(value.const_value.numpy(), name=value.name))
        for node in walk.nodes
        for value in node.inputs
        if value is not None and value.const_value is not None and is_constant_input(value)
    }
    nodes = [ir.to_proto(node) for node in walk.nodes]
    read = {name for node in nodes for name in node.input}
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        nodes,
        "region",
        [helper.make_tensor_value_info(name, kind, array.shape) for name, array in inputs.items() if name in read],
        [helper.make_tensor_value_info(name, kind, None) for name in outputs],
        list(constants.values()),
    )
    owner = walk.nodes[0].graph
    opset = 17 if owner is None else owner.opset_imports.get("", 17)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
