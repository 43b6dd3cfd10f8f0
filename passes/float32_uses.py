"""Which inputs and outputs of a 16-bit model's nodes are float32."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import onnx
import onnx_ir as ir

from lsp_deploy.passes.float32_nodes import nodes_kept_in_float32
from lsp_deploy.plugins.block_sparse import operator as block_sparse

__all__ = ["TYPED_BY_ATTRIBUTE", "float32_uses"]

TYPED_BY_ATTRIBUTE = {
    "Cast": "to",
    "ConstantOfShape": "value",
    "DequantizeLinear": "output_dtype",
    block_sparse.OP_TYPE: "out_type",
}
"""Operators whose result has the type that an attribute names."""


def float32_uses(model: ir.Model, dtype: ir.DataType) -> tuple[set[tuple[ir.Node, int]], set[ir.Value]]:
    """Return what stays float32 when everything else that is float32 becomes `dtype`.

    An operator's schema says which of its inputs and outputs must have the same type, and whether that may be `dtype`.
    Nodes of operators without a schema stay float32, as do all that `nodes_kept_in_float32` names and everything in
    subgraphs. Operators registered with `onnx.defs.register_schema` have a schema, and lsp::BlockSparseLinear one here.

    Returns:
        The node inputs (node, index) that must read float32, and the node outputs that are float32.
    """
    kept = nodes_kept_in_float32(model.graph, dtype)
    uses: set[tuple[ir.Node, int]] = set()
    values: set[ir.Value] = set()
    for node in model.graph.all_nodes():
        known = None if node in kept else _signature(node, model.opset_imports)
        variables = set() if known is None else _kept_variables(node, known, dtype)
        for index, operand in enumerate(node.inputs):
            if _is_float(operand) and (known is None or known.inputs[index] in variables):
                uses.add((node, index))
        for index, value in enumerate(node.outputs):
            if _is_float(value) and (known is None or known.outputs[index] in variables):
                values.add(value)
    return uses, values


@dataclass(frozen=True)
class _Signature:
    """The schema's type variable (T, T1, ...) of each input and output of a node, and the types each may stand for."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    allowed: dict[str, frozenset[str]]


def _kept_variables(node: ir.Node, known: _Signature, dtype: ir.DataType) -> set[str]:
    read = {variable for variable, value in zip(known.inputs, node.inputs, strict=True) if _is_float(value)}
    written = {variable for variable, value in zip(known.outputs, node.outputs, strict=True) if _is_float(value)}
    wanted = f"tensor({dtype.name.lower()})"
    kept = {variable for variable in read | written if wanted not in known.allowed[variable]}
    # What follows from no input is float32 by default, as the statistics that LayerNormalization can give.
    return kept if node.op_type in TYPED_BY_ATTRIBUTE else kept | (written - read)


_FLOATS = frozenset({"tensor(float)", "tensor(float16)", "tensor(bfloat16)"})
# Ours has no schema. Its bias and scale are float32, whatever it computes in.
_BLOCK_SPARSE = ("T", "T", "tensor(float)", "tensor(float)", "T")


def _signature(node: ir.Node, opset_imports: dict[str, int]) -> _Signature | None:
    if node.domain == block_sparse.DOMAIN and node.op_type == block_sparse.OP_TYPE:
        allowed = {"T": _FLOATS, "tensor(float)": frozenset({"tensor(float)"})}
        return _Signature(_BLOCK_SPARSE[: len(node.inputs)], ("T",), allowed)
    schema = _schema(node.op_type, node.domain, opset_imports.get(node.domain, 1))
    if schema is None:
        return None
    inputs = tuple(_parameter(schema.inputs, index).type_str for index in range(len(node.inputs)))
    outputs = tuple(_parameter(schema.outputs, index).type_str for index in range(len(node.outputs)))
    allowed = {name: frozenset({name}) for name in (*inputs, *outputs)}
    for constraint in schema.type_constraints:
        allowed[constraint.type_param_str] = frozenset(constraint.allowed_type_strs)
    return _Signature(inputs, outputs, allowed)


@cache
def _schema(op_type: str, domain: str, opset: int) -> onnx.defs.OpSchema | None:
    if not onnx.defs.has(op_type, domain=domain, max_inclusive_version=opset):
        return None
    return onnx.defs.get_schema(op_type, max_inclusive_version=opset, domain=domain)


def _parameter(
    parameters: Sequence[onnx.defs.OpSchema.FormalParameter], index: int
) -> onnx.defs.OpSchema.FormalParameter:
    return parameters[min(index, len(parameters) - 1)]  # the last one may be variadic


def _is_float(value: ir.Value | None) -> bool:
    return value is not None and value.dtype == ir.DataType.FLOAT
