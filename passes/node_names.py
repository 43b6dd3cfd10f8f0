"""Names for nodes that take the place of others."""

from __future__ import annotations

import re

import onnx_ir as ir

__all__ = ["name_beside"]


def name_beside(node: ir.Node, op_type: str) -> str:
    """Return a name for a node of another operator in the place of `node`: /act/Gelu instead of /act/Erf_1.

    It may be taken; `NameFixPass` makes names unique.
    """
    name, count = re.subn(rf"{node.op_type}(_\d+)?$", op_type, str(node.name))
    return name if count else f"{name}/{op_type}"
