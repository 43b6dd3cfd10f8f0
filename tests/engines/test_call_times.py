"""Short calls in turns. No time is judged."""

from __future__ import annotations

import numpy as np
import pytest
from pass_models import graph

from lsp_deploy.engines import call_times
from lsp_deploy.engines.call_times import call_times_us
from lsp_deploy.engines.onnxruntime_backend import OnnxRuntimeEngine
from lsp_deploy.errors import UserError


class Clock:
    """A clock that only calls move."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.order: list[str] = []
        monkeypatch.setattr(call_times.time, "perf_counter", lambda: self.now)

    def call(self, name: str, *seconds: float):
        """Return a call that takes so long: the first time, the second, ..., the last for ever."""
        left = list(seconds)

        def call() -> None:
            self.order.append(name)
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return call


def test_the_least_time_counts_and_the_first_call_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    # The first call of a block is not counted, however fast it is.
    found = call_times_us({"a": clock.call("a", 0.001, 0.009, 0.004, 0.006), "b": clock.call("b", 0.02)})
    assert found == pytest.approx({"a": 4000.0, "b": 20000.0})


def test_calls_take_turns_in_both_directions(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    call_times_us({"a": clock.call("a", 0.02), "b": clock.call("b", 0.02)})
    assert "".join(clock.order) == "aaabbb" + "bbbaaa" + "aaabbb"


def test_rounds_go_on_until_nothing_gets_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    slow_at_first = [0.02] * 7 + [0.01]  # two rounds of three calls
    found = call_times_us({"a": clock.call("a", *slow_at_first)})
    assert found == pytest.approx({"a": 10000.0})
    clock = Clock(monkeypatch)
    ever_faster = [0.02 * 0.9**number for number in range(40)]
    call_times_us({"a": clock.call("a", *ever_faster)}, seconds=0.1)
    assert len(clock.order) < 20, "a machine that does not settle is given up"


def test_a_bound_call_runs_the_model() -> None:
    model = graph("g (float[2, 3] x) => (float[2, 3] y) { y = Add(x, x) }")
    with OnnxRuntimeEngine.from_model(model, threads=1) as engine:
        call = engine.bound({"x": np.ones((2, 3), np.float32)})
        assert call() is None
        with pytest.raises(UserError, match="x"):
            engine.bound({"x": np.ones((2, 4), np.float32)})
