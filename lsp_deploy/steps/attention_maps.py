"""What the heads attend to before and after compression, on one sample (LSP, Fig. 5)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["AttentionMaps", "BlockAttention", "HeadMaps", "Query", "attention_maps"]

Query = Literal["class token", "mean over all tokens"]

# A head whose weights differ from the even share by no more than this, relatively, attends to nothing in particular.
_EVEN = 0.05
# Tokens before the patches: a class token, and DeiT's distillation token after it.
_LEADING_TOKENS = (1, 2)


@dataclass(frozen=True)
class HeadMaps:
    """One attention of one model."""

    weights: NDArray[np.float32]
    """[heads, rows, columns]: attention weights of the query; the patch grid, or one row of tokens."""
    inactive: list[int]
    """Heads that attend to all tokens alike, whichever token asks."""


@dataclass(frozen=True)
class BlockAttention:
    """One attention of both models."""

    name: str
    """Of the dense model's Softmax node."""
    query: Query
    """Which query the weights are of."""
    dense: HeadMaps
    compressed: HeadMaps | None
    """None where the compressed model has it no more."""


@dataclass(frozen=True)
class AttentionMaps:
    """The attention of every block, in graph order, for the first sample; of windows the first."""

    blocks: list[BlockAttention]


def attention_maps(
    dense: ir.Model, compressed: ir.Model, feeds: Mapping[str, NDArray[Any]], *, threads: int = 1
) -> AttentionMaps | None:
    """Return the attention weights of both models on one sample, or None where none can be compared.

    Attention is a Softmax over the last axis of [batch, heads, tokens, tokens]. Both models run in ONNX Runtime in
    float32. A Softmax of the dense model is compared with the compressed model's of the same name; where no name is
    in both, with the one at the same place, if they have equally many.

    Args:
        dense: the model before compression.
        compressed: the model after it; its passes may have renamed nodes, and taken heads or whole blocks out.
        feeds: inputs of one sample.
        threads: of ONNX Runtime.

    Returns:
        None if either model has no such Softmax (a fused attention shows no weights), or if they do not correspond.

    Raises:
        UserError: ONNX Runtime cannot run a model on `feeds`.
    """
    before, after = (_attentions(model, feeds, threads) for model in (dense, compressed))
    pairs = _paired(before, after)
    blocks = [_block(name, array, other) for name, (array, other) in pairs.items()]
    return AttentionMaps(blocks) if blocks else None


def _attentions(model: ir.Model, feeds: Mapping[str, NDArray[Any]], threads: int) -> dict[str, NDArray[np.float32]]:
    """Return [heads, tokens, tokens] of the first sample or window, by the name of the Softmax, in graph order."""
    from lsp_deploy.engines.onnxruntime_backend import OnnxRuntimeEngine

    names = {
        str(node.name or node.outputs[0].name): str(node.outputs[0].name)
        for node in model.graph
        if node.op_type == "Softmax" and node.domain == "" and node.attributes.get_int("axis", -1) in (-1, 3)
    }
    if not names:
        return {}
    with OnnxRuntimeEngine.from_model(
        model, threads=threads, extra_outputs=list(names.values()), float32_twin=True
    ) as engine:
        outputs = engine.run(feeds)
    found = {name: outputs[value] for name, value in names.items()}
    return {name: array[0] for name, array in found.items() if array.ndim == 4 and array.shape[2] == array.shape[3] > 1}


def _paired(
    before: Mapping[str, NDArray[np.float32]], after: Mapping[str, NDArray[np.float32]]
) -> dict[str, tuple[NDArray[np.float32], NDArray[np.float32] | None]]:
    if before.keys() & after.keys():
        return {name: (array, after.get(name)) for name, array in before.items()}
    if len(before) != len(after):
        return {}
    return {name: (array, other) for (name, array), other in zip(before.items(), after.values(), strict=True)}


def _block(name: str, dense: NDArray[np.float32], compressed: NDArray[np.float32] | None) -> BlockAttention:
    query = _query(dense.shape[-1])
    return BlockAttention(name, query, _maps(dense), None if compressed is None else _maps(compressed))


def _query(tokens: int) -> Query:
    return "class token" if _leading_tokens(tokens) else "mean over all tokens"


def _leading_tokens(tokens: int) -> int:
    """Return how many tokens stand before a square grid of patches; 0 where that cannot be told from their number."""
    if _is_square(tokens):
        return 0
    return next((leading for leading in _LEADING_TOKENS if tokens > leading + 1 and _is_square(tokens - leading)), 0)


def _maps(attention: NDArray[np.float32]) -> HeadMaps:
    heads, tokens, _ = attention.shape
    leading = _leading_tokens(tokens)
    row = attention[:, 0, leading:] if leading else attention.mean(axis=1)
    side = math.isqrt(row.shape[1])
    grid = (side, side) if side * side == row.shape[1] else (1, row.shape[1])
    uneven = np.abs(attention * tokens - 1).max(axis=(1, 2))
    return HeadMaps(
        weights=np.ascontiguousarray(row.reshape(heads, *grid), np.float32),
        inactive=[int(head) for head in np.flatnonzero(uneven <= _EVEN)],
    )


def _is_square(number: int) -> bool:
    return math.isqrt(number) ** 2 == number
