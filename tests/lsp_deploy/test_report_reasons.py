"""Reasons in groups: what differs from layer to layer is a range."""

from __future__ import annotations

from report_samples import sample_plan

from lsp_deploy.reporting.layer_rows import layer_rows
from lsp_deploy.reporting.reasons import sparsity_groups


def test_figures_with_an_exponent_are_figures() -> None:
    """Damages are as small as 3e-09: with a reason for each layer, nobody sees the few that there are."""
    plan = sample_plan(blocks=1, width=64)
    for number, layer in enumerate(plan.layers):
        layer.sparsity.pattern = "block"
        layer.sparsity.reason = f"{number + 1} of 16 blocks removed: the next ones would cost {number + 2.5:.2f}e-09"
    (group,) = sparsity_groups(layer_rows(plan, None))
    last = len(plan.layers)
    assert group.reason == (
        f"1 to {last} of 16 blocks removed: the next ones would cost 2.50e-09 to {last + 1.5:.2f}e-09"
    )
