"""Attention as exporters write it: softmax over a product of queries and keys, then a product with values.

What q, k and v are is read off their layout (`passes/strided_views.py`), not off the operators that made it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from lsp_deploy.passes.attention_scores import UnfitError, add_bias, of_rank_4, only_reader, read_scores, scaled_input
from lsp_deploy.passes.constant_inputs import constant_array
from lsp_deploy.passes.strided_views import ConcreteSizes, View

__all__ = ["HEADS_FIRST", "FoundAttention", "Operand", "Rows", "find_attention", "is_candidate"]

# From [B, S, H, D] to the layout that a product reads or writes.
HEADS_FIRST = (0, 2, 1, 3)
_TRANSPOSED_HEADS = (0, 2, 3, 1)


@dataclass(frozen=True, eq=False)
class Rows:
    """A value [B, S, columns], perhaps of another rank, of whose rows q, k or v are a part."""

    value: ir.Value
    columns: int
    first: int
    """Column that the part begins with."""
    scale: float
    """What the part is multiplied with afterwards."""

    @property
    def rank(self) -> int:
        """Return the rank of the value."""
        return len(self.value.shape or ())


@dataclass(frozen=True, eq=False)
class Operand:
    """q, k or v as a product reads it."""

    value: ir.Value
    layout: tuple[int, ...] | None
    """The permutation that makes `value` of [B, S, H, D]; None where it is [B, S, H·D]."""
    scale: float
    """What `value` is multiplied with before the product."""
    sources: list[Rows]
    """Where it comes from, the nearest first. May be none."""


@dataclass(frozen=True, eq=False)
class FoundAttention:
    """y = softmax(scale · q kᵀ + biases) v."""

    sizes: tuple[int, int, int, int, int]
    """Batch, heads, queries, keys, size of a head. Batch, queries and keys may stand for names (`ConcreteSizes`)."""
    q: Operand
    k: Operand
    v: Operand
    scale: float
    """Without those of the operands."""
    arrays: list[NDArray[Any]]
    """Constants that are added to the scores [B, H, S, T], of rank 4. Along B they may repeat, as of windows."""
    biases: list[ir.Value]
    """Values to add to them."""
    y: ir.Value
    """[B, H, S, D], or what it is reshaped to: [B, S, H·D]."""
    y_is_rows: bool


def is_candidate(node: ir.Node) -> bool:
    """Return whether a node may be the middle of an attention: a Softmax over scores of heads, or an Attention."""
    if node.domain or node.op_type not in ("Softmax", "Attention"):
        return False
    y = node.outputs[0]
    return node.op_type == "Attention" or y.shape is None or len(y.shape) > 2


def find_attention(node: ir.Node, sizes: ConcreteSizes) -> FoundAttention:
    """Return the attention around a candidate.

    Raises:
        UnfitError: it is none, or not one that lsp::Attention computes.
    """
    found = _around_attention(node, sizes) if node.op_type == "Attention" else _around_softmax(node, sizes)
    if found.y.dtype != ir.DataType.FLOAT:
        raise UnfitError(f"it computes in {found.y.dtype}")
    _, heads, _, _, size = found.sizes
    if sizes.has_name(heads) or sizes.has_name(size):
        raise UnfitError("how many heads there are, or how large they are, is not known")
    return found


def _around_softmax(softmax: ir.Node, sizes: ConcreteSizes) -> FoundAttention:
    weights = softmax.outputs[0]
    shape = sizes.of(weights)
    if shape is None or len(shape) != 4 or softmax.attributes.get_int("axis", -1) not in (-1, 3):
        raise UnfitError("its scores are not [batch, heads, queries, keys] of known rank")
    product = only_reader(weights, "the attention weights")
    if product.op_type != "MatMul" or product.inputs[0] is not weights:
        raise UnfitError(f"{product.op_type} reads the attention weights, not a product with values")
    scores = read_scores(softmax.inputs[0], sizes)
    batch, heads, queries, keys = shape
    y = product.outputs[0]
    v_shape, y_shape = sizes.of(product.inputs[1]), sizes.of(y)
    left, right = scores.product.inputs
    q_shape = sizes.of(left)
    if q_shape is None or y_shape is None or v_shape is None or sizes.of(right) is None:
        raise UnfitError("the shapes of q, k and v are not known")
    size = q_shape[-1]
    if q_shape != (batch, heads, queries, size) or sizes.of(right) != (batch, heads, size, keys):
        raise UnfitError("q and k are not [batch, heads, tokens, size], each with all heads")
    if v_shape != (batch, heads, keys, size):
        raise UnfitError(f"v is not of the size of q, {size} for each of {heads} heads")
    rows = _rows_of(y, y_shape, sizes)
    return FoundAttention(
        (batch, heads, queries, keys, size),
        _operand(left, HEADS_FIRST, (batch, queries, heads, size), sizes, scalable=True),
        _operand(right, _TRANSPOSED_HEADS, (batch, keys, heads, size), sizes, scalable=True),
        _operand(product.inputs[1], HEADS_FIRST, (batch, keys, heads, size), sizes, scalable=False),
        scores.scale,
        scores.arrays,
        scores.biases,
        rows or y,
        rows is not None,
    )


def _around_attention(node: ir.Node, sizes: ConcreteSizes) -> FoundAttention:
    q, k, v, mask = ([*node.inputs, None])[:4]
    if len(node.outputs) > 1 or any(value is not None for value in node.inputs[4:]):
        raise UnfitError("it keeps keys and values")
    for name in ("is_causal", "softcap", "softmax_precision"):
        if name in node.attributes and node.attributes[name].value:
            raise UnfitError(f"it has {name}")
    q_shape, k_shape, v_shape = sizes.of(q), sizes.of(k), sizes.of(v)
    if q_shape is None or k_shape is None or v_shape is None:
        raise UnfitError("the shapes of q, k and v are not known")
    rows = len(q_shape) == 3
    heads = node.attributes.get_int("q_num_heads", 0) if rows else q_shape[1]
    kv_heads = node.attributes.get_int("kv_num_heads", 0) if rows else k_shape[1]
    if heads != kv_heads or not heads or k_shape != v_shape or q_shape[-1] != k_shape[-1]:
        raise UnfitError("q, k and v differ in heads or in their size")
    batch, queries, keys = q_shape[0], q_shape[-2], k_shape[-2]
    size = q_shape[-1] // heads if rows else q_shape[-1]
    layout = None if rows else HEADS_FIRST
    scale = node.attributes["scale"].as_float() if "scale" in node.attributes else 1 / math.sqrt(size)
    arrays, biases = list[NDArray[Any]](), list[ir.Value]()
    if mask is not None and mask.dtype == ir.DataType.BOOL:
        array = constant_array(mask)
        if array is None:
            raise UnfitError("its mask is computed")
        arrays.append(of_rank_4(np.where(array, np.float32(0), -np.float32(np.inf))))
    elif mask is not None:
        add_bias(mask, arrays, biases)
    y = node.outputs[0]
    y_shape = sizes.of(y)
    y_rows = y if rows or y_shape is None else _rows_of(y, y_shape, sizes)
    return FoundAttention(
        (batch, heads, queries, keys, size),
        _operand(q, layout, (batch, queries, heads, size), sizes, scalable=True),
        _operand(k, layout, (batch, keys, heads, size), sizes, scalable=True),
        _operand(v, layout, (batch, keys, heads, size), sizes, scalable=False),
        scale,
        arrays,
        biases,
        y_rows or y,
        y_rows is not None,
    )


def _operand(
    value: ir.Value | None,
    layout: tuple[int, ...] | None,
    rows: tuple[int, int, int, int],
    sizes: ConcreteSizes,
    *,
    scalable: bool,
) -> Operand:
    """Trace q, k or v back: through what moves entries, and through scaling, where that can be made up for."""
    assert value is not None
    operand = Operand(value, layout, 1.0, [])
    current, scale, moves = value, 1.0, list[ir.Value]()
    while True:
        source = _source(current, scale, moves, layout, rows, sizes)
        if source is not None:
            operand.sources.append(source)
        node = current.producer()
        scaled = scaled_input(node) if node is not None and scalable else None
        if scaled is not None:
            current, scale = scaled[0], scale * scaled[1]
            if not moves:
                operand = Operand(current, layout, scale, operand.sources)
        elif node is not None and _is_move(current, sizes):
            moves.insert(0, current)
            current = node.inputs[0] or current
        else:
            return operand


def _is_move(output: ir.Value, sizes: ConcreteSizes) -> bool:
    node = output.producer()
    shape = sizes.of(node.inputs[0]) if node is not None and node.inputs else None
    return shape is not None and View.whole(shape).through(output, sizes) is not None


def _source(
    value: ir.Value,
    scale: float,
    moves: Sequence[ir.Value],
    layout: tuple[int, ...] | None,
    rows: tuple[int, int, int, int],
    sizes: ConcreteSizes,
) -> Rows | None:
    """Return how `moves` read q, k or v out of `value`; None if not as parts of rows."""
    shape = sizes.of(value)
    batch, tokens, heads, size = rows
    if shape is None or math.prod(shape) % (batch * tokens):
        return None
    view: View | None = View.whole(shape)
    for output in moves:
        view = None if view is None else view.through(output, sizes)
    if view is None:
        return None
    columns = math.prod(shape) // (batch * tokens)
    whole = View.whole(shape).reshaped((batch, tokens, columns))
    expected = (
        None if whole is None or view.offset + heads * size > columns else whole.cut(2, view.offset, heads * size)
    )
    if layout is not None and expected is not None:
        by_head = expected.reshaped(rows)
        expected = None if by_head is None else by_head.transposed(layout)
    return Rows(value, columns, view.offset, scale) if expected == view else None


def _rows_of(y: ir.Value, shape: tuple[int, ...], sizes: ConcreteSizes) -> ir.Value | None:
    """Return the value [B, S, H·D] that y [B, H, S, D] is made into, if nothing else is made of it."""
    batch, heads, queries, size = shape
    view: View | None = View.whole(shape)
    expected = View.whole(shape).transposed(HEADS_FIRST).reshaped((batch, queries, heads * size))
    value = y
    while view is not None:
        if len(value.shape or ()) == 3 and view == expected:
            return value
        readers = value.consumers()
        if value.is_graph_output() or len(value.uses()) != 1:
            return None
        value = readers[0].outputs[0]
        view = view.through(value, sizes)
    return None
