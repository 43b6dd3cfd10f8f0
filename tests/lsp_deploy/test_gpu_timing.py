"""Layers timed on a GPU: the models that are timed, what is timed, and what is remembered. No time is judged."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorrt_machine import A100, made_up_gpu

from lsp_deploy.engines.onnxruntime_backend import OnnxRuntimeEngine
from lsp_deploy.engines.protocol import EngineBuildError
from lsp_deploy.engines.tensorrt.backend import TensorRtBackend
from lsp_deploy.hardware.cpu_timings import LinearShape
from lsp_deploy.hardware.gpu_timings import GPU_DENSITIES, break_even_zeros
from lsp_deploy.hardware.target import load_target
from lsp_deploy.passes.to_float32 import ToFloat32Pass
from lsp_deploy.recipe import Recipe
from lsp_deploy.steps import gpu_timing
from lsp_deploy.steps.gpu_timing import EngineTimer, engine_timer, gpu_candidates, time_gpu_layers
from lsp_deploy.steps.layer_candidates import gpu_candidate_model, layer_feeds
from lsp_deploy.steps.preparation import PreparedModel, prepare

ASSETS = Path(__file__).parents[2] / "lsp_deploy" / "assets"
TARGET = load_target("a100")
SMALL = LinearShape(M=6, K=64, N=96, activation="gelu", residual=True, block=(16, 16))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LSP_DEPLOY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def prepared() -> PreparedModel:
    return prepare(ASSETS / "digits_vit.onnx", Recipe(target="a100"), TARGET)


class MadeUpTimer:
    device = "a made-up GPU"
    versions = {"tensorrt": "0"}  # noqa: RUF012

    def __init__(self, *, has_operator: bool = True, error: str | None = None) -> None:
        self.has_operator, self.error = has_operator, error
        self.asked: list[tuple[LinearShape, list[str]]] = []

    def curves(self, shape: LinearShape, names: Sequence[str], compute_type: str) -> dict[str, dict[float, float]]:
        self.asked.append((shape, list(names)))
        if self.error is not None:
            raise EngineBuildError(self.error)
        return {
            name: {density: 10.0 * density for density in (GPU_DENSITIES if name.startswith("block") else (1.0,))}
            for name in names
        }


def output(candidate: str, density: float = 1.0) -> np.ndarray:
    """Return what a candidate computes in float32 from whole numbers of its input's steps."""
    model = gpu_candidate_model(SMALL, candidate, density, "fp16")
    ToFloat32Pass()(model)
    steps = np.float32(np.float16(4 / 127))
    feeds = {name: np.clip(np.rint(feed / steps), -127, 127) for name, feed in layer_feeds(SMALL).items()}
    with OnnxRuntimeEngine.from_model(model, threads=1) as engine:
        scaled = engine.inputs["x"].dtype != np.int8
        x = (feeds["x"] * (steps if scaled else 1)).astype(engine.inputs["x"].dtype)
        (y,) = engine.run({"x": x, "residual": feeds["residual"] * steps}).values()
    return np.asarray(y, np.float32)


@pytest.mark.parametrize(
    ("candidate", "like", "density", "tolerance"),
    [
        ("matmul int8", "matmul fp16", 1.0, 0.03),
        ("block_sparse fp16", "matmul fp16", 1.0, 0.003),
        ("block_sparse int8", "matmul int8", 1.0, 0.01),
        ("two_four int8", "two_four fp16", 1.0, 0.03),
        ("block_sparse int8", "block_sparse fp16", 0.4, 0.03),
    ],
)
def test_candidates_compute_the_same(candidate: str, like: str, density: float, tolerance: float) -> None:
    expected = output(like, density)
    assert np.abs(output(candidate, density) - expected).max() <= tolerance * np.abs(expected).max()


@pytest.mark.parametrize("candidate", ["matmul int8", "two_four int8", "block_sparse int8"])
def test_int8_layers_start_quantized(candidate: str) -> None:
    model = gpu_candidate_model(SMALL, candidate, 0.4, "fp16")
    assert [value.dtype.name for value in model.graph.inputs] == ["INT8", "FLOAT16"]
    assert "QuantizeLinear" not in [node.op_type for node in model.graph]


@pytest.mark.parametrize(
    ("asked", "operator", "expected"),
    [
        ({}, True, 6),
        ({}, False, 4),
        ({"sparsity": "none"}, True, 2),
        ({"sparsity": "block", "precision": "fp16"}, True, 2),
        ({"sparsity": "2:4", "precision": "int8"}, True, 4),
    ],
)
def test_candidates_are_what_the_recipe_leaves_open(asked: dict[str, str], operator: bool, expected: int) -> None:
    names = gpu_candidates(Recipe.model_validate({"target": "a100", **asked}), TARGET, "fp16", operator=operator)
    assert len(names) == expected and names[0] == "matmul fp16"
    assert not any(name.startswith("block_sparse") for name in names) or operator


def test_an_old_gpu_has_no_operator() -> None:
    names = gpu_candidates(Recipe(target="t4"), load_target("t4"), "fp16", operator=True)
    assert not any(name.startswith("block_sparse") for name in names)


def test_every_shape_in_the_blocks_is_timed_once(prepared: PreparedModel) -> None:
    timer = MadeUpTimer()
    timings = time_gpu_layers(prepared, Recipe(target="a100"), TARGET, timer=timer)
    assert timings is not None and timings.has_operator
    shapes = [shape for shape, _ in timer.asked]
    assert len(shapes) == len(set(shapes)) == 4
    assert len(timings.layers) == 4 * len(shapes)  # the model has four blocks
    name = next(iter(timings.layers))
    assert timings.at(name, 0.5)["block_sparse int8"] == pytest.approx(5.0)
    assert timings.at(name, 0.5)["two_four int8"] == 10.0
    assert timings.at("/head/Gemm", 1.0) == {}


def test_without_a_choice_nothing_is_timed(prepared: PreparedModel) -> None:
    timer = MadeUpTimer()
    recipe = Recipe(target="a100", precision="fp16", sparsity="none")
    assert time_gpu_layers(prepared, recipe, TARGET, timer=timer) is None and timer.asked == []


def test_where_the_gpu_is_elsewhere_nothing_is_timed(prepared: PreparedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lsp_deploy.engines.tensorrt.backend.first_gpu", lambda: None)
    assert time_gpu_layers(prepared, Recipe(target="a100"), load_target("h100")) is None


def test_who_has_no_plugin_is_told(prepared: PreparedModel, capsys: pytest.CaptureFixture[str]) -> None:
    timings = time_gpu_layers(prepared, Recipe(target="a100"), TARGET, timer=MadeUpTimer(has_operator=False))
    assert timings is not None and not timings.has_operator
    assert "name liblsp_block_sparse.so with --plugin" in capsys.readouterr().out.replace("\n", " ")


def test_an_engine_that_is_refused_leaves_estimates(
    prepared: PreparedModel, capsys: pytest.CaptureFixture[str]
) -> None:
    assert time_gpu_layers(prepared, Recipe(target="a100"), TARGET, timer=MadeUpTimer(error="refused")) is None
    assert "what they take is estimated: refused" in capsys.readouterr().err.replace("\n", " ")


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine with an A100 and TensorRT, both made up, and without TensorRT-RTX."""
    with made_up_gpu(tmp_path, monkeypatch):
        monkeypatch.setattr("lsp_deploy.engines.tensorrt_common.gpu.first_gpu", lambda: A100)
        yield


@pytest.mark.skipif(os.name != "posix", reason="needs a POSIX shell")
def test_engines_are_timed_on_the_gpu_that_is_here_and_remembered(
    machine: None, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_timing, "_RUNS", 2)
    target = TARGET.model_copy(update={"builders": ["tensorrt"]})
    timer = engine_timer(target)
    assert timer.device == A100.name and timer.versions == {"tensorrt": TensorRtBackend().status(target).version}
    assert not timer.has_operator
    names = ["matmul fp16", "two_four fp16"]
    first = timer.curves(SMALL, names, "fp16")
    assert list(first) == names and all(curve[1.0] > 0 for curve in first.values())

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("it was measured before")

    monkeypatch.setattr(EngineTimer, "_measured", refuse)
    assert timer.curves(SMALL, names, "fp16") == first
    with pytest.raises(AssertionError, match="measured before"):
        timer.curves(SMALL, names[:1], "fp16")


def test_break_even() -> None:
    curve = {1.0: 14.0, 0.6: 10.0, 0.4: 6.0, 0.2: 4.0}
    assert break_even_zeros(curve, 8.0) == pytest.approx(0.5)
    assert break_even_zeros(curve, 20.0) == 0.0
    assert break_even_zeros(curve, 3.0) is None
    assert break_even_zeros(curve, 10.0) == pytest.approx(0.4)


@settings(max_examples=200)
@given(st.lists(st.floats(1, 100), min_size=4, max_size=4), st.floats(0.5, 120))
def test_at_its_break_even_the_operator_takes_as_long_as_the_dense_layer(times: list[float], dense: float) -> None:
    curve = dict(zip(GPU_DENSITIES, times, strict=True))
    zeros = break_even_zeros(curve, dense)
    densities = sorted(curve)
    monotone = np.minimum.accumulate([curve[density] for density in densities][::-1])[::-1]
    if zeros is None:
        assert monotone[0] >= dense
    elif zeros == 0:
        assert monotone[-1] <= dense
    else:
        assert np.interp(1 - zeros, densities, monotone) == pytest.approx(dense)
