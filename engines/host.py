"""The host as a measuring device: its CPU, its clock governor, and how busy other programs keep it."""

from __future__ import annotations

import os
import platform
import time
from dataclasses import dataclass
from pathlib import Path

__all__ = ["CpuMeter", "available_cpus", "cpu_governor", "cpu_model", "load_average"]


def available_cpus() -> tuple[int, ...]:
    """Return the CPUs that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return tuple(sorted(os.sched_getaffinity(0)))
    return tuple(range(os.cpu_count() or 1))


def cpu_model() -> str:
    """Return the CPU's name, e.g. "AMD EPYC 9654 96-Core Processor"."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() in ("model name", "Hardware") and value.strip():
                return value.strip()
    return platform.processor() or platform.machine()


def cpu_governor() -> str | None:
    """Return the frequency governor of the first CPU that this process may use, or None where it cannot be read."""
    path = Path(f"/sys/devices/system/cpu/cpu{available_cpus()[0]}/cpufreq/scaling_governor")
    try:
        return path.read_text().strip()
    except OSError:
        return None


def load_average() -> float | None:
    """Return the load average of the last minute, or None where the system has none."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


@dataclass(frozen=True)
class _Reading:
    wall: float
    own: float
    busy: float | None


class CpuMeter:
    """Measures how many CPUs other programs keep busy, of those that this process may use (Linux; None elsewhere)."""

    def __init__(self) -> None:
        self._start = _read()

    def restart(self) -> None:
        """Begin a new interval."""
        self._start = _read()

    def foreign_cpus(self) -> float | None:
        """Return the CPUs' worth of time that other programs took since the interval began, e.g. 0.3.

        /proc/stat counts in ticks of 10 ms, so an interval of 0.3 s resolves about 0.05 CPUs.
        """
        start, now = self._start, _read()
        if start.busy is None or now.busy is None or now.wall <= start.wall:
            return None
        foreign = (now.busy - start.busy) - (now.own - start.own)
        return max(0.0, foreign / (now.wall - start.wall))


def _read() -> _Reading:
    return _Reading(time.perf_counter(), time.process_time(), _busy_seconds())


def _busy_seconds() -> float | None:
    """Return the CPU seconds that anything, hypervisor included, has taken from the usable CPUs since boot."""
    try:
        lines = Path("/proc/stat").read_text().splitlines()
    except OSError:
        return None
    usable = {f"cpu{number}" for number in available_cpus()}
    ticks = 0
    for line in lines:
        name, *fields = line.split()
        if name in usable:
            user, nice, system, _idle, _iowait, irq, softirq, steal = (int(field) for field in fields[:8])
            ticks += user + nice + system + irq + softirq + steal
    return ticks / os.sysconf("SC_CLK_TCK")
