"""INA3221: the current sensors on the power rails of a Jetson module, through Linux' hwmon.

They have no energy counter, so a thread reads watts and adds them up. The file imports nothing of this package: it also
runs alone, on a Jetson that has no more than Python.
"""

from __future__ import annotations

import re
import threading
import time
from pathlib import Path

__all__ = ["Ina3221Meter", "open_ina3221"]

_ROOT = Path("/")
_INTERVAL_S = 0.05
# Which rails make up a module, by label. AGX Orin has no sensor on its input. VDDQ_VDD2_1V8AO is left out there: it is
# fed by the 5 V input, so VIN_SYS_5V0 has it already. The modules of Orin NX and Orin Nano have one on the input.
_MODULES = (("VDD_IN",), ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"))


class Ina3221Meter:
    """Energy of a module's rails, by the trapezoidal rule over readings every `interval_s` seconds."""

    name = "INA3221 rails, hwmon"
    window_s = 10.0  # some two hundred readings

    def __init__(self, channels: dict[str, tuple[Path, Path]], root: Path, interval_s: float) -> None:
        """Begin at zero joules and keep reading; `channels` are files of mV and of mA by the rail's label."""
        self.covers = f"the module, as the sum of its rails {', '.join(channels)}; not the carrier board"
        if len(channels) == 1:
            self.covers = f"the module, at its input {next(iter(channels))}; not the carrier board"
        self.caveat = f"no energy counter: power is read every {1000 * interval_s:.0f} ms and added up"
        self._channels = channels
        self._root = root
        self._energy_j = dict.fromkeys(channels, 0.0)
        self._power_w = _power_w(channels)
        self._time_s = time.monotonic()
        self._readings = 1
        self._failure: Exception | None = None
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._keep_reading, args=(interval_s,), name="ina3221", daemon=True)
        self._thread.start()

    @property
    def readings(self) -> int:
        """Return how often the rails were read."""
        return self._readings

    def energy_j(self) -> dict[str, float]:
        """Return the joules of each rail since the meter was opened, up to now."""
        with self._lock:
            if self._failure is not None:
                raise OSError(f"a rail could not be read: {self._failure}")
            self._add()
            return dict(self._energy_j)

    def state(self) -> dict[str, str]:
        """Return the power mode (nvpmodel) and whether clocks are held at their highest (jetson_clocks)."""
        return {"nvpmodel": _power_mode(self._root), "clocks": _clocks(self._root)}

    def close(self) -> None:
        """Stop reading."""
        self._closed.set()
        self._thread.join()

    def _keep_reading(self, interval_s: float) -> None:
        while not self._closed.wait(interval_s):
            with self._lock:
                try:
                    self._add()
                except (OSError, ValueError) as error:
                    self._failure = error  # told to whoever asks for energy next
                    return

    def _add(self) -> None:
        power_w, now = _power_w(self._channels), time.monotonic()
        for rail, watts in power_w.items():
            self._energy_j[rail] += (self._power_w[rail] + watts) / 2 * (now - self._time_s)
        self._power_w, self._time_s = power_w, now
        self._readings += 1


def open_ina3221(root: Path = _ROOT, interval_s: float = _INTERVAL_S) -> tuple[Ina3221Meter | None, str]:
    """Return the meter of this Jetson module, or None and why there is none; `root` is where sys, etc and var lie."""
    channels = _labelled_channels(root)
    if not channels:
        return None, "no INA3221 sensor with labelled rails (not a Jetson, or its driver is not loaded)"
    for rails in _MODULES:
        if set(rails) <= channels.keys():
            try:
                return Ina3221Meter({rail: channels[rail] for rail in rails}, root, interval_s), ""
            except (OSError, ValueError) as error:
                return None, f"a rail cannot be read: {error}"
    return None, f"which of the rails {', '.join(sorted(channels))} make up this module is not known"


def _labelled_channels(root: Path) -> dict[str, tuple[Path, Path]]:
    """Return the files of mV and of mA of every rail; hwmon's numbers vary from start to start, labels do not."""
    channels = {}
    for label in sorted(root.glob("sys/bus/i2c/drivers/ina3221*/*/hwmon/hwmon*/in*_label")):
        number = label.name.removeprefix("in").removesuffix("_label")
        files = (label.with_name(f"in{number}_input"), label.with_name(f"curr{number}_input"))
        rail = label.read_text(errors="replace").strip()
        # NC is not connected; channel 7 is the sum of shunt voltages and has no current.
        if rail != "NC" and all(file.is_file() for file in files):
            channels[rail] = files
    return channels


def _power_w(channels: dict[str, tuple[Path, Path]]) -> dict[str, float]:
    return {rail: int(mv.read_text()) * int(ma.read_text()) / 1e6 for rail, (mv, ma) in channels.items()}


def _power_mode(root: Path) -> str:
    """Return the mode that nvpmodel was last set to, by its name in nvpmodel's own list."""
    try:
        status = (root / "var/lib/nvpmodel/status").read_text()
        modes = (root / "etc/nvpmodel.conf").read_text(errors="replace")
    except OSError as error:
        return f"unknown: {error}"
    set_to = re.search(r"pmode:(\d+)", status)
    if set_to is None:
        return "unknown: no mode in nvpmodel's status"
    number = int(set_to[1])
    name = re.search(rf"POWER_MODEL\s+ID={number}\s+NAME=(\S+)", modes)
    return f"{name[1]} (mode {number})" if name else f"mode {number}"


def _clocks(root: Path) -> str:
    """Return the range that CPU and GPU clocks may move in: jetson_clocks leaves one value, the highest."""
    cpu = _range_mhz(root, "sys/devices/system/cpu/cpu[0-9]*/cpufreq/scaling_{}_freq", hertz=1e3)
    gpu = _range_mhz(root, "sys/class/devfreq/17000000.*/{}_freq", hertz=1)  # the GPU's address on every Orin
    return f"CPU {cpu}, GPU {gpu}"


def _range_mhz(root: Path, files: str, hertz: float) -> str:
    try:
        lowest = [int(file.read_text()) * hertz / 1e6 for file in root.glob(files.format("min"))]
        highest = [int(file.read_text()) * hertz / 1e6 for file in root.glob(files.format("max"))]
    except (OSError, ValueError) as error:
        return f"unknown: {error}"
    if not lowest or not highest:
        return "unknown"
    low, high = min(lowest), max(highest)
    return f"held at {high:.0f} MHz" if low == high else f"{low:.0f} to {high:.0f} MHz"
