"""Int8 layers as Gemms between Q/DQ: they compute what the plan says, and ONNX Runtime makes QGemms of them."""

from __future__ import annotations

import re

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pass_models import array_of, graph, layer, node_of, op_types, plan, run

from lsp_deploy.engines.onnxruntime_backend import session_options
from lsp_deploy.errors import UserError
from lsp_deploy.passes.insert_qdq import InsertQdqPass
from lsp_deploy.passes.qgemm_form import QgemmFormPass

RNG = np.random.default_rng(0)
K, N = 8, 6
W = RNG.standard_normal((K, N)).astype(np.float32)
V = RNG.standard_normal((K, N)).astype(np.float32)
B = RNG.standard_normal(N).astype(np.float32)
X = RNG.standard_normal((2, 5, K)).astype(np.float32)
X_SCALE = float(np.float32(np.abs(X).max() / 127))

BIASED = "g (float[2, 5, 8] x) => (float[2, 5, 6] y) { m = MatMul(x, w)  y = Add(b, m) }"
DYNAMIC = "g (float[batch, 5, 8] x) => (float[batch, 5, 6] y) { m = MatMul(x, w)  y = Add(b, m) }"


def int8_plan(scale=X_SCALE, offset=0.0, **weights):
    """Return a plan that runs layers, given by their weights, as QGemms."""
    made = plan(
        *(layer(name, *weight.shape, "int8", scale) for name, weight in weights.items()),
        weight_scales={name: (np.abs(w).max(axis=0) / 127).astype(np.float32) for name, w in weights.items()},
    )
    for each in made.layers:
        each.execution.kernel = "qgemm"
        each.precision.activation_offset = offset
    return made


def symmetric_int8(model, decided):
    """Return a copy of the model with its Q/DQ in the general form."""
    copy = model.clone()
    InsertQdqPass(decided)(copy)
    return copy


def sessions(model, folder):
    """Return a user's own session and one of ours, each with the operators that it runs."""
    found = []
    for options in (ort.SessionOptions(), session_options(1)):
        options.log_severity_level = 4
        path = folder / "optimized.onnx"
        options.optimized_model_filepath = str(path)
        content = ir.to_proto(model).SerializeToString()
        session = ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        found.append((session, [node.op_type for node in onnx.load(path).graph.node]))
    return found


def test_structure():
    model = graph(BIASED, w=W, b=B)
    assert QgemmFormPass(int8_plan(m=W))(model).modified
    dequantize = ["DequantizeLinear"] * 3
    assert op_types(model) == ["Reshape", "QuantizeLinear", *dequantize, "Gemm", "Reshape"]
    x, weight, bias = (value.producer() for value in node_of(model, "m").inputs)
    assert [value.name for value in x.inputs] == ["m/x_q", "m/x_scale", "m/x_zero_point"]
    assert [value.name for value in weight.inputs] == ["m/weight_q", "m/weight_scale", "m/weight_zero_point"]
    assert [value.name for value in bias.inputs] == ["m/bias_q", "m/bias_scale"]
    assert array_of(model, "m/x_zero_point") == np.uint8(128)
    assert array_of(model, "m/weight_q").dtype == np.int8
    assert array_of(model, "m/bias_q").dtype == np.int32
    assert not {"w", "b"} & set(model.graph.initializers)
    assert model.graph.outputs[0].name == "y"
    assert list(model.graph.outputs[0].shape) == [2, 5, N]


@pytest.mark.parametrize(
    "text",
    [
        "g (float[2, 5, 8] x) => (float[2, 5, 6] y) { y = MatMul(x, w) }",
        BIASED,
        DYNAMIC,
        "g (float[a, c, 8] x) => (float[a, c, 6] y) { m = MatMul(x, w)  y = Add(m, b) }",
        "g (float[10, 8] x) => (float[10, 6] y) { m = MatMul(x, w)  y = Add(m, b) }",
        "g (float[10, 8] x) => (float[10, 6] y) { y = Gemm <alpha = 0.5, beta = 2.0> (x, w, b) }",
        "g (float[10, 8] x) => (float[10, 6] y) { y = Gemm <transB = 1> (x, t, b) }",
        "g (float[8, 10] x) => (float[10, 6] y) { y = Gemm <transA = 1> (x, w) }",
        "g (float[10, 8] x) => (float[10, 6] y) { y = Gemm <beta = 2.0> (x, w, c) }",
        "g (float[10, 8] x) => (float[1, 10, 6] y) { m = MatMul(x, u)  y = Add(m, b) }",
        "g (float[10, 8] x) => (float[1, 10, 6] y) { m = MatMul(x, w)  y = Add(m, d) }",
        "g (float[8] x) => (float[6] y) { m = MatMul(x, w)  y = Add(m, b) }",
    ],
)
def test_outputs_are_those_of_symmetric_int8(text):
    constants = {"w": W, "t": W.T.copy(), "u": W.reshape(1, K, N), "b": B, "c": B[0], "d": B.reshape(1, 1, N)}
    nodes = text[text.index("{") :]
    named = {name: array for name, array in constants.items() if re.search(rf"\b{name}\b", nodes)}
    x = {1: X[0, 0], 2: X.reshape(10, K), 3: X}[text.split("]")[0].count(",") + 1]
    model = graph(text, **named)
    decided = int8_plan(**{("m" if "m = " in text else "y"): W * (0.5 if "alpha" in text else 1)})
    expected = run(symmetric_int8(model, decided), x=x.T if "transA" in text else x)["y"]
    QgemmFormPass(decided)(model)
    actual = run(model, x=x.T if "transA" in text else x)["y"]
    assert actual.shape == expected.shape
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-3 * np.abs(expected).max())


@pytest.mark.parametrize("opset", [17, 21, 23])
@pytest.mark.parametrize("text", [BIASED, DYNAMIC])
def test_runs_in_int8_whatever_the_session(text, opset, tmp_path):
    model = graph(text, opset=opset, w=W, b=B)
    decided = int8_plan(m=W)
    expected = run(symmetric_int8(model, decided), x=X)["y"]
    QgemmFormPass(decided)(model)
    for session, operators in sessions(model, tmp_path):
        assert operators.count("QGemm") == 1
        assert not {"Gemm", "MatMul", "DequantizeLinear"} & set(operators)
        (actual,) = session.run(None, {"x": X})
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-3 * np.abs(expected).max())


@pytest.mark.parametrize("opset", [17, 21])
@pytest.mark.parametrize("batch", ["2", "batch"])
def test_layers_that_read_one_tensor_share_its_integers_and_run_in_int8(batch, opset, tmp_path):
    text = (
        f"g (float[{batch}, 5, 8] x) => (float[{batch}, 5, 6] y, float[{batch}, 5, 6] z) "
        "{ h = Relu(x)  q = MatMul(h, w)  y = Add(q, b)  z = MatMul(h, v) }"
    )
    model = graph(text, opset=opset, w=W, b=B, v=V)
    decided = int8_plan(z=V, q=W)  # not in the graph's order
    expected = run(symmetric_int8(model, decided), x=X)
    QgemmFormPass(decided)(model)
    assert op_types(model).count("QuantizeLinear") == 1
    for session, operators in sessions(model, tmp_path):
        assert operators.count("QGemm") == 2
        assert not {"Gemm", "MatMul", "DequantizeLinear"} & set(operators)
        for actual, wanted in zip(session.run(None, {"x": X}), expected.values(), strict=True):
            np.testing.assert_allclose(actual, wanted, rtol=1e-5, atol=1e-3 * np.abs(wanted).max())


def test_layers_that_quantize_one_tensor_differently_have_pairs_of_their_own():
    text = "g (float[2, 5, 8] x) => (float[2, 5, 6] y, float[2, 5, 6] z) { y = MatMul(x, w)  z = MatMul(x, v) }"
    model = graph(text, w=W, v=V)
    decided = int8_plan(y=W, z=V)
    decided.layer("z").precision.activation_scale = 2 * X_SCALE
    QgemmFormPass(decided)(model)
    assert op_types(model).count("QuantizeLinear") == 2


@pytest.mark.parametrize("offset", [1.5, -0.3])
def test_an_offset_is_part_of_the_zero_point(offset):
    model = graph(BIASED, w=W, b=B)
    decided = int8_plan(offset=offset, m=W)
    QgemmFormPass(decided)(model)
    zero_point = 128 - round(offset / X_SCALE)
    assert array_of(model, "m/x_zero_point") == zero_point
    assert "Sub" not in op_types(model)
    held = (np.clip(np.rint(X / np.float32(X_SCALE)) + zero_point, 0, 255) - zero_point) * np.float32(X_SCALE)
    scale = decided.weight_scales["m"]
    expected = held @ (np.rint(W / scale) * scale) + B
    np.testing.assert_allclose(run(model, x=X)["y"], expected, rtol=1e-5, atol=1e-3 * np.abs(expected).max())


def test_an_offset_that_no_zero_point_can_express_is_subtracted():
    offset = 1000 * X_SCALE
    model = graph(BIASED, w=W, b=B)
    expected = run(model, x=X + np.float32(offset))["y"]
    QgemmFormPass(int8_plan(offset=offset, m=W))(model)
    assert op_types(model).count("Sub") == 1
    assert array_of(model, "m/x_zero_point") == 128
    actual = run(model, x=X + np.float32(offset))["y"]
    # The offset takes the rounding of W with it; what is left is that of x and W at their own sizes.
    decided = int8_plan(offset=offset, m=W)
    held = np.rint(W / decided.weight_scales["m"]) * decided.weight_scales["m"]
    np.testing.assert_allclose(actual, (X + np.float32(offset)) @ held + B, atol=0.05)
    assert np.abs(actual - expected).max() < 1e-2 * np.abs(expected).max()


def test_a_bias_beyond_int32_stays_float(tmp_path):
    bias = np.array([1e9, 1, 2, 3, 4, 5], np.float32)
    model = graph(BIASED, w=W, b=bias)
    decided = int8_plan(m=W)
    expected = run(symmetric_int8(model, decided), x=X)["y"]
    QgemmFormPass(decided)(model)
    assert op_types(model)[-3:] == ["Gemm", "Reshape", "Add"]
    np.testing.assert_allclose(run(model, x=X)["y"], expected, rtol=1e-6, atol=1e-5)
    assert all(operators.count("QGemm") == 1 for _, operators in sessions(model, tmp_path))


def test_what_reads_between_product_and_bias_keeps_its_value():
    text = "g (float[2, 5, 8] x) => (float[2, 5, 6] y, float[2, 5, 6] m) { m = MatMul(x, w)  y = Add(m, b) }"
    model = graph(text, w=W, b=B)
    decided = int8_plan(m=W)
    expected = run(symmetric_int8(model, decided), x=X)
    QgemmFormPass(decided)(model)
    assert op_types(model)[-1] == "Add"
    actual = run(model, x=X)
    for name in ("y", "m"):
        np.testing.assert_allclose(actual[name], expected[name], rtol=1e-5, atol=1e-5)


def test_only_int8_layers_with_that_kernel_change():
    model = graph(BIASED, w=W, b=B)
    for decided in (int8_plan(m=W), int8_plan(m=W)):
        decided.layers[0].execution.kernel = "engine"
        assert not QgemmFormPass(decided)(model).modified
        decided.layers[0].execution.kernel = "qgemm"
        decided.layers[0].precision.dtype = "fp32"
        assert not QgemmFormPass(decided)(model).modified
    assert op_types(model) == ["MatMul", "Add"]


def test_missing_scales_are_refused():
    decided = int8_plan(m=W)
    decided.layers[0].precision.activation_scale = None
    with pytest.raises(UserError, match="no activation_scale"):
        QgemmFormPass(decided)(graph(BIASED, w=W, b=B))
    decided = int8_plan(m=W)
    decided.weight_scales.clear()
    with pytest.raises(UserError, match="no 6 positive weight scales"):
        QgemmFormPass(decided)(graph(BIASED, w=W, b=B))


def test_a_convolution_is_refused():
    text = (
        "g (float[1, 2, 4, 4] x) => (float[1, 6, 2, 2] y) { y = Conv <kernel_shape = [2, 2], strides = [2, 2]> (x, w) }"
    )
    with pytest.raises(UserError, match="y run by a matrix kernel, but it is a convolution"):
        QgemmFormPass(int8_plan(y=W))(graph(text, w=W.T.reshape(6, 2, 2, 2).copy()))


def test_old_opset_is_a_broken_contract():
    with pytest.raises(ir.passes.PreconditionError, match="needs opset 15"):
        QgemmFormPass(int8_plan(m=W))(graph(BIASED, opset=13, w=W, b=B))


@settings(max_examples=30)
@given(
    leading=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    dynamic=st.sets(st.integers(0, 2)),
    k=st.integers(1, 20),
    n=st.integers(1, 20),
    seed=st.integers(0, 1000),
)
def test_any_shape(leading, dynamic, k, n, seed):
    rng = np.random.default_rng(seed)
    weight, bias = rng.standard_normal((k, n)).astype(np.float32), rng.standard_normal(n).astype(np.float32)
    x = rng.uniform(-1, 1, (*leading, k)).astype(np.float32)
    dims = ", ".join(f"d{i}" if i in dynamic else str(size) for i, size in enumerate(leading))
    model = graph(f"g (float[{dims}, {k}] x) => (float[{dims}, {n}] y) {{ m = MatMul(x, w)  y = Add(m, b) }}",
                  w=weight, b=bias)  # fmt: skip
    decided = int8_plan(scale=1 / 127, m=weight)
    expected = run(symmetric_int8(model, decided), x=x)["y"]
    QgemmFormPass(decided)(model)
    actual = run(model, x=x)["y"]
    assert actual.shape == expected.shape
    # The bias is rounded to steps of scale products.
    step = np.abs(weight).max() / 127**2
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=0.51 * step + 1e-6)
