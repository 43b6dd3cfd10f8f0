"""Zeros that `auto` adds on a GPU: 2:4, or blocks where those make the network faster still.

A search for blocks is long, and on many targets it cannot win. So it asks for as few blocks as would beat 2:4, looks at
what a step on the way there loses, and where that is too much, or no mask can be fast enough, tries nothing more.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from lsp_deploy.allocation.blocks import blocks_within_loss
from lsp_deploy.allocation.gpu_execution import gpu_time_us, operator_cannot_run
from lsp_deploy.allocation.precision import COMPRESSIBLE_ROLES
from lsp_deploy.allocation.pruning import Pruning
from lsp_deploy.allocation.question import Question
from lsp_deploy.allocation.sparsity import excluded
from lsp_deploy.allocation.two_four import add_two_four
from lsp_deploy.errors import UserError
from lsp_deploy.plan import LayerPlan, Plan

if TYPE_CHECKING:
    from lsp_deploy.linear_layers import LinearLayer

__all__ = ["add_gpu_zeros"]

# Of the linear layers' time: below that, `auto` keeps what the engine runs by itself. The cost model's ratios are off
# by up to a fifth, and it does not know what an engine fuses with its own kernels.
_WORTH_MEASURED, _WORTH_ESTIMATED = 0.03, 0.15
_FEWEST = 0.1  # of the blocks, in all layers at once: about what the embedded network, an easy one, can do with


def add_gpu_zeros(question: Question, plan: Plan, budget: float) -> tuple[Plan, Pruning | None]:
    """Return the plan with the zeros that are fastest on the target, within `budget` points of loss.

    Layers that stay dense, and those that get 2:4, say why they have no blocks where that was looked into.
    """
    halved, found = add_two_four(question, plan.branch(), budget)
    if not _may_have_blocks(question):
        return halved, found
    if question.gpu_timings is not None and not question.gpu_timings.has_operator:
        return _without_blocks(halved, "blocks were not tried: the operator was not timed", question, why=""), found
    trial = plan.branch()
    trial.block_shape = question.recipe.block_shape
    try:
        dense_us = gpu_time_us(question, plan)
        worth = _WORTH_ESTIMATED if question.gpu_timings is None else _WORTH_MEASURED
        wanted_us = (1 - worth) * gpu_time_us(question, halved)
        if _least_us(question, trial) > wanted_us:
            return _without_blocks(halved, f"zero blocks cannot save {worth:.0%} of the time", question), found
        losses: dict[float, float] = {}
        left = wanted_us / dense_us
        blocks, pruning = blocks_within_loss(question, trial, budget, "auto", first=left, losses=losses)
        blocks_us = gpu_time_us(question, blocks)
    except UserError as error:  # nobody asked for blocks
        return _without_blocks(halved, f"blocks were not tried: {error}", question, why=""), found
    if pruning is None:
        few = f"zero blocks within {question.points_of_loss(budget)} are too few to save {worth:.0%} of the time"
        keep, points = next(one for one in losses.items() if one[1] > budget)
        lost = "no mask leaves so little" if math.isinf(points) else f"{points:.2f} points are lost"
        reason = f"{few}{_basis(question)}; {lost} with {keep:.0%} of the time left"
        return _without_blocks(halved, reason, question, why=""), found
    if blocks_us > wanted_us:
        least = (
            f"zero blocks leave {blocks_us / dense_us:.0%} of the time, {wanted_us / dense_us:.0%} would be worth it"
        )
        return _without_blocks(halved, least, question), found
    return blocks, pruning


def _may_have_blocks(question: Question) -> bool:
    """Return whether blocks can be found for their time, and what they lose be measured.

    A budget of another kind decides what is removed, and the LSP allocator counts FLOPs.
    """
    if question.pruner is None or question.why_no_zeros is not None:
        return False
    return question.recipe.allocator == "exact" and question.pruner.asked_keep is None


def _least_us(question: Question, plan: Plan) -> float:
    """Return what the layers would take with as few blocks as a search may hope for."""
    sparse = plan.branch()
    shape = question.recipe.block_shape
    for layer, of_model in zip(sparse.layers, question.layers, strict=True):
        if _can_lose_blocks(layer, of_model, question):
            layer.sparsity.pattern = "block"
            sparse.masks[layer.name] = _mask((layer.K, layer.N), shape)
    return gpu_time_us(question, sparse)


def _can_lose_blocks(layer: LayerPlan, of_model: LinearLayer, question: Question) -> bool:
    if layer.role not in COMPRESSIBLE_ROLES or excluded(of_model, question.recipe.exclude) is not None:
        return False
    return operator_cannot_run(layer, of_model, question.recipe.block_shape, question.target) is None


def _mask(size: tuple[int, int], block: tuple[int, int]) -> np.ndarray:
    """Return a mask [K, N] of which the fraction `_FEWEST` of the blocks survives, one at least."""
    grid = -(-size[0] // block[0]), -(-size[1] // block[1])
    kept = np.arange(grid[0] * grid[1]) < max(1, round(_FEWEST * grid[0] * grid[1]))
    return kept.reshape(grid).repeat(block[0], axis=0).repeat(block[1], axis=1)[: size[0], : size[1]]


def _basis(question: Question) -> str:
    """Return where the times in a reason come from."""
    timings = question.gpu_timings
    return " (estimated)" if timings is None else f" (measured on {timings.device})"


def _without_blocks(plan: Plan, reason: str, question: Question, why: str | None = None) -> Plan:
    """Return the plan, every layer that could have lost blocks with the reason why it has not."""
    why = _basis(question) if why is None else why
    result = plan.branch()
    for layer, of_model in zip(result.layers, question.layers, strict=True):
        if _can_lose_blocks(layer, of_model, question):
            layer.sparsity.reason += f"; {reason}{why}"
    return result
