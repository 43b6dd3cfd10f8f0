"""Run trtexec on an engine, and read the module's rails meanwhile: latency, power and energy of an inference.

    python3 measure.py --batch 8 --output profile.json -- trtexec --loadEngine=model.engine ...

Python 3.10 with nothing added is enough.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ina3221 import Ina3221Meter, open_ina3221  # type: ignore[import-not-found]  # beside this file, in a bundle

_SETTLE_S = 2.0
"""What clocks need to go down after the last kernel."""
_MISALIGNED, _MISALIGNED_S = 0.05, 0.5
"""Share of the window, and seconds, by which what was watched may differ from what trtexec says that it timed."""
_NUMBER = r"([\d.]+(?:[eE][+-]?\d+)?)"


@dataclass(frozen=True)
class Mark:
    """A moment, and the joules of each rail up to it."""

    seconds: float
    energy_j: dict[str, float]


@dataclass(frozen=True)
class Power:
    """Of the module while the engine runs back-to-back; an inference is one call with its whole batch."""

    meter: str
    covers: str
    caveat: str
    regime: str
    power_w: float
    rails_w: dict[str, float]
    idle_before_w: float
    idle_after_w: float
    net_power_w: float
    energy_per_inference_j: float
    net_energy_per_inference_j: float
    window_s: float
    state: dict[str, str]


class MeasureError(Exception):
    """What a user is told in one line."""


def main() -> int:
    """Measure, print, and write the figures; 1 where trtexec failed."""
    arguments = _arguments()
    meter, why = open_ina3221(arguments.root)
    try:
        idle_before = _idle(meter, arguments.idle_seconds)
        lines, window = _run(arguments.command, arguments.warm_up_seconds, arguments.seconds, meter)
        state = {} if meter is None else meter.state()
        timing = parse_timing(lines)
        idle_after = _idle(meter, arguments.idle_seconds)
        power = None
        if meter is not None:
            power, why = _power(meter, window, (idle_before, idle_after), timing, state)
    except (MeasureError, OSError) as error:
        print(f"measure.py: {error}", file=sys.stderr)
        return 1
    finally:
        if meter is not None:
            meter.close()
    result = {
        "device": arguments.device,
        "batch": arguments.batch,
        **timing,
        "inferences_per_s": timing["inferences"] / timing["walltime_s"],
        "images_per_s": arguments.batch * timing["inferences"] / timing["walltime_s"],
        "power": None if power is None else asdict(power),
        "power_not_measured": why if power is None else None,
    }
    arguments.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print("\n".join(_report(result)))
    print(f"all figures: {arguments.output}")
    return 0


def parse_timing(lines: list[str]) -> dict[str, Any]:
    """Return what trtexec says it measured: inferences, seconds, and quantiles of the latency, ms.

    Raises:
        MeasureError: a line is missing, as in an output that this was not written for.
    """
    text = "\n".join(lines)
    trace = re.search(rf"Timing trace has (\d+) queries over {_NUMBER} s", text)
    if trace is None:
        raise MeasureError("trtexec does not say how many inferences it timed; see build/profile.log")
    timing: dict[str, Any] = {"inferences": int(trace[1]), "walltime_s": float(trace[2])}
    for key, name in (("latency_ms", "Latency"), ("gpu_ms", "GPU Compute Time")):
        summary = re.search(rf"\] (?:\[I\] )?{name}: (min = .*)", text)
        if summary is None:
            raise MeasureError(f"trtexec prints no {name!r}; see build/profile.log")
        figures = {what: float(ms) for what, ms in re.findall(rf"(min|max|mean|median) = {_NUMBER} ms", summary[1])}
        figures |= {f"p{n}": float(ms) for n, ms in re.findall(rf"percentile\(([\d.]+)%\) = {_NUMBER} ms", summary[1])}
        timing[key] = figures
    version = re.search(r"TensorRT version: (\S+)", text)
    timing["tensorrt"] = version[1] if version else None
    return timing


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path("/"), help="where sys, etc and var lie")
    parser.add_argument("--device", default="", help="what this device is called")
    parser.add_argument("--batch", type=int, default=1, help="images an inference")
    parser.add_argument("--seconds", type=float, default=20.0, help="of measuring")
    parser.add_argument("--warm-up-seconds", type=float, default=2.0, help="before")
    parser.add_argument("--idle-seconds", type=float, default=10.0, help="of idling, before and after")
    parser.add_argument("--output", type=Path, default=Path("profile.json"), help="file of all figures")
    parser.add_argument("command", nargs="+", help="trtexec and its flags, behind --")
    arguments = parser.parse_args()
    if min(arguments.seconds, arguments.warm_up_seconds, arguments.idle_seconds) <= 0:
        parser.error("--seconds, --warm-up-seconds and --idle-seconds are above 0")
    return arguments


def _idle(meter: Ina3221Meter | None, seconds: float) -> float:
    """Return the watts of the module while it has nothing to do."""
    if meter is None:
        return 0.0
    print(f"idle: {seconds:g} s", flush=True)
    time.sleep(min(_SETTLE_S, seconds))
    begin = _mark(meter)
    time.sleep(seconds)
    end = _mark(meter)
    return sum(_watts(begin, end).values())


def _run(
    command: list[str], warm_up_s: float, seconds: float, meter: Ina3221Meter | None
) -> tuple[list[str], tuple[Mark, Mark] | None]:
    """Run trtexec; return its lines, and the moments between which it timed inferences.

    It says when inferences begin, warms up, times for `seconds`, and says how many there were.
    """
    timed = [f"--warmUp={round(1000 * warm_up_s)}", f"--duration={seconds:g}", "--percentile=50,90,95,99"]
    print(f"running the engine: {seconds:g} s, log in build/profile.log", flush=True)
    lines: list[str] = []
    begin = end = None
    Path("build").mkdir(exist_ok=True)
    with (
        Path("build/profile.log").open("w", encoding="utf-8") as log,
        subprocess.Popen([*command, *timed], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            log.write(line)
            lines.append(line.rstrip("\n"))
            if "Starting inference" in line:
                time.sleep(warm_up_s)
                begin = _mark(meter)
            elif "Timing trace has" in line:
                end = _mark(meter)
    if process.returncode != 0:
        errors = [line for line in lines if "[E]" in line] or lines[-1:] or ["it printed nothing"]
        raise MeasureError(f"trtexec ended with {process.returncode}: {errors[0].strip()}; see build/profile.log")
    return lines, None if begin is None or end is None else (begin, end)


def _power(
    meter: Ina3221Meter,
    window: tuple[Mark, Mark] | None,
    idle_w: tuple[float, float],
    timing: dict[str, Any],
    state: dict[str, str],
) -> tuple[Power | None, str]:
    """Return the figures, or None and why there are none."""
    if window is None:
        return None, "trtexec does not say when it begins and ends"
    begin, end = window
    watched, said = end.seconds - begin.seconds, timing["walltime_s"]
    if abs(watched - said) > _MISALIGNED * said + _MISALIGNED_S:
        return None, f"trtexec timed {said:.1f} s, but {watched:.1f} s were watched: its output came late"
    rails_w = _watts(begin, end)
    power_w = sum(rails_w.values())
    net_w = power_w - sum(idle_w) / 2
    seconds_each = said / timing["inferences"]
    power = Power(
        meter=meter.name,
        covers=meter.covers,
        caveat=meter.caveat,
        regime="back-to-back",
        power_w=power_w,
        rails_w=rails_w,
        idle_before_w=idle_w[0],
        idle_after_w=idle_w[1],
        net_power_w=net_w,
        energy_per_inference_j=power_w * seconds_each,
        net_energy_per_inference_j=net_w * seconds_each,
        window_s=watched,
        state=state,
    )
    return power, ""


def _mark(meter: Ina3221Meter | None) -> Mark:
    energy_j = {} if meter is None else meter.energy_j()
    return Mark(time.monotonic(), energy_j)  # energy first: it is up to the end of its readings, which take a while


def _watts(begin: Mark, end: Mark) -> dict[str, float]:
    return {rail: (end.energy_j[rail] - begin.energy_j[rail]) / (end.seconds - begin.seconds) for rail in end.energy_j}


def _report(result: dict[str, Any]) -> list[str]:
    """Return what a person reads."""
    latency, gpu, power, batch = result["latency_ms"], result["gpu_ms"], result["power"], result["batch"]
    lines = [
        f"device    {result['device'] or 'this one'}, TensorRT {result['tensorrt'] or 'of unknown version'}",
        f"latency   median {latency['median']:.3f} ms, 99 % below {latency['p99']:.3f} ms, batch {batch}; "
        f"on the GPU alone {gpu['median']:.3f} ms",
        f"rate      {result['inferences_per_s']:.1f} inferences/s, {result['images_per_s']:.1f} images/s, back-to-back",
    ]
    if power is None:
        return [*lines, f"power     not measured: {result['power_not_measured']}"]
    idle_w = (power["idle_before_w"] + power["idle_after_w"]) / 2
    each, net = power["energy_per_inference_j"], power["net_energy_per_inference_j"]
    rails = ", ".join(f"{rail} {watts:.2f} W" for rail, watts in power["rails_w"].items())
    state = "; ".join(f"{name}: {value}" for name, value in power["state"].items())
    return [
        *lines,
        f"state     {state}",
        f"power     {power['power_w']:.2f} W; idle {idle_w:.2f} W; above idle {power['net_power_w']:.2f} W",
        f"          {rails}",
        f"          {power['covers']}",
        f"energy    {1000 * each:.3f} mJ an inference, {1000 * each / batch:.3f} mJ an image; "
        f"above idle {1000 * net:.3f} and {1000 * net / batch:.3f} mJ",
    ]


if __name__ == "__main__":
    sys.exit(main())
