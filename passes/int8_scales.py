"""The int8 scales that a plan gives a layer, and the weight that they give."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lsp_deploy.errors import UserError
from lsp_deploy.plan import LayerPlan, Plan

__all__ = ["activation_scale", "int8_weight", "weight_scale"]


def activation_scale(layer: LayerPlan) -> float:
    """Return the scale of an int8 layer's input.

    Raises:
        UserError: the plan has none.
    """
    scale = layer.precision.activation_scale
    if scale is None:
        raise UserError(f"the plan makes layer {layer.name} int8 but gives it no activation_scale")
    return scale


def weight_scale(plan: Plan, layer: LayerPlan) -> NDArray[np.float32]:
    """Return the scales of an int8 layer's weight, float32 [N].

    Raises:
        UserError: the plan has none, or not N positive ones.
    """
    scale = plan.weight_scales.get(layer.name)
    if scale is None or scale.shape != (layer.N,) or not (scale > 0).all():
        raise UserError(
            f"the plan makes layer {layer.name} int8 but has no {layer.N} positive weight scales for it; "
            "keep plan.safetensors beside plan.json"
        )
    return scale


def int8_weight(weight: NDArray[np.float32], scale: NDArray[np.float32]) -> NDArray[np.int8]:
    """Return clip(round half even(W / scale), ±127), so that zeros stay exactly zero; `scale` broadcasts."""
    return np.asarray(np.clip(np.rint(weight / scale), -127, 127), np.int8)
