"""Element types and shapes of all values, found node by node."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from itertools import count, zip_longest

import onnx
import onnx_ir as ir

from lsp_deploy.passes.constant_inputs import constant_array
from lsp_deploy.passes.known_sizes import Size, Sizes, is_same_size, known_sizes, product, quotient, sizes_of
from lsp_deploy.plugins.operators import describe_output

__all__ = ["InferShapesPass", "ShapeInference", "reshaped", "standard_opset"]

# Larger constants are never shapes, axes or sizes.
_MAX_ELEMENTS = 1024


class InferShapesPass(ir.passes.InPlacePass):
    """Values without type or shape get those that follow from their nodes' inputs.

    Nodes that neither ONNX nor lsp-deploy defines keep what the file declares. The declared shapes of graph inputs and
    outputs stay. The model is never serialized, so its size does not matter.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Infer in topological order."""
        inference = ShapeInference(model)
        changed = [inference.infer(node) for node in model.graph]
        return ir.passes.PassResult(model, modified=any(changed))


def standard_opset(node: ir.Node, opsets: Mapping[str, int]) -> int | None:
    """Return the version of the standard operators that defines `node`; None if it is another's operator.

    The (de)quantizers of opset 21 do what those before them did, and com.microsoft's twins of them.
    """
    if node.op_type in ("DequantizeLinear", "QuantizeLinear") and node.domain in ("", "com.microsoft"):
        return max(21, opsets.get("", 0))
    return None if node.domain else opsets.get("")


class ShapeInference:
    """Types and shapes of a graph, node after node in topological order, and what is known of computed sizes."""

    def __init__(self, model: ir.Model) -> None:
        """Start with what the inputs and initializers declare."""
        self._opsets = model.opset_imports
        self._known: dict[ir.Value, Sizes] = {}
        taken = _symbols(model.graph)
        self._names = (name for number in count() if (name := f"unknown_{number}") not in taken)

    def infer(self, node: ir.Node) -> bool:
        """Set the types and shapes of the outputs of `node`; return whether any of them changed."""
        before = [(output.type, output.shape) for output in node.outputs]
        if not any(output.is_graph_output() for output in node.outputs):
            describe_output(node)
        for output, type_ in zip(node.outputs, self._infer_types(node), strict=False):
            if type_ is not None:
                output.type = ir.serde.deserialize_type_proto_for_type(type_) or output.type
                self._refine(output, ir.serde.deserialize_type_proto_for_shape(type_))
        self._refine(node.outputs[0], self._shape_from_sizes(node))
        self._name_unknown(node.outputs)
        sizes = known_sizes(node, self._known)
        if sizes is not None:
            self._known[node.outputs[0]] = sizes
        return before != [(output.type, output.shape) for output in node.outputs]

    def sizes(self, value: ir.Value | None) -> Sizes | None:
        """Return what is known of a small integer tensor; None if it is none."""
        return sizes_of(value, self._known)

    def _infer_types(self, node: ir.Node) -> list[onnx.TypeProto | None]:
        opset = standard_opset(node, self._opsets)
        schema = None if opset is None else _schema(node.op_type, opset)
        inputs = {str(value.name): value for value in node.inputs if value is not None}
        if schema is None or _has_graphs(node) or any(value.dtype is None for value in inputs.values()):
            return []
        types = {name: _type_proto(value) for name, value in inputs.items()}
        data = {name: ir.to_proto(tensor) for name, value in inputs.items() if (tensor := _small(value)) is not None}
        proto = ir.to_proto(node)
        proto.domain = ""
        try:
            inferred = onnx.shape_inference.infer_node_outputs(
                schema, proto, types, data, opset_imports=[onnx.helper.make_opsetid("", opset or 0)]
            )
        except (onnx.shape_inference.InferenceError, onnx.checker.ValidationError):
            # Declared shapes contradict each other, or an attribute is wrong: what the file declares stays.
            return []
        return [inferred.get(str(output.name)) for output in node.outputs]

    def _shape_from_sizes(self, node: ir.Node) -> list[Size] | None:
        """Return the output shape of nodes that take it as an input which is only partly known."""
        position = {"Reshape": 1, "Expand": 1, "ConstantOfShape": 0, "Resize": 3}.get(node.op_type)
        if node.domain or position is None or len(node.inputs) <= position:
            return None
        sizes = self.sizes(node.inputs[position])
        if sizes is None or sizes.ndim != 1:
            return None
        if node.op_type == "Reshape":
            return reshaped(node, sizes)
        if node.op_type == "Expand":
            return _expanded(node, sizes)
        return list(sizes)

    def _refine(self, output: ir.Value, shape: Iterable[Size] | None) -> None:
        """Set the shape of `output`; where `shape` knows nothing of a dimension, what was declared stays."""
        if shape is None or (output.shape is not None and output.is_graph_output()):
            return
        new = list(shape)
        old = [None] * len(new) if output.shape is None or len(output.shape) != len(new) else list(output.shape)
        output.shape = ir.Shape([_precise(*pair) for pair in zip(new, old, strict=True)])

    def _name_unknown(self, outputs: Iterable[ir.Value]) -> None:
        """Give every dimension that is not known a name of its own, by which it is recognised further on."""
        for output in outputs:
            if output.shape is not None and not output.is_graph_output():
                sizes = [size if isinstance(size, int) else size.value or next(self._names) for size in output.shape]
                output.shape = ir.Shape(sizes)


def reshaped(node: ir.Node, sizes: Sizes) -> list[Size]:
    """Return the shape that a Reshape to `sizes` gives; None for a dimension that is not known."""
    shape = list(node.inputs[0].shape) if node.inputs[0] is not None and node.inputs[0].shape is not None else []
    copies = "allowzero" not in node.attributes or not node.attributes["allowzero"].as_int()
    result: list[Size] = [
        shape[axis] if size == 0 and copies and axis < len(shape) else size for axis, size in enumerate(sizes)
    ]
    for axis, size in enumerate(result):
        if size == -1:
            others = product([*result[:axis], *result[axis + 1 :]])
            result[axis] = quotient(product(shape), others) if shape else None
    return result


def _expanded(node: ir.Node, sizes: Sizes) -> list[Size] | None:
    """Return the shape that broadcasting the first input to `sizes` gives."""
    shape = node.inputs[0].shape if node.inputs[0] is not None else None
    if shape is None:
        return None
    pairs = zip_longest(reversed(list(shape)), reversed(list(sizes)), fillvalue=1)
    return [_broadcast(dimension, size) for dimension, size in pairs][::-1]


def _broadcast(dimension: int | ir.SymbolicDim, size: Size) -> Size:
    if size == 1 or (isinstance(dimension, int) and dimension > 1) or is_same_size(dimension, size):
        return dimension
    return size if dimension == 1 or (isinstance(size, int) and size > 1) else None


def _precise(new: Size, old: Size) -> int | str | None:
    for size in (new, old):
        if isinstance(size, int):
            return size
    return next((size.value for size in (new, old) if isinstance(size, ir.SymbolicDim) and size.value), None)


def _symbols(graph: ir.Graph) -> set[str]:
    """Return the names of all dimensions of a graph."""
    values = [*graph.inputs, *graph.outputs, *(output for node in graph for output in node.outputs)]
    return {str(size) for value in values for size in value.shape or () if isinstance(size, ir.SymbolicDim)}


def _type_proto(value: ir.Value) -> onnx.TypeProto:
    assert value.type is not None
    proto = ir.serde.serialize_type(value.type)
    if value.shape is not None:
        ir.serde.serialize_shape_into(proto, value.shape)
    return proto


def _small(value: ir.Value) -> ir.TensorProtocol | None:
    if value.const_value is None or value.const_value.size > _MAX_ELEMENTS or constant_array(value) is None:
        return None
    return value.const_value


def _has_graphs(node: ir.Node) -> bool:
    kinds = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
    return any(attribute.type in kinds for attribute in node.attributes.values())


@cache
def _schema(op_type: str, opset: int) -> onnx.defs.OpSchema | None:
    try:
        return onnx.defs.get_schema(op_type, opset)
    except onnx.defs.SchemaError:
        return None
