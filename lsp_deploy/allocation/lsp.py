"""LSP's allocation as published: one λ, a target slope a layer, tangents to the smoothed δ-curves (Eq. 7-11 and 14).

Minimise Σ δ_i(α_i) + β·L_power subject to a share R of the FLOPs, α_i being the fraction of blocks removed and, by
Eq. 7 and 8,

    L_power = Σ_i p_m · ceil(M_i / B_m) · (1 − α_i) · blocks_i,        blocks_i = ceil(K_i / B_k) · ceil(N_i / B_n).

Its derivative is ∂L/∂α_i = −p_m·ceil(M_i / B_m)·blocks_i: removing blocks lowers power. Eq. 10 sets the derivative
of the whole sum to λ; with the power term brought to the right side the sign turns, and for a positive β a larger
matrix product gets a steeper target slope, hence loses more (Eq. 11):

    ∂δ_i/∂α_i = λ_i = λ + β · |∂L/∂α_i|.

Read differently from the print, because the print has no solution or leaves it open:

* the curve is the unsquared δ of Eq. 11 (Eq. 9 squares it, Eq. 10 and 11 do not);
* β is Eq. 14 with absolute values: as printed it is negative. p_m and B_m cancel in β·|∂L/∂α_i| where they are the
  same for all layers, as the paper says; here they may differ, and M / B_m is rounded up;
* λ may be negative: with λ ≥ 0, most R have no solution;
* a curve need not be convex: α_i is the largest α at which the slope is at most λ_i, so that removals grow with λ.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from lsp_deploy.allocation.problem import Allocation, LayerCurve, remaining_flops
from lsp_deploy.sensitivity.curves import slopes, smooth

__all__ = ["LspAllocator", "power_slopes"]


class LspAllocator:
    """The δ-curves of a network, smoothed and differentiated once, for any number of FLOPs targets."""

    def __init__(
        self,
        curves: Sequence[LayerCurve],
        *,
        tile_m: int = 64,
        p_m: float | Mapping[str, float] = 1.0,
        power_weight: float = 1.0,
        smoothing: float = 0.9,
        min_density: float | Mapping[str, float] = 0.0,
        fixed_flops: float = 0.0,
        removed: Mapping[str, int] | None = None,
    ) -> None:
        """Prepare the target slopes.

        Args:
            curves: the layers that may lose blocks.
            tile_m: B_m of Eq. 7, rows; the target's `kernels.tile_m`.
            p_m: energy of one within-block product (Eq. 7), for all layers or by layer name; its unit cancels.
            power_weight: multiplies β; 0 leaves the power term out (the ablation of LSP's Table 2).
            smoothing: weight of the past in the moving average of the curves (section 4.1); 0: none.
            min_density: least fraction of blocks that stays, for all layers or by name; one block always stays.
            fixed_flops: FLOPs outside these layers that count on both sides of the FLOPs target.
            removed: blocks that are gone already, the first of each order, by layer name: no λ brings them back.

        Raises:
            ValueError: there are no layers.
        """
        if not curves:
            raise ValueError("there is no layer to take blocks from")
        self._curves = list(curves)
        self._fixed_flops = fixed_flops
        self._flops = [curve.flops() for curve in curves]
        self._dense_flops = fixed_flops + sum(float(flops[0]) for flops in self._flops)
        measured = [slopes(smooth(curve.delta, smoothing)) for curve in curves]
        power = power_slopes(curves, tile_m=tile_m, p_m=p_m)
        self.beta = float(sum(np.abs(slope).max() for slope in measured) / power.sum())
        self._power = power_weight * self.beta * power
        # The λ at which a layer has lost j blocks or more, j = 1 .. most: the smallest slope from there on (Eq. 11).
        self._thresholds = [
            _suffix_minimum(slope[1 : curve.most_removable(min_density) + 1]) - term
            for curve, slope, term in zip(curves, measured, self._power, strict=True)
        ]
        for curve, thresholds in zip(curves, self._thresholds, strict=True):
            thresholds[: (removed or {}).get(curve.name, 0)] = -np.inf
        self._lambdas = np.unique(np.concatenate(self._thresholds))
        self._lambdas = self._lambdas[np.isfinite(self._lambdas)]

    def allocate(self, flops: float) -> Allocation:
        """Find the λ whose network comes closest to a FLOPs target without exceeding it.

        The remaining FLOPs change only at finitely many λ, so the bisection is over those: exact, and over all reals.

        Args:
            flops: R, the fraction of the FLOPs that may remain.

        Raises:
            ValueError: so few cannot remain.
        """
        if self._remaining(np.inf) > flops:
            raise ValueError(
                f"{flops:.1%} of the FLOPs cannot be reached: {self._remaining(np.inf):.1%} remain with every layer at "
                "its minimum density"
            )
        lambda_ = self._smallest_lambda(flops)
        removed = {curve.name: count for curve, count in zip(self._curves, self._counts(lambda_), strict=True)}
        remaining = remaining_flops(self._curves, removed, self._fixed_flops)
        return Allocation(
            removed=removed,
            flops=remaining,
            cost=remaining * self._dense_flops,
            damage=float(sum(curve.delta[removed[curve.name]] for curve in self._curves)),
            price=lambda_,
            reasons={
                curve.name: _reason(curve, removed[curve.name], thresholds + term, lambda_ + term)
                for curve, thresholds, term in zip(self._curves, self._thresholds, self._power, strict=True)
            },
        )

    def _smallest_lambda(self, flops: float) -> float:
        if len(self._lambdas) == 0:
            return 0.0
        nothing = float(np.nextafter(self._lambdas[0], -np.inf))
        if self._remaining(nothing) <= flops:
            return nothing
        low, high = -1, len(self._lambdas) - 1
        while high - low > 1:
            middle = (low + high) // 2
            if self._remaining(float(self._lambdas[middle])) <= flops:
                high = middle
            else:
                low = middle
        return float(self._lambdas[high])

    def _counts(self, lambda_: float) -> list[int]:
        return [int(np.searchsorted(thresholds, lambda_, side="right")) for thresholds in self._thresholds]

    def _remaining(self, lambda_: float) -> float:
        left = self._fixed_flops + sum(
            float(flops[count]) for flops, count in zip(self._flops, self._counts(lambda_), strict=True)
        )
        return left / self._dense_flops


def power_slopes(
    curves: Sequence[LayerCurve], *, tile_m: int, p_m: float | Mapping[str, float] = 1.0
) -> NDArray[np.float64]:
    """Return |∂L_power/∂α_i| = p_m · ceil(M_i / B_m) · blocks_i for each layer (LSP, Eq. 8), in the unit of `p_m`.

    Args:
        curves: the layers.
        tile_m: B_m, rows.
        p_m: energy of one within-block product, for all layers or by layer name.
    """
    return np.array([
        (p_m[curve.name] if isinstance(p_m, Mapping) else p_m) * -(-curve.M // tile_m) * curve.blocks
        for curve in curves
    ], np.float64)  # fmt: skip


def _suffix_minimum(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the smallest of each value and all that follow: it never falls."""
    return np.minimum.accumulate(values[::-1])[::-1]


def _reason(curve: LayerCurve, removed: int, slope: NDArray[np.float64], target: float) -> str:
    if removed == 0:
        least = f"its δ-curve has no smaller slope than {slope[0]:.3g}" if len(slope) else "no block may go"
        return f"left dense: {least}, the target slope is {target:.3g}"
    rest = "no more may go" if removed == len(slope) else f"the next slope is {slope[removed]:.3g}"
    if slope[removed - 1] == -np.inf:
        return f"{removed} of {curve.blocks} blocks removed before: {rest}, the target slope is {target:.3g}"
    return (
        f"{removed} of {curve.blocks} blocks removed: the slope of δ there, {slope[removed - 1]:.3g}, meets the target "
        f"slope of {target:.3g}, {rest}"
    )
