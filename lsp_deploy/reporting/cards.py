"""The first thing that a reader sees: one sentence, and one card for every figure that decides."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from lsp_deploy.reporting import formatting
from lsp_deploy.reporting.report import Report
from lsp_deploy.reporting.sections import BudgetSection, FidelitySection

__all__ = ["Card", "as_asked_words", "budget_words", "cards", "headline"]


_ZEROS = {"2:4": "2:4 zeros", "block": "zero blocks"}


@dataclass(frozen=True)
class Card:
    """One figure: dense to compressed."""

    title: str
    value: str
    detail: str
    basis: str
    share_percent: float | None = None
    """What is left of the dense model, for the bar; None: no bar."""
    state: str = ""
    """good, bad, warn or nothing."""


def headline(report: Report) -> str:
    """Return what the run achieved, in a sentence."""
    types = Counter(layer.precision.dtype for layer in report.layers).most_common()
    patterns = Counter[str](layer.sparsity.pattern for layer in report.layers)
    layers = formatting.count(len(report.layers), "linear layer")
    if len(types) == 1:
        words = [f"All {layers} compute in {types[0][0]}"]
    else:
        words = [f"Of {layers} {_listed([f'{number} compute in {dtype}' for dtype, number in types])}"]
    zeros = [f"{patterns[pattern]} have {name}" for pattern, name in _ZEROS.items() if patterns[pattern]]
    words.append(_listed(zeros) or "none has zeros")
    words.append(f"the file has {formatting.percent(report.size.compressed_percent)} of the dense model's size")
    fidelity = report.fidelity
    if fidelity is None:
        return "; ".join(words) + "."
    if fidelity.top1_compressed_percent is not None and fidelity.top1_dense_percent is not None:
        top1 = formatting.percent(fidelity.top1_compressed_percent, 2)
        words.append(f"top-1 is {top1} instead of {formatting.percent(fidelity.top1_dense_percent, 2)}")
    elif fidelity.agreement_percent is not None:
        words.append(f"{formatting.percent(fidelity.agreement_percent, 2)} of the answers are the dense model's")
    return "; ".join(words) + "."


def cards(report: Report) -> list[Card]:
    """Return the cards of `report`: size, accuracy, FLOPs, precision, zeros, times, energy, engine."""
    made = [_size(report), _accuracy(report), _drop(report), _flops(report), _precision(report), _zeros(report)]
    return [
        card
        for card in (*made, _linear_time(report), _latency(report), _energy(report), _engine(report))
        if card is not None
    ]


def _size(report: Report) -> Card:
    size = report.size
    return Card(
        title="Model file",
        value=formatting.file_size(size.compressed_bytes),
        detail=f"was {formatting.file_size(size.dense_bytes)}; {formatting.percent(size.compressed_percent)} is left",
        basis="measured",
        share_percent=size.compressed_percent,
    )


def _accuracy(report: Report) -> Card | None:
    fidelity = report.fidelity
    if fidelity is None:
        return None
    if fidelity.top1_dense_percent is not None and fidelity.top1_compressed_percent is not None:
        return Card(
            title="Top-1",
            value=formatting.percent(fidelity.top1_compressed_percent, 2),
            detail=f"was {formatting.percent(fidelity.top1_dense_percent, 2)}, on {_samples(fidelity)}; "
            f"lost {_lost(fidelity)}",
            basis="measured",
        )
    if fidelity.agreement_percent is not None:
        return Card(
            title="Same answer as dense",
            value=formatting.percent(fidelity.agreement_percent, 2),
            detail=f"of {_samples(fidelity)}; no labels, so no top-1",
            basis="measured",
        )
    return Card(
        title="Output against dense",
        value=f"{fidelity.sqnr_db:.1f} dB",
        detail=f"signal to noise; cosine {fidelity.cosine:.4f}, on {_samples(fidelity)}",
        basis="measured",
    )


def _drop(report: Report) -> Card | None:
    budget = report.budget
    if budget is None:
        return None
    ends = formatting.interval(budget.low_points, budget.high_points)
    return Card(
        title=f"{budget.measure.capitalize()} top-1 loss",
        value=formatting.points(budget.drop_points),
        detail=f"{f'95 % interval {ends}; ' if ends else ''}{budget_words(budget)}",
        basis="measured" if budget.measure == "measured" else "expectation over measured outputs",
        state="good" if budget.met else "bad" if budget.typed else "warn",
    )


def budget_words(budget: BudgetSection) -> str:
    """Return the budget and whether it was kept; the default one bounds only what `auto` adds."""
    if budget.typed:
        return f"--max-drop {budget.max_drop_points:g}: {'met' if budget.met else 'not met'}"
    if budget.met:
        return f"within the default budget of {budget.max_drop_points:g}"
    return f"above {budget.max_drop_points:g}, the default budget of what auto adds to typed choices"


def _flops(report: Report) -> Card:
    flops = report.flops
    return Card(
        title="FLOPs of linear layers",
        value=f"{formatting.percent(100 * flops.linear_remaining_fraction)} left",
        detail=f"{formatting.flops(flops.linear_remaining_flops)} of {formatting.flops(flops.linear_dense_flops)} at "
        f"batch {flops.batch}; with attention {formatting.percent(100 * flops.model_remaining_fraction)}",
        basis="counted",
        share_percent=100 * flops.linear_remaining_fraction,
    )


def _precision(report: Report) -> Card:
    counts = Counter(layer.precision.dtype for layer in report.layers)
    int8 = counts.pop("int8", 0)
    rest = _listed([f"{number} {dtype}" for dtype, number in counts.most_common()])
    return Card(
        title="Layers in int8",
        value=f"{int8} of {len(report.layers)}",
        detail=f"the others: {rest}" if rest else "all of them",
        basis="counted",
    )


def _zeros(report: Report) -> Card:
    weights = sum(layer.K * layer.N for layer in report.layers)
    zeros = sum(layer.K * layer.N * layer.sparsity.zeros_percent for layer in report.layers) / weights if weights else 0
    patterns = Counter(layer.sparsity.pattern for layer in report.layers)
    dense = patterns.pop("dense", 0)
    words = [f"{_ZEROS[pattern]} in {formatting.count(number, 'layer')}" for pattern, number in patterns.most_common()]
    return Card(
        title="Zeros in linear layers",
        value=formatting.percent(zeros),
        detail=_listed([*words, f"none in {formatting.count(dense, 'layer')}"] if dense else words),
        basis="counted",
    )


def _linear_time(report: Report) -> Card | None:
    times = report.linear_time
    if times is None:
        return None
    share = 100 * times.compressed_ms / times.dense_ms
    return Card(
        title="Time of linear layers",
        value=formatting.milliseconds(times.compressed_ms),
        detail=f"{formatting.milliseconds(times.dense_ms)} as dense float32 MatMuls; each layer timed by itself, "
        f"batch {times.batch}, {formatting.count(times.threads, 'thread')}",
        basis="measured",
        share_percent=share,
    )


def _latency(report: Report) -> Card | None:
    if not report.speedups:
        return None
    ratio = report.speedups[0]
    on_target = report.target.name == "cpu"
    return Card(
        title="Speed on this CPU",
        value=f"{ratio.median_ratio:.2f} × dense",
        detail=f"{ratio.low_ratio:.2f} to {ratio.high_ratio:.2f} × over {formatting.count(ratio.rounds, 'round')}, "
        f"batch {ratio.batch}{'' if on_target else f'; not the speed of {report.target.name}'}",
        basis="measured",
    )


def _energy(report: Report) -> Card | None:
    rows = {row.label: row for row in report.power.rows}
    if len(rows) < 2:
        return None
    dense, compressed = rows["dense"], rows["compressed"]
    return Card(
        title="Energy of one inference",
        value=formatting.joules(compressed.energy_per_inference_j),
        detail=f"was {formatting.joules(dense.energy_per_inference_j)}, batch {compressed.batch}, "
        f"{report.power.regime}; above idle {formatting.joules(compressed.net_energy_per_inference_j)}, was "
        f"{formatting.joules(dense.net_energy_per_inference_j)}",
        basis="measured",
        share_percent=100 * compressed.energy_per_inference_j / dense.energy_per_inference_j,
    )


def _engine(report: Report) -> Card:
    engine = report.engine
    if not engine.built:
        return Card(
            title=f"Engine for {report.target.name}",
            value="not built",
            detail=_without_commands(engine.not_built_reason or ""),
            basis="",
        )
    detail = f"{engine.backend}, {formatting.file_size(engine.size_bytes or 0)}"
    if engine.build_seconds is not None:
        detail += f", in {formatting.seconds(engine.build_seconds)}"
    differs = any(layer.engine.matches_request is False for layer in report.layers)
    return Card(
        title=f"Engine for {report.target.name}",
        value="built",
        detail=f"{detail}; {as_asked_words(report)}",
        basis="measured",
        state="warn" if differs else "good",
    )


def _without_commands(reason: str) -> str:
    """Return why there is no engine, and instead of what to run where it stands."""
    first, *commands = reason.splitlines() or [""]
    return f"{first.rpartition('; ')[0] or first.rstrip(':')}; what to run there stands below" if commands else first


def as_asked_words(report: Report) -> str:
    """Return how many layers the engine runs in the type that was asked for, and of how many that is not known."""
    left = [layer for layer in report.layers if not layer.gone]
    answers = Counter(layer.engine.matches_request for layer in left)
    unknown = f", {answers[None]} not known" if answers[None] else ""
    gone = f", {len(report.layers) - len(left)} gone from the model" if len(left) < len(report.layers) else ""
    return f"{answers[True]} of {formatting.count(len(left), 'linear layer')} run as asked{unknown}{gone}"


def _samples(fidelity: FidelitySection) -> str:
    return formatting.count(fidelity.samples, "sample")


def _lost(fidelity: FidelitySection) -> str:
    if fidelity.measured_drop_points is None:
        return "points: not measured"
    ends = formatting.interval(fidelity.measured_drop_low_points, fidelity.measured_drop_high_points)
    return f"{formatting.points(fidelity.measured_drop_points)}{f' ({ends})' if ends else ''}"


def _listed(parts: list[str]) -> str:
    return ", ".join(parts[:-1]) + (" and " if len(parts) > 1 else "") + parts[-1] if parts else ""
