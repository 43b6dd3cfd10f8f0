"""What `profile` and `compare` print: answers, latencies, power, and layers where they were asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lsp_deploy.reporting import formatting

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from lsp_deploy.comparing import Comparison, LayerFidelity
    from lsp_deploy.engines.fidelity import Fidelity
    from lsp_deploy.engines.profiler import Profile

__all__ = ["comparison_tables", "profile_tables"]


def comparison_tables(comparison: Comparison) -> list[RenderableType]:
    """Return the tables of a comparison: answers, latency, power, and layers where they were asked for."""
    tables = [_answer_table(comparison), *profile_tables(comparison.profiles)]
    return [*tables, *_layer_tables(comparison.layers)] if comparison.layers else tables


def profile_tables(profiles: Sequence[Profile]) -> list[RenderableType]:
    """Return a table of latencies, one row a model and batch size, what they rest on, and power."""
    from rich.text import Text

    from lsp_deploy.engines.profiler import busy_words
    from lsp_deploy.power_tables import power_tables

    first = profiles[0]
    table = _table(f"latency measured on {first.device}, {first.regime}; {first.clock}")
    for column in ("model", "batch", "threads", "min ms", "median ms", "p90 ms", "p99 ms", "samples/s"):
        table.add_column(column, justify="left" if column == "model" else "right", overflow="fold")
    for one in profiles:
        latency = (one.latency_min_ms, one.latency_median_ms, one.latency_p90_ms, one.latency_p99_ms)
        numbers = [f"{value:.2f}" for value in latency]
        table.add_row(one.label, str(one.batch), str(one.threads), *numbers, f"{one.throughput_per_s:.1f}")
    lines = _speedups(profiles)
    if busy := busy_words(profiles):
        lines.append(busy)
    return [table, *(Text(line) for line in lines), *power_tables(profiles)]


def _speedups(profiles: Sequence[Profile]) -> list[str]:
    from lsp_deploy.engines.profiler import latency_ratio

    by_label = {(one.label, one.batch): one for one in profiles}
    lines = []
    for (label, batch), compressed in by_label.items():
        dense = by_label.get(("dense", batch))
        if label != "compressed" or dense is None:
            continue
        ratio = latency_ratio(dense, compressed)
        lines.append(
            f"batch {batch}: {ratio.median:.2f} × as fast as dense, {ratio.low:.2f} to {ratio.high:.2f} × over "
            f"{formatting.count(ratio.rounds, 'round')} (measured)"
        )
    return lines


def _answer_table(comparison: Comparison) -> Table:
    table = _table(f"answers on {comparison.data}, measured")
    table.add_column("")
    for column in ("dense", "compressed"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("")
    for cells in _answers(comparison.fidelity):
        table.add_row(*cells)
    return table


def _answers(fidelity: Fidelity) -> list[tuple[str, str, str, str]]:
    rows = []
    shares = (
        ("top-1", fidelity.dense_top1_percent, fidelity.compressed_top1_percent),
        ("top-5", fidelity.dense_top5_percent, fidelity.compressed_top5_percent),
    )
    for name, dense, compressed in shares:
        if dense is not None and compressed is not None:
            rows.append((name, formatting.percent(dense, 2), formatting.percent(compressed, 2), "by the labels"))
    if fidelity.measured_drop_points is not None:
        ends = formatting.interval(fidelity.measured_drop_low_points, fidelity.measured_drop_high_points)
        rows.append(("top-1 loss", "", formatting.points(fidelity.measured_drop_points), f"95 %: {ends}"))
    if fidelity.agreement_percent is not None:
        rows.append(("same answer", "", formatting.percent(fidelity.agreement_percent, 2), ""))
    if fidelity.dense_confidence_percent is not None:
        words = "mean probability that it gives its own answers"
        rows.append(("sureness", formatting.percent(fidelity.dense_confidence_percent, 2), "", words))
    if fidelity.expected_drop_points is not None:
        ends = formatting.interval(fidelity.expected_drop_low_points, fidelity.expected_drop_high_points)
        words = f"95 %: {ends}; what that probability loses"
        rows.append(("expected top-1 loss", "", formatting.points(fidelity.expected_drop_points), words))
    rows.append(("signal to noise", "", f"{fidelity.sqnr_db:.1f} dB", "of the output"))
    rows.append(("cosine similarity", "", f"{fidelity.cosine:.4f}", "of the output"))
    if fidelity.non_finite_samples:
        samples = formatting.count(fidelity.non_finite_samples, "sample")
        rows.append(("NaN or infinity", "", samples, "counted as wrong answers"))
    return rows


def _layer_tables(layers: Sequence[LayerFidelity]) -> list[RenderableType]:
    from rich.text import Text

    table = _table("signal to noise of every linear layer's output, worst first")
    table.add_column("layer", overflow="fold")
    table.add_column("dB", justify="right")
    for layer in sorted(layers, key=lambda one: one.sqnr_db):
        table.add_row(layer.name, f"{layer.sqnr_db:.1f}")
    changed = (
        "A model that compress pruned in other bases (--basis change, its default with real images) holds other values "
        "inside, of the same outputs: its layers are then far from the dense ones without any loss."
    )
    return [table, Text(changed)]


def _table(title: str) -> Table:
    from rich.table import Table
    from rich.text import Text

    return Table(title=Text(title), title_justify="left", box=None, pad_edge=False)
