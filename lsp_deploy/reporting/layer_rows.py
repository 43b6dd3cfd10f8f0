"""The plan joined with the engine's layer table: what every layer was asked to be, and what it became."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from lsp_deploy.engines.protocol import EngineInfo, LayerRecord
from lsp_deploy.plan import LayerPlan, Plan
from lsp_deploy.reporting.execution_rows import layer_execution, layer_time_ms
from lsp_deploy.reporting.pruning_rows import layer_blocks, layer_recovery
from lsp_deploy.reporting.sections import (
    EngineLayer,
    LayerBlocks,
    LayerPrecision,
    LayerRow,
    LayerSparsity,
    LayerStructure,
)

if TYPE_CHECKING:
    from lsp_deploy.allocation.pruning import Pruning
    from lsp_deploy.passes.remove_dead_structure import DeadStructure

__all__ = ["WITHOUT_TWO_FOUR", "layer_rows"]

# Builders that multiply by the zeros of a 2:4 weight: TensorRT-RTX 1.7 gives the same bytes with and without
# SPARSE_WEIGHTS, and ONNX Runtime's CPU provider has no such kernels.
WITHOUT_TWO_FOUR = frozenset({"onnxruntime", "tensorrt_rtx"})

# What builders call a layer that multiplies.
_MULTIPLIES = re.compile("gemm|matmul|conv|correlation|fully_connected|blocksparselinear", re.IGNORECASE)
# A layer that was cut into parts has nodes <name>/0, <name>/1, ..., or <name>/panel_0/MatMul, ...
_PART = re.compile(r"/(\d+|panel_\d+/MatMul)$")


def layer_rows(
    plan: Plan, engine: EngineInfo | None, dead: DeadStructure | None = None, pruning: Pruning | None = None
) -> list[LayerRow]:
    """Return one row for every layer of `plan`, in its order, with what `engine` (None: not built) made of it.

    Layers are joined by the name of their ONNX node, which builders keep through their fusions. Those that `dead` says
    are gone from the compressed model are not asked of the engine. Of `pruning` the rows take the δ-curves.
    """
    records = _by_layer(engine.layers, {layer.name for layer in plan.layers}) if engine is not None else {}
    structures = {} if dead is None else _structures(plan, dead)
    rows = []
    for layer in plan.layers:
        structure = structures.get(layer.name)
        if structure is not None and structure.K == 0:
            ran = EngineLayer(note="the layer is gone from the model")
        else:
            ran = _engine_layer(layer, engine, records.get(layer.name, ()))
        rows.append(_row(layer, structure, layer_blocks(pruning, layer.name), ran))
    return rows


def _structures(plan: Plan, dead: DeadStructure) -> dict[str, LayerStructure]:
    sizes = {layer.name: (layer.K, layer.N) for layer in plan.layers}
    notes: dict[str, list[str]] = {}
    for smaller in dead.removed:
        if smaller.name not in sizes:
            continue
        (K, N), sizes[smaller.name] = smaller.before, smaller.after
        left = "gone" if smaller.after == (0, 0) else f"K × N {K} × {N} became {smaller.after[0]} × {smaller.after[1]}"
        notes[smaller.name] = [f"{left}: {'; '.join(dict.fromkeys(smaller.reasons))}"]
    for kept in dead.kept:
        if kept.name in sizes:
            zeros = f"{kept.zero_rows} rows and {kept.zero_columns} columns of zeros stay"
            notes.setdefault(kept.name, []).append(f"{zeros}: {kept.reason}")
    return {
        name: LayerStructure(K=sizes[name][0], N=sizes[name][1], note=". ".join(one)) for name, one in notes.items()
    }


def _row(
    layer: LayerPlan, structure: LayerStructure | None, blocks: LayerBlocks | None, engine: EngineLayer
) -> LayerRow:
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
        structure=structure,
        recovery=layer_recovery(layer.recovery),
        blocks=blocks,
        precision=LayerPrecision(
            asked=precision.asked, dtype=precision.dtype, sqnr_db=precision.sqnr_db, reason=precision.reason
        ),
        execution=layer_execution(layer),
        engine=engine,
        time_ms=layer_time_ms(layer),
    )


def _by_layer(records: Iterable[LayerRecord], layers: set[str]) -> dict[str, list[LayerRecord]]:
    """Return the engine layers that do each linear layer: one for every ONNX node that it was written as."""
    by_node: dict[str, list[LayerRecord]] = {}
    for record in records:
        for node in record.onnx_nodes:
            by_node.setdefault(node, []).append(record)
    found: dict[str, list[LayerRecord]] = {}
    for node, candidates in by_node.items():
        layer = node if node in layers else _PART.sub("", node)
        if layer in layers:
            # The first that multiplies: what else names a node prepares its operand or reads its result.
            own = next((one for one in candidates if _MULTIPLIES.search(one.kind)), candidates[0])
            found.setdefault(layer, []).append(own)
    return found


def _engine_layer(layer: LayerPlan, engine: EngineInfo | None, records: Sequence[LayerRecord]) -> EngineLayer:
    if engine is None:
        return EngineLayer(note="no engine was built")
    if not records:
        return EngineLayer(note="the engine's layer table does not name this node")
    asked, first = layer.precision.dtype, records[0]
    ran = " and ".join(dict.fromkeys(record.precision for record in records))
    two_four = _uses_two_four(first, engine) if layer.sparsity.pattern == "2:4" else None
    notes = [f"asked {asked}, the engine ran {ran} {first.kind}"] if ran != asked else []
    if two_four is False:
        why = "has no 2:4 kernels" if engine.backend in WITHOUT_TWO_FOUR else "chose no 2:4 kernel"
        notes.append(f"{engine.backend} {why}: the zeros gain no speed")
    elif layer.sparsity.pattern == "2:4" and two_four is None:
        notes.append(f"{engine.backend} does not say whether this kernel uses the 2:4 zeros")
    return EngineLayer(
        precision=ran,
        layer=first.name,
        kind=first.kind,
        tactic=first.tactic or None,
        uses_two_four=two_four,
        matches_request=ran == asked,
        note="; ".join(notes) or None,
    )


def _uses_two_four(record: LayerRecord, engine: EngineInfo) -> bool | None:
    """Return whether a 2:4 kernel was chosen: TensorRT calls them sparse; None where it names no kernel."""
    if engine.backend in WITHOUT_TWO_FOUR:
        return False
    return "sparse" in record.tactic.lower() if record.tactic else None
