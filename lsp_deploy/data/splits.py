"""Samples set aside for measuring, and samples chosen from many."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lsp_deploy.data.dataset import Dataset

__all__ = ["choose", "hold_out"]


def hold_out(dataset: Dataset, every: int = 5) -> tuple[Dataset, Dataset]:
    """Split `dataset` into (calibration, held-out): every fifth sample is held out, counted class by class.

    Counting goes through the samples in order of label where labels are known: data whose classes take turns (digits
    0 to 9, again and again) would otherwise lose whole classes to one side. Both parts keep the order of the samples.
    With fewer than `every` samples nothing is set aside and both are the whole dataset.
    """
    if len(dataset) < every:
        return dataset, dataset
    order = np.arange(len(dataset)) if dataset.labels is None else np.argsort(dataset.labels, kind="stable")
    held_out = np.sort(order[::every])
    return dataset.subset(np.setdiff1d(np.arange(len(dataset)), held_out)), dataset.subset(held_out)


def choose(groups: Sequence[Any] | NDArray[Any], wanted: int | None, seed: int) -> NDArray[np.int64]:
    """Choose `wanted` samples (all if None), as many of each group as of any other as far as there are so many.

    Within a group, samples are spread evenly: one is drawn from each of as many stretches of equal length.

    Args:
        groups: the group of each sample, in order (a class folder, a label; all the same where nothing is known).
        wanted: how many.
        seed: of the draws.

    Returns:
        Indices of the chosen samples, ascending; int64.
    """
    if wanted is None or wanted >= len(groups):
        return np.arange(len(groups), dtype=np.int64)
    rng = np.random.default_rng(seed)
    _, group_of = np.unique(np.asarray(groups), return_inverse=True)
    members = np.split(np.argsort(group_of, kind="stable"), np.cumsum(np.bincount(group_of))[:-1])
    shares = _shares([len(member) for member in members], wanted, rng)
    chosen = [member[_spread(len(member), share, rng)] for member, share in zip(members, shares, strict=True)]
    return np.sort(np.concatenate(chosen)).astype(np.int64)


def _shares(sizes: Sequence[int], wanted: int, rng: np.random.Generator) -> list[int]:
    """Deal `wanted` out to groups of these sizes, evenly, never more to a group than it has."""
    shares = [0] * len(sizes)
    while wanted:
        unfilled = [group for group, size in enumerate(sizes) if shares[group] < size]
        if wanted < len(unfilled):
            unfilled = [unfilled[place] for place in _spread(len(unfilled), wanted, rng)]
        each = wanted // len(unfilled)
        for group in unfilled:
            dealt = min(each, sizes[group] - shares[group])
            shares[group] += dealt
            wanted -= dealt
    return shares


def _spread(count: int, wanted: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Draw one of `count` places from each of `wanted` stretches of equal length; ascending and distinct."""
    # Drawn rather than at a fixed step: a step that divides a period in the data would pick the same class always.
    edges = np.arange(wanted + 1) * count // wanted if wanted else np.zeros(1, np.int64)
    return rng.integers(edges[:-1], edges[1:], dtype=np.int64)
