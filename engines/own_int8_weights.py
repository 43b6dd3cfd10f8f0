"""Int8 weights that several layers share, given to each of them, for ONNX Runtime."""

from __future__ import annotations

import onnx_ir as ir

__all__ = ["with_own_int8_weights"]


def with_own_int8_weights(model: ir.Model) -> ir.Model:
    """Return `model` with an int8 constant of its own for every DequantizeLinear; itself where none is shared.

    ONNX Runtime's `x64quantprecision` replaces such a constant by its uint8 form once for each reader, and fails at the
    second one ("Attempt to replace the existing tensor", ONNX Runtime 1.31).
    """
    if not _second_readers(model):
        return model
    copy = model.clone()
    for number, node in enumerate(_second_readers(copy)):
        shared = node.inputs[0]
        assert shared is not None
        own = ir.Value(name=f"{shared.name}/own_{number}", shape=shared.shape, type=shared.type)
        own.const_value = shared.const_value
        copy.graph.register_initializer(own)
        node.replace_input_with(0, own)
    return copy


def _second_readers(model: ir.Model) -> list[ir.Node]:
    """Return the DequantizeLinear nodes whose int8 constant an earlier one reads too."""
    seen: set[ir.Value] = set()
    found = []
    for node in model.graph:
        weight = node.inputs[0] if node.op_type == "DequantizeLinear" else None
        if weight is None or not weight.is_initializer() or weight.dtype != ir.DataType.INT8:
            continue
        if weight in seen:
            found.append(node)
        seen.add(weight)
    return found
