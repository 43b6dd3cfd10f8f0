"""From what was asked and what was measured to a plan: every layer's decision with its reason.

Zeros that were typed come first; element types are decided on what they leave; then what `auto` adds, and last what
runs each layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from lsp_deploy import __version__
from lsp_deploy.allocation.blocks import add_blocks, blocks_within_loss, typed_blocks
from lsp_deploy.allocation.budget import largest_within_budget
from lsp_deploy.allocation.execution import decide_execution
from lsp_deploy.allocation.gpu_execution import decide_gpu_execution
from lsp_deploy.allocation.gpu_zeros import add_gpu_zeros
from lsp_deploy.allocation.precision import decide_precision, without_int8
from lsp_deploy.allocation.pruning import Pruning
from lsp_deploy.allocation.question import Question, planned_weight, set_weight_scales
from lsp_deploy.allocation.sparsity import dense
from lsp_deploy.allocation.two_four import typed_two_four
from lsp_deploy.plan import LayerPlan, Plan, PrecisionDecision

if TYPE_CHECKING:
    from lsp_deploy.sensitivity.activations import ActivationStatistics

__all__ = ["decide"]


def decide(question: Question) -> tuple[Plan, Pruning | None]:
    """Decide every layer's zeros and precision; also returns how the zeros were found, where there are any.

    What was typed is carried out; what `auto` adds is bounded by the loss budget, and by what pays on the target.

    Raises:
        UserError: a budget that block sparsity cannot reach, or one that cannot be measured.
    """
    recipe = question.recipe
    keep = question.pruner.asked_keep if question.pruner is not None else recipe.flops
    pruning: Pruning | None = None
    plan = _undecided(question)
    if recipe.sparsity == "2:4":
        plan, pruning = typed_two_four(question, plan)
    elif recipe.sparsity == "block" and keep is not None:
        plan, pruning = typed_blocks(question, plan, keep)
    _decide_precisions(question, plan, question.statistics(plan))
    typed_loss = _typed_loss(question, plan)
    budget = question.max_drop + (typed_loss if recipe.max_drop is None else 0.0)
    _bound_int8(question, plan, budget)
    if recipe.sparsity == "auto" or (recipe.sparsity == "block" and keep is None):
        plan = decide_execution(question, plan, budget)  # what bf16 loses counts when zeros are added
    added: Pruning | None = None
    if recipe.sparsity == "block" and keep is None:
        plan, added = blocks_within_loss(question, plan, budget)
    elif recipe.sparsity == "auto":
        add = add_gpu_zeros if question.timings is None else add_blocks
        plan, added = add(question, plan, budget)
    on_gpu = question.target.kind == "gpu"
    plan = decide_gpu_execution(question, plan) if on_gpu else decide_execution(question, plan, budget)
    set_weight_scales(plan, question.weights)
    return plan, added or pruning


def _undecided(question: Question) -> Plan:
    """Return a plan in which every layer is dense and computes in the compute type."""
    recipe = question.recipe
    return Plan(
        tool_version=__version__,
        model_sha256=question.model_sha256,
        target=question.target.name,
        compute_type=question.compute_type,
        opset=question.opset,
        io_types=recipe.io_types,
        block_shape=recipe.block_shape if recipe.sparsity == "block" else None,
        recipe=recipe.typed(),
        layers=[
            LayerPlan(
                name=layer.name,
                role=layer.role,
                block=layer.block,
                K=layer.K,
                N=layer.N,
                M=layer.M,
                sparsity=dense(recipe.sparsity, f"left dense: --sparsity {recipe.sparsity}"),
                precision=PrecisionDecision(asked=recipe.precision, dtype=question.compute_type, reason="undecided"),
            )
            for layer in question.layers
        ],
    )


def _decide_precisions(question: Question, plan: Plan, statistics: Mapping[str, ActivationStatistics]) -> None:
    for layer, decided in zip(question.layers, plan.layers, strict=True):
        decided.precision = decide_precision(
            layer,
            planned_weight(plan, layer.name, question.weights[layer.name]),
            statistics[str(layer.x.name)],
            asked=question.recipe.precision,
            compute_type=question.compute_type,
            int8_on_target="int8" in question.target.types,
        )


def _typed_loss(question: Question, plan: Plan) -> float:
    """Measure what the typed choices lose by themselves, where `auto` may add to them."""
    recipe = question.recipe
    adds = recipe.precision == "auto" or recipe.sparsity == "auto" or question.timings is not None
    typed = recipe.precision == "int8" or bool(plan.masks)
    if question.loss is None or not (adds and typed) or recipe.max_drop is not None:
        return 0.0
    return max(0.0, question.loss_of(_without_auto(plan)))


def _without_auto(plan: Plan) -> Plan:
    trial = plan.branch()
    for layer in trial.layers:
        if layer.precision.asked == "auto" and layer.precision.dtype == "int8":
            layer.precision = without_int8(layer.precision, trial.compute_type, "the budget")
    return trial


def _bound_int8(question: Question, plan: Plan, budget: float) -> None:
    """Take int8 back from the layers it hurts most until the loss is within the budget; `auto` only."""
    chosen = [layer for layer in plan.layers if layer.precision.dtype == "int8" and layer.precision.asked == "auto"]
    if question.loss is None or not chosen:
        return
    order = sorted(chosen, key=lambda layer: -(layer.precision.sqnr_db or 0.0))

    def trial(count: int) -> Plan:
        candidate = plan.branch()
        for layer in order[count:]:
            dropped = candidate.layer(layer.name)
            dropped.precision = without_int8(dropped.precision, candidate.compute_type, question.points_of_loss(budget))
        return candidate

    count = largest_within_budget(len(order), lambda n: question.loss_of(trial(n)), budget)
    plan.layers = trial(count).layers
