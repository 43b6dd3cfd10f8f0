"""Latency and throughput, measured: engines take turns in blocks of one run, so that they share the same conditions.

Turns are blocks and not single calls because threads and caches need a moment to settle on an engine; blocks are
short, so that a slow spell of the machine meets every engine alike. Only ratios within one run compare engines.
With a power meter a block is as long as the meter's window, and latency and energy are of the same runs.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from lsp_deploy.engines.host import CpuMeter, available_cpus, cpu_governor, cpu_model, load_average
from lsp_deploy.engines.power.recording import Interval, PowerFigures, PowerRecorder
from lsp_deploy.engines.protocol import DeviceTimed, Engine

__all__ = ["Conditions", "Profile", "Ratio", "busy_words", "latency_ratio", "profile"]

Feeds = Mapping[str, NDArray[Any]]

_MIN_ROUNDS = 3
# Foreign load on top of the CPUs that an engine leaves idle, in CPUs, from which a block counts as disturbed: well
# above what the 10 ms ticks of /proc/stat resolve in a block of 0.3 s.
_DISTURBED_CPUS = 0.2
_WALL_CLOCK = "wall clock around one call"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Conditions(_Strict):
    """What else holds for a measurement."""

    cpu: str
    cpus: int = Field(description="CPUs that the process may use")
    governor: str | None = Field(None, description="frequency governor; None where it cannot be read")
    load_average: float | None = Field(None, description="of the last minute, before the run")
    versions: dict[str, str] = Field(default_factory=dict)
    warm_up_seconds: float
    block_seconds: float
    foreign_cpus: float | None = Field(None, description="median CPUs that other programs kept busy; None: not known")


class Profile(_Strict):
    """Measured latency and throughput of one engine on one kind of feeds."""

    label: str
    backend: str
    device: str
    batch: int
    threads: int | None
    measured: Literal[True] = True
    clock: str = Field(_WALL_CLOCK, description="what is timed")
    regime: str = Field("back-to-back", description='"back-to-back", or the fixed rate of requests')
    rate_per_s: float | None = Field(None, description="calls a second that were asked for; None: back-to-back")
    missed_slots: int = Field(
        0, description="of a fixed rate, those that found the engine still busy, and were left out"
    )
    latency_min_ms: float
    latency_median_ms: float
    latency_mean_ms: float
    latency_p90_ms: float
    latency_p99_ms: float
    latency_max_ms: float
    spread: float = Field(description="interquartile range over the median")
    throughput_per_s: float = Field(
        description="samples a second: batch / median latency; at a fixed rate, those served"
    )
    runs: int = Field(description="timed calls behind these figures")
    blocks: int = Field(description="blocks behind these figures")
    disturbed_blocks: int = Field(
        description="of all blocks run, those in which other programs took this engine's CPUs"
    )
    discarded_blocks: int = Field(description="blocks left out because one of their round was disturbed")
    block_medians_ms: list[float] = Field(description="median latency of each block; entry i of all engines is round i")
    power: PowerFigures | None = Field(None, description="of the same runs; None: not measured")
    power_note: str = Field("not measured", description="why power was not measured; empty where it was")
    conditions: Conditions


class Ratio(_Strict):
    """How many times faster one engine is than another, over the rounds of one run."""

    median: float
    low: float = Field(description="of the round where it gained least")
    high: float
    rounds: int


@dataclass(frozen=True)
class _Block:
    milliseconds: list[float]
    missed_slots: int
    interval: Interval
    state: dict[str, str]
    foreign_cpus: float | None
    disturbed: bool


def profile(
    engines: Mapping[str, Engine],
    feeds: Feeds | Mapping[str, Feeds],
    *,
    threads: int | None = None,
    duration: float = 3.0,
    warm_up: float = 0.5,
    block_seconds: float = 0.3,
    gap_seconds: float = 0.05,
    rate_per_s: float | None = None,
    power: PowerRecorder | None = None,
) -> dict[str, Profile]:
    """Measure `engines` in alternating blocks of one run and return a profile of each.

    Every round gives each engine one block, in an order that turns from round to round. Rounds in which other
    programs took CPU time away are left out, unless that would leave less than half of them.

    Args:
        engines: by label.
        feeds: inputs by name for all engines, or such a mapping by label.
        threads: what the profile says; None for what each engine says of itself.
        duration: seconds of measuring for each engine; at least three blocks are run whatever they take.
        warm_up: seconds that each engine runs before the first block.
        block_seconds: length of a block; it ends with the call that passes it.
        gap_seconds: pause before a block, in which the previous engine's threads come to rest.
        rate_per_s: calls a second; each begins in a slot of its own. None: each call begins when the last one ends.
        power: records energy as well; idle power is measured before and after, which takes some 15 seconds or more.
    """
    power = power or PowerRecorder(None, "not measured")
    block_seconds = max(block_seconds, power.window_s)
    own_feeds = _feeds_by_label(engines, feeds)
    own_threads = {label: threads or engine.describe().threads for label, engine in engines.items()}
    load = load_average()
    idle_before = power.idle()
    calls = {label: _timed_call(engine, own_feeds[label]) for label, engine in engines.items()}
    for call in calls.values():
        _back_to_back(call, warm_up)
    rounds: list[dict[str, _Block]] = []
    seconds = dict.fromkeys(engines, 0.0)
    while len(rounds) < _MIN_ROUNDS or min(seconds.values()) < duration:
        blocks = {}
        for label in _turn(list(engines), len(rounds)):
            time.sleep(gap_seconds)
            blocks[label] = _block(calls[label], block_seconds, own_threads[label], rate_per_s, power)
            seconds[label] += blocks[label].interval.seconds
        rounds.append(blocks)
    idle_after = power.idle()
    kept = _kept(rounds)
    foreign = [block.foreign_cpus for blocks in rounds for block in blocks.values() if block.foreign_cpus is not None]
    return {
        label: _summary(
            label,
            engine,
            own_feeds[label],
            own_threads[label],
            kept=[blocks[label] for blocks in kept],
            run=[blocks[label] for blocks in rounds],
            rate_per_s=rate_per_s,
            power=power,
            idle=(idle_before, idle_after),
            conditions=Conditions(
                cpu=cpu_model(),
                cpus=len(available_cpus()),
                governor=cpu_governor(),
                load_average=load,
                versions=engine.describe().versions,
                warm_up_seconds=warm_up,
                block_seconds=block_seconds,
                foreign_cpus=round(float(np.median(foreign)), 3) if foreign else None,
            ),
        )
        for label, engine in engines.items()
    }


def latency_ratio(slow: Profile, fast: Profile) -> Ratio:
    """Return how many times faster `fast` is than `slow`, from the block medians of each round.

    Raises:
        ValueError: the two profiles are not of one run.
    """
    if len(slow.block_medians_ms) != len(fast.block_medians_ms):
        raise ValueError(f"{slow.label} and {fast.label} were not measured in one run")
    ratios = np.divide(slow.block_medians_ms, fast.block_medians_ms)
    return Ratio(median=float(np.median(ratios)), low=float(ratios.min()), high=float(ratios.max()), rounds=len(ratios))


def busy_words(profiles: Iterable[Profile]) -> str | None:
    """Return that other programs took CPU time under the figures; None where what they disturbed was left out."""
    kept = [one for one in profiles if one.disturbed_blocks and not one.discarded_blocks]
    if not kept:
        return None
    disturbed, blocks = (sum(getattr(one, name) for one in kept) for name in ("disturbed_blocks", "blocks"))
    return (
        f"other programs took CPU time in {disturbed} of {blocks} blocks: the times are those of a busy machine, and "
        "ratios of one run hold better than they"
    )


def _feeds_by_label(engines: Mapping[str, Engine], feeds: Feeds | Mapping[str, Feeds]) -> dict[str, Feeds]:
    if all(isinstance(value, Mapping) for value in feeds.values()):
        by_label = cast(Mapping[str, Feeds], feeds)
        return {label: by_label[label] for label in engines}
    shared = cast(Feeds, feeds)
    return dict.fromkeys(engines, shared)


def _turn(labels: list[str], number: int) -> list[str]:
    """Return the order of round `number`: forwards, then backwards, so that no engine always follows another."""
    return labels if number % 2 == 0 else labels[::-1]


def _timed_call(engine: Engine, feeds: Feeds) -> Callable[[], float]:
    """Return a call that runs the engine once and gives milliseconds: on the device's clock where it has one."""
    if isinstance(engine, DeviceTimed):
        return engine.timed_run(feeds)

    def call() -> float:
        start = time.perf_counter()
        engine.run(feeds)
        return (time.perf_counter() - start) * 1000

    return call


def _back_to_back(call: Callable[[], float], seconds: float) -> list[float]:
    """Call until `seconds` have passed, at least once; returns the milliseconds of each call."""
    milliseconds = []
    begin = time.perf_counter()
    while True:
        milliseconds.append(call())
        if time.perf_counter() - begin >= seconds:
            return milliseconds


def _at_rate(call: Callable[[], float], seconds: float, rate_per_s: float) -> tuple[list[float], int]:
    """Call at the slots of a fixed rate, for whole slots that fill `seconds`.

    A slot that comes while the last call is still running is left out. Returns the milliseconds of each call, and how
    many slots were left out.
    """
    milliseconds = []
    slots = max(1, math.ceil(seconds * rate_per_s))
    begin = time.perf_counter()
    slot = 0
    while slot < slots:
        _sleep_until(begin + slot / rate_per_s)
        milliseconds.append(call())
        slot = max(slot + 1, math.ceil((time.perf_counter() - begin) * rate_per_s))
    _sleep_until(begin + slots / rate_per_s)
    return milliseconds, slots - len(milliseconds)


def _sleep_until(moment: float) -> None:
    time.sleep(max(0.0, moment - time.perf_counter()))


def _block(
    call: Callable[[], float], seconds: float, threads: int | None, rate_per_s: float | None, power: PowerRecorder
) -> _Block:
    meter = CpuMeter()
    begin = power.begin()
    if rate_per_s is None:
        milliseconds, missed_slots = _back_to_back(call, seconds), 0
    else:
        milliseconds, missed_slots = _at_rate(call, seconds, rate_per_s)
    interval = power.since(begin)
    foreign = meter.foreign_cpus()
    cpus = len(available_cpus())
    spare = cpus - min(threads or cpus, cpus)
    disturbed = foreign is not None and foreign > spare + _DISTURBED_CPUS
    return _Block(milliseconds, missed_slots, interval, power.state(), foreign, disturbed)


def _kept(rounds: list[dict[str, _Block]]) -> list[dict[str, _Block]]:
    quiet = [blocks for blocks in rounds if not any(block.disturbed for block in blocks.values())]
    return quiet if 2 * len(quiet) >= len(rounds) else rounds


def _summary(
    label: str,
    engine: Engine,
    feeds: Feeds,
    threads: int | None,
    *,
    kept: list[_Block],
    run: list[_Block],
    rate_per_s: float | None,
    power: PowerRecorder,
    idle: tuple[Interval, Interval],
    conditions: Conditions,
) -> Profile:
    latency = np.concatenate([block.milliseconds for block in kept])
    lower, median, upper, p90, p99 = (float(value) for value in np.percentile(latency, (25, 50, 75, 90, 99)))
    first = next(iter(feeds.values()))
    batch = len(first) if first.ndim else 1
    regime = "back-to-back" if rate_per_s is None else f"{rate_per_s:g} requests/s"
    seconds = sum(block.interval.seconds for block in kept)
    figures = power.figures(
        [block.interval for block in kept], idle, inferences=len(latency), regime=regime, state=kept[-1].state
    )
    return Profile(
        label=label,
        backend=engine.backend,
        device=engine.describe().device or conditions.cpu,
        batch=batch,
        threads=threads,
        clock=engine.clock if isinstance(engine, DeviceTimed) else _WALL_CLOCK,
        regime=regime,
        rate_per_s=rate_per_s,
        missed_slots=sum(block.missed_slots for block in kept),
        latency_min_ms=float(latency.min()),
        latency_median_ms=median,
        latency_mean_ms=float(latency.mean()),
        latency_p90_ms=p90,
        latency_p99_ms=p99,
        latency_max_ms=float(latency.max()),
        spread=(upper - lower) / median,
        throughput_per_s=batch * (1000 / median if rate_per_s is None else len(latency) / seconds),
        runs=len(latency),
        blocks=len(kept),
        disturbed_blocks=sum(block.disturbed for block in run),
        discarded_blocks=len(run) - len(kept),
        block_medians_ms=[float(np.median(block.milliseconds)) for block in kept],
        power=figures,
        power_note=power.note,
        conditions=conditions,
    )
