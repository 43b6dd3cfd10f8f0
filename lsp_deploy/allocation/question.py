"""Everything that the decisions about a model depend on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from lsp_deploy.allocation.pruning import Pruner
from lsp_deploy.plan import Plan
from lsp_deploy.sensitivity.quantization import ComputeType, activation_grid, weight_scale

if TYPE_CHECKING:
    from lsp_deploy.hardware.cpu_timings import CpuTimings
    from lsp_deploy.hardware.gpu_timings import GpuTimings
    from lsp_deploy.hardware.target import Target
    from lsp_deploy.linear_layers import LinearLayer
    from lsp_deploy.recipe import Recipe
    from lsp_deploy.sensitivity.activations import ActivationStatistics

__all__ = ["DEFAULT_MAX_DROP", "Question", "planned_weight", "renew_grids", "set_weight_scales"]

DEFAULT_MAX_DROP = 1.0
_FEWEST_HELD_OUT = 20  # with fewer, the expected loss of a point is known to a few points only


@dataclass(frozen=True)
class Question:
    """What was asked, of which model, and the means to find out what a plan does."""

    recipe: Recipe
    target: Target
    model_sha256: str
    opset: int
    compute_type: ComputeType
    layers: Sequence[LinearLayer]
    weights: Mapping[str, NDArray[np.float32]]
    """Dense W [K, N] by layer name."""
    statistics: Callable[[Plan], Mapping[str, ActivationStatistics]]
    """Runs the model with a plan's weights; by the name of the tensor that a layer reads."""
    attention_flops: int
    real_images: bool
    held_out: int
    """Images that losses are measured on."""
    recover: bool
    """Whether surviving weights are reconstructed."""
    pruner: Pruner | None
    """None where there is nothing to differentiate with."""
    why_no_pruner: str
    """In that case: what to do about it."""
    loss: Callable[[Plan], float] | None
    """Points of top-1 that a plan loses on the held-out images; None for a model without a class output."""
    timings: CpuTimings | None = None
    """What layers take on this machine's CPU, measured; None where the target is another."""
    gpu_timings: GpuTimings | None = None
    """The same of this machine's GPU."""

    @property
    def max_drop(self) -> float:
        """The loss budget in points."""
        return DEFAULT_MAX_DROP if self.recipe.max_drop is None else self.recipe.max_drop

    @property
    def why_no_zeros(self) -> str | None:
        """Why `auto` adds zeros to no layer, whatever they would gain; None where it may."""
        if not self.real_images:
            return "left dense: auto prunes nothing without real images; name some with --calibration-data"
        if self.loss is None:
            return "left dense: the model has no class output, so auto cannot measure what pruning would lose"
        if self.held_out < _FEWEST_HELD_OUT:
            return (
                f"left dense: auto prunes nothing with fewer than {_FEWEST_HELD_OUT} images to measure the loss on, "
                f"here {self.held_out}; name more with --calibration-data or --eval-data"
            )
        return f"left dense: {self.why_no_pruner}" if self.pruner is None else None

    def points_of_loss(self, budget: float) -> str:
        """Return a loss budget as reasons name it: under the default one, typed choices may lose what they lose."""
        number, own = f"{budget:.3g}", f"{self.max_drop:.3g}"
        words = f"{number} point{'' if number == '1' else 's'} of loss"
        return words if number == own else f"{words} ({own} more than what was asked for loses by itself)"

    def loss_of(self, plan: Plan) -> float:
        """Return the points that a plan loses.

        Raises:
            ValueError: the model has no class output.
        """
        if self.loss is None:
            raise ValueError("the loss of a model without a class output was asked for")
        set_weight_scales(plan, self.weights)
        return self.loss(plan)


def renew_grids(question: Question, plan: Plan) -> Plan:
    """Calibrate the plan's int8 inputs again, in place: after pruning they are no longer the dense model's."""
    if any(layer.precision.dtype == "int8" for layer in plan.layers):
        statistics = question.statistics(plan)
        for layer, decided in zip(question.layers, plan.layers, strict=True):
            if decided.precision.dtype == "int8":
                grid = activation_grid(statistics[str(layer.x.name)].histogram, plan.compute_type)
                decided.precision.activation_scale, decided.precision.activation_offset = grid.scale, grid.offset
    return plan


def set_weight_scales(plan: Plan, weights: Mapping[str, NDArray[np.float32]]) -> None:
    """Set the int8 scales of every quantized weight as the plan leaves it; dense weights [K, N] by layer name."""
    plan.weight_scales.clear()
    for layer in plan.layers:
        if layer.precision.dtype == "int8":
            weight = planned_weight(plan, layer.name, weights[layer.name])
            plan.weight_scales[layer.name] = weight_scale(weight, plan.compute_type)


def planned_weight(plan: Plan, name: str, dense: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return a layer's weight [K, N] as the plan leaves it: replaced where it says so, zero where its mask is False."""
    weight = plan.weights.get(name, dense)
    return weight * plan.masks[name] if name in plan.masks else weight
