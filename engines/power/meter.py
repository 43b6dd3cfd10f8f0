"""What every power meter offers: energy since it was opened, and what that energy is of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

__all__ = ["PowerMeter"]


class PowerMeter(Protocol):
    """A meter that is open and can be read; a reading that fails raises OSError."""

    name: str
    """Of the sensor and what reads it, e.g. "NVML energy counter"."""
    covers: str
    """What its energy is of, and what is left out."""
    caveat: str
    """What a reader of its figures must know; empty where there is nothing."""
    window_s: float
    """Seconds that a measurement must last for the meter's own steps to stay below 1 % of it."""

    @property
    def readings(self) -> int:
        """Return how often the sensor was read since the meter was opened."""
        ...

    def energy_j(self) -> Mapping[str, float]:
        """Return the joules of each part since the meter was opened; the total is their sum."""
        ...

    def state(self) -> Mapping[str, str]:
        """Return what holds now and power depends on: clocks, limits, temperature, power mode."""
        ...

    def close(self) -> None:
        """Stop reading."""
        ...
