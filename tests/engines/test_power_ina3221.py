"""The rails of Jetson modules, on made-up trees of sysfs, etc and var."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from lsp_deploy.engines.power import ina3221
from lsp_deploy.engines.power.ina3221 import Ina3221Meter, open_ina3221

NEVER = 3600.0
"""Seconds between readings, where a test reads itself."""


def rail(root: Path, chip: str, channel: int, label: str, mv: int = 5000, ma: int | None = 1000) -> Path:
    """Write one channel of a sensor; returns its folder."""
    folder = root / f"sys/bus/i2c/drivers/ina3221/{chip}/hwmon/hwmon{3 if chip == '1-0040' else 4}"
    write(folder / f"in{channel}_label", f"{label}\n")
    write(folder / f"in{channel}_input", f"{mv}\n")
    if ma is not None:
        write(folder / f"curr{channel}_input", f"{ma}\n")
    return folder


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.fixture
def orin(tmp_path: Path) -> Path:
    """An AGX Orin: 20 V × 1 A, 20 V × 0.5 A, 5 V × 2 A, and VDDQ below the last one."""
    rail(tmp_path, "1-0040", 1, "VDD_GPU_SOC", 20_000, 1000)
    rail(tmp_path, "1-0040", 2, "VDD_CPU_CV", 20_000, 500)
    rail(tmp_path, "1-0040", 3, "VIN_SYS_5V0", 5000, 2000)
    rail(tmp_path, "1-0040", 7, "sum of shunt voltages", ma=None)
    rail(tmp_path, "1-0041", 1, "NC")
    rail(tmp_path, "1-0041", 2, "VDDQ_VDD2_1V8AO", 5000, 800)
    return tmp_path


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The meter's clock: what the last entry says."""
    times = [100.0]
    monkeypatch.setattr(ina3221.time, "monotonic", lambda: times[-1])
    return times


@pytest.fixture
def opened():
    """Opens meters, and closes them when the test is over."""
    meters: list[Ina3221Meter] = []

    def open_one(root: Path, interval_s: float = NEVER) -> Ina3221Meter:
        meter, reason = open_ina3221(root, interval_s)
        assert meter is not None, reason
        meters.append(meter)
        return meter

    yield open_one
    for meter in meters:
        meter.close()


def test_rails_of_an_agx_orin_by_their_labels_and_vddq_is_not_counted_twice(orin, clock, opened):
    meter = opened(orin)
    clock.append(102.0)
    assert meter.energy_j() == pytest.approx({"VDD_GPU_SOC": 40.0, "VDD_CPU_CV": 20.0, "VIN_SYS_5V0": 20.0})
    assert "VDD_GPU_SOC, VDD_CPU_CV, VIN_SYS_5V0; not the carrier board" in meter.covers


def test_power_is_added_up_by_the_trapezoidal_rule(orin, clock, opened):
    meter = opened(orin)
    current = orin / "sys/bus/i2c/drivers/ina3221/1-0040/hwmon/hwmon3/curr1_input"
    clock.append(101.0)
    current.write_text("3000")  # from 20 W to 60 W within 1 s
    assert meter.energy_j()["VDD_GPU_SOC"] == pytest.approx(40.0)
    clock.append(101.5)
    current.write_text("1000")  # and back within 0.5 s
    assert meter.energy_j()["VDD_GPU_SOC"] == pytest.approx(60.0)
    assert meter.readings == 3


def test_modules_with_a_sensor_on_their_input_have_it_as_their_total(tmp_path, clock, opened):
    rail(tmp_path, "1-0040", 1, "VDD_IN", 5000, 2000)
    rail(tmp_path, "1-0040", 2, "VDD_CPU_GPU_CV", 5000, 600)
    rail(tmp_path, "1-0040", 3, "VDD_SOC", 5000, 300)
    meter = opened(tmp_path)
    clock.append(101.0)
    assert meter.energy_j() == pytest.approx({"VDD_IN": 10.0})
    assert "at its input VDD_IN" in meter.covers


def test_a_thread_reads_between_two_questions(orin, opened):
    meter = opened(orin, interval_s=0.001)
    before = meter.readings
    deadline = ina3221.time.monotonic() + 10
    while meter.readings < before + 5:
        assert ina3221.time.monotonic() < deadline
        ina3221.time.sleep(0.002)
    meter.close()
    assert not meter._thread.is_alive()
    energy = meter.energy_j()
    assert energy["VDD_GPU_SOC"] == pytest.approx(2 * energy["VDD_CPU_CV"])
    assert energy["VDD_GPU_SOC"] > 0


def test_a_rail_that_fails_later_is_told_to_whoever_asks(orin, opened):
    meter = opened(orin, interval_s=0.001)
    (orin / "sys/bus/i2c/drivers/ina3221/1-0040/hwmon/hwmon3/curr2_input").unlink()
    meter._thread.join(timeout=10)
    assert not meter._thread.is_alive()
    with pytest.raises(OSError, match=r"a rail could not be read: .*curr2_input"):
        meter.energy_j()


def test_rails_of_no_known_module(tmp_path):
    rail(tmp_path, "1-0040", 1, "GPU")
    rail(tmp_path, "1-0040", 2, "CPU")
    assert open_ina3221(tmp_path) == (None, "which of the rails CPU, GPU make up this module is not known")


def test_no_rails(tmp_path):
    rail(tmp_path, "1-0040", 1, "NC")
    meter, reason = open_ina3221(tmp_path)
    assert meter is None
    assert "not a Jetson" in reason


def test_a_rail_without_a_number(orin):
    write(orin / "sys/bus/i2c/drivers/ina3221/1-0040/hwmon/hwmon3/in1_input", "")
    meter, reason = open_ina3221(orin)
    assert meter is None
    assert reason.startswith("a rail cannot be read")


def test_power_mode_and_clocks(orin, opened):
    write(orin / "var/lib/nvpmodel/status", "pmode:0002\n")
    write(orin / "etc/nvpmodel.conf", "< POWER_MODEL ID=0 NAME=MAXN >\n< POWER_MODEL ID=2 NAME=MODE_30W >\n")
    for cpu in (0, 1):
        for end, khz in (("min", 729_600), ("max", 2_201_600)):
            write(orin / f"sys/devices/system/cpu/cpu{cpu}/cpufreq/scaling_{end}_freq", f"{khz}\n")
    for end in ("min", "max"):
        write(orin / f"sys/class/devfreq/17000000.gpu/{end}_freq", "1300500000\n")
    meter = opened(orin)
    assert meter.state() == {
        "nvpmodel": "MODE_30W (mode 2)",
        "clocks": "CPU 730 to 2202 MHz, GPU held at 1300 MHz",
    }
    write(orin / "var/lib/nvpmodel/status", "pmode:0007")
    assert meter.state()["nvpmodel"] == "mode 7"


def test_what_cannot_be_found_out_is_unknown(orin, opened):
    meter = opened(orin)
    assert meter.state()["nvpmodel"].startswith("unknown: ")
    assert meter.state()["clocks"] == "CPU unknown, GPU unknown"
    write(orin / "var/lib/nvpmodel/status", "fmode:quiet")
    write(orin / "etc/nvpmodel.conf", "")
    assert meter.state()["nvpmodel"].startswith("unknown: no mode")


def test_the_file_runs_alone(orin, tmp_path):
    """On a Jetson without this package: it may import nothing but Python's own library."""
    code = (
        "import ina3221, pathlib, sys\n"
        "meter, reason = ina3221.open_ina3221(pathlib.Path(sys.argv[1]))\n"
        "print(sorted(meter.energy_j()))\n"
        "meter.close()\n"
        "sys.exit(any(name.startswith('lsp_deploy') for name in sys.modules))\n"
    )
    run = subprocess.run(
        [sys.executable, "-S", "-c", code, str(orin)],
        cwd=Path(ina3221.__file__).parent,
        capture_output=True,
        text=True,
    )
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout.strip() == "['VDD_CPU_CV', 'VDD_GPU_SOC', 'VIN_SYS_5V0']"
