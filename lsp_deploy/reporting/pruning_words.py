"""What pruning did, in a line or two; for the terminal and the page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from lsp_deploy.reporting import formatting
from lsp_deploy.reporting.sections import BudgetSection, FidelitySection, LayerRow, PruningSection

__all__ = [
    "budget_share_words",
    "damage_words",
    "delta",
    "loss_words",
    "objective_unit",
    "pruning_words",
    "recovery_words",
]

_UNITS = {
    "loss": "nats of cross-entropy against the labels",
    "top1": "nats of cross-entropy against the dense model's own answer",
    "pseudo": "nats of cross-entropy against a sampled class",
    "output": "units of the outputs' squared change, projected at random",
}
_MEASURES = {
    "flops": "FLOPs of linear layers",
    "latency_us": "latency of linear layers",
    "energy_uj": "estimated energy",
    "parameters": "parameters of linear layers",
    "bytes": "size of linear layers",
}


def pruning_words(layers: Sequence[LayerRow], remaining_fraction: float | None = None) -> str:
    """Return how many layers have zeros, of which pattern, what is left of the work, and how they were recovered.

    Args:
        layers: all rows of the report.
        remaining_fraction: of the layers' FLOPs; None for what the masks leave.
    """
    pruned = [layer for layer in layers if layer.sparsity.pattern != "dense"]
    if not pruned:
        return f"pruning: none of {formatting.count(len(layers), 'linear layer')} has zeros"
    patterns = Counter(layer.sparsity.pattern for layer in pruned)
    listed = " and ".join(f"{number} {pattern}" for pattern, number in patterns.most_common())
    weights = sum(layer.K * layer.N for layer in layers)
    zeros = sum(layer.K * layer.N * layer.sparsity.zeros_percent for layer in layers) / weights
    if remaining_fraction is None:
        saved = sum(layer.flops * layer.sparsity.zeros_percent for layer in layers)
        remaining_fraction = 1 - saved / (100 * sum(layer.flops for layer in layers))
    refitted = sum(layer.recovery.method == "reconstruct" for layer in pruned)
    recovery = f"surviving weights refitted in {refitted}" if refitted else "surviving weights are the dense ones"
    left = formatting.percent(100 * remaining_fraction)
    return (
        f"pruning: {len(pruned)} of {formatting.count(len(layers), 'linear layer')} ({listed}); "
        f"{formatting.percent(zeros)} of all weights are zero, {left} of FLOPs left (counted); {recovery}"
    )


def loss_words(
    pruning: PruningSection | None, budget: BudgetSection | None, fidelity: FidelitySection | None
) -> str | None:
    """Return the predicted beside the measured loss; None where nothing was predicted."""
    if pruning is None or pruning.predicted_damage is None:
        return None
    words = f"loss: predicted {damage_words(pruning.predicted_damage, pruning.objective)} (estimated)"
    if budget is not None:
        basis = "measured" if budget.measure == "measured" else "expectation over measured outputs"
        return f"{words}; found {formatting.points(budget.drop_points)} of top-1 ({basis})"
    if fidelity is not None:
        return f"{words}; found {fidelity.sqnr_db:.1f} dB of signal to noise at the output (measured)"
    return words


def damage_words(damage: float, objective: str | None) -> str:
    """Return a predicted damage with the unit of its objective."""
    return f"{delta(damage)} {objective_unit(objective)}"


def objective_unit(objective: str | None) -> str:
    """Return the unit of an objective and its δ: "nats of cross-entropy against the labels"."""
    return _UNITS.get(objective or "", "units of the objective")


def budget_share_words(pruning: PruningSection) -> str:
    """Return what the budget leaves: "50 % of the dense model's FLOPs of linear layers"."""
    share = formatting.percent(100 * (pruning.keep_fraction or 0))
    return f"{share} of the dense model's {_MEASURES.get(pruning.measure or '', pruning.measure)}"


def recovery_words(layer: LayerRow) -> str:
    """Return what was done to the surviving weights of a layer; empty where there is nothing to say."""
    recovery = layer.recovery
    if recovery.method == "reconstruct":
        words = f"refitted to the {recovery.fits or 'dense model'}"
        if recovery.error_before is not None and recovery.error_after is not None:
            errors = f"{_relative(recovery.error_before)} \N{RIGHTWARDS ARROW} {_relative(recovery.error_after)}"
            words += f": relative error {errors} on held-out samples (measured)"
        return f"{words}; {recovery.reason}" if recovery.reason else words
    if layer.sparsity.pattern == "dense":
        return ""
    return f"masked weights kept: {recovery.reason}"


def delta(value: float) -> str:
    """Return a δ with three significant digits and a proper minus sign."""
    return f"{value:.3g}".replace("-", "\N{MINUS SIGN}")


def _relative(error: float) -> str:
    return f"{error:.2f}" if error >= 0.1 else f"{error:.2g}"
