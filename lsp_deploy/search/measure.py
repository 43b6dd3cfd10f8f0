"""What a budget counts: FLOPs, parameters, bytes, or what a layer takes.

What it takes is estimated by the target's cost model; latency is that of the timings that were made on this machine,
where there are some: always on a CPU, which has no cost model, and on a GPU that is here.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lsp_deploy.allocation.execution import linear_time_us
from lsp_deploy.allocation.masks import block_sums
from lsp_deploy.errors import UserError
from lsp_deploy.hardware.cost_model import CostKind, block_costs, block_matmul_energy_uj, layer_cost
from lsp_deploy.search.block_curves import block_sizes

if TYPE_CHECKING:
    from lsp_deploy.hardware.cpu_timings import CpuTimings, LayerTimes
    from lsp_deploy.hardware.gpu_timings import GpuTimings
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
    times: Mapping[str, LayerTimes] = field(default_factory=dict)
    """What layers take on this machine, by layer name, where it is the target."""
    dense_only: frozenset[str] = frozenset()
    """Layers that nothing runs faster for their zeros: convolutions on a GPU. They save neither time nor energy."""

    @property
    def unit(self) -> str:
        """For messages."""
        return UNITS[self.kind]

    @property
    def is_measured(self) -> bool:
        """Whether it is a latency by measured times."""
        return self.kind == "latency_us" and bool(self.times)

    def has_times(self, layer: LinearLayer | LayerPlan) -> bool:
        """Return whether a layer was timed; the convolution on a GPU is not."""
        return self.is_measured and layer.name in self.times

    @property
    def times_key(self) -> dict[str, Any]:
        """What of the times a search depends on, as plain JSON: nothing where they do not count."""
        if not self.is_measured:
            return {}
        return {
            name: {candidate: sorted(curve.items()) for candidate, curve in times.curves.items()}
            for name, times in self.times.items()
        }

    def of_blocks(self, layer: LinearLayer | LayerPlan, sizes: NDArray[np.integer]) -> NDArray[np.float64]:
        """Return the cost after the first j blocks are removed, [blocks + 1].

        Args:
            layer: the layer.
            sizes: entries of each block, in the order of removal.
        """
        if self.has_times(layer):
            return self._measured(layer, np.arange(len(sizes), -1, -1) / len(sizes))
        if layer.name in self.dense_only and self.kind in ("latency_us", "energy_uj"):
            return np.full(len(sizes) + 1, self.of_dense(layer))
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

    def of_dense(self, layer: LinearLayer | LayerPlan) -> float:
        """Return the cost of a layer that loses nothing."""
        if self.has_times(layer):
            return float(self._measured(layer, np.ones(1))[0])
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

    def _measured(self, layer: LinearLayer | LayerPlan, density: NDArray[np.float64]) -> NDArray[np.float64]:
        times = self.times[layer.name]
        # A weight that several layers share counts with the rows of all of them.
        return times.least_us(self.dtypes[layer.name], density) * (layer.M / times.shape.M)


def measure_of(
    recipe: Recipe,
    target: Target,
    dtypes: Mapping[str, ElementType],
    attention_flops: int,
    timings: CpuTimings | GpuTimings | None = None,
    dense_only: Collection[str] = (),
) -> tuple[Measure, float | None]:
    """Return the measure that the recipe's budget is in, and the budget in its unit.

    FLOPs are given as a fraction of the dense ones and come back as they are. Without a budget the measure is FLOPs,
    but for the zeros that `auto` adds: those are to save time. What is named in `dense_only` saves none.

    Raises:
        UserError: the target has no figures to estimate from.
    """
    typed = next((name for name in _KINDS if getattr(recipe, name) is not None), None)
    estimable = timings is not None or (target.kind == "gpu" and bool(target.peak))
    saves_time = estimable and recipe.sparsity == "auto" and recipe.allocator == "exact"
    kind, factor = _KINDS[typed or ("max_latency_ms" if saves_time else "flops")]
    always = float(attention_flops) if kind == "flops" and recipe.flops_of == "model" else 0.0
    if kind == "energy_uj":
        block_matmul_energy_uj(target, target.compute_type, recipe.block_shape)  # says at once if there are no figures
    value = None if typed is None else getattr(recipe, typed)
    times = {} if timings is None else timings.layers
    measure = Measure(kind, target, dtypes, recipe.block_shape, always, times, frozenset(dense_only))
    return measure, None if value is None else value * factor


def planned_cost(measure: Measure, plan: Plan) -> float:
    """Return the measure of a plan as it was decided in the end: its blocks, and its element types.

    A search prices layers with the types that they are expected to have; the loss budget may take int8 back. Latency is
    what the plan says that was measured of its layers, also where a plan is carried out again.

    Raises:
        UserError: the plan does not say what a layer takes.
    """
    if measure.kind == "latency_us" and measure.target.kind == "cpu":
        return measure.always + sum(_time_in_plan(layer) for layer in plan.layers)
    total = measure.always
    for layer in plan.layers:
        measured = linear_time_us(layer) if measure.kind == "latency_us" else None
        if measured is not None:
            total += measured
            continue
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


def _time_in_plan(layer: LayerPlan) -> float:
    time = linear_time_us(layer)
    if time is None:
        raise UserError(f"the plan does not say what {layer.name} takes the way it is run; decide again without --plan")
    return time
