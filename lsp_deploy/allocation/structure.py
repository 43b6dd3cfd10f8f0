"""Blocks of one neuron or head priced together, so that an allocator takes whole units, which leave the graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from lsp_deploy.graph.structure import StructureGroup

__all__ = ["dead_units", "prefer_structure"]


def prefer_structure(
    scores: Mapping[str, NDArray[np.float64]],
    costs: Mapping[str, NDArray[np.float64]],
    groups: Sequence[StructureGroup],
    preference: float = 1.0,
    gone: Mapping[str, NDArray[np.bool_]] | None = None,
) -> dict[str, tuple[NDArray[np.int64], NDArray[np.float64]]]:
    """Return in which order the blocks of each layer go and what that does, where blocks of a whole unit go for less.

    A unit (a neuron or head, or several in the same blocks) is dead once one side of it is zero, its columns in the
    layers before or its rows in those behind. All its other blocks then go for nothing: what it still adds is a
    constant, which folds into a bias. So the unit as a whole does the damage D of its cheaper side, less than the sum S
    of all its blocks. At a price p per unit of cost it is better to take the whole unit than its cheap blocks alone
    once D ≤ Σ min(score, p · cost). Let λ be the price of equality: then blocks of less than λ per unit of cost keep
    their score, and all others cost λ. Now the unit's blocks sum to D, and an allocator that knows nothing of units
    finds the best mixture of whole units and single blocks, as if each unit were an option of its own.

    Args:
        scores: damage of removing each block [blocks], 0 or more, by layer name; row-major over
            [ceil(K / block_k), ceil(N / block_n)]. Layers that are not pruned are left out.
        costs: what each block costs while it is there [blocks], above 0: its FLOPs, say.
        groups: the units, of `structure_groups`.
        preference: how strongly whole units are preferred, 0 to 1. D lies between S, where nothing changes, and the
            cheaper side, which is the account above.
        gone: bool [blocks] by layer name, True where a block was removed before: those do no damage and come first.

    Returns:
        By layer name: the blocks in rising order of damage per cost, int64 [blocks], and the damage after the first j
        of them are removed, float64 [blocks + 1]. It is convex in the cost.

    Raises:
        ValueError: scores, costs or the preference are not as above.
    """
    _check(scores, costs, preference)
    gone = gone or {}
    damages = {name: np.where(gone[name], 0.0, score) if name in gone else score for name, score in scores.items()}
    densities = {name: damage / costs[name] for name, damage in damages.items()}
    ceilings, units = _ceilings(damages, costs, groups, preference)
    removals = {}
    for name, density in densities.items():
        damage = np.where(density > ceilings[name], ceilings[name] * costs[name], damages[name])
        first = ~gone[name] if name in gone else np.ones(len(density), bool)
        # Of blocks that cost alike, those of one unit go together.
        keys = (np.arange(len(density)), units[name], np.minimum(density, ceilings[name]), first)
        order = np.lexsort(keys).astype(np.int64)
        removals[name] = order, np.concatenate([[0.0], np.cumsum(damage[order])])
    return removals


def dead_units(gone: Mapping[str, NDArray[np.bool_]], groups: Sequence[StructureGroup]) -> list[StructureGroup]:
    """Return the groups that are dead: all blocks of one side are gone.

    Args:
        gone: bool [blocks], True where a block is removed, by layer name; layers that are not pruned are left out.
        groups: of `structure_groups`.
    """
    return [
        group
        for group in groups
        if any(all(gone[name][group.blocks[name]].all() for name in side) for side in _sides(group, gone))
    ]


def _ceilings(
    damages: Mapping[str, NDArray[np.float64]],
    costs: Mapping[str, NDArray[np.float64]],
    groups: Sequence[StructureGroup],
    preference: float,
) -> tuple[dict[str, NDArray[np.float64]], dict[str, NDArray[np.int64]]]:
    """Return λ of each block's unit, infinity outside units, and the number of that unit; by layer name [blocks]."""
    ceilings = {name: np.full(len(damage), np.inf) for name, damage in damages.items()}
    units = {name: np.full(len(damage), len(groups)) for name, damage in damages.items()}
    for number, group in enumerate(groups):
        blocks = {name: _all_blocks(group, name) for name in {**group.blocks, **group.free} if name in damages}
        sides = [
            sum(float(damages[name][group.blocks[name]].sum()) for name in side) for side in _sides(group, damages)
        ]
        if not sides:
            continue
        damage = np.concatenate([damages[name][indices] for name, indices in blocks.items()])
        cost = np.concatenate([costs[name][indices] for name, indices in blocks.items()])
        whole = (1 - preference) * float(damage.sum()) + preference * min(sides)
        price = _price_of_the_whole(damage, cost, whole)
        for name, indices in blocks.items():
            lower = price < ceilings[name][indices]
            ceilings[name][indices[lower]] = price
            units[name][indices[lower]] = number
    return ceilings, units


def _sides(group: StructureGroup, layers: Mapping[str, NDArray[np.generic]]) -> list[list[str]]:
    """Return the layers before the units and those behind, where all of a side are among `layers`."""
    before = [name for name in group.blocks if name not in group.readers]
    behind = [name for name in group.blocks if name in group.readers]
    return [side for side in (before, behind) if side and all(name in layers for name in side)]


def _all_blocks(group: StructureGroup, name: str) -> NDArray[np.int64]:
    none = np.zeros(0, np.int64)
    return np.union1d(group.blocks.get(name, none), group.free.get(name, none))


def _price_of_the_whole(damage: NDArray[np.float64], cost: NDArray[np.float64], whole: float) -> float:
    """Return λ with Σ min(damage, λ · cost) = whole, infinity where the whole does no less damage than its blocks."""
    if whole >= float(damage.sum()):
        return np.inf
    order = np.argsort(damage / cost, kind="stable")
    damage, cost = damage[order], cost[order]
    below = np.concatenate([[0.0], np.cumsum(damage)[:-1]])  # damage of the blocks that are cheaper than each
    from_here = np.cumsum(cost[::-1])[::-1]  # cost of each block and the dearer ones
    reached = np.flatnonzero(below + damage / cost * from_here >= whole)
    first = int(reached[0]) if len(reached) else len(damage) - 1  # rounding
    return float((whole - below[first]) / from_here[first])


def _check(
    scores: Mapping[str, NDArray[np.float64]], costs: Mapping[str, NDArray[np.float64]], preference: float
) -> None:
    if not 0 <= preference <= 1:
        raise ValueError(f"the preference for structure is 0 to 1, not {preference:g}")
    for name, score in scores.items():
        if score.shape != costs[name].shape or score.ndim != 1:
            raise ValueError(f"{name} has scores of shape {score.shape} and costs of shape {costs[name].shape}")
        if not (np.isfinite(score).all() and (score >= 0).all()):
            raise ValueError(f"the scores of {name} are not all 0 or more")
        if not (np.isfinite(costs[name]).all() and (costs[name] > 0).all()):
            raise ValueError(f"the costs of {name} are not all above 0")
