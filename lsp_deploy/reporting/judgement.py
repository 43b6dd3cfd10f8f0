"""What a report says about its own result: whether the budget was kept, and what may be wrong."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from lsp_deploy.allocation.question import DEFAULT_MAX_DROP
from lsp_deploy.reporting import formatting
from lsp_deploy.reporting.cards import budget_words
from lsp_deploy.reporting.layer_rows import WITHOUT_TWO_FOUR
from lsp_deploy.reporting.sections import BudgetSection, LayerRow
from lsp_deploy.steps.evaluation import decisive_drop

if TYPE_CHECKING:
    from lsp_deploy.engines.fidelity import Fidelity
    from lsp_deploy.engines.profiler import Profile
    from lsp_deploy.recipe import Recipe
    from lsp_deploy.steps.building import Built
    from lsp_deploy.steps.calibration import CalibrationData

__all__ = ["budget_section", "run_warnings"]

_UNSURE_PERCENT = 10.0  # a trained classifier gives its own answers several times this


def budget_section(fidelity: Fidelity, recipe: Recipe) -> BudgetSection | None:
    """Return the loss budget and whether the compressed model kept it; None for a model without class scores."""
    if fidelity.expected_drop_points is None:
        return None
    budget = DEFAULT_MAX_DROP if recipe.max_drop is None else recipe.max_drop
    drop = decisive_drop(fidelity)
    warning = None
    if drop.high - drop.low > budget:
        ends = f"{drop.low:.2f} to {drop.high:.2f} points"
        warning = f"the drop is known to {ends} only, an interval wider than the budget of {budget:g}"
        warning += ": more held-out images would settle it" if drop.low <= budget < drop.high else ""
    return BudgetSection(
        max_drop_points=budget,
        typed=recipe.max_drop is not None,
        measure=drop.measure,
        drop_points=drop.points,
        low_points=drop.low,
        high_points=drop.high,
        met=drop.points <= budget,
        warning=warning,
    )


def run_warnings(
    data: CalibrationData,
    layers: Sequence[LayerRow],
    budget: BudgetSection | None,
    built: Built,
    fidelity: Fidelity,
    profiles: Iterable[Profile] = (),
) -> list[str]:
    """Return what may be wrong with a result, the gravest first."""
    from lsp_deploy.engines.profiler import busy_words

    warnings = list(built.failures)
    if fidelity.non_finite_samples:
        warnings.append(f"the compressed model gave NaN or infinity for {fidelity.non_finite_samples} samples")
    if budget is not None and not budget.met:
        warnings.append(f"the {budget.measure} top-1 loss is {budget.drop_points:.2f} points: {budget_words(budget)}")
    if budget is not None and budget.warning:
        warnings.append(budget.warning)
    if budget is not None and (unsure := _unsure(fidelity, budget)):
        warnings.append(unsure)
    if data.preprocess_from == "default" and "images" in (data.calibration.kind, data.held_out.kind):
        warnings.append("the model does not say how its images are prepared: imagenet was assumed (--preprocess)")
    skipped = {dataset.name: dataset.skipped for dataset in (data.calibration, data.held_out) if dataset.skipped}
    warnings += [f"{number} images of {name} did not decode and were skipped" for name, number in skipped.items()]
    other = [layer for layer in layers if layer.engine.matches_request is False]
    if other:
        warnings.append(
            f"the engine computes {len(other)} of {len(layers)} linear layers in another element type than asked: "
            f"{other[0].name}: {other[0].engine.note}{' and others' if len(other) > 1 else ''}"
        )
    left = [layer for layer in layers if not layer.gone]
    stay = [
        layer
        for layer in left
        if layer.sparsity.pattern == "block" and layer.execution.kernel == "engine" and not layer.execution.times_us
    ]
    if stay:
        warnings.append(
            f"the block zeros of {formatting.count(len(stay), 'layer')} stay in ordinary MatMuls, at the dense speed: "
            f"{stay[0].name}: {stay[0].execution.reason}"
        )
    gain_nothing = sum(layer.engine.uses_two_four is False for layer in layers)
    if gain_nothing and built.info is not None:
        builder = built.info.backend
        why = "it has no kernels for them" if builder in WITHOUT_TWO_FOUR else "it chose other kernels"
        elsewhere = "; TensorRT on the device itself can use them" if builder == "tensorrt_rtx" else ""
        warnings.append(f"2:4 zeros of {gain_nothing} layers gain no speed in the {builder} engine: {why}{elsewhere}")
    if busy := busy_words(profiles):
        warnings.append(busy)
    return warnings


def _unsure(fidelity: Fidelity, budget: BudgetSection) -> str | None:
    """Return why the expected loss says little: it is at most the probability that the dense model gives itself."""
    confidence = fidelity.dense_confidence_percent
    if budget.measure != "expected" or confidence is None or confidence >= max(_UNSURE_PERCENT, budget.max_drop_points):
        return None
    return (
        f"the dense model gives its own answers a probability of {formatting.percent(confidence)} on average, and the "
        f"expected loss is at most that, whatever pruning does: a budget of {budget.max_drop_points:g} bounds little. "
        "Are these class scores of a trained model, and images as it knows them? 500 labelled held-out images decide"
    )
