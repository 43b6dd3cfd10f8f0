from __future__ import annotations

import numpy as np
import pytest

from lsp_deploy.engines import host, profiler
from lsp_deploy.engines.host import CpuMeter, available_cpus, cpu_model, load_average
from lsp_deploy.engines.onnxruntime_backend import OnnxRuntimeEngine
from lsp_deploy.engines.profiler import Profile, latency_ratio, profile
from lsp_deploy.engines.protocol import EngineInfo

FEEDS = {"x": np.zeros((4, 3), np.float32)}


class FakeEngine:
    """Notes its calls; takes no time of its own."""

    backend = "fake"

    def __init__(self, label: str, calls: list[str], threads: int = 1) -> None:
        self.label = label
        self.calls = calls
        self.threads = threads
        self.feeds: list[dict[str, np.ndarray]] = []

    def run(self, feeds):
        self.calls.append(self.label)
        self.feeds.append(feeds)
        return {}

    def describe(self) -> EngineInfo:
        return EngineInfo(backend="fake", target="cpu", device="a fake", threads=self.threads, versions={"fake": "1.2"})


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch):
    """A clock of the test's own: a call takes what `cost` says, in seconds."""

    class Clock:
        now = 0.0

        def sleep(self, seconds: float) -> None:
            self.now += seconds

    clock = Clock()
    monkeypatch.setattr(profiler.time, "perf_counter", lambda: clock.now)
    monkeypatch.setattr(profiler.time, "sleep", clock.sleep)
    return clock


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch):
    """Foreign load as the test says, block by block; none once the list is used up."""
    loads: list[float] = []
    monkeypatch.setattr(CpuMeter, "foreign_cpus", lambda self: loads.pop(0) if loads else 0.0)
    monkeypatch.setattr(profiler, "available_cpus", lambda: (0, 1))
    return loads


def timed(engine: FakeEngine, clock, costs) -> FakeEngine:
    """Let the engine's calls take `costs`, in turn, the last one from then on."""
    run, left = engine.run, list(costs)

    def with_cost(feeds):
        clock.sleep(left.pop(0) if len(left) > 1 else left[0])
        return run(feeds)

    engine.run = with_cost
    return engine


def test_figures_of_known_latencies(clock, quiet):
    calls: list[str] = []
    # Warm-up takes the first call; then blocks of four calls: 1, 2, 3 and 4 ms.
    costs = [0.5, *([0.001, 0.002, 0.003, 0.004] * 3)]
    engine = timed(FakeEngine("a", calls, threads=2), clock, costs)
    (result,) = profile({"a": engine}, FEEDS, duration=0.03, warm_up=0.1, block_seconds=0.0095).values()
    latency = np.tile([1.0, 2.0, 3.0, 4.0], 3)
    assert len(calls) == 1 + 12
    assert (result.runs, result.blocks) == (12, 3)
    assert result.latency_min_ms == pytest.approx(1)
    assert result.latency_max_ms == pytest.approx(4)
    assert result.latency_mean_ms == pytest.approx(2.5)
    assert result.latency_median_ms == pytest.approx(2.5)
    assert result.latency_p90_ms == pytest.approx(np.percentile(latency, 90))
    assert result.latency_p99_ms == pytest.approx(np.percentile(latency, 99))
    assert result.spread == pytest.approx((3.25 - 1.75) / 2.5)
    assert result.batch == 4
    assert result.throughput_per_s == pytest.approx(4 / 0.0025)
    assert result.block_medians_ms == pytest.approx([2.5, 2.5, 2.5])
    assert (result.label, result.backend, result.device, result.threads) == ("a", "fake", "a fake", 2)
    assert result.measured is True
    assert (result.power, result.power_note) == (None, "not measured")
    assert result.conditions.versions == {"fake": "1.2"}
    assert Profile.model_validate_json(result.model_dump_json()) == result


def test_engines_take_turns_in_blocks_after_a_warm_up_of_each(clock, quiet):
    calls: list[str] = []
    engines = {label: timed(FakeEngine(label, calls), clock, [0.01]) for label in "ab"}
    results = profile(engines, FEEDS, duration=0.09, warm_up=0.02, block_seconds=0.025)
    warm_up, blocks = "aabb", ["aaa", "bbb", "bbb", "aaa", "aaa", "bbb"]
    assert "".join(calls) == warm_up + "".join(blocks)
    assert [result.blocks for result in results.values()] == [3, 3]


def test_it_goes_on_until_every_engine_has_had_its_time(clock, quiet):
    calls: list[str] = []
    engines = {
        "slow": timed(FakeEngine("s", calls), clock, [0.5]),
        "fast": timed(FakeEngine("f", calls), clock, [0.01]),
    }
    results = profile(engines, FEEDS, duration=1.0, warm_up=0, block_seconds=0.1)
    assert results["fast"].runs * 0.01 >= 1.0
    assert results["fast"].blocks == results["slow"].blocks


def test_the_ratio_is_taken_round_by_round(clock, quiet):
    calls: list[str] = []
    # The machine is twice as slow in the second round; the ratio is not.
    slow = timed(FakeEngine("s", calls), clock, [0.02, 0.02, 0.04, 0.03])
    fast = timed(FakeEngine("f", calls), clock, [0.01, 0.01, 0.02, 0.01])
    results = profile({"slow": slow, "fast": fast}, FEEDS, duration=0, warm_up=0, block_seconds=0)
    ratio = latency_ratio(results["slow"], results["fast"])
    assert (ratio.median, ratio.low, ratio.high, ratio.rounds) == pytest.approx((2, 2, 3, 3))
    results["fast"].block_medians_ms.pop()
    with pytest.raises(ValueError, match="not measured in one run"):
        latency_ratio(results["slow"], results["fast"])


def test_a_disturbed_round_is_left_out_for_all(clock, quiet):
    calls: list[str] = []
    engines = {
        "a": timed(FakeEngine("a", calls, threads=2), clock, [0.01]),
        "b": timed(FakeEngine("b", calls, threads=2), clock, [0.01, 0.01, 0.01, 0.09, 0.01]),
    }
    quiet += [0.0, 0.0, 0.5, 0.1]  # round 1: a, b; round 2: b, a
    results = profile(engines, FEEDS, duration=0, warm_up=0, block_seconds=0)
    assert (results["a"].disturbed_blocks, results["b"].disturbed_blocks) == (0, 1)
    assert [result.discarded_blocks for result in results.values()] == [1, 1]
    assert [result.blocks for result in results.values()] == [2, 2]


def test_where_most_rounds_are_disturbed_all_are_kept_and_it_is_said(clock, quiet):
    quiet += [0.5, 0.5, 0.0]
    engine = timed(FakeEngine("a", [], threads=2), clock, [0.01])
    result = profile({"a": engine}, FEEDS, duration=0, warm_up=0, block_seconds=0)["a"]
    assert (result.blocks, result.disturbed_blocks, result.discarded_blocks) == (3, 2, 0)
    assert result.conditions.foreign_cpus == 0.5


def test_foreign_load_on_spare_cpus_does_not_disturb(clock, quiet):
    quiet += [0.9, 0.9, 0.9]
    engine = timed(FakeEngine("a", [], threads=1), clock, [0.01])
    assert profile({"a": engine}, FEEDS, duration=0, warm_up=0)["a"].disturbed_blocks == 0


def test_feeds_may_differ_by_engine_and_threads_may_be_given(clock, quiet):
    engines = {label: timed(FakeEngine(label, []), clock, [0.1]) for label in "ab"}
    feeds = {"a": FEEDS, "b": {"x": np.ones((2, 3), np.float16)}}
    results = profile(engines, feeds, threads=7, duration=0, warm_up=0)
    assert [result.batch for result in results.values()] == [4, 2]
    assert [result.threads for result in results.values()] == [7, 7]
    assert engines["b"].feeds[0] is feeds["b"]


def test_a_real_session(make_model, x: np.ndarray):
    with OnnxRuntimeEngine.from_model(make_model(), threads=1) as engine:
        result = profile({"small": engine}, {"x": x}, duration=0, warm_up=0, block_seconds=0.01, gap_seconds=0)["small"]
    assert result.runs >= result.blocks >= 1
    assert 0 < result.latency_min_ms <= result.latency_median_ms <= result.latency_p90_ms <= result.latency_p99_ms
    assert (result.batch, result.threads, result.backend) == (3, 1, "onnxruntime")
    assert set(result.conditions.versions) == {"onnxruntime"}


def test_foreign_cpus_is_what_others_took_of_the_interval(monkeypatch: pytest.MonkeyPatch):
    readings = iter([(10.0, 3.0, 100.0), (12.0, 4.0, 102.5)])  # wall, own, busy
    monkeypatch.setattr(host, "_read", lambda: host._Reading(*next(readings)))
    assert CpuMeter().foreign_cpus() == pytest.approx((2.5 - 1.0) / 2)


def test_foreign_cpus_is_unknown_where_the_system_does_not_say(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(host, "_busy_seconds", lambda: None)
    assert CpuMeter().foreign_cpus() is None


def test_the_host_has_a_name_and_cpus():
    assert cpu_model()
    assert len(available_cpus()) >= 1
    assert load_average() is None or load_average() >= 0
