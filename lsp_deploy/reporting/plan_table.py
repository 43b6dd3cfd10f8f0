"""The plan as a table, for `--dry-run`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lsp_deploy.plan import Plan

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["plan_table"]


def plan_table(plan: Plan) -> Table:
    """Return a table of every layer's decisions and reasons."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=f"plan for {plan.target}: what would be done")
    for column in ("layer", "role", "K × N", "zeros", "type", "why"):
        table.add_column(column, overflow="fold")
    for layer in plan.layers:
        sparsity = layer.sparsity
        zeros = "dense" if sparsity.pattern == "dense" else f"{sparsity.pattern} {sparsity.zeros:.0%}"
        why = f"{layer.precision.reason}; {sparsity.reason}"
        table.add_row(
            escape(layer.name), layer.role, f"{layer.K} × {layer.N}", zeros, layer.precision.dtype, escape(why)
        )
    return table
