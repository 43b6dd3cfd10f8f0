"""Block zeros: to a budget that was typed, or as far as the loss on held-out images allows."""

from __future__ import annotations

import math

from lsp_deploy.allocation.budget import climb_within_budget
from lsp_deploy.allocation.execution import least_time_us
from lsp_deploy.allocation.pruning import OutOfReachError, Pruner, Pruning, adopt
from lsp_deploy.allocation.question import Question, renew_grids
from lsp_deploy.allocation.sparsity import dense, does_not_pay
from lsp_deploy.errors import UserError
from lsp_deploy.plan import Plan

__all__ = ["add_blocks", "blocks_within_loss", "typed_blocks"]

_STEPS = 20  # without a budget, what remains is searched in steps of 5 %
_GENTLEST = 1 - 1 / _STEPS
_WORTH = 0.03  # of the linear layers' time: below that, `auto` leaves them dense


def add_blocks(question: Question, plan: Plan, budget: float) -> tuple[Plan, Pruning | None]:
    """Return the plan with blocks removed where the measured times say that it pays, within `budget` points of loss.

    Nobody asked for zeros: where they cannot be had, or would save little, layers stay dense and say why.

    Raises:
        ValueError: the question has no timings.
    """
    if (reason := _why_none(question)) is not None:
        return _dense(question, plan, reason, "auto"), None
    trial = plan.branch()
    trial.block_shape = question.recipe.block_shape
    try:
        found, pruning = blocks_within_loss(question, trial, budget, "auto")
    except UserError as error:
        reason = f"left dense: what zero blocks would lose cannot be measured: {error}"
        return _dense(question, plan, reason, "auto"), None
    if pruning is None:
        found.block_shape = None
        return found, None
    saved = 1 - least_time_us(question, found) / least_time_us(question, plan)
    if saved >= _WORTH:
        return found, pruning
    little = (
        f"left dense: zero blocks within {question.points_of_loss(budget)} would save {max(saved, 0):.1%} of the "
        f"linear layers' time (measured), less than {_WORTH:.0%}"
    )
    return _dense(question, plan, little, "auto"), None


def typed_blocks(question: Question, plan: Plan, keep: float) -> tuple[Plan, Pruning | None]:
    """Return the plan with blocks removed until the fraction `keep` of what the budget counts is left.

    Raises:
        UserError: so little cannot be left, or there is nothing to differentiate with.
    """
    pruner = _pruner(question)
    if keep >= 1:
        return _dense(question, plan, "left dense: the budget is met without pruning", "block"), None
    pruning = _with_words(question, pruner.blocks(keep))
    return adopt(plan, pruning), pruning


def blocks_within_loss(
    question: Question,
    plan: Plan,
    budget: float,
    asked: str = "block",
    *,
    first: float = _GENTLEST,
    losses: dict[float, float] | None = None,
) -> tuple[Plan, Pruning | None]:
    """Return the plan with as many blocks removed as lose no more than `budget` points on the held-out images.

    No more than --flops needs, where that is given. From few to many: a gradual search goes on from the step before,
    and a budget of a point is usually met early. `first` is the fraction of the measure that is to be left at most.
    Where that is several steps away, one step is looked at beforehand: what loses too much by then is not gone on with.
    What was found to be lost, in points, is added to `losses` by the fraction left.

    Raises:
        UserError: the model has no class output to measure a loss on, or there is nothing to differentiate with.
    """
    pruner = _pruner(question)
    if question.loss is None:
        raise UserError(
            "--sparsity block needs --flops or another budget for this model: "
            "it has no class output to measure a loss on"
        )

    least = question.recipe.flops or 0.0

    def found_with(keep: float) -> tuple[Plan, Pruning] | None:
        try:
            pruning = _with_words(question, pruner.blocks(keep))
        except OutOfReachError:
            return None  # layers that have to stay hold more than that
        pruning.asked = asked
        return renew_grids(question, adopt(plan, pruning)), pruning

    def trial(steps: int) -> tuple[float, tuple[Plan, Pruning] | None]:
        keep = max(round(first - (steps - 1) / _STEPS, 9), least)
        return keep, found_with(keep)

    def loss(tried: tuple[float, tuple[Plan, Pruning] | None]) -> float:
        keep, found = tried
        lost = float("inf") if found is None else question.loss_of(found[0])
        if losses is not None:
            losses[keep] = lost
        return lost

    # One step more would leave nothing, or less than is wanted.
    most = min(math.ceil(first * _STEPS - 1e-9), 1 + max(0, math.ceil((first - least) * _STEPS - 1e-9)))
    on_the_way = first < _GENTLEST and question.recipe.search != "one-shot"
    if on_the_way and loss((_GENTLEST, found_with(_GENTLEST))) > budget:
        most = 0
    best = climb_within_budget(most, trial, loss, budget)
    if best is None or best[1] is None:
        reason = f"left dense: no ratio of zero blocks fits {question.points_of_loss(budget)}"
        return _dense(question, plan, reason, asked), None
    return best[1]


def _why_none(question: Question) -> str | None:
    if question.timings is None:
        raise ValueError("whether zero blocks pay is not known: nothing was timed")
    times = question.timings.layers
    if all(does_not_pay(layer, question.target, "block", times[layer.name]) for layer in question.layers):
        return "left dense: zero blocks make no layer faster (measured)"
    return question.why_no_zeros


def _pruner(question: Question) -> Pruner:
    if question.pruner is None:
        raise UserError(f"--sparsity block: {question.why_no_pruner}")
    return question.pruner


def _with_words(question: Question, pruning: Pruning) -> Pruning:
    for layer in question.layers:
        reason = pruning.reasons.get(layer.name)
        times = None if question.timings is None else question.timings.layers[layer.name]
        no_gain = does_not_pay(layer, question.target, "block", times)
        if reason is not None and layer.name in pruning.masks and no_gain is not None:
            pruning.reasons[layer.name] = f"{reason}; {no_gain}"
    return pruning


def _dense(question: Question, plan: Plan, reason: str, asked: str) -> Plan:
    result = plan.branch()
    for layer in question.layers:
        result.layer(layer.name).sparsity = dense(asked, reason)
    return result
