"""Attention as one node."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes.common import NameFixPass, RemoveUnusedNodesPass

from lsp_deploy.passes.attention_pattern import (
    HEADS_FIRST,
    FoundAttention,
    Operand,
    Rows,
    find_attention,
    is_candidate,
)
from lsp_deploy.passes.attention_scores import UnfitError
from lsp_deploy.passes.infer_shapes import InferShapesPass
from lsp_deploy.passes.layer_weights import add_initializer
from lsp_deploy.passes.node_names import name_beside
from lsp_deploy.passes.strided_views import ConcreteSizes
from lsp_deploy.plugins.attention.operator import DOMAIN, MAX_HEAD_SIZE, VERSION, Attention, Compute, to_node

__all__ = ["FuseAttentionPass"]


class FuseAttentionPass(ir.passes.InPlacePass):
    """softmax(scale · q kᵀ + bias) v, with the reshaping around it, becomes lsp::Attention.

    q, k and v are read where the projections wrote them: from the fused qkv [B, S, 3·H·D], or from three values
    [B, S, H·D]. What is not laid out so, as behind rotary positions, is copied before. A mask of shifted windows goes
    into the bias. Attention whose scores or weights something else reads stays.
    """

    def __init__(self, compute: Compute = "float32", selected: Callable[[str], bool] | None = None) -> None:
        """Take what the nodes compute in, and which attentions: all, or those whose Softmax has a selected name."""
        super().__init__()
        self.compute: Compute = compute
        self.selected = selected
        self.found = 0
        """How many were fused."""
        self.left: dict[str, str] = {}
        """Why others were not, by the name of their Softmax or Attention."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Fuse the attentions of the main graph."""
        self.found, self.left = 0, {}
        sizes = ConcreteSizes()
        for node in list(model.graph):
            name = str(node.name)
            if not is_candidate(node) or (self.selected is not None and not self.selected(name)):
                continue
            try:
                _Fusion(model.graph, node, find_attention(node, sizes), sizes).write(self.compute)
            except UnfitError as reason:
                self.left[name] = str(reason)
            else:
                self.found += 1
        if self.found:
            model.opset_imports[DOMAIN] = VERSION
            RemoveUnusedNodesPass()(model)
            NameFixPass()(model)
            InferShapesPass()(model)
        return ir.passes.PassResult(model, modified=self.found > 0)


class _Fusion:
    """One attention on its way to one node."""

    def __init__(self, graph: ir.Graph, node: ir.Node, found: FoundAttention, sizes: ConcreteSizes) -> None:
        self._graph, self._node, self._found, self._sizes = graph, node, found, sizes
        last = found.y.producer()
        assert last is not None
        self._last = last

    def write(self, compute: Compute) -> None:
        """Replace y by the output of an lsp::Attention."""
        found = self._found
        _, heads, queries, keys, size = found.sizes
        if size > MAX_HEAD_SIZE:
            raise UnfitError(f"its heads have {size} channels, more than {MAX_HEAD_SIZE}")
        array = self._checked_biases()  # after this nothing is refused, and the graph changes
        packed = self._packed(heads * size)
        if packed is not None:
            operands = [self._as_rank_3(packed[0], queries)]
            scale = packed[0].scale * packed[1].scale
        else:
            written = [
                self._written(operand, tokens, heads * size)
                for operand, tokens in ((found.q, queries), (found.k, keys), (found.v, keys))
            ]
            operands = [value for value, _ in written]
            scale = written[0][1] * written[1][1]
        operator = Attention(heads, found.scale * scale, packed is not None, compute)
        node = to_node(operator, operands, self._written_bias(array), name=name_beside(self._node, "Attention"))
        self._graph.insert_before(self._last, node)
        self._replace_y(node.outputs[0])

    def _packed(self, width: int) -> list[Rows] | None:
        """Return the fused projection as it holds q, k and v; None if there is none."""
        for q in sorted(self._found.q.sources, key=lambda rows: rows.rank != 3):
            parts = [q]
            for operand, first in ((self._found.k, width), (self._found.v, 2 * width)):
                parts += [rows for rows in operand.sources if rows.value is q.value and rows.first == first]
            usable = q.rank == 3 or self._is_known(self._found.sizes[2])
            if len(parts) == 3 and q.first == 0 and q.columns == 3 * width and usable:
                return parts
        return None

    def _written(self, operand: Operand, tokens: int, width: int) -> tuple[ir.Value, float]:
        """Return q, k or v as [B, S, H·D], and what it has to be multiplied with."""
        usable = [rows for rows in operand.sources if rows.rank == 3 or self._is_known(tokens)]
        if not usable:
            return self._transposed(operand), operand.scale
        rows = min(usable, key=lambda rows: (rows.rank != 3, rows.columns != width))
        value = self._as_rank_3(rows, tokens)
        if rows.columns != width:
            bounds = [np.array([bound]) for bound in (rows.first, rows.first + width, 2)]
            value = self._insert("Slice", [value, *(self._constant("part", bound) for bound in bounds)])
        return value, rows.scale

    def _transposed(self, operand: Operand) -> ir.Value:
        """Return q, k or v as [B, S, H·D], from where the product reads it."""
        value = operand.value
        if operand.layout is None:
            return value
        order = [operand.layout.index(axis) for axis in range(4)]
        node = value.producer()
        while node is not None and node.op_type == "Transpose" and node.inputs[0] is not None:
            permutation = node.attributes.get_ints("perm", (3, 2, 1, 0))
            order, value = [permutation[axis] for axis in order], node.inputs[0]
            node = value.producer()
        if order != [0, 1, 2, 3]:
            value = self._insert("Transpose", [value], [ir.AttrInt64s("perm", order)])
        return self._reshaped(value, [0, 0, -1])

    def _as_rank_3(self, rows: Rows, tokens: int) -> ir.Value:
        return rows.value if rows.rank == 3 else self._reshaped(rows.value, [-1, tokens, rows.columns])

    def _is_known(self, tokens: int) -> bool:
        return not self._sizes.has_name(tokens)

    def _checked_biases(self) -> NDArray[np.float32] | None:
        """Return the sum of all constants, and see whether everything that is added to the scores can be a bias."""
        batch, heads, queries, keys, _ = self._found.sizes
        shapes = [array.shape for array in self._found.arrays]
        for value in self._found.biases:
            shape = self._sizes.of(value)
            if shape is None or len(shape) > 4 or value.dtype != ir.DataType.FLOAT:
                raise UnfitError(f"{value.name}, which is added to its scores, has no usable type or shape")
            shapes.append((1,) * (4 - len(shape)) + shape)
        repeats = max((shape[0] for shape in shapes), default=1)
        for shape in shapes:
            fits = shape[1] in (1, heads) and shape[2] in (1, queries) and shape[3] in (1, keys)
            if not fits or shape[0] not in (1, repeats) or batch % repeats:
                raise UnfitError(f"something of shape {list(shape)} is added to its scores")
            if shape[2:] != (queries, keys) and not (self._is_known(queries) and self._is_known(keys)):
                raise UnfitError("what is added to its scores is not known to be of their size")
        return sum(self._found.arrays[1:], self._found.arrays[0]) if self._found.arrays else None

    def _written_bias(self, array: NDArray[np.float32] | None) -> ir.Value | None:
        """Return the sum of constants and computed biases, of the size of the scores along queries and keys."""
        queries, keys = self._found.sizes[2:4]
        total = None
        if array is not None:
            array = np.broadcast_to(array, (*array.shape[:2], queries, keys))
            total = self._constant("bias", np.ascontiguousarray(array, np.float32))
        for value in self._found.biases:
            shape = self._sizes.of(value) or ()
            if shape[-2:] != (queries, keys):
                value = self._insert("Expand", [value, self._constant("size", np.array([1, 1, queries, keys]))])
            elif len(shape) < 4:
                axes = np.arange(4 - len(shape))
                value = self._insert("Unsqueeze", [value, self._constant("axes", axes)])
            total = value if total is None else self._insert("Add", [total, value])
        return total

    def _replace_y(self, rows: ir.Value) -> None:
        """Let the new node's output take the place of y."""
        y = self._found.y
        if not self._found.y_is_rows:
            heads, size = self._found.sizes[1], self._found.sizes[4]
            split = self._reshaped(rows, [0, 0, heads, size])
            rows.name = f"{y.name}_rows"
            rows = self._insert("Transpose", [split], [ir.AttrInt64s("perm", HEADS_FIRST)])
        rows.shape, rows.type = y.shape, y.type
        ir.convenience.replace_all_uses_with(y, rows, replace_graph_outputs=True)
        rows.name, y.name = y.name, None

    def _reshaped(self, value: ir.Value, shape: Sequence[int]) -> ir.Value:
        return self._insert("Reshape", [value, self._constant("shape", np.array(shape))])

    def _constant(self, what: str, array: NDArray[Any]) -> ir.Value:
        return add_initializer(self._graph, f"{name_beside(self._node, 'Attention')}/{what}", array)

    def _insert(self, op_type: str, inputs: Sequence[ir.Value], attributes: Sequence[ir.Attr] = ()) -> ir.Value:
        node = ir.Node("", op_type, inputs, attributes, name=name_beside(self._node, op_type))
        self._graph.insert_before(self._last, node)
        return node.outputs[0]
