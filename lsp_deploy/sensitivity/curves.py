"""δ-curves: what removing the first j blocks of a layer does to the objective, to second order, for every j.

LSP, Eq. 11 and 12: δ = gᵀΔW + ½ ΔWᵀ F̂ ΔW with F̂ = κI + (1/N) Σ_n g_n g_nᵀ. Removing blocks sets ΔW to −W on them,
so with A[n, b] = Σ_{ij ∈ b} g_n,ij · W_ij the whole curve is a running sum over blocks:
g·ΔW = −Σ_b Ā[b] and ΔWᵀ F̂ ΔW = κ Σ_b ‖W_b‖² + (1/N) Σ_n (Σ_b A[n, b])². Eq. 13's recursion gives the same numbers.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["delta_curve", "lower_hull", "slopes", "smooth"]

_CHUNK = 1 << 22  # values of A at a time: the running sums of a chunk are all that is held


def delta_curve(
    contributions: NDArray[np.floating],
    square_norms: NDArray[np.floating],
    order: NDArray[np.integer],
    *,
    kappa: float,
    first_order: bool = True,
) -> NDArray[np.float64]:
    """Return δ after removing the first j blocks of `order`, j = 0 .. blocks (Eq. 11, unsquared).

    Args:
        contributions: A [N, blocks]; may be mapped from disk, it is read in chunks of samples.
        square_norms: ‖W_b‖² [blocks].
        order: block indices, the first to go first.
        kappa: κ of the empirical Fisher.
        first_order: whether the term g·ΔW is part of it; without it the curve is 0 or above everywhere.

    Returns:
        float64 [len(order) + 1], starting at 0.
    """
    samples = len(contributions)
    first = np.zeros(len(order))
    second = np.zeros(len(order))
    step = max(1, _CHUNK // max(1, len(order)))
    for start in range(0, samples, step):
        running = np.asarray(contributions[start : start + step])[:, order].astype(np.float64)
        np.cumsum(running, axis=1, out=running)
        first += running.sum(axis=0)
        second += np.square(running, out=running).sum(axis=0)
    ridge = kappa * np.cumsum(np.asarray(square_norms, np.float64)[order])
    delta = 0.5 * (ridge + second / samples)
    if first_order:
        delta -= first / samples
    return np.concatenate([[0.0], delta])


def smooth(curve: NDArray[np.float64], factor: float = 0.9) -> NDArray[np.float64]:
    """Smooth a curve by an exponential moving average (LSP section 4.1); `factor`, 0 to 1, weighs the past."""
    result = np.empty_like(curve)
    average = curve[0]
    for index, value in enumerate(curve):
        average = factor * average + (1 - factor) * value
        result[index] = average
    return result


def slopes(curve: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return dδ/dα at every block count by the 5-point centred difference (LSP section 4.1), α the fraction removed.

    Near the ends, where five points do not fit, differences of second order are taken.
    """
    step = 1 / max(len(curve) - 1, 1)
    result = np.gradient(curve, step, edge_order=1) if len(curve) > 1 else np.zeros_like(curve)
    if len(curve) >= 5:
        result[2:-2] = (curve[:-4] - 8 * curve[1:-3] + 8 * curve[3:-1] - curve[4:]) / (12 * step)
    return np.asarray(result)


def lower_hull(curve: NDArray[np.float64]) -> NDArray[np.intp]:
    """Return the block counts on the lower convex hull of a curve, from 0 to the last."""
    hull: list[int] = []
    for index, value in enumerate(curve):
        while len(hull) >= 2:
            left, middle = hull[-2], hull[-1]
            if (curve[middle] - curve[left]) * (index - left) >= (value - curve[left]) * (middle - left):
                hull.pop()
            else:
                break
        hull.append(index)
    return np.asarray(hull, np.intp)
