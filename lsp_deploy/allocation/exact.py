"""One price per unit of cost for all layers: the knapsack that allocation is, solved on the lower convex hulls.

Every layer offers options, each with a cost and a damage: dense, 2:4, or its first j blocks removed. At a price p
each layer takes the option with the least damage + p·cost, and that lies on the lower convex hull of its options in
the plane of cost and damage. Whatever cost the choice then has, no choice of that cost or less does less damage
(Everett 1963). Raising the price from 0 upwards walks along all hulls at once, the flattest step first, so all these
choices are one sorted list of steps, made once.

Between two of them lies a budget that no price meets exactly. The choice before the budget is then amended in one
layer so that it fits, or the choice after it in one layer by what fits into the slack, whichever does the least
damage. So the budget is never exceeded, and a larger budget never does more damage.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from lsp_deploy.allocation.problem import Allocation, LayerCurve, remaining_flops

__all__ = ["Choice", "ExactAllocator", "LayerOptions", "OptionHulls", "choose_options"]


@dataclass(frozen=True, eq=False)
class LayerOptions:
    """What one layer can be; one cost and one damage an option, in any order."""

    costs: NDArray[np.float64]
    damages: NDArray[np.float64]
    labels: Sequence[str] = ()
    """What the options are called, if they have names."""

    def __post_init__(self) -> None:
        if self.costs.shape != self.damages.shape or self.costs.ndim != 1 or not self.costs.size:
            raise ValueError("a layer has at least one option, each with a cost and a damage")
        if self.labels and len(self.labels) != len(self.costs):
            raise ValueError("labels name every option or none")
        if not (np.isfinite(self.costs).all() and np.isfinite(self.damages).all()):
            raise ValueError("costs and damages are finite")


@dataclass(frozen=True)
class Choice:
    """One option a layer."""

    chosen: dict[str, int]
    """Index of the option, by layer name."""
    labels: dict[str, str]
    """Label of the option, by the name of each layer whose options have labels."""
    cost: float
    damage: float
    price: float
    """Damage per unit of cost: what was taken costs at most that much, what was left at least. 0: no need to pay."""
    next_prices: dict[str, float]
    """Damage per unit of cost at which a layer would have gone to its next cheaper option; inf at the last."""


class OptionHulls:
    """The hulls of all layers, for any number of budgets."""

    def __init__(self, options: Mapping[str, LayerOptions]) -> None:
        """Find the hulls and sort their steps.

        Raises:
            ValueError: there are no layers.
        """
        if not options:
            raise ValueError("there is no layer to choose for")
        self._options = dict(options)
        self._hulls = [_hull(layer.costs, layer.damages) for layer in options.values()]
        savings = [-np.diff(layer.costs[hull]) for layer, hull in zip(self._options.values(), self._hulls, strict=True)]
        harms = [np.diff(layer.damages[hull]) for layer, hull in zip(self._options.values(), self._hulls, strict=True)]
        self._prices = [harm / saving for harm, saving in zip(harms, savings, strict=True)]
        price = np.concatenate(self._prices)
        order = np.argsort(price, kind="stable")  # the steps of one layer rise in price, so they stay in their order
        self._step_price = price[order]
        self._step_layer = np.repeat(np.arange(len(savings)), [len(saving) for saving in savings])[order]
        first = self._after(0)
        self._costs = self._cost(first) - np.concatenate([[0.0], np.cumsum(np.concatenate(savings)[order])])
        self._damages = self._damage(first) + np.concatenate([[0.0], np.cumsum(np.concatenate(harms)[order])])

    @property
    def frontier(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Costs (falling) and damages (rising) of all choices that some price makes; each is the best of its cost."""
        return self._costs, self._damages

    @property
    def least_cost(self) -> float:
        """The cost of the cheapest options together."""
        return float(self._costs[-1])

    def within_cost(self, budget: float) -> Choice:
        """Return the choice with the least damage whose cost is within a budget.

        Raises:
            ValueError: the cheapest options together cost more.
        """
        found = self._within(budget)
        if found is None:
            raise ValueError(
                f"a cost of {budget:.6g} cannot be reached: the cheapest choice costs {self._costs[-1]:.6g}"
            )
        return self._choice(*found)

    def within_damage(self, limit: float) -> Choice:
        """Return the choice with the least cost whose damage is within a limit: the same walk, from the other end.

        Raises:
            ValueError: the least damaging options together do more damage.
        """
        found = self._swapped._within(limit)
        if found is None:
            raise ValueError(f"a damage of {limit:.6g} cannot be kept: the least possible is {self._damages[0]:.6g}")
        chosen, price = found
        if price > 0:
            return self._choice(chosen, 1 / price)
        return self._choice(chosen, float(self._step_price[-1]) if len(self._step_price) else 0.0)

    def _within(self, budget: float) -> tuple[list[int], float] | None:
        """Return the options chosen and the price, or None if the budget cannot be met."""
        steps = int(np.searchsorted(-self._costs, -budget, side="left"))
        while steps < len(self._costs) and self._cost(self._after(steps)) > budget:
            steps += 1  # the running sums were a rounding error off
        if steps == len(self._costs):
            return None
        starts = [self._after(steps), *([self._after(steps - 1)] if steps else [])]
        amended = [choice for start in starts if (choice := self._amended(start, budget)) is not None]
        price = float(self._step_price[steps - 1]) if steps else 0.0
        return min([*amended, starts[0]], key=self._damage), price

    @cached_property
    def _swapped(self) -> OptionHulls:
        return OptionHulls({
            name: LayerOptions(layer.damages, layer.costs, layer.labels) for name, layer in self._options.items()
        })  # fmt: skip

    def _after(self, steps: int) -> list[int]:
        """Return the option of each layer after the first steps."""
        positions = np.bincount(self._step_layer[:steps], minlength=len(self._hulls))
        return [int(hull[position]) for hull, position in zip(self._hulls, positions, strict=True)]

    def _amended(self, chosen: list[int], budget: float) -> list[int] | None:
        """Change one layer of a choice so that the whole is within the budget and does the least damage."""
        room = budget - self._cost(chosen)
        best: tuple[float, int, int] | None = None
        for index, (layer, current) in enumerate(zip(self._options.values(), chosen, strict=True)):
            damages = np.where(layer.costs <= layer.costs[current] + room, layer.damages, np.inf)
            option = int(np.argmin(damages))
            if damages[option] == damages[current]:
                option = current  # of equal damage, a hull has the cheapest
            change = float(damages[option] - layer.damages[current])
            if np.isfinite(change) and (best is None or change < best[0]):
                best = (change, index, option)
        if best is None:
            return None
        amended = [*chosen[: best[1]], best[2], *chosen[best[1] + 1 :]]
        return amended if self._cost(amended) <= budget else None  # rounding

    def _choice(self, chosen: list[int], price: float) -> Choice:
        names = list(self._options)
        return Choice(
            chosen=dict(zip(names, chosen, strict=True)),
            labels={
                name: layer.labels[option]
                for (name, layer), option in zip(self._options.items(), chosen, strict=True)
                if layer.labels
            },
            cost=self._cost(chosen),
            damage=self._damage(chosen),
            price=price,
            next_prices=self._next_prices(chosen),
        )

    def _next_prices(self, chosen: list[int]) -> dict[str, float]:
        result = {}
        for (name, layer), option, hull, prices in zip(
            self._options.items(), chosen, self._hulls, self._prices, strict=True
        ):
            cheaper = int(np.argmax(layer.costs[hull] < layer.costs[option]))  # 0: none is
            result[name] = float(prices[cheaper - 1]) if cheaper else float("inf")
        return result

    def _cost(self, chosen: Sequence[int]) -> float:
        return float(sum(layer.costs[option] for layer, option in zip(self._options.values(), chosen, strict=True)))

    def _damage(self, chosen: Sequence[int]) -> float:
        return float(sum(layer.damages[option] for layer, option in zip(self._options.values(), chosen, strict=True)))


def choose_options(options: Mapping[str, LayerOptions], budget: float) -> Choice:
    """Choose one option a layer: the least damage within a budget.

    Args:
        options: what each layer can be, by its name.
        budget: the most that all layers may cost together, in the unit of the options' costs.

    Raises:
        ValueError: there are no layers, or the cheapest options together cost more.
    """
    return OptionHulls(options).within_cost(budget)


class ExactAllocator:
    """Blocks for the least damage at a cost, or the least cost at a damage, for any number of budgets."""

    def __init__(
        self,
        curves: Sequence[LayerCurve],
        *,
        costs: Mapping[str, NDArray[np.float64]] | None = None,
        damages: Mapping[str, NDArray[np.float64]] | None = None,
        fixed_cost: float = 0.0,
        fixed_flops: float = 0.0,
        min_density: float | Mapping[str, float] = 0.0,
        unit: str = "FLOP",
    ) -> None:
        """Find the hulls.

        Args:
            curves: the layers that may lose blocks.
            costs: cost after the first j blocks are removed [blocks + 1], by layer name; default: FLOPs.
            damages: damage after the first j blocks are removed [blocks + 1], by layer name; default: raw δ.
            fixed_cost: cost outside these layers, counted in every budget.
            fixed_flops: FLOPs outside these layers, counted in the fraction of FLOPs that is reported.
            min_density: least fraction of blocks that stays, for all layers or by name; one block always stays.
            unit: of the costs, for the reasons: FLOP, byte, µs, µJ.

        Raises:
            ValueError: there are no layers, or costs or damages do not fit them.
        """
        self._curves, self._unit = list(curves), unit
        self._fixed_cost, self._fixed_flops = fixed_cost, fixed_flops
        options = {
            curve.name: _block_options(
                curve,
                curve.flops() if costs is None else costs[curve.name],
                curve.delta if damages is None else damages[curve.name],
                curve.most_removable(min_density),
            )
            for curve in curves
        }
        self._hulls = OptionHulls(options)
        self.dense_cost = fixed_cost + sum(float(layer.costs[0]) for layer in options.values())
        """Cost with no block removed, fixed cost included."""

    def allocate(self, budget: float) -> Allocation:
        """Return the blocks to remove for the least damage at a cost of at most `budget`, fixed cost included.

        Raises:
            ValueError: the budget cannot be reached.
        """
        try:
            return self._allocation(self._hulls.within_cost(budget - self._fixed_cost))
        except ValueError as error:
            least, unit = self._fixed_cost + self._hulls.least_cost, self._unit
            raise ValueError(
                f"{budget:.4g} of {self.dense_cost:.4g} {unit} cannot be reached: {least:.4g} {unit} remain "
                "with every layer at its minimum"
            ) from error

    def allocate_damage(self, limit: float) -> Allocation:
        """Return the blocks to remove for the least cost at a damage of at most `limit`.

        Raises:
            ValueError: the limit cannot be kept.
        """
        return self._allocation(self._hulls.within_damage(limit))

    def _allocation(self, choice: Choice) -> Allocation:
        return Allocation(
            removed=choice.chosen,
            flops=remaining_flops(self._curves, choice.chosen, self._fixed_flops),
            cost=self._fixed_cost + choice.cost,
            damage=choice.damage,
            price=choice.price,
            reasons={
                curve.name: _reason(
                    choice.chosen[curve.name], curve.blocks, choice.price, choice.next_prices[curve.name], self._unit
                )
                for curve in self._curves
            },
        )


def _block_options(
    curve: LayerCurve, costs: NDArray[np.float64], damages: NDArray[np.float64], most: int
) -> LayerOptions:
    if not (len(costs) == len(damages) == curve.blocks + 1):
        raise ValueError(
            f"{curve.name} needs {curve.blocks + 1} costs and damages, one for each number of blocks removed"
        )
    return LayerOptions(costs[: most + 1], damages[: most + 1])


def _hull(costs: NDArray[np.float64], damages: NDArray[np.float64]) -> NDArray[np.intp]:
    """Return the options on the lower left hull, from the least damaging (the cheapest of those) to the cheapest."""
    order = np.lexsort((damages, costs))
    least = np.minimum.accumulate(damages[order])
    order = order[np.concatenate([[True], damages[order][1:] < least[:-1]])]  # what nothing cheaper or equal beats
    x, y = costs[order].tolist(), damages[order].tolist()  # plain floats: many times faster one by one
    hull: list[int] = []
    for index in range(len(x)):
        while len(hull) >= 2:
            left, middle = hull[-2], hull[-1]
            if (y[middle] - y[left]) * (x[index] - x[left]) < (y[index] - y[left]) * (x[middle] - x[left]):
                break
            hull.pop()
        hull.append(index)
    return np.asarray(order[hull[::-1]], np.intp)


def _reason(removed: int, blocks: int, price: float, next_price: float, unit: str) -> str:
    asked = f"the price is {price:.3g} of damage per {unit}"
    if removed == 0:
        least = "no block may go" if next_price == float("inf") else f"its first blocks would cost {next_price:.3g}"
        return f"left dense: {least}, {asked}"
    rest = "no more may go" if next_price == float("inf") else f"the next ones would cost {next_price:.3g}"
    return f"{removed} of {blocks} blocks removed: {asked}, {rest}"
