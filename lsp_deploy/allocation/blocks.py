"""Block zeros: to a budget that was typed, or as far as the loss on held-out images allows."""

from __future__ import annotations

from lsp_deploy.allocation.budget import best_within_budget
from lsp_deploy.allocation.pruning import OutOfReachError, Pruner, Pruning, adopt
from lsp_deploy.allocation.question import Question, renew_grids
from lsp_deploy.allocation.sparsity import dense, does_not_pay
from lsp_deploy.errors import UserError
from lsp_deploy.plan import Plan

__all__ = ["blocks_within_loss", "typed_blocks"]

_STEPS = 20  # without a budget, what remains is searched in steps of 5 %


def typed_blocks(question: Question, plan: Plan, keep: float) -> tuple[Plan, Pruning | None]:
    """Return the plan with blocks removed until the fraction `keep` of what the budget counts is left.

    Raises:
        UserError: so little cannot be left, or there is nothing to differentiate with.
    """
    pruner = _pruner(question)
    if keep >= 1:
        return _dense(question, plan, "left dense: the budget is met without pruning"), None
    pruning = _with_words(question, pruner.blocks(keep))
    return adopt(plan, pruning), pruning


def blocks_within_loss(question: Question, plan: Plan, budget: float) -> tuple[Plan, Pruning | None]:
    """Return the plan with as many blocks removed as lose no more than `budget` points on the held-out images.

    Raises:
        UserError: the model has no class output to measure a loss on, or there is nothing to differentiate with.
    """
    pruner = _pruner(question)
    if question.loss is None:
        raise UserError(
            "--sparsity block needs --flops or another budget for this model: "
            "it has no class output to measure a loss on"
        )

    def trial(steps: int) -> tuple[Plan, Pruning] | None:
        try:
            pruning = _with_words(question, pruner.blocks(1 - steps / _STEPS))
        except OutOfReachError:
            return None  # layers that have to stay hold more than that
        return renew_grids(question, adopt(plan, pruning)), pruning

    def loss(found: tuple[Plan, Pruning] | None) -> float:
        return float("inf") if found is None else question.loss_of(found[0])

    best = best_within_budget(_STEPS - 1, trial, loss, budget)
    if best is None:
        return _dense(question, plan, f"left dense: no ratio of zero blocks fits {budget:g} points of loss"), None
    return best


def _pruner(question: Question) -> Pruner:
    if question.pruner is None:
        raise UserError(f"--sparsity block: {question.why_no_pruner}")
    return question.pruner


def _with_words(question: Question, pruning: Pruning) -> Pruning:
    for layer in question.layers:
        reason = pruning.reasons.get(layer.name)
        if reason is not None and layer.name in pruning.masks:
            pruning.reasons[layer.name] = f"{reason}; {does_not_pay(layer, question.target, 'block')}"
    return pruning


def _dense(question: Question, plan: Plan, reason: str) -> Plan:
    result = plan.branch()
    for layer in question.layers:
        result.layer(layer.name).sparsity = dense("block", reason)
    return result
