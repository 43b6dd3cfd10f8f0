"""Power in a profile: engines that draw known watts for known times, under a meter and a clock of the test's own."""

from __future__ import annotations

import io

import numpy as np
import pytest
from rich.console import Console

from lsp_deploy.engines import profiler
from lsp_deploy.engines.host import CpuMeter
from lsp_deploy.engines.power import finding
from lsp_deploy.engines.power.finding import find_meter, power_recorder
from lsp_deploy.engines.power.recording import PowerRecorder
from lsp_deploy.engines.profiler import Profile, profile
from lsp_deploy.engines.protocol import EngineInfo
from lsp_deploy.errors import UserError
from lsp_deploy.power_tables import power_tables

FEEDS = {"x": np.zeros((4, 3), np.float32)}


class World:
    """Time that passes only where somebody waits, and the energy that is used meanwhile."""

    def __init__(self) -> None:
        self.now = 0.0
        self.idle_w = 10.0
        self.used_j = 1000.0
        self.windows: list[str] = []

    def wait(self, seconds: float, watts: float | None = None) -> None:
        self.now += seconds
        self.used_j += seconds * (self.idle_w if watts is None else watts)


class Meter:
    """Two parts, one of which takes three quarters."""

    name = "a made-up meter"
    covers = "a made-up board"
    caveat = "it is made up"
    window_s = 10.0

    def __init__(self, world: World) -> None:
        self.world = world
        self.readings = 0
        self.closed = False
        self.fails_after: int | None = None

    def energy_j(self) -> dict[str, float]:
        self.readings += 1
        if self.fails_after is not None and self.readings > self.fails_after:
            raise OSError("no answer")
        return {"core": 0.75 * self.world.used_j, "memory": 0.25 * self.world.used_j}

    def state(self) -> dict[str, str]:
        return {"mode": f"at {self.world.now:.0f} s"}

    def close(self) -> None:
        self.closed = True


class Engine:
    """Takes `seconds` a call, drawing `watts`."""

    backend = "fake"

    def __init__(self, world: World, label: str, seconds: float, watts: float) -> None:
        self.world, self.label, self.seconds, self.watts = world, label, seconds, watts

    def run(self, feeds):
        self.world.windows.append(self.label)
        self.world.wait(self.seconds, self.watts)
        return {}

    def describe(self) -> EngineInfo:
        return EngineInfo(backend="fake", target="cpu", device="a fake", threads=1)


class TimedEngine(Engine):
    """Says that a call takes half of what the clock on the wall says."""

    clock = "a clock of its own"

    def timed_run(self, feeds):
        def call() -> float:
            self.run(feeds)
            return self.seconds * 1000 / 2

        return call


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    world = World()
    monkeypatch.setattr(profiler.time, "perf_counter", lambda: world.now)
    monkeypatch.setattr(profiler.time, "sleep", world.wait)
    monkeypatch.setattr(CpuMeter, "foreign_cpus", lambda self: 0.0)
    monkeypatch.setattr(profiler, "available_cpus", lambda: (0, 1))
    return world


def profiled(world: World, meter: Meter | None, *engines: Engine, **options) -> dict[str, Profile]:
    by_label = {engine.label: engine for engine in engines}
    recorder = PowerRecorder(meter, "" if meter else "not measured: no meter")
    return profile(by_label, FEEDS, warm_up=0, power=recorder, gap_seconds=0, **options)


def test_watts_and_joules_raw_and_without_idle_power(world):
    result = profiled(world, Meter(world), Engine(world, "a", seconds=0.5, watts=50))["a"]
    power = result.power
    assert power is not None
    assert (power.meter, power.covers, power.caveat) == (Meter.name, Meter.covers, Meter.caveat)
    assert (power.regime, result.regime, result.rate_per_s) == ("back-to-back", "back-to-back", None)
    assert power.power_w == power.power_low_w == power.power_high_w == pytest.approx(50)
    assert power.parts_w == pytest.approx({"core": 37.5, "memory": 12.5})
    assert power.idle_before_w == power.idle_after_w == pytest.approx(10)
    assert power.net_power_w == pytest.approx(40)
    assert power.energy_per_inference_j == pytest.approx(25)
    assert power.net_energy_per_inference_j == pytest.approx(20)
    assert power.inferences_per_s == pytest.approx(2)
    assert (power.windows, power.window_s, power.inferences) == (3, pytest.approx(10), 60)
    assert power.readings == 3  # one more at the end of each window than at its beginning
    assert power.state == {"mode": "at 42 s"}  # 12 s idle, one call to warm up, three windows
    assert result.power_note == ""
    assert Profile.model_validate_json(result.model_dump_json()) == result


def test_two_engines_take_turns_in_windows_that_the_meter_can_tell_apart(world):
    dense, small = Engine(world, "d", seconds=5, watts=80), Engine(world, "s", seconds=2, watts=70)
    results = profiled(world, Meter(world), dense, small)
    windows = ["dd", "sssss", "sssss", "dd", "dd", "sssss"]
    assert "".join(world.windows) == "ds" + "".join(windows)
    powers = [results[label].power for label in "ds"]
    assert [power.power_w for power in powers] == pytest.approx([80, 70])
    # Watts hardly fall back-to-back; joules an inference do.
    assert [power.energy_per_inference_j for power in powers] == pytest.approx([400, 140])


def test_idle_power_that_drifts_is_the_mean_of_both_ends(world):
    class Warming(Engine):
        def run(self, feeds):
            super().run(feeds)
            world.idle_w = 14.0
            return {}

    power = profiled(world, Meter(world), Warming(world, "a", seconds=1, watts=50))["a"].power
    assert (power.idle_before_w, power.idle_after_w) == pytest.approx((10, 14))
    assert power.net_power_w == pytest.approx(50 - 12)


def test_a_fixed_rate(world):
    result = profiled(world, Meter(world), Engine(world, "a", seconds=0.05, watts=110), rate_per_s=4)["a"]
    # A quarter of a second each: 0.05 s at 110 W, 0.2 s idle.
    assert result.latency_median_ms == pytest.approx(50)
    assert (result.regime, result.rate_per_s, result.missed_slots) == ("4 requests/s", 4, 0)
    assert result.throughput_per_s == pytest.approx(4 * 4)
    power = result.power
    assert power.regime == "4 requests/s"
    assert power.power_w == pytest.approx(30)
    assert power.inferences_per_s == pytest.approx(4)
    assert power.energy_per_inference_j == pytest.approx(7.5)
    assert power.net_energy_per_inference_j == pytest.approx(5)  # what the call adds: 0.05 s × 100 W


def test_slots_that_find_the_engine_busy_are_missed_and_counted(world):
    result = profiled(world, None, Engine(world, "a", seconds=0.25, watts=50), rate_per_s=10, block_seconds=1)["a"]
    # Of ten slots a block those at 0, 0.3, 0.6 and 0.9 s are served.
    assert result.blocks * 10 == result.runs + result.missed_slots
    assert result.runs == result.blocks * 4
    assert result.throughput_per_s < 4 * 4


def test_a_rate_below_one_a_block_still_has_a_request_in_each(world):
    result = profiled(world, None, Engine(world, "a", seconds=0.5, watts=50), rate_per_s=0.2, duration=0)["a"]
    assert (result.runs, result.missed_slots) == (3, 0)
    assert world.now == pytest.approx(0.5 + 3 * 5)


def test_without_a_meter_nothing_waits_and_the_reason_is_there(world):
    result = profiled(world, None, Engine(world, "a", seconds=0.5, watts=50), duration=0)["a"]
    assert (result.power, result.power_note) == (None, "not measured: no meter")
    assert world.now == pytest.approx(0.5 + 3 * 0.5)


@pytest.mark.parametrize("readings", [0, 1, 2, 3, 9])
def test_a_meter_that_fails_leaves_no_figure(world, readings):
    meter = Meter(world)
    meter.fails_after = readings  # idle before: 2, three windows: 6, idle after: 2
    result = profiled(world, meter, Engine(world, "a", seconds=0.5, watts=50))["a"]
    assert result.power is None
    assert result.power_note == "not measured: a made-up meter failed: no answer"
    assert result.latency_median_ms == pytest.approx(500)


def test_one_recorder_serves_several_runs(world):
    meter = Meter(world)
    recorder = PowerRecorder(meter)
    for watts in (50, 60):
        engine = Engine(world, "a", seconds=0.5, watts=watts)
        assert profile({"a": engine}, FEEDS, power=recorder)["a"].power.power_w == pytest.approx(watts)


def test_engines_with_a_clock_of_their_own(world):
    result = profiled(world, Meter(world), TimedEngine(world, "a", seconds=0.5, watts=50))["a"]
    assert result.clock == "a clock of its own"
    assert result.latency_median_ms == pytest.approx(250)
    # Energy is over the time on the wall, whatever the engine's clock says.
    assert result.power.energy_per_inference_j == pytest.approx(25)
    assert result.power.inferences_per_s == pytest.approx(2)


def jetson(root):
    folder = root / "sys/bus/i2c/drivers/ina3221/1-0040/hwmon/hwmon0"
    folder.mkdir(parents=True)
    for name, text in (("in1_label", "VDD_IN"), ("in1_input", "5000"), ("curr1_input", "1000")):
        (folder / name).write_text(text)
    return folder


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_a_jetson_has_rails_for_both(tmp_path, device):
    folder = jetson(tmp_path)
    meter, _ = find_meter(device, tmp_path)
    assert meter.name.startswith("INA3221")
    meter.close()
    (folder / "in1_label").write_text("GPU")
    assert find_meter(device, tmp_path) == (None, "which of the rails GPU make up this module is not known")


def test_elsewhere_a_gpu_has_nvml_and_a_cpu_has_rapl(tmp_path, monkeypatch):
    monkeypatch.setattr(finding, "open_nvml", lambda: (None, "NVML was asked"))
    assert find_meter("gpu", tmp_path) == (None, "NVML was asked")
    meter, reason = find_meter("cpu", tmp_path)
    assert meter is None
    assert f"{tmp_path}/sys/class/powercap" in reason


def test_wanted_unwanted_and_where_there_is_one(tmp_path, monkeypatch):
    meter = Meter(World())
    monkeypatch.setattr(finding, "find_meter", lambda device, root: (meter, ""))
    with power_recorder("gpu", False) as recorder:
        assert (recorder.window_s, recorder.note) == (0, "not measured: --no-power")
    with pytest.raises(KeyError), power_recorder("gpu") as recorder:
        assert (recorder.window_s, recorder.note) == (10, "")
        raise KeyError
    assert meter.closed
    monkeypatch.setattr(finding, "find_meter", lambda device, root: (None, "there is none"))
    with power_recorder("gpu") as recorder:
        assert recorder.note == "not measured: there is none"
    with (
        pytest.raises(UserError, match="--power: there is none; leave it out to measure without power"),
        power_recorder("gpu", True),
    ):
        pass


def shown(renderables) -> str:
    console = Console(file=io.StringIO(), width=200)
    for renderable in renderables:
        console.print(renderable)
    return console.file.getvalue()


def test_the_table_says_what_was_measured_and_how(world):
    dense, small = Engine(world, "dense", seconds=1, watts=80), Engine(world, "small", seconds=0.5, watts=70)
    text = shown(power_tables(list(profiled(world, Meter(world), dense, small, rate_per_s=0.5).values())))
    assert "a made-up meter, 0.5 requests/s" in text
    assert "a made-up board; it is made up" in text
    assert "10.00 W before and 10.00 W after" in text
    assert "3 windows of 10.0 s in turn" in text
    (row,) = (line for line in text.splitlines() if "dense" in line)
    # One request in two seconds: 1 s at 80 W, 1 s idle.
    assert [float(cell) for cell in row.strip("│ ").split("│")[2:]] == [45, 10, 35, 90, 70, 0.5]


def test_without_a_figure_one_line_says_why(world):
    engine = Engine(world, "a", seconds=0.25, watts=50)
    text = shown(power_tables(list(profiled(world, None, engine, rate_per_s=10, block_seconds=1).values())))
    assert text.splitlines()[0] == "power: not measured: no meter"
    assert "requests came while the last one was still running" in text
