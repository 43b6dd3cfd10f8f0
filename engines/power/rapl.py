"""RAPL: the energy counters of x86 CPU packages, through Linux' powercap; AMD's have Intel's name there as well."""

from __future__ import annotations

from pathlib import Path

__all__ = ["RaplMeter", "open_rapl"]

_SYSFS = Path("/sys")


class RaplMeter:
    """Energy of the CPU packages; the counters wrap around every few minutes to hours, which is made good."""

    name = "RAPL, powercap"
    caveat = "what other programs do on these CPUs is in it"
    window_s = 2.0  # the counters move every millisecond; the rest is for the noise of an operating system

    def __init__(self, zones: dict[str, Path]) -> None:
        """Begin at zero joules; `zones` are folders of powercap by the package's name."""
        self.covers = f"CPU {', '.join(zones)}: cores, caches and memory controller; not DRAM, fans or the board"
        self._zones = zones
        self._ranges_uj = {name: _read(zone / "max_energy_range_uj") for name, zone in zones.items()}
        self._last_uj = {name: _read(zone / "energy_uj") for name, zone in zones.items()}
        self._energy_uj = dict.fromkeys(zones, 0)
        self._readings = 1

    @property
    def readings(self) -> int:
        """Return how often the counters were read."""
        return self._readings

    def energy_j(self) -> dict[str, float]:
        """Return the joules of each package since the meter was opened.

        Between two calls a counter may wrap around once: call it at least every two minutes.
        """
        for name, zone in self._zones.items():
            now = _read(zone / "energy_uj")
            step = now - self._last_uj[name]
            self._energy_uj[name] += step if step >= 0 else step + self._ranges_uj[name]
            self._last_uj[name] = now
        self._readings += 1
        return {name: energy / 1e6 for name, energy in self._energy_uj.items()}

    def state(self) -> dict[str, str]:
        """Return nothing: governor and load are among the profile's conditions."""
        return {}

    def close(self) -> None:
        """Do nothing: no file stays open."""


def open_rapl(sysfs: Path = _SYSFS) -> tuple[RaplMeter | None, str]:
    """Return the meter of this machine's CPU packages, or None and why there is none."""
    root = sysfs / "class/powercap"
    zones = {}
    for zone in sorted(root.glob("intel-rapl:*")):
        name = zone / "name"
        # Parts of a package (intel-rapl:0:0) are in it already; "psys" is the whole board of some laptops.
        if name.is_file() and (package := name.read_text().strip()).startswith("package"):
            zones[package] = zone
    if not zones:
        return None, f"no CPU package has an energy counter in {root} (a virtual machine, or a CPU without one)"
    try:
        return RaplMeter(zones), ""
    except PermissionError as error:
        return None, f"{error.filename} is readable by root only; sudo chmod a+r {root}/intel-rapl:*/energy_uj"
    except (OSError, ValueError) as error:
        return None, f"the energy counters in {root} cannot be read: {error}"


def _read(path: Path) -> int:
    return int(path.read_text())
