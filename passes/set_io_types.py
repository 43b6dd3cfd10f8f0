"""Element types of a model's inputs and outputs."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

__all__ = ["SetIoTypesPass", "io_types"]

_FLOATS = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16})


def io_types(model: ir.Model) -> dict[str, ir.DataType]:
    """Return the element types of the floating-point graph inputs and outputs, by name."""
    values = [*model.graph.inputs, *model.graph.outputs]
    return {str(value.name): value.dtype for value in values if value.dtype in _FLOATS}


class SetIoTypesPass(ir.passes.InPlacePass):
    """x: T -> graph becomes x: U -> Cast(T) -> graph, where `types` asks for U; the same at the outputs.

    Names, order and shapes of inputs and outputs stay as they are.
    """

    def __init__(self, types: Mapping[str, ir.DataType]) -> None:
        """Take the wanted element type of each input and output, by name; those not named stay."""
        super().__init__()
        self.types = types

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Insert the casts."""
        modified = False
        for index, value in enumerate(list(model.graph.inputs)):
            wanted = self.types.get(str(value.name))
            if wanted is not None and wanted != value.dtype:
                _cast_input(model.graph, index, value, wanted)
                modified = True
        for index, value in enumerate(list(model.graph.outputs)):
            wanted = self.types.get(str(value.name))
            if wanted is not None and wanted != value.dtype:
                _cast_output(model.graph, index, value, wanted)
                modified = True
        return ir.passes.PassResult(model, modified=modified)


def _cast_input(graph: ir.Graph, index: int, value: ir.Value, wanted: ir.DataType) -> None:
    name, inner = str(value.name), ir.DataType(value.dtype or ir.DataType.FLOAT)
    graph_input = ir.Value(name=name, shape=value.shape, type=ir.TensorType(wanted), doc_string=value.doc_string)
    value.name = f"{name}_as_{_label(inner)}"
    cast = ir.Node("", "Cast", [graph_input], [ir.AttrInt64("to", int(inner))], name=f"{name}/Cast")
    cast.outputs[0].name = value.name
    cast.outputs[0].shape, cast.outputs[0].type = value.shape, value.type
    ir.convenience.replace_all_uses_with(value, cast.outputs[0], replace_graph_outputs=True)
    graph.inputs[index] = graph_input
    graph.insert_before(next(iter(graph)), cast)


def _cast_output(graph: ir.Graph, index: int, value: ir.Value, wanted: ir.DataType) -> None:
    name = str(value.name)
    value.name = f"{name}_as_{_label(value.dtype)}"
    cast = ir.Node("", "Cast", [value], [ir.AttrInt64("to", int(wanted))], name=f"{name}/Cast")
    output = cast.outputs[0]
    output.name, output.shape, output.type = name, value.shape, ir.TensorType(wanted)
    graph.append(cast)
    graph.outputs[index] = output


def _label(dtype: ir.DataType | None) -> str:
    return dtype.name.lower() if dtype is not None else "float"
