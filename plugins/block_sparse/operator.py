"""lsp::BlockSparseLinear as a node: its attributes, what makes it valid, and the type and shape of its output.

docs/operator.md is the definition for implementers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from lsp_deploy.errors import UserError

__all__ = [
    "BSL16_BLOCKS",
    "DOMAIN",
    "OP_TYPE",
    "VERSION",
    "Activation",
    "BlockSparseLinear",
    "Layout",
    "constant_inputs",
    "describe_output",
    "from_node",
    "to_node",
]

DOMAIN, OP_TYPE, VERSION = "lsp", "BlockSparseLinear", 1
BSL16_BLOCKS = (16, 32, 64)

Activation = Literal["none", "gelu", "gelu_tanh", "relu"]
Layout = Literal["canonical", "bsl16.v1"]

# A file is untrusted: its sizes decide how much memory a weight takes. This is 1 GiB of float32.
_MAX_WEIGHT_ENTRIES = 1 << 28

_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_OUT_TYPES = (*_FLOATS, ir.DataType.INT8)
# What x may be, by the element type of the values.
_X_TYPES = {
    ir.DataType.FLOAT: (ir.DataType.FLOAT,),
    ir.DataType.FLOAT16: (ir.DataType.FLOAT16,),
    ir.DataType.BFLOAT16: (ir.DataType.FLOAT, ir.DataType.BFLOAT16),
    ir.DataType.INT8: (*_FLOATS, ir.DataType.INT8),
}
_INT, _INTS = ir.AttributeType.INT, ir.AttributeType.INTS
_FLOAT, _STRING = ir.AttributeType.FLOAT, ir.AttributeType.STRING
_ATTRIBUTES = {
    "K": _INT,
    "N": _INT,
    "block_k": _INT,
    "block_n": _INT,
    "col_ptr": _INTS,
    "k_idx": _INTS,
    "activation": _STRING,
    "layout": _STRING,
    "x_scale": _FLOAT,
    "x_offset": _FLOAT,
    "out_type": _INT,
    "out_scale": _FLOAT,
    "out_offset": _FLOAT,
}
_REQUIRED = ("K", "N", "block_k", "block_n", "col_ptr")
# TensorRT finds the plugin by these.
_PLUGIN = {"plugin_version": "1", "plugin_namespace": "lsp"}


@dataclass(frozen=True)
class BlockSparseLinear:
    """The attributes: y = act(x @ W + bias) [+ residual], W [K, N] in blocks of block_k × block_n.

    Scales and offsets are rounded to float32, as a file holds them.

    Raises:
        ValueError: attributes that contradict each other, saying how.
    """

    K: int
    N: int
    block_k: int
    block_n: int
    col_ptr: tuple[int, ...]
    """[block columns + 1]: where each block column begins in `k_idx`."""
    k_idx: tuple[int, ...] = ()
    """Block rows of the surviving blocks, ascending within a block column."""
    activation: Activation = "none"
    layout: Layout = "canonical"
    x_scale: float = 0.0
    """Step of an int8 x; 0 where x is used as it is."""
    x_offset: float = 0.0
    """Subtracted from a float x before it is quantized."""
    out_type: ir.DataType = ir.DataType.FLOAT
    out_scale: float = 0.0
    """Step of an int8 y."""
    out_offset: float = 0.0
    """Subtracted from y before it is quantized."""

    def __post_init__(self) -> None:
        for field in fields(self):
            if _ATTRIBUTES[field.name] == _FLOAT:
                object.__setattr__(self, field.name, float(np.float32(getattr(self, field.name))))
        _check_sizes(self)
        _check_blocks(self)
        _check_types(self)

    @property
    def grid(self) -> tuple[int, int]:
        """Block rows and block columns of W, the padded ones at its edges included."""
        return -(-self.K // self.block_k), -(-self.N // self.block_n)

    @property
    def blocks(self) -> int:
        """How many blocks survive."""
        return len(self.k_idx)

    @property
    def n_idx(self) -> NDArray[np.int64]:
        """Return the block column of every surviving block, int64 [blocks]."""
        return np.repeat(np.arange(self.grid[1]), np.diff(self.col_ptr))

    @property
    def mask(self) -> NDArray[np.bool_]:
        """Return which blocks survive, bool [block rows, block columns]."""
        mask = np.zeros(self.grid, bool)
        mask[np.asarray(self.k_idx, np.int64), self.n_idx] = True
        return mask


def from_node(node: ir.Node) -> BlockSparseLinear:
    """Return the attributes of a node, which is checked whole: attributes, inputs, and that they agree.

    Raises:
        UserError: naming the node and what is wrong with it.
    """
    try:
        operator = BlockSparseLinear(**_attributes(node))
        _check_inputs(node, operator)
    except ValueError as error:
        raise UserError(
            f"{node.name} is not a valid {DOMAIN}::{OP_TYPE}: {error}; write the model again with lsp-deploy"
        ) from None
    return operator


def to_node(
    operator: BlockSparseLinear,
    x: ir.Value,
    values: ir.Value,
    bias: ir.Value,
    scale: ir.Value,
    residual: ir.Value | None = None,
    *,
    name: str,
) -> ir.Node:
    """Return a node with these attributes and inputs; its output has type and shape, but no name.

    Who puts it into a graph sees to the model's opset import of domain "lsp", version 1.
    """
    attributes = []
    for field in fields(operator):
        kind, value = _ATTRIBUTES[field.name], getattr(operator, field.name)
        # ONNX does not hold an empty list of ints reliably: without blocks, k_idx is left out.
        if kind != _INTS or value:
            attributes.append(ir.Attr(field.name, kind, int(value) if kind == _INT else value))
    attributes.extend(ir.AttrString(key, value) for key, value in _PLUGIN.items())
    inputs = [x, values, bias, scale, *([] if residual is None else [residual])]
    node = ir.Node(DOMAIN, OP_TYPE, inputs, attributes, version=VERSION, name=name)
    describe_output(node)
    return node


def describe_output(node: ir.Node) -> None:
    """Set type and shape of a node's output from its attributes and the shape of x; no check is made."""
    y, x = node.outputs[0], node.inputs[0] if node.inputs else None
    y.type = ir.TensorType(ir.DataType(node.attributes.get_int("out_type", int(ir.DataType.FLOAT))))
    if x is not None and x.shape is not None and len(x.shape) and "N" in node.attributes:
        y.shape = ir.Shape([*list(x.shape)[:-1], node.attributes["N"].as_int()])


def constant_inputs(node: ir.Node) -> tuple[NDArray[Any], NDArray[np.float32], NDArray[np.float32]]:
    """Return what a checked node's values, bias and scale hold."""
    values, bias, scale = (_constant(node, index).numpy() for index in (1, 2, 3))
    return values, bias, scale


def _attributes(node: ir.Node) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, attribute in node.attributes.items():
        if name in _PLUGIN:
            if attribute.value != _PLUGIN[name]:
                raise ValueError(f"{name} is {attribute.value!r}, this version knows {_PLUGIN[name]!r}")
            continue
        if name not in _ATTRIBUTES:
            raise ValueError(f"it has an attribute {name}, which this version does not know")
        if attribute.type != _ATTRIBUTES[name] or attribute.is_ref():
            raise ValueError(f"attribute {name} is no {_ATTRIBUTES[name].name}")
        found[name] = attribute.value
    if missing := [name for name in _REQUIRED if name not in found]:
        raise ValueError(f"it has no attribute {missing[0]}")
    try:
        found["out_type"] = ir.DataType(found.get("out_type", ir.DataType.FLOAT))
    except ValueError:
        raise ValueError(f"out_type {found['out_type']} is no element type of ONNX") from None
    for name in ("col_ptr", "k_idx"):
        found[name] = tuple(found.get(name, ()))
    return found


def _check_sizes(operator: BlockSparseLinear) -> None:
    for name in ("K", "N", "block_k", "block_n"):
        if getattr(operator, name) < 1:
            raise ValueError(f"{name} is {getattr(operator, name)}, not a positive size")
    rows, columns = operator.grid
    if rows * operator.block_k * columns * operator.block_n > _MAX_WEIGHT_ENTRIES:
        raise ValueError(f"a weight of {operator.K}x{operator.N} is too large for one layer")


def _check_blocks(operator: BlockSparseLinear) -> None:
    rows, columns = operator.grid
    if len(operator.col_ptr) != columns + 1:
        raise ValueError(f"col_ptr has {len(operator.col_ptr)} entries, {columns} block columns need {columns + 1}")
    begins = np.asarray(operator.col_ptr, np.int64)
    # Compared, not subtracted: differences of untrusted numbers wrap around.
    if begins[0] != 0 or (begins[1:] < begins[:-1]).any() or begins[-1] != operator.blocks:
        raise ValueError(f"col_ptr does not ascend from 0 to the {operator.blocks} entries of k_idx")
    if not operator.blocks:
        return
    k_idx = np.asarray(operator.k_idx, np.int64)
    if k_idx.min() < 0 or k_idx.max() >= rows:
        raise ValueError(f"k_idx is not within the {rows} block rows")
    ascends = np.diff(k_idx) > 0
    changes_column = np.diff(operator.n_idx) > 0
    if not (ascends | changes_column).all():
        raise ValueError("k_idx does not ascend within every block column")


def _check_types(operator: BlockSparseLinear) -> None:
    if operator.activation not in get_args(Activation):
        raise ValueError(f"activation {operator.activation!r} is none of {', '.join(get_args(Activation))}")
    if operator.layout not in get_args(Layout):
        raise ValueError(f"layout {operator.layout!r} is none of {', '.join(get_args(Layout))}")
    if operator.out_type not in _OUT_TYPES:
        raise ValueError(f"out_type {operator.out_type.name} is none of {_names(_OUT_TYPES)}")
    for scale, offset in (("x_scale", "x_offset"), ("out_scale", "out_offset")):
        step, center = getattr(operator, scale), getattr(operator, offset)
        if not (math.isfinite(step) and step >= 0 and math.isfinite(center)):
            raise ValueError(f"{scale} {step} or {offset} {center} is no usable number")
        if center and not step:
            raise ValueError(f"{offset} is given without {scale}")
    if (operator.out_type == ir.DataType.INT8) != (operator.out_scale > 0):
        raise ValueError(f"out_type {operator.out_type.name} and out_scale {operator.out_scale} do not fit together")


def _check_inputs(node: ir.Node, operator: BlockSparseLinear) -> None:
    if len(node.inputs) not in (4, 5) or any(value is None for value in node.inputs) or len(node.outputs) != 1:
        raise ValueError("it takes x, values, bias, scale and at most a residual, none of them empty, and gives y")
    values = _constant(node, 1)
    if values.dtype not in _X_TYPES:
        raise ValueError(f"its values are {values.dtype.name}, not one of {_names(_X_TYPES)}")
    if (values.dtype == ir.DataType.INT8) != (operator.x_scale > 0):
        raise ValueError(f"values of {values.dtype.name} and x_scale {operator.x_scale} do not fit together")
    if (shape := tuple(values.shape)) != (expected := _values_shape(operator, values.dtype)):
        raise ValueError(f"its values are {list(shape)}, not {list(expected)}")
    for index, what in ((2, "bias"), (3, "scale")):
        tensor = _constant(node, index)
        if tensor.dtype != ir.DataType.FLOAT or list(tensor.shape) != [operator.N]:
            raise ValueError(f"its {what} is {tensor.dtype.name} {tensor.shape}, not FLOAT [{operator.N}]")
    _check_operand(node.inputs[0], "x", operator.K, _X_TYPES[values.dtype])
    if len(node.inputs) == 5:
        allowed = _FLOATS if operator.out_type == ir.DataType.INT8 else (operator.out_type,)
        _check_operand(node.inputs[4], "residual", operator.N, allowed)
        if not _may_be_alike(node.inputs[0], node.inputs[4]):
            raise ValueError("its residual has other rows than its x; it is not broadcast")


def _check_operand(value: ir.Value | None, what: str, size: int, allowed: Sequence[ir.DataType]) -> None:
    """Check what is known of x or the residual."""
    assert value is not None
    if value.dtype is not None and value.dtype not in allowed:
        raise ValueError(f"its {what} is {value.dtype.name}, not {_names(allowed)}")
    if value.shape is None:
        return
    if not len(value.shape) or (isinstance(value.shape[-1], int) and value.shape[-1] != size):
        raise ValueError(f"its {what} is {value.shape}, but has to end in {size}")


def _may_be_alike(x: ir.Value | None, residual: ir.Value | None) -> bool:
    """Return whether nothing that is known keeps both from having the same sizes before the last."""
    if x is None or residual is None or x.shape is None or residual.shape is None:
        return True
    pairs = list(zip(list(x.shape)[:-1], list(residual.shape)[:-1], strict=False))
    known = [(one, other) for one, other in pairs if isinstance(one, int) and isinstance(other, int)]
    return len(x.shape) == len(residual.shape) and all(one == other for one, other in known)


def _values_shape(operator: BlockSparseLinear, dtype: ir.DataType) -> tuple[int, ...]:
    if operator.layout == "canonical":
        return max(operator.blocks, 1), operator.block_k, operator.block_n
    from lsp_deploy.plugins.block_sparse.bsl16 import bsl16_shape

    return bsl16_shape(operator, dtype.numpy().itemsize)


def _constant(node: ir.Node, index: int) -> ir.TensorProtocol:
    value = node.inputs[index]
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    if tensor is None:
        raise ValueError(f"its {('x', 'values', 'bias', 'scale')[index]} is not constant")
    return tensor


def _names(types: Sequence[ir.DataType] | dict[ir.DataType, Any]) -> str:
    return ", ".join(dtype.name for dtype in types)
