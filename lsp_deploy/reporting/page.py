"""The report as one HTML page: nothing is loaded from elsewhere; for wide screens, phones, dark rooms and paper."""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from lsp_deploy.plan import Plan
from lsp_deploy.reporting import figures, formatting, pruning_figures
from lsp_deploy.reporting.cards import cards, headline
from lsp_deploy.reporting.power_rows import power_words
from lsp_deploy.reporting.pruning_words import (
    budget_share_words,
    damage_words,
    delta,
    loss_words,
    objective_unit,
    recovery_words,
)
from lsp_deploy.reporting.reasons import (
    ReasonGroup,
    engine_groups,
    execution_groups,
    precision_groups,
    recovery_groups,
    sparsity_groups,
    without_outcome,
)
from lsp_deploy.reporting.report import Report
from lsp_deploy.reporting.sections import LayerRow

__all__ = ["render_page"]

_FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class _Topic:
    """Reasons of one kind, and what the page calls them."""

    key: str
    title: str
    groups: list[ReasonGroup]


def render_page(report: Report, plan: Plan) -> str:
    """Return the page of `report`; the same report gives the same bytes. Masks are drawn from `plan`."""
    style, script = (Markup((_FOLDER / name).read_text(encoding="utf-8")) for name in ("page.css", "page.js"))
    environment = Environment(
        loader=FileSystemLoader(_FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(
        breakable=formatting.breakable,
        budget_share=budget_share_words,
        damage=damage_words,
        date=formatting.date,
        delta=delta,
        file_size=formatting.file_size,
        flops=formatting.flops,
        milliseconds=formatting.milliseconds,
        percent=formatting.percent,
        points=formatting.points,
        recovery=recovery_words,
        objective_unit=objective_unit,
        seconds=formatting.seconds,
        without_outcome=without_outcome,
    )
    topics = [
        _Topic("precision", "Element types", precision_groups(report.layers)),
        _Topic("zeros", "Zeros", sparsity_groups(report.layers)),
        *_recovery_topic(report.layers),
        *_execution_topic(report.layers),
        _Topic("engine", "What the engine runs", engine_groups(report.layers)),
    ]
    fidelity, budget = report.fidelity, report.budget
    return environment.get_template("page.html.jinja").render(
        report=report,
        style=style,
        script=script,
        style_hash=_csp_hash(style),
        script_hash=_csp_hash(script),
        headline=headline(report),
        cards=cards(report),
        topics=topics,
        group_of={topic.key: _group_of(topic.groups) for topic in topics},
        bars=pruning_figures.allocation_bars(report.layers),
        block_shape=plan.block_shape,
        patterns=pruning_figures.block_patterns(plan),
        curves=pruning_figures.delta_curves(report.layers),
        attention=pruning_figures.attention_strips(report.attention),
        loss=loss_words(report.pruning, budget, fidelity),
        latency=figures.latency_groups(report.profiles),
        power=power_words(report.power),
        accuracy=figures.accuracy_axis(fidelity) if fidelity else None,
        drop=figures.drop_axis(fidelity, budget.max_drop_points if budget else None) if fidelity else None,
        replay=_replay(report),
        share=_share(report.layers),
    )


def _recovery_topic(layers: list[LayerRow]) -> list[_Topic]:
    """Return what was done to surviving weights; nothing where no layer was pruned."""
    if all(layer.sparsity.pattern == "dense" and layer.recovery.method == "none" for layer in layers):
        return []
    return [_Topic("recovery", "Surviving weights", recovery_groups(layers))]


def _execution_topic(layers: list[LayerRow]) -> list[_Topic]:
    """Return what was chosen to run the layers; nothing where nothing was timed."""
    groups = execution_groups(layers)
    return [_Topic("execution", "What was chosen to run them", groups)] if groups else []


def _csp_hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _group_of(groups: list[ReasonGroup]) -> dict[int, int]:
    """Return the number of the group that each layer is in, by the layer's position."""
    return {position: number for number, group in enumerate(groups) for position in group.layers}


def _replay(report: Report) -> str:
    from shlex import quote

    return f"lsp-deploy compress {quote(report.model.file)} --target {quote(report.target.name)} --plan plan.json"


def _share(layers: list[LayerRow]) -> list[float]:
    """Return each layer's share of the linear layers' dense FLOPs, in percent."""
    total = sum(layer.flops for layer in layers) or 1
    return [100 * layer.flops / total for layer in layers]
