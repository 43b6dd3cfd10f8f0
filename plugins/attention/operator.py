"""lsp::Attention as a node: its attributes, what makes it valid, and the type and shape of its output.

docs/operator.md is the definition for implementers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import onnx_ir as ir

from lsp_deploy.errors import UserError

__all__ = [
    "DOMAIN",
    "MAX_HEAD_SIZE",
    "OP_TYPE",
    "VERSION",
    "Attention",
    "Compute",
    "bias_of",
    "describe_output",
    "from_node",
    "to_node",
]

DOMAIN, OP_TYPE, VERSION = "lsp", "Attention", 1
MAX_HEAD_SIZE = 128

Compute = Literal["float32", "bfloat16"]

_ATTRIBUTES = {
    "num_heads": ir.AttributeType.INT,
    "scale": ir.AttributeType.FLOAT,
    "packed_qkv": ir.AttributeType.INT,
    "compute": ir.AttributeType.STRING,
}


@dataclass(frozen=True)
class Attention:
    """The attributes: y = softmax(scale · q kᵀ + bias) v for each head.

    The scale is rounded to float32, as a file holds it.

    Raises:
        ValueError: an attribute that cannot be, saying why.
    """

    num_heads: int
    scale: float
    packed_qkv: bool
    """Whether q, k and v are one input [B, S, 3·H·D]: all of q, then all of k, then all of v."""
    compute: Compute = "float32"
    """What q, k, v and the probabilities are rounded to; products are summed in float32 in any case."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "scale", float(np.float32(self.scale)))
        if self.num_heads < 1:
            raise ValueError(f"num_heads is {self.num_heads}, not a positive number")
        if not math.isfinite(self.scale):
            raise ValueError(f"scale {self.scale} is no usable number")
        if self.compute not in get_args(Compute):
            raise ValueError(f"compute {self.compute!r} is none of {', '.join(get_args(Compute))}")

    @property
    def operands(self) -> int:
        """How many inputs hold q, k and v."""
        return 1 if self.packed_qkv else 3


def from_node(node: ir.Node) -> Attention:
    """Return the attributes of a node, which is checked whole: attributes, and what is known of its inputs.

    Raises:
        UserError: naming the node and what is wrong with it.
    """
    try:
        operator = Attention(**_attributes(node))
        _check_inputs(node, operator)
    except ValueError as error:
        raise UserError(
            f"{node.name} is not a valid {DOMAIN}::{OP_TYPE}: {error}; write the model again with lsp-deploy"
        ) from None
    return operator


def to_node(operator: Attention, operands: Sequence[ir.Value], bias: ir.Value | None = None, *, name: str) -> ir.Node:
    """Return a node with these attributes and inputs; its output has type and shape, but no name.

    Who puts it into a graph sees to the model's opset import of domain "lsp", version 1.

    Args:
        operator: the attributes.
        operands: qkv [B, S, 3·H·D], or q [B, S, H·D], k and v [B, T, H·D].
        bias: float32 [P, H or 1, S, T], added to the scores; it repeats along B, which is a multiple of P.
        name: of the node.
    """
    attributes = [
        ir.AttrInt64("num_heads", operator.num_heads),
        ir.AttrFloat32("scale", operator.scale),
        ir.AttrInt64("packed_qkv", int(operator.packed_qkv)),
        ir.AttrString("compute", operator.compute),
    ]
    inputs = [*operands, *([] if bias is None else [bias])]
    node = ir.Node(DOMAIN, OP_TYPE, inputs, attributes, version=VERSION, name=name)
    describe_output(node)
    return node


def bias_of(node: ir.Node) -> ir.Value | None:
    """Return the bias that a checked node adds to its scores."""
    operands = 1 if node.attributes["packed_qkv"].as_int() else 3
    return node.inputs[operands] if len(node.inputs) > operands else None


def describe_output(node: ir.Node) -> None:
    """Set type and shape of a node's output from the shape of its first input; no check is made."""
    y, x = node.outputs[0], node.inputs[0] if node.inputs else None
    y.type = ir.TensorType(ir.DataType.FLOAT)
    if x is None or x.shape is None or len(x.shape) != 3:
        return
    *outer, width = x.shape
    if not node.attributes.get_int("packed_qkv", 0):
        y.shape = ir.Shape([*outer, width])
    elif isinstance(width, int):
        y.shape = ir.Shape([*outer, width // 3])


def _attributes(node: ir.Node) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, attribute in node.attributes.items():
        if name not in _ATTRIBUTES:
            raise ValueError(f"it has an attribute {name}, which this version does not know")
        if attribute.type != _ATTRIBUTES[name] or attribute.is_ref():
            raise ValueError(f"attribute {name} is no {_ATTRIBUTES[name].name}")
        found[name] = attribute.value
    if missing := [name for name in _ATTRIBUTES if name not in found]:
        raise ValueError(f"it has no attribute {missing[0]}")
    if found["packed_qkv"] not in (0, 1):
        raise ValueError(f"packed_qkv is {found['packed_qkv']}, neither 0 nor 1")
    return found | {"packed_qkv": bool(found["packed_qkv"])}


def _check_inputs(node: ir.Node, operator: Attention) -> None:
    names = ("qkv",) if operator.packed_qkv else ("q", "k", "v")
    if len(node.inputs) not in (len(names), len(names) + 1) or None in node.inputs or len(node.outputs) != 1:
        raise ValueError(f"it takes {', '.join(names)} and at most a bias, none of them empty, and gives y")
    widths = set()
    for name, value in zip(names, node.inputs, strict=False):
        assert value is not None
        _check_type(value, name, 3)
        if value.shape is not None and isinstance(value.shape[2], int):
            widths.add(value.shape[2])
    if len(widths) > 1:
        raise ValueError(f"q, k and v end in different sizes: {', '.join(map(str, sorted(widths)))}")
    for width in widths:
        heads = operator.num_heads * (3 if operator.packed_qkv else 1)
        if width % heads or not 1 <= width // heads <= MAX_HEAD_SIZE:
            raise ValueError(f"{width} channels do not make {heads} heads of 1 to {MAX_HEAD_SIZE} channels")
    if len(node.inputs) > len(names):
        bias = node.inputs[len(names)]
        assert bias is not None
        _check_type(bias, "bias", 4)
        _check_bias(bias, node.inputs[0], operator)


def _check_bias(bias: ir.Value, x: ir.Value | None, operator: Attention) -> None:
    if bias.shape is None:
        return
    repeats, heads = bias.shape[0], bias.shape[1]
    if isinstance(heads, int) and heads not in (1, operator.num_heads):
        raise ValueError(f"its bias has {heads} heads, not 1 or {operator.num_heads}")
    batch = x.shape[0] if x is not None and x.shape is not None else None
    if isinstance(repeats, int) and isinstance(batch, int) and batch % max(repeats, 1):
        raise ValueError(f"its bias is for {repeats} images, and the batch of {batch} is no multiple of that")


def _check_type(value: ir.Value, name: str, rank: int) -> None:
    if value.dtype not in (None, ir.DataType.FLOAT):
        raise ValueError(f"its {name} is {value.dtype.name}, not FLOAT")
    if value.shape is not None and len(value.shape) != rank:
        raise ValueError(f"its {name} is {value.shape}, not of rank {rank}")
