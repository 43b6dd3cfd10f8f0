"""Reasons in groups: a hundred layers say a handful of things, each with its own figures."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from lsp_deploy.reporting.execution_rows import run_as
from lsp_deploy.reporting.pruning_words import recovery_words
from lsp_deploy.reporting.sections import LayerRow

__all__ = [
    "ReasonGroup",
    "engine_groups",
    "execution_groups",
    "precision_groups",
    "recovery_groups",
    "sparsity_groups",
    "without_outcome",
]

# A figure, not a part of a name: the 8 of int8, the 2 of 2:4 and the 0 of blocks.0 stay as they are.
_FIGURE = re.compile(r"(?<![\w.:/\N{MINUS SIGN}-])-?\d+(?:\.\d+)?(?:e[+-]?\d+)?(?![\w:/]|\.\w)")


@dataclass(frozen=True)
class ReasonGroup:
    """Layers that were decided alike, for the same reason."""

    outcome: str
    """int8, fp16, 2:4, dense, ..."""
    reason: str
    """Without the outcome it may begin with; where figures differ from layer to layer, their range."""
    layers: tuple[int, ...]
    """Positions in the report's list of layers."""


def precision_groups(layers: Iterable[LayerRow]) -> list[ReasonGroup]:
    """Group layers by element type and reason, the largest group first."""
    return _groups((layer.precision.dtype, layer.precision.reason) for layer in layers)


def sparsity_groups(layers: Iterable[LayerRow]) -> list[ReasonGroup]:
    """Group layers by pattern of zeros and reason, the largest group first."""
    return _groups((layer.sparsity.pattern, layer.sparsity.reason) for layer in layers)


def recovery_groups(layers: Iterable[LayerRow]) -> list[ReasonGroup]:
    """Group layers by what was done to their surviving weights, the largest group first."""
    return _groups((_recovered(layer), recovery_words(layer) or "not pruned") for layer in layers)


def execution_groups(layers: Iterable[LayerRow]) -> list[ReasonGroup]:
    """Group layers by what was chosen to run them, the largest group first; none where there was no choice."""
    rows = list(layers)
    chosen = any(layer.execution.times_us or layer.execution.kernel != "engine" for layer in rows)
    return _groups(run_as(rows)) if chosen else []


def engine_groups(layers: Iterable[LayerRow]) -> list[ReasonGroup]:
    """Group layers by what the engine runs and what there is to say about it, the largest group first."""
    return _groups((_ran(layer), _said(layer)) for layer in layers)


def without_outcome(reason: str, outcome: str) -> str:
    """Return a reason without the outcome that it begins with, for a place where the outcome stands beside it."""
    return reason.removeprefix(f"{outcome}: ").removeprefix(f"left {outcome}: ")


def _recovered(layer: LayerRow) -> str:
    if layer.recovery.method == "reconstruct":
        return "refitted"
    return "dense" if layer.sparsity.pattern == "dense" else "masked"


def _ran(layer: LayerRow) -> str:
    engine = layer.engine
    if layer.gone:
        return "gone"
    return "not known" if engine.precision is None else f"{engine.precision} {engine.kind}"


def _said(layer: LayerRow) -> str:
    as_asked = ["as asked"] if layer.engine.matches_request else []
    note = [layer.engine.note] if layer.engine.note else []
    return "; ".join(as_asked + note)


def _groups(decisions: Iterable[tuple[str, str]]) -> list[ReasonGroup]:
    found: dict[tuple[str, str], list[tuple[int, str]]] = {}
    for position, (outcome, reason) in enumerate(decisions):
        found.setdefault((outcome, _FIGURE.sub("#", reason)), []).append((position, reason))
    groups = [
        ReasonGroup(
            outcome,
            without_outcome(_merged([reason for _, reason in members]), outcome),
            tuple(position for position, _ in members),
        )
        for (outcome, _), members in found.items()
    ]
    return sorted(groups, key=lambda group: -len(group.layers))


def _merged(reasons: list[str]) -> str:
    """Return the one reason, each figure that varies as "low to high"."""
    columns = zip(*(_FIGURE.findall(reason) for reason in reasons), strict=True)
    ranges = iter([_range(column) for column in columns])
    return _FIGURE.sub(lambda _: next(ranges), reasons[0])


def _range(figures: tuple[str, ...]) -> str:
    low, high = min(figures, key=float), max(figures, key=float)
    return low if float(low) == float(high) else f"{low} to {high}"
