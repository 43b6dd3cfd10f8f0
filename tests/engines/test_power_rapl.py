"""RAPL, on a made-up powercap tree."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lsp_deploy.engines.power import rapl
from lsp_deploy.engines.power.rapl import RaplMeter, open_rapl

RANGE_UJ = 262_143_328_850


def zone(sysfs: Path, number: str, name: str, energy_uj: int = 0) -> Path:
    folder = sysfs / f"class/powercap/{number}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "name").write_text(f"{name}\n")
    (folder / "max_energy_range_uj").write_text(f"{RANGE_UJ}\n")
    (folder / "energy_uj").write_text(f"{energy_uj}\n")
    return folder / "energy_uj"


def opened(sysfs: Path) -> RaplMeter:
    meter, reason = open_rapl(sysfs)
    assert meter is not None, reason
    return meter


def test_packages_are_added_up_and_their_parts_are_not(tmp_path):
    first = zone(tmp_path, "intel-rapl:0", "package-0", 1_000_000)
    second = zone(tmp_path, "intel-rapl:1", "package-1", 5_000_000)
    zone(tmp_path, "intel-rapl:0:0", "core", 7)
    zone(tmp_path, "intel-rapl:2", "psys", 7)
    zone(tmp_path, "intel-rapl-mmio:0", "package-0", 7)  # the same counter, by another way
    meter = opened(tmp_path)
    assert meter.energy_j() == {"package-0": 0, "package-1": 0}
    first.write_text("3500000")
    second.write_text("5250000")
    assert meter.energy_j() == {"package-0": 2.5, "package-1": 0.25}
    assert meter.readings == 3
    assert "package-0, package-1" in meter.covers
    assert "not DRAM" in meter.covers


def test_a_counter_that_wraps_around(tmp_path):
    counter = zone(tmp_path, "intel-rapl:0", "package-0", RANGE_UJ - 1_000_000)
    meter = opened(tmp_path)
    counter.write_text("2000000")
    assert meter.energy_j()["package-0"] == pytest.approx(3.0)
    counter.write_text("4000000")
    assert meter.energy_j()["package-0"] == pytest.approx(5.0)


@given(st.integers(0, RANGE_UJ - 1), st.lists(st.integers(0, RANGE_UJ - 1), max_size=8))
def test_energy_is_the_sum_of_the_steps_wherever_the_counter_stands(tmp_path_factory, start, steps):
    counter = zone(tmp_path_factory.mktemp("sys"), "intel-rapl:0", "package-0", start)
    meter = opened(counter.parents[3])
    for count, _ in enumerate(steps, start=1):
        counter.write_text(str((start + sum(steps[:count])) % RANGE_UJ))
        assert meter.energy_j()["package-0"] == pytest.approx(sum(steps[:count]) / 1e6)


def test_readable_by_root_only(tmp_path, monkeypatch):
    counter = zone(tmp_path, "intel-rapl:0", "package-0")

    def read(path: Path) -> int:
        if path == counter:
            raise PermissionError(13, "Permission denied", str(path))
        return int(path.read_text())

    monkeypatch.setattr(rapl, "_read", read)  # tests may run as root, whom no mode stops
    meter, reason = open_rapl(tmp_path)
    assert meter is None
    assert reason.startswith(f"{counter} is readable by root only; sudo chmod a+r ")


@pytest.mark.parametrize("text", ["", "many"])
def test_a_counter_without_a_number(tmp_path, text):
    zone(tmp_path, "intel-rapl:0", "package-0").write_text(text)
    meter, reason = open_rapl(tmp_path)
    assert meter is None
    assert "cannot be read: invalid literal" in reason


def test_no_counter(tmp_path):
    zone(tmp_path, "intel-rapl:0:0", "core")
    assert open_rapl(tmp_path)[0] is None
    meter, reason = open_rapl(tmp_path / "nothing")
    assert meter is None
    assert "virtual machine" in reason
