"""Attention maps as part of the report: small tiles of 256 levels."""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from lsp_deploy.reporting.sections import AttentionBlock, AttentionSection

if TYPE_CHECKING:
    from lsp_deploy.steps.attention_maps import AttentionMaps, BlockAttention, HeadMaps

__all__ = ["attention_section", "levels"]

# The darkest level is a tile's largest weight, but at least this many even shares: a head that attends to all tokens
# alike stays pale, instead of showing its rounding errors.
_EVEN_SHARES = 4


def attention_section(maps: AttentionMaps | None) -> AttentionSection | None:
    """Return the part of the report that holds `maps`."""
    return None if maps is None else AttentionSection(blocks=[_block(block) for block in maps.blocks])


def levels(block: AttentionBlock, *, compressed: bool) -> NDArray[np.uint8]:
    """Return the maps of a block, uint8 [heads, rows, columns]."""
    text, heads = (block.compressed, block.heads_compressed) if compressed else (block.dense, block.heads_dense)
    return np.frombuffer(base64.b64decode(text), np.uint8).reshape(heads, block.rows, block.columns)


def _block(block: BlockAttention) -> AttentionBlock:
    _, rows, columns = block.dense.weights.shape
    compressed = block.compressed
    return AttentionBlock(
        name=block.name,
        query=block.query,
        rows=rows,
        columns=columns,
        heads_dense=len(block.dense.weights),
        heads_compressed=0 if compressed is None else len(compressed.weights),
        inactive_dense=block.dense.inactive,
        inactive_compressed=[] if compressed is None else compressed.inactive,
        dense=_encoded(block.dense),
        compressed="" if compressed is None else _encoded(compressed),
    )


def _encoded(maps: HeadMaps) -> str:
    weights = maps.weights
    darkest = np.maximum(weights.max(axis=(1, 2), keepdims=True), _EVEN_SHARES / weights[0].size)
    return base64.b64encode(np.round(255 * weights / darkest).astype(np.uint8).tobytes()).decode()
