"""Int8 results do not depend on the CPU: where its products saturate, ONNX Runtime is told to be exact."""

from __future__ import annotations

import numpy as np
import pytest
from pass_models import graph

from lsp_deploy.engines import onnxruntime_backend
from lsp_deploy.engines.onnxruntime_backend import OnnxRuntimeEngine, session_options

KEY = "session.x64quantprecision"


@pytest.mark.parametrize("saturates", [True, False])
def test_the_exact_kernels_are_asked_for_where_products_saturate_and_only_there(saturates, monkeypatch):
    monkeypatch.setattr(onnxruntime_backend, "int8_saturates", lambda: saturates)
    options = session_options(1)
    if saturates:
        assert options.get_session_config_entry(KEY) == "1"
    else:
        with pytest.raises(RuntimeError):
            options.get_session_config_entry(KEY)


def test_the_largest_products_are_exact_on_this_cpu():
    nodes = (
        "q = QuantizeLinear(x, s, z)  d = DequantizeLinear(q, s, z)  e = DequantizeLinear(w, s, v)  y = MatMul(d, e)"
    )
    text = f"g (float[2, 64] x) => (float[2, 32] y) {{ {nodes} }}"
    weight = np.full((64, 32), 127, np.int8)
    model = graph(text, w=weight, s=np.float32(1), z=np.uint8(0), v=np.int8(0))
    with OnnxRuntimeEngine.from_model(model, threads=1) as engine:
        y = engine.run({"x": np.full((2, 64), 255, np.float32)})["y"]
    np.testing.assert_array_equal(y, np.full((2, 32), 255 * 127 * 64, np.float32))
