"""Layers timed on this machine: candidates compute the same, and times are remembered. No time is judged."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from exports import export_family
from made_up_timer import MadeUpTimer

from lsp_deploy import console
from lsp_deploy.engines.host import CpuMeter
from lsp_deploy.engines.onnxruntime_backend import OnnxRuntimeEngine
from lsp_deploy.errors import UserError
from lsp_deploy.hardware.cpu_timings import CANDIDATES, DENSITIES, LinearShape, type_of
from lsp_deploy.hardware.target import load_target
from lsp_deploy.plugins import NativeLibrary, library
from lsp_deploy.recipe import Recipe
from lsp_deploy.steps import timing
from lsp_deploy.steps.attention_candidates import attention_left, attention_parts
from lsp_deploy.steps.layer_candidates import candidate_model, layer_feeds
from lsp_deploy.steps.preparation import PreparedModel, prepare
from lsp_deploy.steps.timing import CpuLayerTimer, candidates, time_layers

ASSETS = Path(__file__).parents[2] / "lsp_deploy" / "assets"
CPU = load_target("cpu")
SMALL = LinearShape(M=6, K=64, N=96, block=(16, 16))
# Relative to the largest output: bf16 keeps 8 bits, int8 7 of x and of W.
TOLERANCES = {"fp32": 1e-5, "bf16": 0.02, "int8": 0.05}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LSP_DEPLOY_CACHE", str(tmp_path))
    return tmp_path


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """No other program runs."""
    monkeypatch.setattr(CpuMeter, "foreign_cpus", lambda self: 0.0)


@pytest.fixture(scope="module")
def prepared() -> PreparedModel:
    return prepare(ASSETS / "digits_vit.onnx", Recipe(target="cpu"), CPU)


def outputs(shape: LinearShape, candidate: str, density: float = 1.0) -> np.ndarray:
    with OnnxRuntimeEngine.from_model(candidate_model(shape, candidate, density), threads=1) as engine:
        (result,) = engine.run(layer_feeds(shape)).values()
    return result


@pytest.mark.parametrize("candidate", CANDIDATES)
@pytest.mark.parametrize(
    ("activation", "residual"), [("none", False), ("gelu", False), ("gelu_tanh", True), ("relu", True)]
)
def test_all_candidates_compute_the_same(candidate: str, activation: str, residual: bool) -> None:
    shape = LinearShape(6, 64, 96, activation, residual, block=(16, 16))  # type: ignore[arg-type]
    expected = outputs(shape, "matmul fp32")
    error = np.abs(outputs(shape, candidate) - expected).max() / np.abs(expected).max()
    assert error <= TOLERANCES[type_of(candidate)]


@pytest.mark.parametrize("density", DENSITIES)
def test_what_skips_zero_blocks_computes_the_same_at_every_density(density: float) -> None:
    expected = outputs(SMALL, "block_sparse fp32", density)
    for candidate in ("gather fp32", "block_sparse bf16", "block_sparse int8"):
        error = np.abs(outputs(SMALL, candidate, density) - expected).max() / np.abs(expected).max()
        assert error <= TOLERANCES[type_of(candidate)]


def test_a_layer_is_timed_once(quiet: None, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("matmul fp32", "qgemm int8", "gather fp32")
    found = CpuLayerTimer(1, names).curves(SMALL)
    assert {name: set(curve) for name, curve in found.items()} == {
        "matmul fp32": {1.0},
        "qgemm int8": {1.0},
        "gather fp32": set(DENSITIES),
    }
    assert all(time > 0 for curve in found.values() for time in curve.values())

    def fail(*_: object) -> dict[str, float]:
        raise AssertionError("timed again")

    monkeypatch.setattr(timing, "_times", fail)
    again = CpuLayerTimer(1, names)
    assert again.curves(SMALL) == found and not again.disturbed
    for other in (CpuLayerTimer(2, names), CpuLayerTimer(1, names[:1])):
        with pytest.raises(AssertionError, match="timed again"):
            other.curves(SMALL)


def test_disturbed_times_are_used_but_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CpuMeter, "foreign_cpus", lambda self: 1000.0)
    monkeypatch.setattr(timing, "_times", lambda models, feeds, threads: dict.fromkeys(models, 7.0))
    for _ in range(2):
        timer = CpuLayerTimer(1, ("matmul fp32",))
        assert timer.curves(SMALL) == {"matmul fp32": {1.0: 7.0}}
        assert timer.disturbed


def test_a_convolution_is_the_engines(quiet: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "_times", lambda models, feeds, threads: dict.fromkeys(models, 7.0))
    conv = LinearShape(M=6, K=64, N=96, is_conv=True)
    assert CpuLayerTimer(1, CANDIDATES).curves(conv) == {"matmul fp32": {1.0: 7.0}}


def test_every_layer_of_a_network_has_its_times(prepared: PreparedModel) -> None:
    timer = MadeUpTimer(2, CANDIDATES)
    found = time_layers(prepared, Recipe(target="cpu"), CPU, 2, timer)
    assert found.layers.keys() == {layer.name for layer in prepared.layers}
    assert (found.threads, found.disturbed) == (2, False)
    for layer in prepared.layers:
        shape = found.layers[layer.name].shape
        assert (shape.M, shape.K, shape.N) == (layer.M, layer.K, layer.N)
        assert shape.residual == (layer.role in ("proj", "fc2"))
        assert shape.activation == ("gelu" if layer.role == "fc1" else "none")
        assert shape.is_conv == (layer.role == "patch")


def test_a_busy_machine_is_told_of(prepared: PreparedModel, capsys: pytest.CaptureFixture[str]) -> None:
    timer = MadeUpTimer(2, CANDIDATES)
    timer.disturbed = True
    found = time_layers(prepared, Recipe(target="cpu"), CPU, 2, timer)
    assert found.conditions == "measured on a busy machine, 2 threads"
    assert "busy" in capsys.readouterr().err


def test_without_the_library_stock_operators_are_timed_and_the_user_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("lsp_deploy.plugins.library", lambda: NativeLibrary(None, "no compiler was there"))
    console.configure(json=False)
    assert candidates(CPU) == ("matmul fp32", "qgemm int8", "gather fp32")
    assert "no compiler was there" in capsys.readouterr().out
    with pytest.raises(UserError, match="--precision bf16 on a CPU needs the operator's library: no compiler"):
        candidates(CPU, bf16_is_typed=True)


@pytest.mark.skipif(library().path is None, reason="the operator's library is not built")
def test_bf16_is_timed_where_the_cpu_multiplies_in_it_or_it_was_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "usable_isas", lambda path: ["avx2", "portable"])
    assert candidates(CPU) == tuple(name for name in CANDIDATES if name != "block_sparse bf16")
    assert candidates(CPU, bf16_is_typed=True) == CANDIDATES
    monkeypatch.setattr(timing, "usable_isas", lambda path: ["avx512_bf16", "avx2", "portable"])
    assert candidates(CPU) == CANDIDATES
    assert candidates(CPU.model_copy(update={"types": ["fp32"]})) == (
        "matmul fp32", "block_sparse fp32", "gather fp32"
    )  # fmt: skip


@pytest.mark.skipif(library().path is None, reason="the operator's library is not built")
def test_lsp_isa_caps_what_the_kernels_use(monkeypatch: pytest.MonkeyPatch) -> None:
    path = library().path
    assert path is not None
    monkeypatch.delenv("LSP_ISA", raising=False)
    assert timing.usable_isas(path)[-1] == "portable"
    monkeypatch.setenv("LSP_ISA", "portable")
    assert timing.usable_isas(path) == ["portable"]


def test_the_forms_of_attention_compute_the_same(prepared: PreparedModel) -> None:
    (part,) = attention_parts(prepared.canonical, prepared.shapes.opt, ["lsp fp32", "lsp bf16"])
    assert part.count == 4
    assert list(part.models) == ["exported fp32", "lsp fp32", "lsp bf16"]
    results = {}
    for name, model in part.models.items():
        operators = [node for node in model.graph if node.domain == "lsp"]
        assert len(operators) == (0 if name == "exported fp32" else 1)
        with OnnxRuntimeEngine.from_model(model, threads=1) as engine:
            (results[name],) = engine.run(part.feeds).values()
    expected = results.pop("exported fp32")
    assert expected.shape == (8, 17, 64)
    for name, result in results.items():
        assert np.abs(result - expected).max() <= (0.02 if name == "lsp bf16" else 1e-5) * np.abs(expected).max()


def test_all_attention_of_a_network_is_timed_and_remembered(
    prepared: PreparedModel, quiet: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    timer = CpuLayerTimer(1, ("matmul fp32", "block_sparse fp32"))
    monkeypatch.setattr(timing, "_times", lambda models, feeds, threads: dict.fromkeys(models, 7.0))
    found = timer.attention(prepared.canonical, prepared.shapes.opt)
    assert found == {"exported fp32": 28.0, "lsp fp32": 28.0}
    monkeypatch.setattr(timing, "_times", lambda models, feeds, threads: dict.fromkeys(models, 9.0))
    assert timer.attention(prepared.canonical, prepared.shapes.opt) == found
    without = CpuLayerTimer(1, ("matmul fp32", "gather fp32"))
    assert without.attention(prepared.canonical, prepared.shapes.opt) == {}


def test_why_attention_stays_as_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CaiT mixes the heads of its attention between patches; that of its class token is the usual one."""
    cait = prepare(export_family("cait_xxs24_224"), Recipe(target="cpu"), CPU)
    mixed = {f"/blocks/blocks.{number}/attn/Softmax" for number in range(2)}
    monkeypatch.setattr("lsp_deploy.plugins.library", lambda: NativeLibrary(tmp_path, None))
    left = attention_left(cait.canonical)
    assert left.keys() == mixed and "reads the attention weights" in " ".join(left.values())
    monkeypatch.setattr("lsp_deploy.plugins.library", lambda: NativeLibrary(None, "no compiler was there"))
    found = time_layers(cait, Recipe(target="cpu"), CPU, 2, MadeUpTimer(2, ("matmul fp32",)))
    assert len(found.attention_left) == 4 and {name: found.attention_left[name] for name in mixed} == left
    assert list(found.attention_left.values()).count("the operator's library is missing") == 2
