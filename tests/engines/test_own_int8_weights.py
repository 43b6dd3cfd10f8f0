"""Int8 weights that layers share run in ONNX Runtime, whatever the CPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from lsp_deploy.engines.onnxruntime_backend import OnnxRuntimeBackend, OnnxRuntimeEngine
from lsp_deploy.engines.own_int8_weights import with_own_int8_weights
from lsp_deploy.engines.protocol import BuildOptions
from lsp_deploy.hardware.target import load_target
from lsp_deploy.model import save_model

W = np.arange(-32, 32, dtype=np.int8).reshape(8, 8)
TEXT = """<ir_version: 8, opset_import: ["" : 17]>
g (float[3, 8] x) => (float[3, 8] y) {
  xq = QuantizeLinear(x, s, z)  xd = DequantizeLinear(xq, s, z)
  wa = DequantizeLinear(w, s, z)  a = MatMul(xd, wa)
  aq = QuantizeLinear(a, s, z)  ad = DequantizeLinear(aq, s, z)
  wb = DequantizeLinear(w, s, z)  y = MatMul(ad, wb)
}"""


@pytest.fixture
def shared() -> ir.Model:
    model = ir.from_onnx_text(TEXT)
    for name, array in {"w": W, "s": np.array(0.1, np.float32), "z": np.array(0, np.int8)}.items():
        value = next(v for node in model.graph for v in node.inputs if v is not None and v.name == name)
        value.const_value = ir.tensor(array, name=name)
        value.shape, value.type = ir.Shape(array.shape), ir.TensorType(value.const_value.dtype)
        model.graph.register_initializer(value)
    return model


def test_each_layer_gets_its_own_and_the_model_stays_as_it_is(shared: ir.Model):
    changed = with_own_int8_weights(shared)
    assert sum(value.shape == W.shape for value in changed.graph.initializers.values()) == 2
    assert sum(value.shape == W.shape for value in shared.graph.initializers.values()) == 1
    assert with_own_int8_weights(changed) is changed


def test_a_shared_int8_weight_runs_and_builds(shared: ir.Model, tmp_path: Path):
    x = np.linspace(-3, 3, 24, dtype=np.float32).reshape(3, 8)
    held = np.clip(np.rint(x / 0.1), -128, 127) * 0.1
    inner = np.clip(np.rint(held @ (W * 0.1) / 0.1), -128, 127) * 0.1
    with OnnxRuntimeEngine.from_model(shared, threads=1) as engine:
        np.testing.assert_allclose(engine.run({"x": x})["y"], inner @ (W * 0.1), atol=0.8)
    save_model(shared, tmp_path / "m.onnx")
    shapes = {"x": (3, 8)}
    options = BuildOptions(min_shapes=shapes, opt_shapes=shapes, max_shapes=shapes)
    OnnxRuntimeBackend().build(tmp_path / "m.onnx", tmp_path / "m.engine", load_target("cpu"), options)
    assert (tmp_path / "m.engine").exists()
