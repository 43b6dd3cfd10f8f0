from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from lsp_deploy.engines import onnxruntime_backend
from lsp_deploy.engines.onnxruntime_backend import OnnxRuntimeBackend, OnnxRuntimeEngine
from lsp_deploy.engines.protocol import BuildOptions, EngineBuildError, layer_counts, read_sidecar
from lsp_deploy.errors import UserError
from lsp_deploy.hardware.target import load_target
from lsp_deploy.model import load_model


def expected(path: Path, x: np.ndarray) -> np.ndarray:
    """LayerNormalization, MatMul and Add in numpy."""
    weights = {one.name: onnx.numpy_helper.to_array(one) for one in onnx.load(path).graph.initializer}
    x = x.astype(np.float64)
    normed = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    return normed @ weights["weight"] + weights["bias"]


@pytest.mark.parametrize("optimize", [True, False])
@pytest.mark.parametrize("form", ["path", "bytes", "model"])
def test_runs_a_model_in_every_form(make_model, x: np.ndarray, form: str, optimize: bool):
    path = make_model()
    model = {"path": path, "bytes": path.read_bytes(), "model": load_model(path)}[form]
    with OnnxRuntimeEngine.from_model(model, threads=1, optimize=optimize) as engine:
        outputs = engine.run({"x": x})
    assert list(outputs) == ["y"]
    np.testing.assert_allclose(outputs["y"], expected(path, x), atol=1e-5)


@pytest.mark.parametrize("form", ["path", "bytes", "model"])
def test_inner_values_come_out_and_the_model_stays_as_it_is(make_model, x: np.ndarray, form: str):
    path = make_model()
    loaded = load_model(path)
    model = {"path": path, "bytes": path.read_bytes(), "model": loaded}[form]
    with OnnxRuntimeEngine.from_model(model, extra_outputs=["product", "x", "y", "product"]) as engine:
        assert set(engine.outputs) == {"y", "product", "x"}
        outputs = engine.run({"x": x})
    np.testing.assert_array_equal(outputs["x"], x)
    bias = loaded.graph.initializers["bias"].const_value.numpy()
    np.testing.assert_allclose(outputs["product"] + bias, outputs["y"], atol=1e-6)
    assert [value.name for value in loaded.graph.outputs] == ["y"]


def test_an_unknown_inner_value_is_named(make_model):
    with pytest.raises(UserError, match=r"model.onnx computes no value named absent"):
        OnnxRuntimeEngine.from_model(make_model(), extra_outputs=["absent"])


def test_what_goes_in_and_comes_out(make_model):
    with OnnxRuntimeEngine.from_model(make_model("fp16"), threads=1) as engine:
        assert engine.inputs == {"x": (np.dtype(np.float16), ("batch", 4, 64))}
        assert engine.outputs == {"y": (np.dtype(np.float16), ("batch", 4, 96))}
        info = engine.describe()
    assert (info.backend, info.target, info.threads) == ("onnxruntime", "cpu", 1)
    assert info.device
    assert set(info.versions) == {"onnxruntime"}


def test_the_float32_twin_of_a_16_bit_model(make_model, x: np.ndarray):
    path = make_model("fp16")
    loaded = load_model(path)
    with OnnxRuntimeEngine.from_model(loaded, float32_twin=True, extra_outputs=["product"]) as twin:
        outputs = twin.run({"x": x.astype(np.float16)})
    assert {name: value.dtype for name, value in outputs.items()}["product"] == np.float32
    np.testing.assert_allclose(outputs["y"], expected(path, x.astype(np.float16)), atol=2e-3)
    assert loaded.graph.initializers["weight"].const_value.dtype.numpy() == np.float16


def test_wrong_feeds_are_named(make_model, x: np.ndarray):
    with OnnxRuntimeEngine.from_model(make_model()) as engine:
        with pytest.raises(UserError, match=r"model.onnx takes the inputs x; given: z"):
            engine.run({"z": x})
        with pytest.raises(UserError, match=r"input x of model.onnx: expected the shape batchx4x64, got 3x4x63"):
            engine.run({"x": x[..., 1:]})


def test_a_failure_inside_is_one_line_and_nothing_is_printed(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    helper, element = onnx.helper, onnx.TensorProto.FLOAT
    shape = onnx.numpy_helper.from_array(np.array([2, 8]), "shape")
    graph = helper.make_graph(
        [helper.make_node("Reshape", ["x", "shape"], ["y"], "fixed_reshape")],
        "g",
        [helper.make_tensor_value_info("x", element, ["batch", 8])],
        [helper.make_tensor_value_info("y", element, ["b", 8])],
        [shape],
    )
    path = tmp_path / "reshape.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    with (
        OnnxRuntimeEngine.from_model(path) as engine,
        pytest.raises(UserError, match=r"^reshape.onnx fails on x \[3, 8\]: .*fixed_reshape.*$"),
    ):
        engine.run({"x": np.ones((3, 8), np.float32)})
    assert capfd.readouterr() == ("", "")


def test_what_is_not_a_model_is_refused(tmp_path: Path):
    path = tmp_path / "text.onnx"
    path.write_text("not a model")
    with pytest.raises(UserError, match=r"ONNX Runtime cannot run text.onnx: "):
        OnnxRuntimeEngine.from_model(path)


def test_a_large_model_goes_through_a_file_that_lives_as_long_as_the_session(
    make_model, x: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = make_model()
    monkeypatch.setattr(onnxruntime_backend, "_IN_MEMORY_BYTES", 1000)
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(onnxruntime_backend.tempfile, "tempdir", str(folder))
    engine = OnnxRuntimeEngine.from_model(load_model(path))
    assert len(list(folder.rglob("*.onnx"))) == 1
    np.testing.assert_allclose(engine.run({"x": x})["y"], expected(path, x), atol=1e-5)
    engine.close()
    assert list(folder.iterdir()) == []


def test_the_built_engine_loads_and_gives_the_same_outputs(make_model, x: np.ndarray, tmp_path: Path):
    model, engine = make_model(), tmp_path / "onnxruntime-cpu.engine"
    info = OnnxRuntimeBackend().build(model, engine, load_target("cpu"), BuildOptions(sparse_weights=True))
    assert engine.read_bytes()[4:8] == b"ORTM"
    assert read_sidecar(engine) == info
    assert (info.backend, info.target, info.compute_capability) == ("onnxruntime", "cpu", None)
    assert "sparse_weights has no effect in ONNX Runtime" in info.warnings
    with OnnxRuntimeBackend().load(engine) as loaded:
        assert loaded.describe().layers == info.layers
        assert loaded.describe().device is not None
        np.testing.assert_allclose(loaded.run({"x": x})["y"], expected(model, x), atol=1e-5)


def test_layers_of_a_float_model(make_model, tmp_path: Path):
    info = OnnxRuntimeBackend().build(make_model(), tmp_path / "e", load_target("cpu"), BuildOptions())
    assert layer_counts(info.layers)["LayerNormalization fp32"] == 1
    (product,) = [layer for layer in info.layers if layer.kind in ("MatMul", "Gemm", "FusedGemm")]
    assert product.precision == "fp32"
    assert product.constant_types[0] == "fp32"


def test_layers_of_a_quantized_model(make_model, tmp_path: Path):
    info = OnnxRuntimeBackend().build(make_model("int8"), tmp_path / "e", load_target("cpu"), BuildOptions())
    (product,) = [layer for layer in info.layers if layer.precision == "int8"]
    assert product.kind in ("MatMulIntegerToFloat", "QGemm", "QLinearMatMul")
    assert {"int8", "uint8"} & set(product.constant_types), "uint8 on CPUs without VNNI"
    assert product.onnx_nodes == ["linear"]
    assert layer_counts(info.layers)["QuantizeLinear fp32"] == 1


@pytest.mark.parametrize("opset", [19, 21])
def test_int8_of_a_fixed_batch_runs_in_int8(make_model, x: np.ndarray, tmp_path: Path, opset: int):
    path = make_model("int8", batch=3)
    proto = onnx.load(path)
    proto.opset_import[0].version = opset
    proto.ir_version = 10
    onnx.save(proto, path)
    with OnnxRuntimeEngine.from_model(path, threads=1) as engine:
        fixed = engine.run({"x": x})["y"]
    with OnnxRuntimeEngine.from_model(make_model("int8", name="dynamic.onnx"), threads=1) as engine:
        np.testing.assert_allclose(fixed, engine.run({"x": x})["y"], atol=1e-5)
    info = OnnxRuntimeBackend().build(path, tmp_path / "e", load_target("cpu"), BuildOptions())
    assert layer_counts(info.layers)["QuantizeLinear fp32"] == 1
    assert [layer.onnx_nodes for layer in info.layers if layer.precision == "int8"] == [["linear"]]


def test_a_model_that_cannot_be_built_leaves_nothing(tmp_path: Path):
    model = tmp_path / "text.onnx"
    model.write_text("not a model")
    with pytest.raises(EngineBuildError, match=r"^ONNX Runtime: "):
        OnnxRuntimeBackend().build(model, tmp_path / "e", load_target("cpu"), BuildOptions())
    assert [path.name for path in tmp_path.iterdir()] == ["text.onnx"]


def test_an_engine_file_that_is_missing_or_is_none(tmp_path: Path):
    with pytest.raises(UserError, match="does not exist"):
        OnnxRuntimeBackend().load(tmp_path / "absent")
    (tmp_path / "text").write_text("not an engine")
    with pytest.raises(UserError, match="cannot run text"):
        OnnxRuntimeBackend().load(tmp_path / "text")


def test_serves_cpu_targets_only():
    backend = OnnxRuntimeBackend()
    assert backend.serves(load_target("cpu"))
    assert not backend.serves(load_target("a100"))
    assert backend.status().can_run
