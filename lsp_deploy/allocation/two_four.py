"""2:4 zeros: typed for every layer that can have them, or by `auto` where they pay and the loss budget allows."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from lsp_deploy.allocation.budget import best_within_budget
from lsp_deploy.allocation.pruning import Pruning, adopt
from lsp_deploy.allocation.question import Question, renew_grids
from lsp_deploy.allocation.sparsity import METHOD, cannot_have_two_four, dense, does_not_pay, two_four_layer
from lsp_deploy.errors import UserError
from lsp_deploy.hardware.cost_model import layer_cost
from lsp_deploy.plan import Plan

if TYPE_CHECKING:
    from lsp_deploy.linear_layers import LinearLayer

__all__ = ["add_two_four", "typed_two_four"]

_GAIN = 0.03  # of the measured dense time, at least: less may be chance


def typed_two_four(question: Question, plan: Plan) -> tuple[Plan, Pruning]:
    """Return the plan with 2:4 zeros in every layer that can have them: it was asked for.

    Raises:
        UserError: the weights cannot be reconstructed.
    """
    names, reasons = [], {}
    for layer in question.layers:
        if (reason := cannot_have_two_four(layer, question.recipe.exclude)) is not None:
            plan.layer(layer.name).sparsity = dense("2:4", reason)
            continue
        names.append(layer.name)
        no_gain = _no_gain(question, plan, layer)
        note = f", though it does not pay: {no_gain}" if no_gain else ""
        reasons[layer.name] = f"asked for: --sparsity 2:4{note}"
    try:
        pruning = _prune(question, plan, names, "2:4")
    except UserError as error:
        raise UserError(f"{error}; with --recover none, 2:4 needs no gradients") from error
    found = pruning.reasons
    pruning.reasons = {
        name: f"{reason}{found.get(name, '')}" if name in pruning.masks else found[name]
        for name, reason in reasons.items()
    }
    return adopt(plan, pruning), pruning


def add_two_four(question: Question, plan: Plan, budget: float) -> tuple[Plan, Pruning | None]:
    """Return the plan with 2:4 zeros where they save the target most for the damage they are predicted to do.

    As many layers, in that order, as keep the measured loss on held-out images within `budget` points; no more than a
    FLOPs target needs.
    """
    names = []
    for layer in question.layers:
        if (reason := _why_not(question, plan, layer)) is not None:
            plan.layer(layer.name).sparsity = dense("auto", reason)
        else:
            names.append(layer.name)
    if not names or question.pruner is None:
        return plan, None
    try:
        damages = question.pruner.two_four_damages(names)
    except UserError as error:  # nobody asked for zeros: a model that cannot be differentiated goes without
        for name in names:
            plan.layer(name).sparsity = dense("auto", f"left dense: what 2:4 would lose cannot be predicted: {error}")
        return plan, None
    savings = {name: _saving(question, plan, name) for name in names}

    def damage_a_saving(name: str) -> tuple[float, float]:
        saved = savings[name]
        return (damages[name] / saved if saved > 0 else float("inf")), damages[name]

    order = sorted(names, key=damage_a_saving)
    wanted = _enough_for_flops(question, plan, order)
    flops_are_met = f"left dense: --flops {question.recipe.flops or 1:g} is met without it"

    def trial(count: int) -> tuple[Plan, Pruning]:
        pruning = _prune(question, plan, order[:count], "auto")
        words = pruning.reasons
        pruning.reasons = {}
        for position, name in enumerate(order):
            estimate = f"{_saved_words(question, plan, savings[name])}, predicted damage {damages[name]:.3g}"
            if position < count and name not in pruning.masks:
                pruning.reasons[name] = words[name]
            elif position < count:
                pruning.reasons[name] = (
                    f"2:4 pays{_by_what(question)} ({estimate}) and fits the loss budget{words.get(name, '')}"
                )
            elif count == wanted:
                pruning.reasons[name] = flops_are_met
            else:
                pruning.reasons[name] = (
                    f"left dense: 2:4 here too ({estimate}) "
                    f"would exceed {question.points_of_loss(budget)} on held-out images"
                )
        return renew_grids(question, adopt(plan, pruning)), pruning

    def loss(found: tuple[Plan, Pruning]) -> float:
        return question.loss_of(found[0])

    best = best_within_budget(wanted, trial, loss, budget)
    if best is None:
        pruning = Pruning("auto")
        too_much = f"left dense: 2:4 in any layer would exceed {question.points_of_loss(budget)} on held-out images"
        pruning.reasons = dict.fromkeys(order, too_much if wanted else flops_are_met)
        return adopt(plan, pruning), pruning
    return best


def _why_not(question: Question, plan: Plan, layer: LinearLayer) -> str | None:
    if (reason := cannot_have_two_four(layer, question.recipe.exclude)) is not None:
        return reason
    if (no_gain := _no_gain(question, plan, layer)) is not None:
        return f"left dense: {no_gain}"
    return question.why_no_zeros


def _no_gain(question: Question, plan: Plan, layer: LinearLayer) -> str | None:
    """Return why 2:4 makes a layer no faster, by what was measured, else by the target's table; None where it does."""
    times = _measured_us(question, plan, layer.name)
    if times is None:
        return does_not_pay(layer, question.target, "2:4")
    assert question.gpu_timings is not None
    dense, halved = times
    if halved <= (1 - _GAIN) * dense:
        return None
    return f"2:4 makes this layer no faster (measured on {question.gpu_timings.device})"


def _prune(question: Question, plan: Plan, names: Collection[str], asked: str) -> Pruning:
    """Return 2:4 zeros in the named layers: reconstructed, or by |W|·‖x‖ alone.

    Reasons say what is left of a layer, or why one that is named has no mask.
    """
    if question.recover and question.pruner is not None:
        return question.pruner.two_four(names, asked)
    pruning = Pruning(asked, method=METHOD)
    statistics = question.statistics(plan)
    for layer in question.layers:
        if layer.name in names:
            masked = two_four_layer(question.weights[layer.name], statistics[str(layer.x.name)])
            pruning.masks[layer.name], pruning.patterns[layer.name] = masked.mask, "2:4"
            pruning.reasons[layer.name] = f"; the pruned layer's output keeps {masked.sqnr_db:.1f} dB"
    _share(question, pruning.masks)
    return pruning


def _share(question: Question, masks: dict[str, NDArray[np.bool_]]) -> None:
    """Keep layers that share one weight alike, so that they go on sharing it: the first one's mask serves all."""
    first: dict[str, NDArray[np.bool_]] = {}
    for layer in question.layers:
        own = masks.get(layer.name)
        if own is not None:
            shared = first.setdefault(layer.weight_root, own)
            if shared.shape == own.shape:
                masks[layer.name] = shared


def _saving(question: Question, plan: Plan, name: str) -> float:
    """Return the microseconds that 2:4 saves a layer at the opt shapes: measured, else estimated by the cost model."""
    times = _measured_us(question, plan, name)
    if times is not None:
        return times[0] - times[1]
    layer = plan.layer(name)

    def time_us(pattern: str) -> float:
        return layer_cost(
            "latency_us",
            question.target,
            layer.M,
            layer.K,
            layer.N,
            layer.precision.dtype,
            pattern="2:4" if pattern == "2:4" else "dense",
            block=(32, 32),
        )

    return time_us("dense") - time_us("2:4")


def _measured_us(question: Question, plan: Plan, name: str) -> tuple[float, float] | None:
    """Return what a layer takes dense and with 2:4 zeros, in its element type, µs; None where that was not measured."""
    if question.gpu_timings is None:
        return None
    times, dtype = question.gpu_timings.at(name, 1.0), plan.layer(name).precision.dtype
    if f"two_four {dtype}" not in times:
        return None
    return times[f"matmul {dtype}"], times[f"two_four {dtype}"]


def _saved_words(question: Question, plan: Plan, saved: float) -> str:
    if question.gpu_timings is not None:
        return f"measured to save {saved:.3g} µs on {question.gpu_timings.device}"
    words = f"estimated to save {saved:.3g} µs" if saved > 0 else "no saving by the cost model"
    return f"{words} on {plan.target}"


def _by_what(question: Question) -> str:
    return "" if question.gpu_timings is not None else " by the target's table"


def _enough_for_flops(question: Question, plan: Plan, order: Collection[str]) -> int:
    """Return how many of the layers, in order, meet the FLOPs target; all where there is none or it is out of reach."""
    recipe = question.recipe
    if recipe.flops is None:
        return len(order)
    flops = {layer.name: layer.flops for layer in plan.layers}
    always = question.attention_flops if recipe.flops_of == "model" else 0
    total = left = float(sum(flops.values()) + always)
    for count, name in enumerate(order):
        if left <= recipe.flops * total:
            return count
        left -= flops[name] / 2
    return len(order)
