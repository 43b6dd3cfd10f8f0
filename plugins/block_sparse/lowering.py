"""lsp::BlockSparseLinear in standard operators: as one MatMul, or as MatMuls that skip what is zero."""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from lsp_deploy.errors import UserError
from lsp_deploy.plugins.block_sparse.operator import BlockSparseLinear, constant_inputs, from_node
from lsp_deploy.plugins.block_sparse.panels import Panel, find_panels
from lsp_deploy.plugins.block_sparse.weights import dense_weight
from lsp_deploy.plugins.node_writer import NodeWriter

__all__ = ["Form", "lower"]

Form = Literal["matmul", "gather"]

GELU_OPSET = 20
SIXTEEN_BIT_SCALES_OPSET = 19

_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


def lower(graph: ir.Graph, node: ir.Node, form: Form, opset: int) -> None:
    """Replace a node by standard operators; its output keeps its name.

    - `matmul`: MatMul with the whole weight, zeros included; int8 as Q/DQ around it. The MatMul gets the node's name.
    - `gather`: the rows of x that a panel of columns needs are gathered for a MatMul of that panel, and the panels are
      concatenated. Where that costs more than the whole product, the form is `matmul`.

    A product whose x is float16 or bfloat16 is computed in that type altogether, bias and activation included.

    Args:
        graph: that holds the node.
        node: with x of known type; for `gather`, of known rank.
        form: see above.
        opset: of the model, 13 or later.

    Raises:
        UserError: the node is not valid, or type or rank of its x is not known.
    """
    operator = from_node(node)
    panels = find_panels(operator) if form == "gather" else []
    skips = any(panel.rows is not None for panel in panels)
    x = node.inputs[0]
    assert x is not None
    if x.dtype is None or (skips and x.shape is None):
        raise UserError(f"{node.name}: type or rank of its input {x.name} is not known; give the model its shapes")
    lowering = _Lowering(NodeWriter(graph, node), operator, node, opset)
    lowering.finish(lowering.panels(x, panels) if skips else lowering.matmul(x))


class _Lowering:
    """The nodes of one operator, from x to y."""

    def __init__(self, writer: NodeWriter, operator: BlockSparseLinear, node: ir.Node, opset: int) -> None:
        self.writer, self.operator, self.node, self.opset = writer, operator, node, opset
        values, self.bias, self.scale = constant_inputs(node)
        self.weight = dense_weight(operator, values)
        self.compute = _compute_type(node, operator, self.weight.dtype == np.int8, opset)

    def matmul(self, x: ir.Value) -> ir.Value:
        """Return x @ W."""
        return self.multiply(self.operand(x), self.weight, slice(None), "")

    def panels(self, x: ir.Value, panels: list[Panel]) -> ir.Value:
        """Return x @ W, panel by panel."""
        assert x.shape is not None
        operator, writer, outer = self.operator, self.writer, [0] * (len(x.shape) - 1)
        # A gather moves whole slices of x, as long as they can be: their length divides K and the blocks.
        step = math.gcd(operator.K, operator.block_k)
        operand = self.operand(x)
        shape = np.array([*outer, operator.K // step, step], np.int64)
        slices = writer.insert("Reshape", [operand, writer.constant("slices_shape", shape)])
        products = []
        for number, panel in enumerate(panels):
            columns = slice(panel.begin * operator.block_n, min(panel.end * operator.block_n, operator.N))
            source, weight, part = operand, self.weight[:, columns], f"panel_{number}/"
            if panel.rows is not None:
                rows = _entries(panel.rows, operator)
                index = writer.constant(f"{part}slices", rows[::step] // step)
                flat = writer.constant(f"{part}shape", np.array([*outer, rows.size], np.int64))
                gathered = writer.insert("Gather", [slices, index], [ir.AttrInt64("axis", len(outer))])
                source, weight = writer.insert("Reshape", [gathered, flat]), weight[rows]
            products.append(self.multiply(source, weight, columns, part))
        return products[0] if len(products) == 1 else writer.insert("Concat", products, [ir.AttrInt64("axis", -1)])

    def operand(self, x: ir.Value) -> ir.Value:
        """Return x as the product reads it: int8, or rounded to the type of the values."""
        if self.weight.dtype == np.int8:
            return self.quantize(x, "x", self.operator.x_scale, self.operator.x_offset)
        return self.cast(self.cast(x, ir.DataType.from_numpy(self.weight.dtype)), self.compute)

    def multiply(self, x: ir.Value, weight: NDArray[Any], columns: slice, part: str) -> ir.Value:
        """Return x @ weight, which is that of `columns`; `part` begins the names, empty for the whole product."""
        name = f"{self.node.name}/{part}MatMul" if part else str(self.node.name)
        weight = np.ascontiguousarray(weight)
        if weight.dtype != np.int8:
            return self.writer.insert("MatMul", [x, self.constant(f"{part}weight", weight)], name=name)
        x_scale = np.float32(self.operator.x_scale)
        quantized = self.writer.constant(f"{part}weight_q", weight)
        operands = [
            self.dequantize(x, f"{part}x", np.asarray(x_scale)),
            self.dequantize(quantized, f"{part}weight", self.scale[columns] / x_scale),
        ]
        return self.writer.insert("MatMul", operands, name=name)

    def finish(self, product: ir.Value) -> None:
        """Add bias, activation, residual and the output's type, and take the node's place."""
        y = self.writer.insert("Add", [product, self.constant("bias", self.bias)]) if self.bias.any() else product
        y = self.activate(y)
        if len(self.node.inputs) == 5 and (residual := self.node.inputs[4]) is not None:
            y = self.writer.insert("Add", [y, self.cast(residual, self.compute)])
        if self.operator.out_type == ir.DataType.INT8:
            y = self.quantize(y, "y", self.operator.out_scale, self.operator.out_offset)
        self.writer.replace(self.cast(y, self.operator.out_type))

    def activate(self, y: ir.Value) -> ir.Value:
        insert, kind = self.writer.insert, self.operator.activation
        if kind == "none":
            return y
        if kind == "relu":
            return insert("Relu", [y])
        if self.opset >= GELU_OPSET:
            return insert("Gelu", [y], [ir.AttrString("approximate", "tanh" if kind == "gelu_tanh" else "none")])
        if kind == "gelu_tanh":
            cube = insert("Mul", [insert("Mul", [y, y]), y])
            bent = insert("Add", [y, insert("Mul", [cube, self.number("gelu_cube", 0.044715)])])
            inner = insert("Tanh", [insert("Mul", [bent, self.number("gelu_inner", math.sqrt(2 / math.pi))])])
        else:
            inner = insert("Erf", [insert("Mul", [y, self.number("gelu_inner", math.sqrt(0.5))])])
        half = insert("Mul", [y, self.number("gelu_half", 0.5)])
        return insert("Mul", [half, insert("Add", [inner, self.number("gelu_one", 1.0)])])

    def quantize(self, x: ir.Value, what: str, scale: float, offset: float) -> ir.Value:
        """Return a float x as int8; an int8 x as it is."""
        if x.dtype == ir.DataType.INT8:
            return x
        x = self.cast(x, self.compute)
        if offset:
            x = self.writer.insert("Sub", [x, self.number(f"{what}_offset", offset)])
        zero = self.writer.constant(f"{what}_zero_point", np.array(0, np.int8))
        operands = [x, self.number(f"{what}_scale", scale), zero]
        return self.writer.insert("QuantizeLinear", operands, dtype=ir.DataType.INT8)

    def dequantize(self, x: ir.Value, what: str, scale: NDArray[np.float32]) -> ir.Value:
        """Return an int8 x as floats; a `scale` of more than one entry is along its last axis, the second."""
        zero = self.writer.constant(f"{what}_zero_point", np.zeros(scale.shape, np.int8))
        attributes = [ir.AttrInt64("axis", 1)] if scale.ndim else []
        operands = [x, self.constant(f"{what}_scale", scale), zero]
        return self.writer.insert("DequantizeLinear", operands, attributes, dtype=self.compute)

    def number(self, what: str, number: float) -> ir.Value:
        return self.constant(what, np.array(number, np.float32))

    def constant(self, what: str, array: NDArray[Any]) -> ir.Value:
        """Return a constant of the type that the product is computed in."""
        return self.writer.constant(what, array.astype(self.compute.numpy()))

    def cast(self, x: ir.Value, dtype: ir.DataType) -> ir.Value:
        if x.dtype == dtype:
            return x
        return self.writer.insert("Cast", [x], [ir.AttrInt64("to", dtype)], dtype=dtype)


def _compute_type(node: ir.Node, operator: BlockSparseLinear, int8: bool, opset: int) -> ir.DataType:
    """Return what the standard operators compute in: the type of x, or where that is int8, of what else is a float."""
    candidates = [value.dtype for value in (node.inputs[0], *node.inputs[4:]) if value is not None]
    dtype = next((one for one in (*candidates, operator.out_type) if one in _FLOATS), ir.DataType.FLOAT)
    quantizes = int8 or operator.out_type == ir.DataType.INT8
    return ir.DataType.FLOAT if quantizes and opset < SIXTEEN_BIT_SCALES_OPSET else dtype


def _entries(block_rows: tuple[int, ...], operator: BlockSparseLinear) -> NDArray[np.int64]:
    """Return the rows of W in these blocks. Without any it is one block, of zeros: something has to be multiplied."""
    rows = np.concatenate([np.arange(operator.block_k) + row * operator.block_k for row in block_rows or (0,)])
    return np.asarray(rows[rows < operator.K], np.int64)
