"""How zeros were found, as parts of the report."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from lsp_deploy.plan import RecoveryDecision
from lsp_deploy.reporting.sections import LayerBlocks, LayerRecovery, PruningSection

if TYPE_CHECKING:
    from lsp_deploy.allocation.pruning import ChosenPoint, Pruning

__all__ = ["layer_blocks", "layer_recovery", "pruning_section"]

# Points of a curve that the report keeps: enough for a figure, few enough for a page with a hundred of them.
_POINTS = 41


def layer_recovery(decision: RecoveryDecision) -> LayerRecovery:
    """Return what was done to a layer's surviving weights."""
    return LayerRecovery(**decision.model_dump())


def layer_blocks(pruning: Pruning | None, name: str) -> LayerBlocks | None:
    """Return a layer's δ-curve, thinned, and its chosen point; None where its blocks were not analysed."""
    if pruning is None or pruning.analysis is None or name not in pruning.analysis.curves:
        return None
    point: ChosenPoint = pruning.analysis.curves[name]
    total = len(point.delta) - 1
    kept = sorted({round(count) for count in np.linspace(0, total, _POINTS)})
    return LayerBlocks(
        total=total,
        removed=point.removed,
        predicted_delta=float(point.delta[point.removed]),
        curve_removed=kept,
        curve_delta=[float(f"{point.delta[count]:.6g}") for count in kept],
    )


def pruning_section(pruning: Pruning | None) -> PruningSection | None:
    """Return how the zeros of this run were chosen; None where it chose none."""
    if pruning is None:
        return None
    section = PruningSection(asked=pruning.asked, method=pruning.method or None, notes=list(pruning.notes))
    analysis = pruning.analysis
    if analysis is None:
        return section
    return section.model_copy(
        update={
            "objective": analysis.objective,
            "samples": analysis.samples,
            "kappa": analysis.kappa,
            "allocator": analysis.allocator,
            "search": analysis.search,
            "measure": analysis.measure,
            "keep_fraction": analysis.keep,
            "predicted_damage": analysis.predicted_damage,
        }
    )
