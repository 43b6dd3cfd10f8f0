"""Power and energy of profiles, as a table for the terminal and as words for what it rests on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import RenderableType

    from lsp_deploy.engines.power.recording import PowerFigures
    from lsp_deploy.engines.profiler import Profile

__all__ = ["power_tables"]


def power_tables(profiles: Sequence[Profile]) -> list[RenderableType]:
    """Return a table of watts and joules and what was measured how, or one line that says why there is none."""
    from rich.table import Table
    from rich.text import Text

    measured = [(one, one.power) for one in profiles if one.power is not None]
    lines = [f"power: {note}" for note in dict.fromkeys(one.power_note for one in profiles if one.power is None)]
    if missed := sum(one.missed_slots for one in profiles):
        lines.append(f"{missed} requests came while the last one was still running, and were left out")
    if not measured:
        return [Text(line) for line in lines]
    table = Table(title=f"power, {measured[0][1].meter}, {measured[0][1].regime}")
    columns = ("model", "batch", "W", "idle W", "W net", "J/inference", "J net", "inf/s")
    for column in columns:
        table.add_column(column, justify="left" if column == "model" else "right")
    for profile, power in measured:
        numbers = (
            f"{power.power_w:.2f}",
            f"{power.power_w - power.net_power_w:.2f}",
            f"{power.net_power_w:.2f}",
            f"{power.energy_per_inference_j:.4g}",
            f"{power.net_energy_per_inference_j:.4g}",
            f"{power.inferences_per_s:.1f}",
        )
        table.add_row(profile.label, str(profile.batch), *numbers)
    lines += dict.fromkeys(line for _, power in measured for line in _basis(power))
    return [table, *(Text(line) for line in lines)]


def _basis(power: PowerFigures) -> list[str]:
    """Return what the figures are of, and how long and under what they were taken."""
    lines = [f"measured: {power.covers}" + (f"; {power.caveat}" if power.caveat else "")]
    lines.append(f"net: less idle power, {power.idle_before_w:.2f} W before and {power.idle_after_w:.2f} W after")
    lines.append(f"{power.windows} windows of {power.window_s:.1f} s in turn, {power.readings} readings")
    if power.state:
        lines.append(", ".join(f"{name} {value}" for name, value in power.state.items()))
    return lines
