"""FLOPs of attention: the products of two activations."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import onnx_ir as ir

from lsp_deploy.graph.dataflow import DataFlow
from lsp_deploy.graph.measured_shapes import measure_shapes
from lsp_deploy.model import resolve_shapes

__all__ = ["attention_flops"]


def attention_flops(model: ir.Model, shapes: Mapping[str, Sequence[int]] | None = None) -> int:
    """Return the FLOPs of all products of two activations: 2·M·K·N times their number, at concrete input shapes."""
    flow = DataFlow(model.graph, ())
    products = [node for node in model.graph if flow.is_product(node)]
    values = [value for node in products for value in (*node.inputs[:2], *node.outputs[:1]) if value is not None]
    measured = measure_shapes(model, resolve_shapes(model, shapes, batch=1), values)

    def shape(value: ir.Value | None) -> tuple[int, ...]:
        return () if value is None else measured[str(value.name)]

    return sum(_flops(node, shape(node.inputs[0]), shape(node.inputs[1]), shape(node.outputs[0])) for node in products)


def _flops(node: ir.Node, left: tuple[int, ...], right: tuple[int, ...], out: tuple[int, ...]) -> int:
    if node.op_type == "Einsum":
        terms = node.attributes["equation"].as_string().replace(" ", "").split("->")[0].split(",")
        sizes = dict(zip(terms[0], left, strict=False)) | dict(zip(terms[1], right, strict=False))
        return 2 * math.prod(sizes.values())
    if node.op_type == "Gemm":
        return 2 * math.prod(out) * (left[0] if node.attributes.get_int("transA", 0) else left[1])
    if node.op_type == "MatMul":
        return 2 * math.prod(out) * left[-1]
    # Fused attention: scores, then their product with the values.
    keys = left[-2] if node.domain == "com.microsoft" and node.op_type == "Attention" else right[-2]
    queries = math.prod(out) if node.domain == "com.microsoft" and node.op_type == "Attention" else math.prod(left)
    return 2 * keys * (queries + math.prod(out))
