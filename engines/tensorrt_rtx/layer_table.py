"""The fused layers of an engine, read from the table that TensorRT-RTX logs when it has built it.

An engine cannot be inspected without a GPU, and this table is what there is instead. Its format is not documented, so
a line that does not look like one is given back, not guessed at.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from lsp_deploy.engines.compute_types import compute_type
from lsp_deploy.engines.protocol import LayerRecord
from lsp_deploy.engines.tensorrt_common.layer_words import element_type, is_plugin, multiplies, onnx_nodes
from lsp_deploy.engines.tensorrt_common.messages import LogMessage

__all__ = ["LayerTable", "parse_layer_table", "read_layer_table"]

_TABLE_HEAD = "Layers:\n"

_LAYER = re.compile(
    r"Name: (?P<name>.*?), LayerType: (?P<kind>\w+), Inputs: \[(?P<inputs>.*?)\], Constants: \[(?P<constants>.*?)\], "
    r"Outputs: \[(?P<outputs>.*?)\], TacticName: (?P<tactic>.*?), StreamId: \d+, Metadata: ?(?P<origin>.*)"
)
_TENSOR = re.compile(r"Dimensions: \[(?P<dimensions>[-\d,]*)\].*?Datatype: (?P<type>\w+)")


class LayerTable(NamedTuple):
    """The layers, and the lines that could not be read."""

    layers: list[LayerRecord]
    unread: list[str]


def read_layer_table(messages: Iterable[LogMessage]) -> LayerTable:
    """Return the engine's layers; empty where the log has no table."""
    tables = (message.text for message in messages if message.text.startswith(_TABLE_HEAD))
    return parse_layer_table(next(tables, ""))


def parse_layer_table(message: str) -> LayerTable:
    """Read the log message that begins with `Layers:`; the table ends at its first empty line.

    The precision of a matrix product is its operands': int8 only where activations and weights both are.
    """
    table, _, _ = message.removeprefix(_TABLE_HEAD).partition("\n\n")
    layers, unread = [], []
    for line in table.split("\n"):
        match = _LAYER.fullmatch(line.strip())
        if match is not None:
            layers.append(_record(match))
        elif line.strip():
            unread.append(line)
    return LayerTable(layers, unread)


def _record(match: re.Match[str]) -> LayerRecord:
    inputs, constants, outputs = (_tensors(match[name]) for name in ("inputs", "constants", "outputs"))
    operands = inputs or outputs
    if multiplies(match["kind"]):
        operands = [*inputs, *(tensor for tensor in constants if _is_matrix(tensor))]
    elif is_plugin(match["kind"]):
        operands = operands[:1]
    return LayerRecord(
        name=match["name"],
        kind=match["kind"],
        precision=compute_type(tensor.type for tensor in operands),
        input_types=[tensor.type for tensor in inputs],
        constant_types=[tensor.type for tensor in constants],
        output_types=[tensor.type for tensor in outputs],
        tactic=match["tactic"],
        onnx_nodes=onnx_nodes(match["origin"]),
    )


class _Tensor(NamedTuple):
    dimensions: Sequence[int]
    type: str


def _tensors(text: str) -> list[_Tensor]:
    return [
        _Tensor([int(size) for size in found["dimensions"].split(",") if size], element_type(found["type"]))
        for found in _TENSOR.finditer(text)
    ]


def _is_matrix(tensor: _Tensor) -> bool:
    """Tell weights from biases, scales and the like, which have one extended dimension at most."""
    return sum(size > 1 for size in tensor.dimensions) >= 2
