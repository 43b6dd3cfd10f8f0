"""The scores of an attention as exporters write them: a product of queries and keys, scaled, biased and masked."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from lsp_deploy.passes.constant_inputs import constant_array, constant_scalar
from lsp_deploy.passes.strided_views import ConcreteSizes

__all__ = ["Scores", "UnfitError", "add_bias", "of_rank_4", "only_reader", "read_scores", "scaled_input"]

# A masked score that is not -inf: exp of it is 0 beside any score that is not masked.
_MASKED = -1e4


class UnfitError(Exception):
    """Why an attention cannot be one lsp::Attention."""


@dataclass(frozen=True, eq=False)
class Scores:
    """scale · q kᵀ, and what is added to it."""

    product: ir.Node
    scale: float
    arrays: list[NDArray[Any]]
    """Constants, of rank 4."""
    biases: list[ir.Value]
    """What is computed."""


def read_scores(value: ir.Value | None, sizes: ConcreteSizes) -> Scores:
    """Follow scores, the input of a softmax, up to the product of queries and keys.

    Raises:
        UnfitError: something else happens to them on the way, or reads them.
    """
    node = value.producer() if value is not None else None
    if node is None or value is None:
        raise UnfitError("its scores are no product of queries and keys")
    only_reader(value, "the scores")
    if node.op_type == "MatMul":
        return Scores(node, 1.0, [], [])
    scaled = scaled_input(node)
    if scaled is not None:
        scores = read_scores(scaled[0], sizes)
        if scores.arrays or scores.biases:
            raise UnfitError("the scores are scaled after something was added to them")
        return Scores(scores.product, scores.scale * scaled[1], [], [])
    if node.op_type == "Add":
        return _read_sum(node, sizes)
    if node.op_type == "Where":
        return _read_choice(node, sizes)
    if node.op_type == "Reshape":
        return _read_windows(node, sizes)
    raise UnfitError(f"{node.op_type} lies between the scores and their softmax")


def add_bias(bias: ir.Value, arrays: list[NDArray[Any]], biases: list[ir.Value]) -> None:
    """Add a bias to one of the two lists."""
    array = constant_array(bias)
    if array is None:
        biases.append(bias)
    else:
        arrays.append(of_rank_4(array))


def scaled_input(node: ir.Node) -> tuple[ir.Value, float] | None:
    """Return what a node multiplies, and with which number."""
    if node.domain or node.op_type not in ("Mul", "Div"):
        return None
    for x, number in (node.inputs[:2], node.inputs[1::-1] if node.op_type == "Mul" else ()):
        factor = constant_scalar(number)
        if x is None or factor is None or constant_array(x) is not None:
            continue
        if len(x.shape or ()) == len(node.outputs[0].shape or ()) and factor and math.isfinite(factor):
            return (x, factor) if node.op_type == "Mul" else (x, 1 / factor)
    return None


def only_reader(value: ir.Value | None, what: str) -> ir.Node:
    """Return the only node that reads a value.

    Raises:
        UnfitError: there are others, or it is an output of the graph.
    """
    assert value is not None
    if value.is_graph_output() or len(value.uses()) != 1:
        raise UnfitError(f"something else reads {what}")
    return value.consumers()[0]


def of_rank_4(array: NDArray[Any]) -> NDArray[Any]:
    """Return a bias with leading axes of size 1 in front, so that it has four.

    Raises:
        UnfitError: it has more.
    """
    if array.ndim > 4:
        raise UnfitError(f"a mask of rank {array.ndim} is added to its scores")
    return array.reshape((1,) * (4 - array.ndim) + array.shape)


def _read_sum(add: ir.Node, sizes: ConcreteSizes) -> Scores:
    scores, bias = add.inputs if _reaches_product(add.inputs[0]) else add.inputs[::-1]
    assert bias is not None
    found = read_scores(scores, sizes)
    add_bias(bias, found.arrays, found.biases)
    return found


def _read_choice(where: ir.Node, sizes: ConcreteSizes) -> Scores:
    """Read Where(condition, scores, low), or the same the other way round: low scores get no weight."""
    condition, a, b = (constant_array(value) for value in where.inputs)
    low = a if b is None else b
    if condition is None or low is None or low.size != 1 or low.item() > _MASKED:
        raise UnfitError("which scores are masked is not constant, or masked scores are not low")
    kept = np.atleast_1d(condition if a is None else ~condition)
    if not kept.any(-1).all():
        raise UnfitError("a query has no key that is not masked")
    scores = read_scores(where.inputs[1 if a is None else 2], sizes)
    scores.arrays.append(of_rank_4(np.where(kept, np.float32(0), np.float32(low.item()))))
    return scores


def _read_windows(reshape: ir.Node, sizes: ConcreteSizes) -> Scores:
    """Read the mask of shifted windows, which is added to scores [images, windows, heads, queries, keys]."""
    add = reshape.inputs[0].producer() if reshape.inputs[0] is not None else None
    if add is None or add.op_type != "Add":
        raise UnfitError("the scores are reshaped")
    scores, bias = add.inputs if _reaches_product(add.inputs[0]) else add.inputs[::-1]
    mask, before = constant_array(bias), scores.producer() if scores is not None else None
    shape = sizes.of(scores)
    if mask is None or mask.ndim != 5 or mask.shape[0] != 1 or shape is None or len(shape) != 5:
        raise UnfitError("the scores are reshaped, and no mask of windows is added to them")
    flat = (shape[0] * shape[1], *shape[2:])
    if (
        before is None
        or before.op_type != "Reshape"
        or not sizes.of(before.inputs[0]) == sizes.of(reshape.outputs[0]) == flat
    ):
        raise UnfitError("the scores are reshaped to something else than windows")
    for between in (reshape.inputs[0], scores):
        only_reader(between, "the scores")
    found = read_scores(before.inputs[0], sizes)
    found.arrays.append(mask[0])
    return found


def _reaches_product(value: ir.Value | None) -> bool:
    """Return whether scores lie on this side of a sum: a product of two values that are computed."""
    node = value.producer() if value is not None else None
    if node is None or node.domain:
        return False
    if node.op_type == "MatMul":
        return all(constant_array(operand) is None for operand in node.inputs)
    through = ("Mul", "Div", "Add", "Where", "Reshape")
    return node.op_type in through and any(_reaches_product(operand) for operand in node.inputs)
