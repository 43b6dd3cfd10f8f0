"""What a model file must be before anything else looks at it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx_ir as ir

from lsp_deploy.errors import UserError

__all__ = ["check_external_data", "check_structure", "check_weights"]


def check_structure(model: ir.Model, path: Path) -> None:
    """Raise UserError unless the graph has nodes, inputs and outputs, and every value that is read is defined."""
    for what, count in (("nodes", len(model.graph)), ("outputs", len(model.graph.outputs))):
        if not count:
            raise UserError(f"{path} is not a usable ONNX model: its graph has no {what}")
    if all(value.is_initializer() for value in model.graph.inputs):
        raise UserError(f"{path} is not a usable ONNX model: its graph has no inputs")
    if not all(text is None or isinstance(text, str) for text in _texts(model)):
        raise UserError(f"{path} is damaged: a name in it is not text")
    for node in model.graph.all_nodes():
        if any(attribute.type == ir.AttributeType.UNDEFINED for attribute in node.attributes.values()):
            raise UserError(f"{path} is damaged: an attribute of a {node.op_type} has no type")
        for value in node.inputs:
            if value is not None and not _is_defined(value):
                where = f"{node.op_type} {node.name or ''}".strip()
                raise UserError(f"{path} is not a valid ONNX model: {where} reads undefined {value.name!r}")
    for value in model.graph.outputs:
        if not _is_defined(value):
            raise UserError(f"{path} is not a valid ONNX model: nothing computes output {value.name}")


def check_external_data(model: ir.Model, path: Path) -> None:
    """Raise UserError unless all external data lies complete inside the model's folder.

    A model file that is itself a link (as in download caches) may keep its data beside the file it points to. External
    data of node attributes is read into memory, that of initializers stays on disk.
    """
    for graph in model.graphs():
        for value in graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor):
                value.const_value = _inside(value.const_value, path)
    for node in model.graph.all_nodes():
        for name, attribute in list(node.attributes.items()):
            if attribute.type == ir.AttributeType.TENSOR and isinstance(attribute.value, ir.ExternalTensor):
                tensor = _inside(attribute.value, path)
                node.attributes[name] = ir.AttrTensor(name, ir.Tensor(tensor.numpy().copy(), tensor.dtype))


def check_weights(model: ir.Model, path: Path) -> None:
    """Raise UserError if a tensor's data does not fit its shape, or holds NaN or infinity.

    Minus infinity is allowed where it masks attention: in a tensor whose other entries are all equal.
    """
    for name, tensor in _tensors(model):
        try:
            if tensor.dtype == ir.DataType.STRING:
                continue
            array = tensor.numpy()
        except (ValueError, TypeError, AssertionError) as error:  # onnx_ir asserts on data of another type's field
            raise UserError(f"{path} is damaged: the data of {name} does not fit its type and shape") from error
        if not tensor.dtype.is_floating_point() or np.isfinite(array).all():
            continue
        if np.isnan(array).any() or not _is_mask(array):
            kind = "NaN" if np.isnan(array).any() else "infinity"
            raise UserError(f"{path} holds {kind} in weight {name}; a model like this cannot be compressed")


def _texts(model: ir.Model) -> Iterator[object]:
    """Yield names; protobuf gives bytes for those that are not UTF-8."""
    yield from (model.producer_name, model.producer_version, model.domain, model.doc_string, model.graph.name)
    yield from model.opset_imports
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        yield value.name
    for node in model.graph.all_nodes():
        yield from (node.op_type, node.domain, node.name, node.overload, node.doc_string, *node.attributes)
        yield from (value.name for value in node.outputs)


def _is_defined(value: ir.Value) -> bool:
    return value.producer() is not None or value.is_graph_input() or value.is_initializer()


def _is_mask(array: np.ndarray) -> bool:
    finite = array[np.isfinite(array)]
    is_constant = finite.size == 0 or bool((finite == finite[0]).all())
    return (array.ndim >= 2 or array.size == 1) and is_constant and not np.isposinf(array).any()


def _inside(tensor: ir.ExternalTensor, path: Path) -> ir.ExternalTensor:
    """Return the tensor, its location resolved and checked."""
    location = Path(tensor.location)
    where = f"external data {str(location)!r} of {path}"
    if location.is_absolute() or ".." in location.parts:
        raise UserError(f"{where} points outside the model's folder; put the data file beside the model")
    file = (path.parent / location).resolve()
    folders = (path.parent.resolve(), path.resolve().parent)
    folder = next((folder for folder in folders if file.is_relative_to(folder)), None)
    if folder is None:
        raise UserError(f"{where} is a link that leaves the model's folder; put the data file beside the model")
    if not file.is_file():
        raise UserError(f"{where} is missing; copy it beside the model")
    size, links = file.stat().st_size, file.stat().st_nlink
    if links > 1:
        raise UserError(f"{where} has several hard links, so it may be a file from elsewhere; copy it beside the model")
    offset = tensor.offset or 0
    length = tensor.nbytes if tensor.length is None else tensor.length
    if length != tensor.nbytes:
        raise UserError(f"{where} names {length} bytes for {tensor.name}, whose shape needs {tensor.nbytes}")
    if offset < 0 or offset + length > size:
        raise UserError(f"{where} is too short: {tensor.name} needs bytes {offset} to {offset + length}, it has {size}")
    return ir.ExternalTensor(
        os.fspath(file.relative_to(folder)),
        tensor.offset,
        tensor.length,
        tensor.dtype,
        shape=tensor.shape,
        name=tensor.name,
        doc_string=tensor.doc_string,
        base_dir=folder,
    )


def _tensors(model: ir.Model) -> Iterator[tuple[str, ir.TensorProtocol]]:
    for graph in model.graphs():
        for name, value in graph.initializers.items():
            if value.const_value is not None:
                yield name, value.const_value
    for node in model.graph.all_nodes():
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.TENSOR:
                yield f"{node.op_type} {node.name}", attribute.value
