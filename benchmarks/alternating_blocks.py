"""Models timed in alternating blocks of one run, on a machine that others use as well.

Unlike the package's profiler, which leaves out whole rounds, this one leaves out single blocks: with twenty models in a
round there would be no undisturbed round.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from competitors import Images, Runner

from lsp_deploy.engines.host import CpuMeter, available_cpus

# Foreign load on top of the CPUs that a model leaves idle, in CPUs, from which a block is left out: well above what the
# 10 ms ticks of /proc/stat resolve in a block of 0.25 s.
_DISTURBED_CPUS = 0.2
_MOST_TURNS = 3  # as many times the blocks asked for, if others disturb


@dataclass(frozen=True)
class Rhythm:
    """How turns are taken."""

    blocks: int
    """Undisturbed ones, of each model."""
    seconds: float
    """Length of a block; it ends with the call that passes it."""
    gap_seconds: float
    """Pause before a block, in which the threads of the model before come to rest."""


@dataclass
class Turns:
    """The blocks of one model: milliseconds of each call."""

    quiet: list[list[float]] = field(default_factory=list)
    disturbed: list[list[float]] = field(default_factory=list)

    def figures(self) -> dict[str, float]:
        """Return the least and the median time of a call in quiet blocks; in all, where no block was quiet."""
        calls = np.concatenate(self.quiet or self.disturbed)
        return {
            "min_ms": float(calls.min()),
            "median_ms": float(np.median(calls)),
            "calls": len(calls),
            "quiet_blocks": len(self.quiet),
            "disturbed_blocks": len(self.disturbed),
        }


def take_turns(runners: Mapping[str, Runner], images: Images, threads: int, rhythm: Rhythm) -> dict[str, Turns]:
    """Run the models in alternating blocks until each has its undisturbed ones, or has had three times as many turns.

    The first, which the others are compared with, takes part as long as any other does. The order turns from round to
    round, so that no model always follows another.
    """
    turns = {name: Turns() for name in runners}
    first = next(iter(runners))
    for number in range(_MOST_TURNS * rhythm.blocks):
        lacking = [name for name in runners if len(turns[name].quiet) < rhythm.blocks]
        if not lacking:
            break
        names = [name for name in runners if name == first or name in lacking]
        for name in names if number % 2 == 0 else names[::-1]:
            time.sleep(rhythm.gap_seconds)
            milliseconds, disturbed = _block(runners[name], images, threads, rhythm.seconds)
            (turns[name].disturbed if disturbed else turns[name].quiet).append(milliseconds)
    return turns


def _block(runner: Runner, images: Images, threads: int, seconds: float) -> tuple[list[float], bool]:
    """Return the milliseconds of each call, and whether other programs took the model's CPUs."""
    runner.run(images)  # brings the weights back into the caches
    meter, milliseconds = CpuMeter(), []
    begin = time.perf_counter()
    while time.perf_counter() - begin < seconds:
        start = time.perf_counter()
        runner.run(images)
        milliseconds.append((time.perf_counter() - start) * 1000)
    foreign = meter.foreign_cpus()
    spare = max(0, len(available_cpus()) - threads)
    return milliseconds, foreign is not None and foreign > spare + _DISTURBED_CPUS
