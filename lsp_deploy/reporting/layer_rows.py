"""The plan joined with the engine's layer table: what every layer was asked to be, and what it became."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from lsp_deploy.engines.protocol import EngineInfo, LayerRecord
from lsp_deploy.plan import LayerPlan, Plan
from lsp_deploy.reporting.sections import EngineLayer, LayerPrecision, LayerRow, LayerSparsity

__all__ = ["layer_rows"]

# How builders call the layer that multiplies; what else names an ONNX node is a reformat or a part of its epilogue.
_MULTIPLIES = re.compile("gemm|matmul|conv|correlation|fully_connected", re.IGNORECASE)


def layer_rows(plan: Plan, engine: EngineInfo | None) -> list[LayerRow]:
    """Return one row for every layer of `plan`, in its order, with what `engine` (None: not built) made of it.

    Layers are joined by the name of their ONNX node, which builders keep through their fusions.
    """
    records = _by_node(engine.layers) if engine is not None else {}
    return [_row(layer, _engine_layer(layer, engine, records.get(layer.name, ()))) for layer in plan.layers]


def _row(layer: LayerPlan, engine: EngineLayer) -> LayerRow:
    sparsity, precision = layer.sparsity, layer.precision
    return LayerRow(
        name=layer.name,
        role=layer.role,
        block=layer.block,
        K=layer.K,
        N=layer.N,
        M=layer.M,
        flops=layer.flops,
        sparsity=LayerSparsity(
            asked=sparsity.asked,
            pattern=sparsity.pattern,
            zeros_percent=round(100 * sparsity.zeros, 3),
            method=sparsity.method,
            reason=sparsity.reason,
        ),
        precision=LayerPrecision(
            asked=precision.asked, dtype=precision.dtype, sqnr_db=precision.sqnr_db, reason=precision.reason
        ),
        engine=engine,
    )


def _by_node(records: Iterable[LayerRecord]) -> dict[str, list[LayerRecord]]:
    found: dict[str, list[LayerRecord]] = {}
    for record in records:
        for node in record.onnx_nodes:
            found.setdefault(node, []).append(record)
    return found


def _engine_layer(layer: LayerPlan, engine: EngineInfo | None, records: Sequence[LayerRecord]) -> EngineLayer:
    if engine is None:
        return EngineLayer(note="no engine was built")
    if not records:
        return EngineLayer(note="the engine's layer table does not name this node")
    record = next((one for one in records if _MULTIPLIES.search(one.kind)), records[0])
    asked, ran = layer.precision.dtype, record.precision
    two_four = _uses_two_four(record, engine) if layer.sparsity.pattern == "2:4" else None
    notes = [f"asked {asked}, the engine ran {ran} {record.kind}"] if ran != asked else []
    if layer.sparsity.pattern == "2:4" and two_four is not True:
        silent = f"{engine.backend} does not say whether this kernel uses the 2:4 zeros"
        notes.append("no 2:4 kernel was chosen: the zeros gain no speed" if two_four is False else silent)
    return EngineLayer(
        precision=ran,
        layer=record.name,
        kind=record.kind,
        tactic=record.tactic or None,
        uses_two_four=two_four,
        matches_request=ran == asked,
        note="; ".join(notes) or None,
    )


def _uses_two_four(record: LayerRecord, engine: EngineInfo) -> bool | None:
    """Return whether a 2:4 kernel was chosen: TensorRT's are called sparse, ONNX Runtime has none, RTX names none."""
    if engine.backend == "onnxruntime":
        return False
    if "sparse" in record.tactic.lower():
        return True
    return False if engine.backend == "tensorrt" and record.tactic else None
