"""What a block allocator is given, a δ-curve a layer, and what it answers, a number of blocks a layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Allocation", "LayerCurve", "remaining_flops"]


@dataclass(frozen=True, eq=False)
class LayerCurve:
    """One layer y [M, N] = x [M, K] · W [K, N], cut into blocks, and what removing them does."""

    name: str
    role: str
    M: int
    """Rows of x: tokens times batch."""
    K: int
    N: int
    block: tuple[int, int]
    """(block_k, block_n)."""
    order: NDArray[np.int64]
    """Row-major block indices [blocks], the least important first."""
    delta: NDArray[np.float64]
    """Raw δ after the first j blocks are removed [blocks + 1] (LSP, Eq. 11), starting at 0."""
    sizes: NDArray[np.int64]
    """Entries of each block, in that order [blocks]; ragged edges make some smaller."""

    def __post_init__(self) -> None:
        blocks = -(-self.K // self.block[0]) * -(-self.N // self.block[1])
        if not (len(self.order) == len(self.sizes) == len(self.delta) - 1 == blocks):
            raise ValueError(
                f"{self.name} has {blocks} blocks, but an order of {len(self.order)}, sizes of {len(self.sizes)} and a "
                f"curve of {len(self.delta)} points"
            )
        if int(self.sizes.sum()) != self.K * self.N:
            raise ValueError(f"the blocks of {self.name} have {int(self.sizes.sum())} entries, not {self.K} × {self.N}")
        if not np.isfinite(self.delta).all():
            raise ValueError(f"the δ-curve of {self.name} is not finite")

    @property
    def blocks(self) -> int:
        """How many blocks there are."""
        return len(self.order)

    def flops(self) -> NDArray[np.float64]:
        """Return the FLOPs left after the first j blocks are removed, exactly, [blocks + 1]."""
        removed = np.concatenate([[0], np.cumsum(self.sizes)])
        return 2.0 * self.M * (self.K * self.N - removed)

    def most_removable(self, min_density: float | Mapping[str, float] = 0.0) -> int:
        """Return how many blocks may go at most: one always stays.

        Args:
            min_density: least fraction of the blocks that stays, or that by layer name (0 for names left out).
        """
        least = min_density.get(self.name, 0.0) if isinstance(min_density, Mapping) else min_density
        return max(0, self.blocks - max(1, int(np.ceil(least * self.blocks - 1e-9))))


@dataclass(frozen=True)
class Allocation:
    """How many blocks each layer loses, and why."""

    removed: dict[str, int]
    """The first j blocks of a layer's order, by layer name."""
    flops: float
    """FLOPs remaining, as a fraction of the dense ones."""
    cost: float
    """What was bounded, in the allocator's unit (FLOPs unless other costs were given), what is fixed included."""
    damage: float
    """Σ δ over the layers as predicted by the curves that were allocated on."""
    price: float
    """λ for the LSP allocator; δ per unit of cost for the exact one."""
    reasons: dict[str, str]
    """By layer name, a clause for the plan."""


def remaining_flops(curves: Sequence[LayerCurve], removed: Mapping[str, int], fixed_flops: float = 0.0) -> float:
    """Return the FLOPs that remain as a fraction of the dense ones.

    Args:
        curves: the layers.
        removed: blocks removed by layer name.
        fixed_flops: FLOPs that are always done, counted on both sides.
    """
    left, total = fixed_flops, fixed_flops
    for curve in curves:
        flops = curve.flops()
        left += float(flops[removed[curve.name]])
        total += float(flops[0])
    return left / total
