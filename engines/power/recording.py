"""From a meter's readings to figures: energy of intervals, idle power, watts and joules an inference."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from lsp_deploy.engines.power.meter import PowerMeter

__all__ = ["Interval", "PowerFigures", "PowerRecorder"]

# A GPU keeps its clocks up for a moment after the last kernel.
_SETTLE_S = 2.0
_LEAST_IDLE_S = 5.0


class PowerFigures(BaseModel):
    """Measured power and energy of one engine under one load; an inference is one call with its whole batch."""

    model_config = ConfigDict(extra="forbid")

    measured: Literal[True] = True
    meter: str
    covers: str = Field(description="what the energy is of")
    caveat: str = Field("", description="what a reader of the meter must know")
    regime: str = Field(description='"back-to-back", or the fixed rate of requests')
    power_w: float = Field(description="mean over all windows")
    power_low_w: float = Field(description="of the window with the least")
    power_high_w: float = Field(description="of the window with the most")
    parts_w: dict[str, float] = Field(description="mean power of each rail or package; their sum is power_w")
    idle_before_w: float = Field(description="engine loaded, nothing running, before the warm-up")
    idle_after_w: float = Field(description="the same after the last window")
    net_power_w: float = Field(description="power_w less the mean of the two idle powers")
    energy_per_inference_j: float = Field(description="energy over inferences")
    net_energy_per_inference_j: float = Field(description="the same, idle power subtracted for as long as it took")
    inferences_per_s: float = Field(description="in the windows")
    inferences: int = Field(description="in all windows together")
    windows: int
    window_s: float = Field(description="mean length of a window")
    readings: int = Field(description="of the sensor, in all windows together")
    state: dict[str, str] = Field(description="clocks, limits, temperature, power mode, as the last window ended")


@dataclass(frozen=True)
class Interval:
    """Energy of an interval; empty where no meter was read."""

    seconds: float
    energy_j: Mapping[str, float]
    readings: int

    @property
    def power_w(self) -> float:
        """Return the mean power of all parts together."""
        return sum(self.energy_j.values()) / self.seconds


class PowerRecorder:
    """Reads a meter for a run, or stands in for one that is not there; a meter that fails is not read again."""

    def __init__(self, meter: PowerMeter | None, note: str = "") -> None:
        """Record with `meter`; where it is None, `note` says why."""
        self._meter = meter
        self.note = note
        """Why there are no figures; empty where there are."""
        self.window_s = 0.0 if meter is None else meter.window_s
        """Seconds that a window must last."""

    def begin(self) -> Interval:
        """Return a mark in time, for `since`."""
        return Interval(time.perf_counter(), *self._read())

    def since(self, begin: Interval) -> Interval:
        """Return the interval from `begin` until now."""
        energy_j, readings = self._read()
        seconds = time.perf_counter() - begin.seconds
        used = {part: joules - begin.energy_j[part] for part, joules in energy_j.items() if part in begin.energy_j}
        return Interval(seconds, used, readings - begin.readings)

    def idle(self) -> Interval:
        """Wait, and return what is used meanwhile; an empty interval at once where there is no meter."""
        if self._meter is None:
            return Interval(0.0, {}, 0)
        time.sleep(_SETTLE_S)
        begin = self.begin()
        time.sleep(max(_LEAST_IDLE_S, self.window_s))
        return self.since(begin)

    def state(self) -> dict[str, str]:
        """Return what the power of this moment depends on."""
        return {} if self._meter is None else dict(self._meter.state())

    def figures(
        self,
        windows: Sequence[Interval],
        idle: tuple[Interval, Interval],
        *,
        inferences: int,
        regime: str,
        state: dict[str, str],
    ) -> PowerFigures | None:
        """Return the figures of one engine, or None where no meter was read to the end.

        Args:
            windows: in which it ran, one at least.
            idle: before its warm-up, and after the last window.
            inferences: calls in all windows together.
            regime: what the load was, in words.
            state: what the meter said of clocks and limits as the last window ended.
        """
        if self._meter is None:
            return None
        before_w, after_w = (interval.power_w for interval in idle)
        idle_w = (before_w + after_w) / 2
        seconds = sum(window.seconds for window in windows)
        parts_w = {
            part: sum(window.energy_j[part] for window in windows) / seconds for part in sorted(windows[0].energy_j)
        }
        power_w = sum(parts_w.values())
        powers_w = [window.power_w for window in windows]
        return PowerFigures(
            meter=self._meter.name,
            covers=self._meter.covers,
            caveat=self._meter.caveat,
            regime=regime,
            power_w=power_w,
            power_low_w=min(powers_w),
            power_high_w=max(powers_w),
            parts_w=parts_w,
            idle_before_w=before_w,
            idle_after_w=after_w,
            net_power_w=power_w - idle_w,
            energy_per_inference_j=power_w * seconds / inferences,
            net_energy_per_inference_j=(power_w - idle_w) * seconds / inferences,
            inferences_per_s=inferences / seconds,
            inferences=inferences,
            windows=len(windows),
            window_s=seconds / len(windows),
            readings=sum(window.readings for window in windows),
            state=state,
        )

    def _read(self) -> tuple[Mapping[str, float], int]:
        if self._meter is None:
            return {}, 0
        try:
            return self._meter.energy_j(), self._meter.readings
        except OSError as error:
            self.note = f"not measured: {self._meter.name} failed: {error}"
            self._meter = None
            return {}, 0
