"""What a run prints when it is done: before and after, why, the engine, the files."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lsp_deploy.reporting import formatting
from lsp_deploy.reporting.cards import as_asked_words, budget_words
from lsp_deploy.reporting.execution_rows import linear_time_words, operator_words
from lsp_deploy.reporting.plan_table import reason_table
from lsp_deploy.reporting.power_rows import power_cells
from lsp_deploy.reporting.pruning_words import loss_words, pruning_words
from lsp_deploy.reporting.report import Report

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

__all__ = ["summary_renderables"]

_MOST_REASONS = 6


def summary_renderables(report: Report) -> list[RenderableType]:
    """Return the summary of `report` for `console.show`; it fits 40 lines of 80 columns but for long commands."""
    from rich.console import Group
    from rich.text import Text

    parts: list[RenderableType] = [_before_and_after(report), reason_table(report.layers, most=_MOST_REASONS)]
    loss = loss_words(report.pruning, report.budget, report.fidelity)
    pruning = pruning_words(report.layers, report.flops.linear_remaining_fraction)
    times = None if report.linear_time is None else linear_time_words(report.linear_time, report.layers)
    attention = report.attention_execution
    fused = (
        f"attention: {attention.reason}" if attention is not None and (attention.times_us or attention.left) else None
    )
    parts += [Text(line) for line in (times, fused, pruning, loss) if line]
    words, *commands = _engine_lines(report)
    # Commands to be pasted are not broken; in a group, because a bare Text loses that when it is printed.
    parts += [Text(words), Group(*(Text(line, no_wrap=True, overflow="ignore") for line in commands))]
    names = ", ".join(file.name for file in report.outputs)
    on_gpu = report.target.compute_capability is not None
    needs = operator_words(report.layers, report.attention_execution, on_gpu=on_gpu)
    parts += [Text(line) for line in (f"files: {names}" if names else None, needs) if line]
    return parts + [Text(f"warning: {warning}", style="yellow") for warning in report.warnings]


def _before_and_after(report: Report) -> Table:
    from rich.table import Table
    from rich.text import Text

    title = Text(f"{report.model.file} for {report.target.title}")
    table = Table("", box=None, pad_edge=False, title=title, title_justify="left")
    for column in ("dense", "compressed"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("")
    for cells in (_size(report), *_answers(report), _budget(report), _flops(report), *_latencies(report)):
        if cells:
            table.add_row(*(Text(cell) for cell in cells))
    for cells in power_cells(report.power):
        table.add_row(*(Text(cell) for cell in cells))
    return table


def _size(report: Report) -> Sequence[str]:
    size = report.size
    left = f"{formatting.percent(size.compressed_percent)} left, measured"
    return "model file", formatting.file_size(size.dense_bytes), formatting.file_size(size.compressed_bytes), left


def _answers(report: Report) -> list[Sequence[str]]:
    fidelity = report.fidelity
    if fidelity is None:
        return []
    samples = formatting.count(fidelity.samples, "sample")
    if fidelity.agreement_percent is None:
        return [("output", "", f"{fidelity.sqnr_db:.1f} dB", f"signal to noise, {samples}, measured")]
    rows: list[Sequence[str]] = []
    if fidelity.top1_dense_percent is not None and fidelity.top1_compressed_percent is not None:
        shares = (
            formatting.percent(fidelity.top1_dense_percent, 2),
            formatting.percent(fidelity.top1_compressed_percent, 2),
        )
        rows.append(("top-1", *shares, f"{samples}, measured"))
    rows.append(("same answer", "", formatting.percent(fidelity.agreement_percent, 2), f"{samples}, measured"))
    return rows


def _budget(report: Report) -> Sequence[str]:
    budget = report.budget
    if budget is None:
        return ()
    ends = formatting.interval(budget.low_points, budget.high_points)
    words = f"95 %: {ends}; {budget_words(budget)}"
    return f"{budget.measure} top-1 loss", "", formatting.points(budget.drop_points), words


def _flops(report: Report) -> Sequence[str]:
    flops = report.flops
    left = f"{formatting.percent(100 * flops.linear_remaining_fraction)} left, counted, batch {flops.batch}"
    dense, compressed = formatting.flops(flops.linear_dense_flops), formatting.flops(flops.linear_remaining_flops)
    return "FLOPs of linear layers", dense, compressed, left


def _latencies(report: Report) -> list[Sequence[str]]:
    by_batch = {(profile.batch, profile.label): profile for profile in report.profiles}
    where = "its target" if report.target.name == "cpu" else f"this host's CPU, not {report.target.name}"
    rows: list[Sequence[str]] = []
    for ratio in report.speedups:
        dense, compressed = by_batch[ratio.batch, "dense"], by_batch[ratio.batch, "compressed"]
        medians = [formatting.milliseconds(profile.latency_median_ms) for profile in (dense, compressed)]
        # Of rounds in which both ran: not the ratio of the two medians beside it.
        rounds = f"median of {formatting.count(ratio.rounds, 'round')}, measured"
        words = f"{ratio.median_ratio:.2f} × as fast on {where}, batch {ratio.batch}, {rounds}"
        rows.append(("median latency", *medians, words))
    return rows


def _engine_lines(report: Report) -> list[str]:
    engine = report.engine
    if not engine.built:
        first, *rest = (engine.not_built_reason or "not built").splitlines()
        return [f"engine: {first}", *rest]
    words = f"engine: built by {engine.backend}, {formatting.file_size(engine.size_bytes or 0)}"
    if engine.build_seconds is not None:
        words += f" in {formatting.seconds(engine.build_seconds)}"
    counts = ", ".join(f"{number} {kind}" for kind, number in list(engine.layer_counts.items())[:4])
    return [f"{words}; {as_asked_words(report)}" + (f"; after fusion {counts}" if counts else "")]
