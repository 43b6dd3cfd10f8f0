"""The figures of what was measured as plain geometry, drawn by the template in SVG.

Lengths are in percent of the figure's width or height: the figures stretch from a phone to a wide screen, and their
text is HTML, which does not stretch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lsp_deploy.reporting import formatting
from lsp_deploy.reporting.sections import FidelitySection, ProfileRow

__all__ = [
    "Axis",
    "Interval",
    "LatencyGroup",
    "accuracy_axis",
    "drop_axis",
    "latency_groups",
    "wilson",
]


@dataclass(frozen=True)
class LatencyBar:
    """One bar of the latency figure."""

    label: str
    value: str
    length_percent: float


@dataclass(frozen=True)
class LatencyGroup:
    """The bars of one batch size, by statistic: one for every model."""

    batch: int
    rows: list[tuple[str, list[LatencyBar]]]


@dataclass(frozen=True)
class Interval:
    """A value with its 95 % interval on an axis."""

    label: str
    kind: str
    value: str
    range: str
    at_percent: float
    low_percent: float
    high_percent: float


@dataclass(frozen=True)
class Axis:
    """Values on one axis, with its ends and, where there is one, a limit drawn across."""

    low: str
    high: str
    rows: list[Interval]
    limit_percent: float | None = None
    limit: str = ""


def latency_groups(profiles: Sequence[ProfileRow]) -> list[LatencyGroup]:
    """Return min, median, p90 and p99 of every model, by batch size; bars of one batch share their scale."""
    groups = []
    for batch in sorted({profile.batch for profile in profiles}):
        measured = [profile for profile in profiles if profile.batch == batch]
        longest = max(profile.latency_p99_ms for profile in measured) or 1.0
        rows = []
        for statistic in ("min", "median", "p90", "p99"):
            bars = []
            for profile in measured:
                value: float = getattr(profile, f"latency_{statistic}_ms")
                bars.append(LatencyBar(profile.label, formatting.milliseconds(value), 100 * value / longest))
            rows.append((statistic, bars))
        groups.append(LatencyGroup(batch, rows))
    return groups


def accuracy_axis(fidelity: FidelitySection) -> Axis | None:
    """Return top-1, top-5 and agreement with their 95 % intervals (Wilson), or None for outputs without classes."""
    shares = [
        ("top-1, dense", "dense", fidelity.top1_dense_percent),
        ("top-1, compressed", "compressed", fidelity.top1_compressed_percent),
        ("top-5, dense", "dense", fidelity.top5_dense_percent),
        ("top-5, compressed", "compressed", fidelity.top5_compressed_percent),
        ("same answer", "compressed", fidelity.agreement_percent),
    ]
    known = [
        (label, kind, share, wilson(share, fidelity.samples)) for label, kind, share in shares if share is not None
    ]
    if not known:
        return None
    low = max(0.0, 5 * math.floor(min(interval[0] for *_, interval in known) / 5))

    def place(value: float) -> float:
        return 100 * (value - low) / (100 - low)

    rows = [
        Interval(
            label=label,
            kind=kind,
            value=formatting.percent(share, 2),
            range=f"{ends[0]:.1f} to {ends[1]:.1f} %",
            at_percent=place(share),
            low_percent=place(ends[0]),
            high_percent=place(ends[1]),
        )
        for label, kind, share, ends in known
    ]
    return Axis(low=f"{low:g} %", high="100 %", rows=rows)


def drop_axis(fidelity: FidelitySection, max_drop_points: float | None) -> Axis | None:
    """Return the measured and the expected drop with their 95 % intervals, the budget as limit."""
    drops = [
        ("measured drop", fidelity.measured_drop_points, "measured"),
        ("expected drop", fidelity.expected_drop_points, "expected"),
    ]
    known = [
        (
            label,
            value,
            value if (low := getattr(fidelity, f"{which}_drop_low_points")) is None else low,
            value if (high := getattr(fidelity, f"{which}_drop_high_points")) is None else high,
        )
        for label, value, which in drops
        if value is not None
    ]
    if not known:
        return None
    limit = [] if max_drop_points is None else [max_drop_points]
    unit = "point" if max_drop_points == 1 else "points"
    start = min(0.0, *(low for *_, low, _ in known))
    end = max(*limit, *(high for *_, high in known), start + 0.1)
    margin = 0.05 * (end - start)
    start, end = start - margin, end + margin

    def place(value: float) -> float:
        return 100 * (value - start) / (end - start)

    rows = [
        Interval(
            label=label,
            kind="compressed",
            value=formatting.points(value),
            range=formatting.interval(low, high),
            at_percent=place(value),
            low_percent=place(low),
            high_percent=place(high),
        )
        for label, value, low, high in known
    ]
    return Axis(
        low=formatting.signed(start),
        high=formatting.signed(end),
        rows=rows,
        limit_percent=None if max_drop_points is None else place(max_drop_points),
        limit="" if max_drop_points is None else f"budget: {max_drop_points:g} {unit}",
    )


def wilson(share_percent: float, samples: int) -> tuple[float, float]:
    """Return the 95 % interval of a share of independent samples, all in percent (Wilson, JASA 22, 1927)."""
    z = 1.959964
    p = min(1.0, share_percent / 100)
    center = (p + z * z / (2 * samples)) / (1 + z * z / samples)
    half = z / (1 + z * z / samples) * math.sqrt(p * (1 - p) / samples + z * z / (4 * samples * samples))
    return 100 * max(0.0, center - half), 100 * min(1.0, center + half)
