"""Power from the command line: `profile` and `compare` with and without a meter, back-to-back and at a fixed rate."""

from __future__ import annotations

import functools
import itertools
import json
from pathlib import Path

import pytest

from lsp_deploy.engines import profiler


class Meter:
    """Two joules more at every reading."""

    name = "a made-up meter"
    covers = "a made-up board"
    caveat = ""
    window_s = 0.02

    def __init__(self) -> None:
        self._energy = itertools.count(0.0, 2.0)
        self.readings = 0
        self.open = True

    def energy_j(self) -> dict[str, float]:
        self.readings += 1
        return {"board": next(self._energy)}

    def state(self) -> dict[str, str]:
        return {"mode": "quiet"}

    def close(self) -> None:
        self.open = False


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time is not what is tested here."""
    monkeypatch.setattr(profiler, "profile", functools.partial(profiler.profile, block_seconds=0.01))
    monkeypatch.setattr("lsp_deploy.engines.power.recording._SETTLE_S", 0.0)
    monkeypatch.setattr("lsp_deploy.engines.power.recording._LEAST_IDLE_S", 0.02)


@pytest.fixture
def meter(run, monkeypatch: pytest.MonkeyPatch) -> Meter:
    meter = Meter()
    monkeypatch.setattr("lsp_deploy.engines.power.finding.find_meter", lambda *_: (meter, ""))
    return meter


QUICK = ("--batch", 1, "--duration", 0.1, "--warm-up", 0, "--jobs", 1)


def test_profile_with_a_meter(run, meter, bare: Path):
    result = run("profile", bare, *QUICK, "--rate", 100, "--json")
    assert result.code == 0, result.err
    (profile,) = json.loads(result.out)["profiles"]
    assert (profile["regime"], profile["rate_per_s"], profile["power_note"]) == ("100 requests/s", 100, "")
    power = profile["power"]
    # Two joules a window, whatever it took.
    assert power["power_w"] == pytest.approx(2 / power["window_s"])
    assert power["energy_per_inference_j"] == pytest.approx(2 * power["windows"] / power["inferences"])
    assert power["state"] == {"mode": "quiet"}
    assert not meter.open


def test_profile_in_words(run, meter, bare: Path):
    result = run("profile", bare, *QUICK, "--power")
    assert result.code == 0, result.err
    assert "power, a made-up meter, back-to-back" in result.out
    assert "measured: a made-up board" in result.out


def test_compare_with_a_meter(run, meter, bare: Path):
    result = run("compare", bare, bare, "--batch", 1, "--samples", 4, "--jobs", 1, "--json")
    assert result.code == 0, result.err
    dense, compressed = json.loads(result.out)["profiles"]
    assert dense["power"]["windows"] == compressed["power"]["windows"]
    assert dense["power"]["idle_before_w"] == compressed["power"]["idle_before_w"]


def test_without_a_meter(run, bare: Path):
    result = run("profile", bare, *QUICK)
    assert result.code == 0, result.err
    assert "power: not measured: no meter in tests" in result.out
    result = run("profile", bare, *QUICK, "--no-power", "--json")
    (profile,) = json.loads(result.out)["profiles"]
    assert (profile["power"], profile["power_note"]) == (None, "not measured: --no-power")


def test_a_meter_that_is_wanted_and_not_there_ends_it(run, bare: Path):
    result = run("profile", bare, *QUICK, "--power")
    assert result.code == 2
    assert result.err.splitlines()[-1] == ("error: --power: no meter in tests; leave it out to measure without power")


@pytest.mark.parametrize("rate", [0, "inf", "nan"])
def test_a_rate_is_above_zero_and_finite(run, bare: Path, rate):
    result = run("profile", bare, *QUICK, "--rate", rate)
    assert result.code == 2
    assert "--rate" in result.err
