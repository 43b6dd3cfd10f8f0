"""From what was asked and what was measured to a plan: every layer's decision with its reason."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from lsp_deploy import __version__
from lsp_deploy.allocation.budget import largest_within_budget
from lsp_deploy.allocation.precision import decide_precision, without_int8
from lsp_deploy.allocation.sparsity import (
    METHOD,
    MaskedLayer,
    block_layer,
    cannot_have_blocks,
    cannot_have_two_four,
    dense,
    does_not_pay,
    two_four_layer,
)
from lsp_deploy.errors import UserError
from lsp_deploy.plan import LayerPlan, Plan, SparsityDecision
from lsp_deploy.sensitivity.quantization import ComputeType, weight_scale

if TYPE_CHECKING:
    from lsp_deploy.hardware.target import Target
    from lsp_deploy.linear_layers import LinearLayer
    from lsp_deploy.recipe import Recipe
    from lsp_deploy.sensitivity.activations import ActivationStatistics

__all__ = ["DEFAULT_MAX_DROP", "Question", "decide"]

DEFAULT_MAX_DROP = 1.0
_RATIO_STEPS = 20  # block sparsity is searched in steps of 5 % of the blocks


@dataclass(frozen=True)
class Question:
    """Everything that the decisions depend on."""

    recipe: Recipe
    target: Target
    model_sha256: str
    opset: int
    compute_type: ComputeType
    layers: Sequence[LinearLayer]
    weights: Mapping[str, NDArray[np.float32]]
    """W [K, N] by layer name."""
    statistics: Mapping[str, ActivationStatistics]
    """By the name of the tensor that a layer reads."""
    attention_flops: int
    real_images: bool
    loss: Callable[[Plan], float] | None
    """Points of top-1 that a plan loses on the held-out images; None for a model without a class output."""

    @property
    def max_drop(self) -> float:
        """The loss budget in points."""
        return DEFAULT_MAX_DROP if self.recipe.max_drop is None else self.recipe.max_drop

    def input_of(self, layer: LinearLayer) -> ActivationStatistics:
        """Return the statistics of a layer's input."""
        return self.statistics[str(layer.x.name)]


def decide(question: Question) -> Plan:
    """Decide every layer's precision and zeros.

    What was typed is carried out; what `auto` adds is bounded by the loss budget, and by what pays on the target.

    Raises:
        UserError: a FLOPs target that block sparsity cannot reach.
    """
    plan = _typed_plan(question)
    typed_loss = _typed_loss(question, plan)
    budget = question.max_drop + (typed_loss if question.recipe.max_drop is None else 0.0)
    _bound_int8(question, plan, budget)
    if question.recipe.sparsity == "block":
        _choose_blocks(question, plan, budget)
    if question.recipe.sparsity == "auto":
        _add_two_four(question, plan, budget)
    set_weight_scales(plan, question.weights)
    return plan


def set_weight_scales(plan: Plan, weights: Mapping[str, NDArray[np.float32]]) -> None:
    """Set the int8 scales of every quantized weight, masks applied; weights [K, N] by layer name."""
    plan.weight_scales.clear()
    for layer in plan.layers:
        if layer.precision.dtype == "int8":
            weight = weights[layer.name]
            if layer.name in plan.masks:
                weight = weight * plan.masks[layer.name]
            plan.weight_scales[layer.name] = weight_scale(weight, plan.compute_type)


def remaining_flops(plan: Plan, attention_flops: int, flops_of: str) -> float:
    """Return the fraction of FLOPs left: of all linear layers, or with attention's matmuls (`model`)."""
    always = attention_flops if flops_of == "model" else 0
    total = sum(layer.flops for layer in plan.layers) + always
    left = sum(layer.flops * (1 - layer.sparsity.zeros) for layer in plan.layers) + always
    return left / total if total else 1.0


def _typed_plan(question: Question) -> Plan:
    recipe = question.recipe
    layers = []
    masks: dict[str, NDArray[np.bool_]] = {}
    for layer in question.layers:
        precision = decide_precision(
            layer,
            question.weights[layer.name],
            question.input_of(layer),
            asked=recipe.precision,
            compute_type=question.compute_type,
            int8_on_target="int8" in question.target.types,
        )
        sparsity = dense(recipe.sparsity, f"left dense: --sparsity {recipe.sparsity}")
        if recipe.sparsity == "2:4":
            sparsity = _typed_two_four(question, layer, masks)
        layers.append(
            LayerPlan(
                name=layer.name,
                role=layer.role,
                block=layer.block,
                K=layer.K,
                N=layer.N,
                M=layer.M,
                sparsity=sparsity,
                precision=precision,
            )
        )
    plan = Plan(
        tool_version=__version__,
        model_sha256=question.model_sha256,
        target=question.target.name,
        compute_type=question.compute_type,
        opset=question.opset,
        io_types=recipe.io_types,
        block_shape=recipe.block_shape if recipe.sparsity == "block" else None,
        recipe=recipe.typed(),
        layers=layers,
    )
    plan.masks.update(masks)
    _share_masks(plan, question)
    return plan


def _typed_two_four(question: Question, layer: LinearLayer, masks: dict[str, NDArray[np.bool_]]) -> SparsityDecision:
    if (reason := cannot_have_two_four(layer)) is not None:
        return dense("2:4", reason)
    masked = two_four_layer(question.weights[layer.name], question.input_of(layer))
    masks[layer.name] = masked.mask
    no_gain = does_not_pay(layer, question.target, "2:4")
    note = f", though it does not pay: {no_gain}" if no_gain else ""
    return _pruned("2:4", "2:4", masked, f"asked for: --sparsity 2:4{note}")


def _pruned(asked: str, pattern: str, masked: MaskedLayer, reason: str) -> SparsityDecision:
    return SparsityDecision(
        asked=asked,
        pattern=pattern,
        zeros=masked.zeros,
        method=METHOD,
        reason=f"{reason}; the pruned layer's output keeps {masked.sqnr_db:.1f} dB",
    )


def _typed_loss(question: Question, plan: Plan) -> float:
    """Measure what the typed choices lose by themselves, where `auto` may add to them."""
    recipe = question.recipe
    adds = recipe.precision == "auto" or recipe.sparsity == "auto"
    typed = recipe.precision == "int8" or recipe.sparsity == "2:4"
    if question.loss is None or not (adds and typed) or recipe.max_drop is not None:
        return 0.0
    return max(0.0, _loss_of(question, _without_auto(plan)))


def _without_auto(plan: Plan) -> Plan:
    trial = plan.branch()
    for layer in trial.layers:
        if layer.precision.asked == "auto" and layer.precision.dtype == "int8":
            layer.precision = without_int8(layer.precision, trial.compute_type, 0)
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
            dropped.precision = without_int8(dropped.precision, candidate.compute_type, budget)
        return candidate

    count = largest_within_budget(len(order), lambda n: _loss_of(question, trial(n)), budget)
    plan.layers = trial(count).layers


def _add_two_four(question: Question, plan: Plan, budget: float) -> None:
    """Give 2:4 to the layers that it pays for, least damage first, as far as budget and FLOPs target ask."""
    candidates: list[tuple[LayerPlan, MaskedLayer]] = []
    for layer, decided in zip(question.layers, plan.layers, strict=True):
        reason = cannot_have_two_four(layer)
        if reason is None and (no_gain := does_not_pay(layer, question.target, "2:4")) is not None:
            reason = f"left dense: {no_gain}"
        if reason is None and not question.real_images:
            reason = "left dense: auto prunes nothing without real images; name some with --calibration-data"
        if reason is None and question.loss is None:
            reason = "left dense: the model has no class output, so auto cannot measure what pruning would lose"
        if reason is not None:
            decided.sparsity = dense("auto", reason)
        else:
            candidates.append((decided, two_four_layer(question.weights[layer.name], question.input_of(layer))))
    order = sorted(candidates, key=lambda pair: -pair[1].sqnr_db)
    over = f"left dense: 2:4 here too would take the loss on held-out images above {budget:g} points"

    def trial(count: int) -> Plan:
        candidate = plan.branch()
        for position, (decided, masked) in enumerate(order):
            layer = candidate.layer(decided.name)
            if position < count:
                candidate.masks[layer.name] = masked.mask
                layer.sparsity = _pruned("auto", "2:4", masked, f"2:4 pays on {plan.target} and fits the loss budget")
            else:
                layer.sparsity = dense("auto", over)
        _share_masks(candidate, question)
        return candidate

    wanted = _layers_for_flops(question, trial, len(order))
    count = largest_within_budget(wanted, lambda n: _loss_of(question, trial(n)), budget)
    chosen = trial(count)
    if count == wanted < len(order):
        for decided, _ in order[count:]:
            reason = f"left dense: --flops {question.recipe.flops:g} is met without it"
            chosen.layer(decided.name).sparsity = dense("auto", reason)
    plan.layers = chosen.layers
    plan.masks.update(chosen.masks)


def _layers_for_flops(question: Question, trial: Callable[[int], Plan], most: int) -> int:
    if question.recipe.flops is None:
        return most
    for count in range(most + 1):
        left = remaining_flops(trial(count), question.attention_flops, question.recipe.flops_of)
        if left <= question.recipe.flops:
            return count
    return most


def _choose_blocks(question: Question, plan: Plan, budget: float) -> None:
    """Prune every compressible layer to one ratio of blocks: the FLOPs target's, or the most that the budget allows."""
    block = question.recipe.block_shape
    prunable = {layer.name for layer in question.layers if cannot_have_blocks(layer) is None}

    def trial(keep: float) -> Plan:
        candidate = plan.branch()
        for layer, decided in zip(question.layers, candidate.layers, strict=True):
            if layer.name not in prunable:
                decided.sparsity = dense("block", str(cannot_have_blocks(layer)))
            elif keep >= 1:
                decided.sparsity = dense("block", f"left dense: no ratio of zero blocks fits {budget:g} points of loss")
            else:
                masked = block_layer(question.weights[layer.name], question.input_of(layer), block, keep)
                candidate.masks[layer.name] = masked.mask
                no_gain = does_not_pay(layer, question.target, "block")
                decided.sparsity = _pruned("block", "block", masked, f"asked for: --sparsity block; {no_gain}")
        _share_masks(candidate, question)
        return candidate

    if not prunable:
        keep = 1.0
    elif question.recipe.flops is not None:
        keep = _ratio_for_flops(question, plan, prunable)
    elif question.loss is None:
        raise UserError("--sparsity block needs --flops for this model: it has no class output to measure a loss on")
    else:
        steps = largest_within_budget(
            _RATIO_STEPS - 1, lambda n: _loss_of(question, trial(1 - n / _RATIO_STEPS)), budget
        )
        keep = 1 - steps / _RATIO_STEPS
    chosen = trial(keep)
    plan.layers = chosen.layers
    plan.masks.update(chosen.masks)


def _ratio_for_flops(question: Question, plan: Plan, prunable: set[str]) -> float:
    recipe = question.recipe
    flops = recipe.flops if recipe.flops is not None else 1.0
    attention = question.attention_flops if recipe.flops_of == "model" else 0
    total = sum(layer.flops for layer in plan.layers) + attention
    pruned = sum(layer.flops for layer in plan.layers if layer.name in prunable)
    fixed = total - pruned
    keep = (flops * total - fixed) / pruned
    if keep <= 0:
        raise UserError(
            f"--flops {flops:g} cannot be reached: layers that are not pruned hold {fixed / total:.1%} of the FLOPs; "
            f"ask for more than {fixed / total:.3f}"
        )
    return min(keep, 1.0)


def _loss_of(question: Question, plan: Plan) -> float:
    set_weight_scales(plan, question.weights)
    if question.loss is None:
        raise ValueError("the loss of a model without a class output was asked for")
    return question.loss(plan)


def _share_masks(plan: Plan, question: Question) -> None:
    """Keep layers that share one weight alike, so that they go on sharing it: the first one's mask serves all."""
    first: dict[str, NDArray[np.bool_]] = {}
    for layer in question.layers:
        own = plan.masks.get(layer.name)
        if own is None:
            continue
        shared = first.setdefault(layer.weight_root, own)
        if shared.shape == own.shape:
            plan.masks[layer.name] = shared
