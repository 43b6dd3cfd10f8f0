"""Power and energy as parts of the report, and in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from lsp_deploy.reporting import formatting
from lsp_deploy.reporting.sections import PowerRow, PowerSection

if TYPE_CHECKING:
    from lsp_deploy.engines.profiler import Profile

__all__ = ["power_cells", "power_section", "power_words"]


def power_section(profiles: Mapping[str, Profile]) -> PowerSection:
    """Return what a meter said of dense and compressed in one run, or why none did."""
    measured = [(profile, profile.power) for profile in profiles.values() if profile.power is not None]
    if len(measured) < len(profiles) or not measured:
        note = next((profile.power_note for profile in profiles.values() if profile.power is None), "not measured")
        return PowerSection(note=note)
    _, first = measured[0]
    rows = [
        PowerRow(
            label="dense" if profile.label == "dense" else "compressed",
            batch=profile.batch,
            power_w=power.power_w,
            power_low_w=power.power_low_w,
            power_high_w=power.power_high_w,
            net_power_w=power.net_power_w,
            energy_per_inference_j=power.energy_per_inference_j,
            net_energy_per_inference_j=power.net_energy_per_inference_j,
            inferences_per_s=power.inferences_per_s,
            windows=power.windows,
            window_seconds=power.window_s,
            readings=power.readings,
            state=power.state,
        )
        for profile, power in measured
    ]
    return PowerSection(
        basis="measured",
        note="",
        meter=first.meter,
        covers=first.covers,
        caveat=first.caveat or None,
        regime=first.regime,
        idle_before_w=first.idle_before_w,
        idle_after_w=first.idle_after_w,
        rows=rows,
    )


def power_words(power: PowerSection) -> list[tuple[str, str]]:
    """Return titles and sentences for the page: one for each model, and how it was measured."""
    if not power.rows:
        return [("Power", power.note)]
    words = [
        (
            f"Power, {row.label}",
            f"{formatting.watts(row.power_w)} ({formatting.watts(row.power_low_w)} to "
            f"{formatting.watts(row.power_high_w)} over {formatting.count(row.windows, 'window')}), "
            f"{formatting.watts(row.net_power_w)} above idle; {formatting.joules(row.energy_per_inference_j)} an "
            f"inference, {formatting.joules(row.net_energy_per_inference_j)} above idle; batch {row.batch}, "
            f"{row.inferences_per_s:.1f} inferences/s",
        )
        for row in power.rows
    ]
    return [*words, ("How power was measured", _how(power))]


def power_cells(power: PowerSection) -> list[Sequence[str]]:
    """Return rows for the summary: name, dense, compressed, and what it rests on."""
    rows = {row.label: row for row in power.rows}
    if len(rows) < 2:
        return [("power", "", "", power.note)]
    both = rows["dense"], rows["compressed"]
    idle = " and ".join(formatting.watts(value) for value in _idle(power))
    return [
        ("power", *(formatting.watts(row.power_w) for row in both), f"{power.meter}, {power.regime}, measured"),
        ("power above idle", *(formatting.watts(row.net_power_w) for row in both), f"idle {idle}, before and after"),
        (
            "energy of one inference",
            *(formatting.joules(row.energy_per_inference_j) for row in both),
            f"batch {both[0].batch}, measured",
        ),
        ("energy above idle", *(formatting.joules(row.net_energy_per_inference_j) for row in both), ""),
    ]


def _how(power: PowerSection) -> str:
    idle = " and ".join(formatting.watts(value) for value in _idle(power))
    seconds = formatting.seconds(max(row.window_seconds for row in power.rows))
    readings = formatting.count(sum(row.readings for row in power.rows), "reading")
    state = ", ".join(f"{name} {value}" for name, value in power.rows[-1].state.items())
    parts = [
        f"{power.meter}, {power.regime}, alternating windows of {seconds}, {readings}",
        f"it covers {power.covers}",
        power.caveat or "",
        f"idle power {idle}, before and after, both models loaded",
        state,
    ]
    return "; ".join(part for part in parts if part)


def _idle(power: PowerSection) -> list[float]:
    return [value for value in (power.idle_before_w, power.idle_after_w) if value is not None]
