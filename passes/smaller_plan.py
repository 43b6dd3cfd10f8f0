"""What a plan says of the layers that are left, once dead structure is out of the graph."""

from __future__ import annotations

import numpy as np

from lsp_deploy.passes.remove_dead_structure import DeadStructure
from lsp_deploy.plan import Plan

__all__ = ["smaller_plan"]


def smaller_plan(plan: Plan, found: DeadStructure) -> Plan:
    """Return the plan for the model that `RemoveDeadStructurePass` leaves; the decisions are the same.

    Layers that are gone are left out; K, N and the arrays of the others lose their dead rows and columns. Biases, which
    the graph holds already, are left out too where the layer changed: constants were folded into them.

    Args:
        plan: whose masks and weights are already in the graph; it is not changed.
        found: of the pass.
    """
    smaller = plan.branch()
    changed = {layer.name: layer for layer in found.removed}
    smaller.layers = [
        layer for layer in smaller.layers if layer.name not in changed or changed[layer.name].after != (0, 0)
    ]
    for layer in smaller.layers:
        if layer.name in changed:
            layer.K, layer.N = changed[layer.name].after
    for name, left in changed.items():
        for matrices in (smaller.masks, smaller.weights):
            if name in matrices:
                matrices[name] = np.ascontiguousarray(matrices[name][np.ix_(left.rows, left.columns)])
        if name in smaller.weight_scales:
            smaller.weight_scales[name] = smaller.weight_scales[name][left.columns]
        smaller.biases.pop(name, None)
        if left.after == (0, 0):
            for arrays in (smaller.masks, smaller.weights, smaller.weight_scales):
                arrays.pop(name, None)
    return smaller
