"""Zeros that were found for a network, with all that goes with them; what a plan takes over."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from lsp_deploy.errors import UserError
from lsp_deploy.plan import Pattern, Plan, RecoveryDecision, SparsityDecision

__all__ = ["Analysis", "ChosenPoint", "OutOfReachError", "Pruner", "Pruning", "adopt"]


class OutOfReachError(UserError):
    """A budget below what is left when everything that may go has gone."""


@dataclass(frozen=True)
class ChosenPoint:
    """A layer's δ-curve of the dense network and where on it the layer ended."""

    delta: NDArray[np.float64]
    """Raw δ after the first j blocks are removed [blocks + 1] (LSP, Eq. 11); estimated to second order."""
    removed: int
    """Blocks that were removed."""


@dataclass(frozen=True)
class Analysis:
    """How block sparsity was decided."""

    objective: str
    """What was differentiated: loss, top1, pseudo or output."""
    samples: int
    """Calibration samples it was measured on."""
    kappa: float
    """κ of the empirical Fisher (Eq. 12)."""
    allocator: str
    """exact or lsp."""
    search: str
    """one-shot or gradual."""
    measure: str
    """What the budget is counted in: flops, latency_us, energy_uj, parameters or bytes."""
    keep: float
    """Fraction of the dense measure that the budget leaves."""
    predicted_damage: float
    """What one shot at this budget is expected to do, before recovery, in units of the objective; estimated."""
    curves: dict[str, ChosenPoint]
    """By layer name, of the layers that could be pruned."""


@dataclass
class Pruning:
    """Masks of some layers, the weights that survive, and why."""

    asked: str
    """What the recipe asked for: auto, 2:4 or block."""
    masks: dict[str, NDArray[np.bool_]] = field(default_factory=dict)
    """By layer name: bool [K, N], True survives. A layer that stays dense has none."""
    patterns: dict[str, Pattern] = field(default_factory=dict)
    """By layer name."""
    weights: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    """By layer name: [K, N], where they are other than the masked dense ones."""
    biases: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    """By layer name: [N], where they changed."""
    constants: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    """By `node:input`: other constants that changed."""
    recoveries: dict[str, RecoveryDecision] = field(default_factory=dict)
    """By layer name."""
    reasons: dict[str, str] = field(default_factory=dict)
    """By layer name, of those that are pruned or could have been."""
    method: str = ""
    """Score that the masks were chosen by."""
    notes: list[str] = field(default_factory=list)
    """What the user should know of how this was found."""
    analysis: Analysis | None = None
    """How blocks were chosen; None for other patterns."""


class Pruner(Protocol):
    """Finds zeros; the same question has the same answer."""

    @property
    def asked_keep(self) -> float | None:
        """The fraction of the dense measure that the recipe's budget leaves; None without a budget."""

    def two_four(self, names: Collection[str], asked: str) -> Pruning:
        """Prune the named layers to 2:4."""

    def two_four_damages(self, names: Collection[str]) -> dict[str, float]:
        """Predict what 2:4 in each of the named layers alone does to the objective, before recovery."""

    def blocks(self, keep: float) -> Pruning:
        """Prune blocks until the fraction `keep` of the budget's measure remains.

        Raises:
            OutOfReachError: so little cannot be left.
        """

    def finish(self) -> None:
        """Forget what only an interrupted run would need: all is decided."""


def adopt(plan: Plan, pruning: Pruning) -> Plan:
    """Return `plan` with the zeros and weights of `pruning`; layers that it says nothing of stay as they are."""
    adopted = plan.branch()
    adopted.masks.update(pruning.masks)
    adopted.weights.update(pruning.weights)
    adopted.biases.update(pruning.biases)
    adopted.constants.update(pruning.constants)
    for layer in adopted.layers:
        if layer.name in pruning.reasons:
            mask = pruning.masks.get(layer.name)
            layer.sparsity = SparsityDecision(
                asked=pruning.asked,
                pattern="dense" if mask is None else pruning.patterns[layer.name],
                zeros=0.0 if mask is None else float(1 - mask.mean()),
                method=None if mask is None else pruning.method,
                reason=pruning.reasons[layer.name],
            )
        if layer.name in pruning.recoveries:
            layer.recovery = pruning.recoveries[layer.name]
        elif layer.name in pruning.masks:
            layer.recovery = RecoveryDecision(reason="not asked for")
    return adopted
