"""The layers of an engine, from the JSON of TensorRT's inspector.

There are two dialects. TensorRT 10 has `Bindings` and, for each tensor, `Format/Datatype` in one; TensorRT 11 has
`I/O Tensors`, and `Format` and `DataType` apart. Neither is documented field by field: what is not there is left empty.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from lsp_deploy.engines.compute_types import compute_type
from lsp_deploy.engines.protocol import LayerRecord
from lsp_deploy.engines.tensorrt_common.layer_words import element_type, is_plugin, multiplies, onnx_nodes

__all__ = ["InspectionError", "parse_inspection"]

_TYPE_KEYS = ("DataType", "Datatype", "Format/Datatype", "Format/DataType")
# Kernels that multiply int8 matrices: i8i8_i8i32, i8f16_i8i32, ampere_int8, ... Their residual may be of a wider type.
_INT8_TACTIC = re.compile(r"i8[if]|imma|int8", re.IGNORECASE)
# What TensorRT puts before and after the names of the nodes that it fuses.
_NODES_IN_NAME = re.compile(r"^(?:Reformatting CopyNode for .*|.*\{ForeignNode\[.*)$")


class InspectionError(ValueError):
    """What the inspector says is not the JSON that is known."""


def parse_inspection(text: str) -> list[LayerRecord]:
    """Return one record for each layer in the inspector's JSON, in the engine's order.

    Raises:
        InspectionError: it is not JSON, or has no list of layers.
    """
    try:
        document = json.loads(text)
    except json.JSONDecodeError as error:
        raise InspectionError(f"the inspector's answer is not JSON: {error}") from None
    layers = document.get("Layers") if isinstance(document, dict) else None
    if not isinstance(layers, list):
        raise InspectionError("the inspector's answer has no list of layers")
    return [_record(layer) for layer in layers]


def _record(layer: Mapping[str, Any] | str) -> LayerRecord:
    if isinstance(layer, str):  # of an engine that was built without detailed profiling
        return LayerRecord(name=layer, kind="unknown", precision="unknown", onnx_nodes=_nodes(layer, ""))
    name, kind, tactic = (str(layer.get(key, "")) for key in ("Name", "LayerType", "TacticName"))
    inputs, constants, outputs = (_tensors(layer.get(key, ())) for key in ("Inputs", "Constants", "Outputs"))
    weights = layer.get("Weights")
    weight_types = [element_type(str(weights.get("Type", "")))] if isinstance(weights, Mapping) else []
    constant_types = [*weight_types, *(kind_ for kind_, _ in constants)]
    matrices = [*weight_types, *(kind_ for kind_, is_matrix in constants if is_matrix)]
    input_types = [kind_ for kind_, _ in inputs]
    output_types = [kind_ for kind_, _ in outputs]
    return LayerRecord(
        name=name,
        kind=kind or "unknown",
        precision=_precision(kind, tactic, input_types, matrices, output_types),
        input_types=input_types,
        constant_types=constant_types,
        output_types=output_types,
        tactic=tactic,
        onnx_nodes=_nodes(name, str(layer.get("Metadata", ""))),
    )


def _precision(kind: str, tactic: str, inputs: Sequence[str], matrices: Sequence[str], outputs: Sequence[str]) -> str:
    if is_plugin(kind):
        return compute_type(inputs[:1])
    if not multiplies(kind):
        return compute_type(inputs or outputs)
    if "int8" in inputs and _INT8_TACTIC.search(tactic):
        return "int8"
    return compute_type([*inputs, *matrices] or outputs)


def _tensors(tensors: Sequence[Any]) -> list[tuple[str, bool]]:
    """Return the element type of each tensor, and whether it is a matrix and not a bias or a scale."""
    found = []
    for tensor in tensors:
        if isinstance(tensor, Mapping):
            said = next((str(tensor[key]) for key in _TYPE_KEYS if key in tensor), "")
            found.append((element_type(said), sum(size != 1 for size in tensor.get("Dimensions", ())) >= 2))
    return found


def _nodes(name: str, metadata: str) -> list[str]:
    """Return the ONNX nodes that a layer does: from its metadata, else from its name, in which they are joined."""
    if metadata:
        return onnx_nodes(metadata)
    return [] if _NODES_IN_NAME.match(name) or name.startswith("__my") else name.split(" + ")
