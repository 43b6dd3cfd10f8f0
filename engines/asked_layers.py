"""What a model asks of its builder, layer by layer, held against what the builder made of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from lsp_deploy.engines.protocol import LayerRecord, SparseTactics
from lsp_deploy.engines.tensorrt_common.layer_words import multiplies
from lsp_deploy.graph.constants import evaluate, is_constant
from lsp_deploy.graph.weight_patterns import find_pattern
from lsp_deploy.model import load_model

__all__ = ["unmet_requests"]

_PRODUCTS = frozenset({"MatMul", "Gemm", "Conv"})
_MOVES = frozenset({"Transpose", "Reshape", "Identity"})
_INT8 = frozenset({ir.DataType.INT8, ir.DataType.UINT8})


def unmet_requests(
    model_path: Path,
    layers: Sequence[LayerRecord],
    *,
    sparse_weights: bool = False,
    sparse_tactics: SparseTactics | None = None,
) -> list[str]:
    """Return a line for every layer that the model asks to be int8 or 2:4 and the engine runs otherwise.

    A product is asked to be int8 where both of its operands are dequantized from int8, and to be 2:4 where its weight
    has the pattern.

    Args:
        model_path: the ONNX file that was built.
        layers: what it became.
        sparse_weights: whether the builder was told to use 2:4 kernels.
        sparse_tactics: what it says of them.
    """
    by_node: dict[str, list[LayerRecord]] = {}
    for layer in layers:
        for node_name in layer.onnx_nodes:
            by_node.setdefault(node_name, []).append(layer)
    lines, not_named = [], []
    for node in load_model(model_path).graph:
        if node.op_type not in _PRODUCTS or node.domain not in ("", "ai.onnx"):
            continue
        name, int8, two_four = str(node.name), _asks_int8(node), sparse_weights and _is_two_four(node)
        if not int8 and not two_four:
            continue
        named = by_node.get(name, [])
        records = [record for record in named if multiplies(record.kind)] or named
        if not records:
            not_named.append(name)
            continue
        if int8 and not any(record.precision == "int8" for record in records):
            lines.append(f"{name} is asked to be int8 and runs in {records[0].precision} ({records[0].kind})")
        if two_four and not _runs_two_four(name, records, sparse_tactics):
            lines.append(f"{name} has 2:4 weights and runs a dense kernel: the zeros gain no speed")
    return lines + _not_named_line(not_named)


def _runs_two_four(name: str, records: Iterable[LayerRecord], tactics: SparseTactics | None) -> bool:
    """TensorRT calls 2:4 kernels sparse; its log names the layers that use them, joined where they are fused."""
    chosen = tactics.layers if tactics is not None else []
    return any("sparse" in record.tactic.lower() for record in records) or any(
        name in layer.split(" + ") for layer in chosen
    )


def _not_named_line(names: Sequence[str]) -> list[str]:
    if not names:
        return []
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return [f"the builder does not say what became of {len(names)} of the layers asked to be int8 or 2:4: {shown}"]


def _asks_int8(node: ir.Node) -> bool:
    return all(_is_dequantized_int8(value) for value in node.inputs[:2])


def _is_dequantized_int8(value: ir.Value | None) -> bool:
    for producer in _producers(value):
        if producer.op_type == "DequantizeLinear":
            source = producer.inputs[0]
            quantize = source.producer() if source is not None else None
            typed = [*producer.inputs[2:3], source, *(quantize.inputs[2:3] if quantize is not None else ())]
            return any(one is not None and one.dtype in _INT8 for one in typed)
        if producer.op_type not in _MOVES:
            return False
    return False


def _producers(value: ir.Value | None) -> Iterator[ir.Node]:
    """Yield what makes `value`, then what makes the first input of that, and so on."""
    producer = value.producer() if value is not None else None
    while producer is not None:
        yield producer
        first = producer.inputs[0] if producer.inputs else None
        producer = first.producer() if first is not None else None


def _is_two_four(node: ir.Node) -> bool:
    value = node.inputs[1]
    if value is None or not is_constant(value):
        return False
    weight = _weight(node, evaluate(value).astype(np.float32))
    return weight.ndim == 2 and find_pattern(weight).pattern == "2:4"


def _weight(node: ir.Node, array: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return W [K, N] as the mathematics sees it."""
    if node.op_type == "Conv":
        return array.reshape(len(array), -1).T
    transposed = node.attributes.get("transB")
    return array.T if transposed is not None and transposed.as_int() else array
