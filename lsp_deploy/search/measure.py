"""What a budget counts: FLOPs, parameters, bytes, or what the target's cost model says a layer takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from lsp_deploy.allocation.masks import block_sums
from lsp_deploy.hardware.cost_model import CostKind, block_costs, layer_cost
from lsp_deploy.search.block_curves import block_sizes

if TYPE_CHECKING:
    from lsp_deploy.hardware.target import ElementType, Target
    from lsp_deploy.linear_layers import LinearLayer
    from lsp_deploy.plan import LayerPlan, Plan
    from lsp_deploy.recipe import Recipe

__all__ = ["Measure", "measure_of", "planned_cost"]

# Recipe field: kind of cost, its unit in the recipe as a multiple of the cost model's.
_KINDS: dict[str, tuple[CostKind, float]] = {
    "flops": ("flops", 1.0),
    "max_latency_ms": ("latency_us", 1e3),
    "max_energy_mj": ("energy_uj", 1e3),
    "max_parameters": ("parameters", 1.0),
    "max_size_mb": ("bytes", 1e6),
}
UNITS = {"flops": "FLOP", "latency_us": "µs", "energy_uj": "µJ", "parameters": "parameter", "bytes": "byte"}


@dataclass(frozen=True)
class Measure:
    """A kind of cost on a target, of all linear layers (and attention's products, where FLOPs of the model count)."""

    kind: CostKind
    target: Target
    dtypes: Mapping[str, ElementType]
    """Element type that each layer's weights are going to have, by layer name."""
    block: tuple[int, int]
    always: float = 0.0
    """Cost outside the linear layers."""

    @property
    def unit(self) -> str:
        """For messages."""
        return UNITS[self.kind]

    def of_blocks(self, layer: LinearLayer | LayerPlan, sizes: NDArray[np.integer]) -> NDArray[np.float64]:
        """Return the cost after the first j blocks are removed, [blocks + 1].

        Args:
            layer: the layer.
            sizes: entries of each block, in the order of removal.
        """
        return block_costs(
            self.kind,
            self.target,
            layer.M,
            layer.K,
            layer.N,
            self.dtypes[layer.name],
            block=self.block,
            sizes=sizes,
        )

    def of_dense(self, layer: LinearLayer) -> float:
        """Return the cost of a layer that loses nothing."""
        return layer_cost(
            self.kind,
            self.target,
            layer.M,
            layer.K,
            layer.N,
            self.dtypes[layer.name],
            pattern="dense",
            block=self.block,
        )


def measure_of(
    recipe: Recipe, target: Target, dtypes: Mapping[str, ElementType], attention_flops: int
) -> tuple[Measure, float | None]:
    """Return the measure that the recipe's budget is in, and the budget in its unit.

    FLOPs are given as a fraction of the dense ones and come back as they are; without a budget the measure is FLOPs.

    Raises:
        UserError: the target has no figures to estimate from.
    """
    field = next((name for name in _KINDS if getattr(recipe, name) is not None), "flops")
    kind, factor = _KINDS[field]
    always = float(attention_flops) if kind == "flops" and recipe.flops_of == "model" else 0.0
    value = getattr(recipe, field)
    return Measure(kind, target, dtypes, recipe.block_shape, always), None if value is None else value * factor


def planned_cost(measure: Measure, plan: Plan) -> float:
    """Return the measure of a plan as it was decided in the end: its blocks, and its element types.

    A search prices layers with the types that they are expected to have; the loss budget may take int8 back.
    """
    total = measure.always
    for layer in plan.layers:
        mask = plan.masks.get(layer.name)
        sizes = block_sizes(layer, measure.block)
        gone = (
            np.zeros(len(sizes), bool)
            if mask is None
            else block_sums(mask.astype(np.float32), measure.block).reshape(-1) == 0
        )
        order = np.argsort(~gone, kind="stable")
        total += float(measure.of_blocks(layer, sizes[order])[int(gone.sum())])
    return total
