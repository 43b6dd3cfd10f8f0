"""Models with operators of ours in ONNX Runtime: with the native library, and without it."""

import numpy as np
import pytest
from block_sparse_cases import BSL16_SHAPES, case, cpu_cases
from hypothesis import given, settings
from hypothesis import strategies as st

from lsp_deploy.engines.onnxruntime_backend import OnnxRuntimeBackend, OnnxRuntimeEngine
from lsp_deploy.engines.own_operators import imports_operators, with_runnable_operators
from lsp_deploy.engines.protocol import BuildOptions
from lsp_deploy.hardware.target import load_target
from lsp_deploy.model import save_model
from lsp_deploy.plugins import NativeLibrary, library
from lsp_deploy.plugins.operators import operator_nodes

needs_library = pytest.mark.skipif(library().path is None, reason=str(library().why))
# bfloat16 is rounded differently where a sum of products is.
TOLERANCE = 1e-4


@pytest.fixture
def no_library(monkeypatch):
    monkeypatch.setattr(
        "lsp_deploy.engines.own_operators.library", lambda: NativeLibrary(None, "no C++ compiler was found")
    )


def assert_right(y, expected):
    assert y.dtype == expected.dtype
    if y.dtype == np.int8:
        assert np.abs(y.astype(int) - expected.astype(int)).max() <= 1
    else:
        np.testing.assert_allclose(y, expected, rtol=0, atol=TOLERANCE * (np.abs(expected).max() + 1e-6))


@needs_library
@settings(max_examples=30)
@given(one=cpu_cases())
def test_native(one):
    with OnnxRuntimeEngine.from_model(one.model(), threads=1) as engine:
        assert engine.describe().warnings == []
        assert_right(engine.run(one.feeds())["y"], one.expected())


@needs_library
@settings(max_examples=15)
@given(one=cpu_cases(dtypes=("bfloat16", "int8"), blocks=st.sampled_from(BSL16_SHAPES)))
def test_native_from_bsl16(one):
    model = one.in_layout("bsl16.v1").model()
    with OnnxRuntimeEngine.from_model(model, threads=1) as engine:
        assert_right(engine.run(one.feeds())["y"], one.expected())
    assert model.graph[0].attributes["layout"].value == "bsl16.v1"  # the model itself stays as it is


@needs_library
def test_the_float32_twin_of_a_gpu_model_runs():
    one = case("float16", K=64, N=48, x_type="float16", out_type="float16").in_layout("bsl16.v1")
    with OnnxRuntimeEngine.from_model(one.model(), threads=1, float32_twin=True) as engine:
        y = engine.run({"x": one.x.astype(np.float32)})["y"]
    np.testing.assert_allclose(y, one.x.astype(np.float64) @ one.weight.astype(np.float64) + one.bias, atol=1e-4)


@pytest.mark.parametrize("form", ["path", "bytes", "model"])
def test_without_the_library_standard_operators_run(form, tmp_path, no_library):
    one = case("int8", activation="gelu", residual=True)
    model = one.model()
    path = tmp_path / "model.onnx"
    save_model(model, path)
    source = {"path": path, "bytes": path.read_bytes(), "model": model}[form]
    with OnnxRuntimeEngine.from_model(source, threads=1) as engine:
        (warning,) = engine.describe().warnings
        assert_right(engine.run(one.feeds())["y"], one.expected())
    assert warning == ("operators of lsp-deploy (1) run as standard ones, which is slower: no C++ compiler was found")
    assert len(operator_nodes(model)) == 1


def test_without_the_library_an_engine_is_built_of_standard_operators(tmp_path, no_library):
    one = case(activation="relu")
    save_model(one.model(), tmp_path / "model.onnx")
    backend = OnnxRuntimeBackend()
    info = backend.build(tmp_path / "model.onnx", tmp_path / "model.ort", load_target("cpu"), BuildOptions())
    assert any("run as standard ones" in warning for warning in info.warnings)
    with backend.load(tmp_path / "model.ort") as engine:
        assert_right(engine.run(one.feeds())["y"], one.expected())


@needs_library
def test_an_engine_is_built_with_the_library(tmp_path):
    one = case("bfloat16", activation="gelu", K=64, N=64).in_layout("bsl16.v1")
    save_model(one.model(), tmp_path / "model.onnx")
    backend = OnnxRuntimeBackend()
    info = backend.build(tmp_path / "model.onnx", tmp_path / "model.ort", load_target("cpu"), BuildOptions())
    assert [layer.kind for layer in info.layers] == ["BlockSparseLinear"]
    with backend.load(tmp_path / "model.ort") as engine:
        assert_right(engine.run(one.feeds())["y"], one.expected())


def test_models_of_standard_operators_are_left_alone(make_model, tmp_path):
    from lsp_deploy.model import load_model

    model = load_model(make_model())
    assert with_runnable_operators(model) == (model, [])
    assert not imports_operators(make_model())
    assert not imports_operators(tmp_path / "absent.onnx") and not imports_operators(b"\x08\xff no model")
