"""Operators written out as the function bodies that the ONNX standard gives them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import onnx
import onnx_ir as ir
from onnx_ir.passes.common import InlinePass

__all__ = ["expand_functions"]


def expand_functions(model: ir.Model, known: Collection[tuple[str, str]]) -> ir.Model:
    """Return `model` with model-local functions inlined, and operators that are not `known` replaced by their bodies.

    A body may hold operators that have a body themselves: it is expanded again until nothing more can be. Operators
    without a body stay.

    Args:
        model: it is not changed; where there is nothing to expand, it is what is returned.
        known: (domain, operator) pairs that stay as they are.
    """
    if not model.functions and not any(_has_body(node, known, model) for node in model.graph):
        return model
    model = model.clone()
    InlinePass()(model)
    while bodies := [body for node in model.graph if (body := _body(node, known, model)) is not None]:
        for body in bodies:
            model.functions[body.identifier()] = body
        InlinePass()(model)
    return model


def _has_body(node: ir.Node, known: Collection[tuple[str, str]], model: ir.Model) -> bool:
    schema = _schema(node, model)
    if schema is None or (node.domain, node.op_type) in known:
        return False
    return bool(schema.has_function or schema.has_context_dependent_function)


def _body(node: ir.Node, known: Collection[tuple[str, str]], model: ir.Model) -> ir.Function | None:
    """Return the body of one node as a function that this node alone calls, or None where there is none."""
    schema = _schema(node, model)
    if schema is None or not _has_body(node, known, model):
        return None
    opset = model.opset_imports[node.domain]
    _add_default_attributes(node, schema)
    if schema.has_function:
        version = _newest(schema.function_opset_versions, opset)
        content = schema.get_function_with_opset_version(version) if version else b""
    else:
        version = _newest(schema.context_dependent_function_opset_versions, opset)
        types = [b"" if value is None else _type(value) for value in node.inputs]
        call = ir.to_proto(node).SerializeToString()
        content = schema.get_context_dependent_function_with_opset_version(version, call, types) if version else b""
    if not content:
        return None
    proto = onnx.FunctionProto.FromString(content)
    # The body may depend on the node's attributes and types, so no two nodes share one.
    node.overload = proto.overload = f"of {node.outputs[0].name}"
    proto.domain, proto.name = node.domain, node.op_type
    del proto.output[len(node.outputs) :]  # a body may leave out what is optional
    del proto.opset_import[:]
    proto.opset_import.extend(onnx.helper.make_opsetid(domain, opset) for domain, opset in model.opset_imports.items())
    body: ir.Function = ir.from_proto(proto)
    return body


def _newest(versions: Sequence[int], opset: int) -> int | None:
    """Return the newest version that is not after `opset`, else the oldest: what runs the body takes all opsets."""
    return max((version for version in versions if version <= opset), default=min(versions, default=None))


def _add_default_attributes(node: ir.Node, schema: Any) -> None:
    """Write out what the node leaves to the defaults, which the body refers to by name."""
    for name, attribute in schema.attributes.items():
        if name not in node.attributes and attribute.default_value.type:
            node.attributes[name] = ir.serde.deserialize_attribute(attribute.default_value)


def _schema(node: ir.Node, model: ir.Model) -> Any | None:  # an OpSchema; its stubs know nothing of functions
    opset = model.opset_imports.get(node.domain)
    if opset is None or not onnx.defs.has(node.op_type, opset, node.domain):
        return None
    return onnx.defs.get_schema(node.op_type, opset, node.domain)


def _type(value: ir.Value) -> bytes:
    proto = onnx.TypeProto()
    if value.dtype is not None:
        shape = None if value.shape is None else [size if isinstance(size, int) else None for size in value.shape]
        proto = onnx.helper.make_tensor_type_proto(int(value.dtype), shape)
    content: bytes = proto.SerializeToString()
    return content
