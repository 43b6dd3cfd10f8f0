"""The figures of pruning: what survives in each layer, patterns of blocks, δ-curves, attention before and after.

Lengths are in percent of a figure's width or height, as in `figures`; patterns and attention are small images.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from lsp_deploy.plan import LayerPlan, Plan
from lsp_deploy.reporting import formatting
from lsp_deploy.reporting.attention_levels import levels
from lsp_deploy.reporting.images import ink_image
from lsp_deploy.reporting.pruning_words import delta
from lsp_deploy.reporting.sections import AttentionBlock, AttentionSection, LayerRow

__all__ = [
    "AttentionStrip",
    "BlockPattern",
    "DeltaCurve",
    "LayerBar",
    "Selection",
    "allocation_bars",
    "attention_strips",
    "block_patterns",
    "delta_curves",
]

_ROLES = ("qkv", "proj", "fc1", "fc2", "patch", "head")
_LARGEST = 192  # pixels along an axis: what a mask of 3072 in blocks of 16 has
_SIDE = 176  # CSS pixels of the longest mask
_HEAD = 56  # CSS pixels of a head's tile

_T = TypeVar("_T")


@dataclass(frozen=True)
class LayerBar:
    """One layer in the chart of what survives; x is its position."""

    position: int
    survives_percent: float
    role: str
    """One that has a colour; all others are "other"."""
    dtype: str
    starts_block: bool
    title: str


@dataclass(frozen=True)
class Selection(Generic[_T]):
    """Figures of many layers: those of the first, middle and last block at once, the rest on demand."""

    shown: list[_T]
    rest: list[_T]


@dataclass(frozen=True)
class BlockPattern:
    """A small image of a mask: ink where blocks survive, the paper where they are zero."""

    uri: str
    width: int
    height: int
    name: str
    caption: str
    detail: str
    description: str


@dataclass(frozen=True)
class DeltaCurve:
    """A curve over the share of blocks removed, in percent of the figure, with the chosen point."""

    name: str
    caption: str
    path: str
    zero_y: float
    chosen_x: float
    chosen_y: float
    chosen: str
    ends: str


@dataclass(frozen=True)
class AttentionStrip:
    """The heads of one block side by side, before and after."""

    title: str
    dense: AttentionTiles
    compressed: AttentionTiles | None


@dataclass(frozen=True)
class AttentionTiles:
    """The heads of one block in one model."""

    uri: str
    width: int
    height: int
    scale: int
    """CSS pixels of a pixel of the image, which is width × height."""
    frames: str
    """Path around every head, in pixels of the image."""
    description: str
    note: str
    """How many heads are left and which are inactive, in words; empty where there is nothing to say."""


def allocation_bars(layers: Sequence[LayerRow]) -> list[LayerBar]:
    """Return one bar for every layer, in graph order: how many percent of its weights survive (LSP, Fig. 3)."""
    bars = []
    previous: int | None = None
    for position, layer in enumerate(layers):
        survives = 100 - layer.sparsity.zeros_percent
        bars.append(
            LayerBar(
                position=position,
                survives_percent=survives,
                role=layer.role if layer.role in _ROLES else "other",
                dtype=layer.precision.dtype,
                starts_block=layer.block is not None and layer.block != previous,
                title=f"{layer.name} ({layer.role}): {formatting.percent(survives)} survive, {layer.precision.dtype}",
            )
        )
        previous = layer.block
    return bars


def block_patterns(plan: Plan) -> Selection[BlockPattern]:
    """Return an image of every mask of blocks, a pixel for a block or, beyond 192, for several (LSP, Fig. 4)."""
    if plan.block_shape is None:
        return Selection([], [])
    drawn = [layer for layer in plan.layers if layer.sparsity.pattern == "block" and layer.name in plan.masks]
    reduced = [_reduced(plan.masks[layer.name][:: plan.block_shape[0], :: plan.block_shape[1]]) for layer in drawn]
    # One scale for all of them: a block is as large in every image.
    scale = max(1, _SIDE // max((max(density.shape) for density in reduced), default=1))
    patterns = [
        _pattern(layer, plan.block_shape, density, scale) for layer, density in zip(drawn, reduced, strict=True)
    ]
    return _selected(patterns, [layer.block for layer in drawn])


def delta_curves(layers: Sequence[LayerRow]) -> Selection[DeltaCurve]:
    """Return the δ-curve of every layer that was analysed, each with a scale of its own."""
    analysed = [layer for layer in layers if layer.blocks is not None and layer.blocks.total > 0]
    return _selected([_curve(layer) for layer in analysed], [layer.block for layer in analysed])


def attention_strips(attention: AttentionSection | None) -> list[AttentionStrip]:
    """Return the attention of every block, one strip of heads for each model (LSP, Fig. 5)."""
    if attention is None:
        return []
    return [
        AttentionStrip(
            title=str(number),
            dense=_tiles(block, number, compressed=False),
            compressed=_tiles(block, number, compressed=True) if block.heads_compressed else None,
        )
        for number, block in enumerate(attention.blocks)
    ]


def _selected(figures: Sequence[_T], blocks: Sequence[int | None]) -> Selection[_T]:
    """Split figures: the first, middle and last transformer block, or all where no layer is in a block."""
    known = sorted({block for block in blocks if block is not None})
    chosen = {known[0], known[len(known) // 2], known[-1]} if known else {None}
    shown = [figure for figure, block in zip(figures, blocks, strict=True) if block in chosen]
    return Selection(shown, [figure for figure, block in zip(figures, blocks, strict=True) if block not in chosen])


def _caption(role: str, block: int | None) -> str:
    return role if block is None else f"{block} {role}"


def _pattern(layer: LayerPlan, block_shape: tuple[int, int], density: NDArray[np.float64], scale: int) -> BlockPattern:
    zeros = formatting.percent(100 * layer.sparsity.zeros)
    return BlockPattern(
        uri=ink_image(density),
        width=density.shape[1] * scale,
        height=density.shape[0] * scale,
        name=layer.name,
        caption=_caption(layer.role, layer.block),
        detail=f"{zeros} zeros",
        description=f"{layer.name}: {zeros} zeros; {layer.K} × {layer.N} in blocks of "
        f"{block_shape[0]} × {block_shape[1]}",
    )


def _reduced(survivors: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Return the share of survivors in squares just large enough that at most 192 lie along an axis."""
    step = math.ceil(max(survivors.shape) / _LARGEST)
    rows, columns = (np.arange(0, size, step) for size in survivors.shape)
    counts, sizes = (
        np.add.reduceat(np.add.reduceat(values, rows, 0), columns, 1)
        for values in (survivors.astype(np.float64), np.ones(survivors.shape))
    )
    return np.asarray(counts / sizes)


def _curve(layer: LayerRow) -> DeltaCurve:
    blocks = layer.blocks
    assert blocks is not None
    values = [*blocks.curve_delta, blocks.predicted_delta]
    low, high = min(values), max(values)
    span = (high - low) or 1.0

    def across(removed: int) -> float:
        return 100 * removed / blocks.total

    def up(value: float) -> float:
        return 100 - 100 * (value - low) / span

    points = zip(blocks.curve_removed, blocks.curve_delta, strict=True)
    removed = formatting.percent(across(blocks.removed))
    return DeltaCurve(
        name=layer.name,
        caption=_caption(layer.role, layer.block),
        path="M" + "L".join(f"{across(removed):.1f} {up(value):.1f}" for removed, value in points),
        zero_y=up(0.0),
        chosen_x=across(blocks.removed),
        chosen_y=up(blocks.predicted_delta),
        chosen=f"{removed} removed: δ\N{NO-BREAK SPACE}{delta(blocks.predicted_delta)}",
        ends=f"{delta(low)} to {delta(high)}",
    )


def _tiles(block: AttentionBlock, number: int, *, compressed: bool) -> AttentionTiles:
    maps = levels(block, compressed=compressed) / 255
    heads, rows, columns = maps.shape
    which = block.inactive_compressed if compressed else block.inactive_dense
    strip = np.full((rows, heads * (columns + 1) - 1), 0.0)
    for head in range(heads):
        strip[:, head * (columns + 1) :][:, :columns] = maps[head]
    notes = [f"{heads} of {block.heads_dense} heads left"] if heads < block.heads_dense else []
    if which:
        notes.append(formatting.count(len(which), "inactive head") + ": " + ", ".join(str(head) for head in which))
    model = "compressed" if compressed else "dense"
    return AttentionTiles(
        uri=ink_image(strip),
        width=strip.shape[1],
        height=rows,
        scale=max(1, _HEAD // max(rows, columns)),
        frames="".join(f"M{head * (columns + 1)} 0h{columns}v{rows}h-{columns}z" for head in range(heads)),
        description="; ".join(
            [f"attention {number} ({block.name}), {model}: {formatting.count(heads, 'head')}", *notes]
        ),
        note="; ".join(notes),
    )
