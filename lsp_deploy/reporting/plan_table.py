"""Plans as tables: every layer for `--dry-run`, and the reasons in groups."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lsp_deploy.plan import Plan
from lsp_deploy.reporting import formatting
from lsp_deploy.reporting.layer_rows import layer_rows
from lsp_deploy.reporting.pruning_rows import pruning_section
from lsp_deploy.reporting.pruning_words import loss_words, pruning_words
from lsp_deploy.reporting.reasons import execution_groups, precision_groups, sparsity_groups
from lsp_deploy.reporting.sections import LayerRow

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

    from lsp_deploy.allocation.pruning import Pruning

__all__ = ["plan_table", "reason_table"]


def plan_table(plan: Plan, pruning: Pruning | None = None) -> Group:
    """Return what `--dry-run` prints: every layer's decision, then the reasons, then what pruning comes to.

    Args:
        plan: the decisions.
        pruning: how the zeros were found, for what it predicts; None where that is not known.
    """
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    title = Text(f"plan for {plan.target}, compute type {plan.compute_type}: what would be done")
    table = Table(box=None, pad_edge=False, title=title, title_justify="left")
    table.add_column("layer", overflow="fold")
    table.add_column("role")
    table.add_column("K × N", justify="right", no_wrap=True)
    table.add_column("zeros", no_wrap=True)
    table.add_column("type")
    table.add_column("run by")
    rows = layer_rows(plan, None)
    for row in rows:
        sparsity = row.sparsity
        zeros = f" {formatting.percent(sparsity.zeros_percent)}" if sparsity.pattern != "dense" else ""
        cells = (
            row.name,
            row.role,
            f"{row.K} × {row.N}",
            sparsity.pattern + zeros,
            row.precision.dtype,
            row.execution.kernel,
        )
        table.add_row(*(Text(cell) for cell in cells))
    attention = f"attention: {plan.attention.reason}" if plan.attention.times_us or plan.attention.left else None
    words = [attention, pruning_words(rows), loss_words(pruning_section(pruning), None, None)]
    return Group(table, Text(), reason_table(rows), *(Text(line) for line in words if line))


def reason_table(layers: Sequence[LayerRow], *, most: int | None = None) -> Table:
    """Return why layers are what they are, in groups: at most `most` for types and as many for zeros.

    Where all are shown, what was chosen to run them, too: that is a group for every shape.
    """
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_column(no_wrap=True)
    table.add_column()
    topics = {"types": precision_groups, "zeros": sparsity_groups}
    if most is None:
        topics["run by"] = execution_groups
    for topic, grouped in topics.items():
        groups = grouped(layers)
        shown = groups[:most]
        for number, group in enumerate(shown):
            cells = (topic if number == 0 else "", str(len(group.layers)), group.outcome, group.reason)
            table.add_row(*(Text(cell) for cell in cells))
        rest = sum(len(group.layers) for group in groups[len(shown) :])
        if rest:
            table.add_row("", str(rest), "", "for other reasons: see report.html")
    return table
