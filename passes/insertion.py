"""Where a new node may stand."""

from __future__ import annotations

from collections.abc import Iterable

import onnx_ir as ir

__all__ = ["insert_after"]


def insert_after(graph: ir.Graph, value: ir.Value, nodes: ir.Node | Iterable[ir.Node]) -> None:
    """Insert `nodes`, which read `value`, right behind its producer: before every other node that reads it."""
    producer = value.producer()
    if producer is None:
        graph.insert_before(next(iter(graph)), nodes)
    else:
        graph.insert_after(producer, nodes)
