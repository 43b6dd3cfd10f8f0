"""Q/DQ: where it is put, what it holds, and that it computes what symmetric int8 computes."""

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from pass_models import array_of, graph, layer, node_of, op_types, plan, run

from lsp_deploy.errors import UserError
from lsp_deploy.passes.apply_masks import ApplyMasksPass
from lsp_deploy.passes.insert_qdq import InsertQdqPass

RNG = np.random.default_rng(0)
W = RNG.standard_normal((8, 6)).astype(np.float32)
SCALE = (np.abs(W).max(axis=0) / 127).astype(np.float32)
X = RNG.standard_normal((3, 8)).astype(np.float32)
X_SCALE = float(np.float32(np.abs(X).max() / 127))

ONE = "g (float[3, 8] x) => (float[3, 6] y) { y = MatMul(x, w) }"
TWO = "g (float[3, 8] x) => (float[3, 6] a, float[3, 6] b) { h = Relu(x)  a = MatMul(h, w)  b = MatMul(h, v) }"


def int8_of(weight, scale):
    return np.clip(np.rint(weight / scale), -127, 127).astype(np.int8)


def quantized(values, scale):
    return np.clip(np.rint(values / np.float32(scale)), -128, 127).astype(np.float32) * np.float32(scale)


def expected(x=X, weight=W, scale=SCALE):
    return quantized(x, X_SCALE) @ (int8_of(weight, scale) * scale)


def int8_plan(*names, k=8, n=6, scale=X_SCALE, weight_scale=SCALE):
    return plan(*(layer(name, k, n, "int8", scale) for name in names), weight_scales=dict.fromkeys(names, weight_scale))


def test_matmul_structure():
    model = graph(ONE, w=W)
    assert InsertQdqPass(int8_plan("y"))(model).modified
    assert op_types(model) == ["QuantizeLinear", "DequantizeLinear", "DequantizeLinear", "MatMul"]
    product = node_of(model, "y")
    activation, weight = (value.producer() for value in product.inputs)
    assert [value.name for value in activation.inputs] == ["y/x_q", "y/x_scale", "y/x_zero_point"]
    assert [value.name for value in weight.inputs] == ["y/weight_q", "y/weight_scale", "y/weight_zero_point"]
    assert weight.attributes.get_int("axis") == 1
    assert "w" not in model.graph.initializers
    assert array_of(model, "y/x_zero_point").dtype == np.int8
    assert array_of(model, "y/x_zero_point").shape == ()
    assert not array_of(model, "y/weight_zero_point").any()
    assert array_of(model, "y/x_scale") == np.float32(X_SCALE)
    np.testing.assert_array_equal(array_of(model, "y/weight_scale"), SCALE)
    np.testing.assert_array_equal(array_of(model, "y/weight_q"), int8_of(W, SCALE))


@pytest.mark.parametrize("optimize", [False, True])
def test_matmul_outputs(optimize):
    model = graph(ONE, w=W)
    InsertQdqPass(int8_plan("y"))(model)
    np.testing.assert_allclose(run(model, optimize, x=X)["y"], expected(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("transposed", [0, 1])
def test_gemm_folds_alpha_and_keeps_its_bias_float(transposed):
    text = f"g (float[3, 8] x) => (float[3, 6] y) {{ y = Gemm <transB = {transposed}, alpha = 0.5> (x, w, c) }}"
    bias = RNG.standard_normal(6).astype(np.float32)
    model = graph(text, w=W.T.copy() if transposed else W, c=bias)
    InsertQdqPass(int8_plan("y", weight_scale=SCALE / 2))(model)
    assert node_of(model, "y/weight/DequantizeLinear").attributes.get_int("axis") == (0 if transposed else 1)
    assert array_of(model, "c").dtype == np.float32
    np.testing.assert_allclose(run(model, x=X)["y"], expected() / 2 + bias, rtol=1e-5, atol=1e-5)


def test_patch_embedding():
    text = (
        "g (float[1, 2, 4, 4] x) => (float[1, 6, 2, 2] y) { y = Conv <kernel_shape = [2, 2], strides = [2, 2]> (x, w) }"
    )
    image = RNG.standard_normal((1, 2, 4, 4)).astype(np.float32)
    patches = image.reshape(1, 2, 2, 2, 2, 2).transpose(0, 2, 4, 1, 3, 5).reshape(4, 8)
    model = graph(text, w=W.T.reshape(6, 2, 2, 2).copy())
    InsertQdqPass(int8_plan("y"))(model)
    assert node_of(model, "y/weight/DequantizeLinear").attributes.get_int("axis") == 0
    np.testing.assert_allclose(run(model, x=image)["y"].reshape(6, 4).T, expected(patches), rtol=1e-5, atol=1e-5)


def test_layers_that_read_one_tensor_share_the_pair():
    model = graph(TWO, w=W, v=2 * W)
    # In the plan's order, which need not be the graph's.
    both = plan(
        layer("b", 8, 6, "int8", X_SCALE),
        layer("a", 8, 6, "int8", X_SCALE),
        weight_scales={"a": SCALE, "b": 2 * SCALE},
    )
    InsertQdqPass(both)(model)
    assert op_types(model).count("QuantizeLinear") == 1
    assert node_of(model, "a").inputs[0] is node_of(model, "b").inputs[0]
    outputs = run(model, x=X)
    np.testing.assert_allclose(outputs["a"], expected(np.maximum(X, 0)), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(outputs["b"], 2 * outputs["a"], rtol=1e-5, atol=1e-5)


def test_two_scales_for_one_tensor_are_refused():
    both = plan(layer("a", 8, 6, "int8", 0.1), layer("b", 8, 6, "int8", 0.2), weight_scales={"a": SCALE, "b": SCALE})
    with pytest.raises(UserError, match="a and b read the same tensor"):
        InsertQdqPass(both)(graph(TWO, w=W, v=W))


def test_other_readers_of_the_tensor_stay_float():
    text = "g (float[3, 8] x) => (float[3, 6] y, float[3, 8] z) { h = Relu(x)  y = MatMul(h, w)  z = Add(h, x) }"
    model = graph(text, w=W)
    InsertQdqPass(int8_plan("y"))(model)
    np.testing.assert_array_equal(run(model, x=X)["z"], np.maximum(X, 0) + X)


def test_a_tensor_that_is_quantized_already_gets_no_second_pair():
    nodes = "q = QuantizeLinear(x, s, z)  d = DequantizeLinear(q, s, z)  y = MatMul(d, w)"
    text = f"g (float[3, 8] x) => (float[3, 6] y) {{ {nodes} }}"
    model = graph(text, w=W, s=np.float32(X_SCALE), z=np.int8(0))
    InsertQdqPass(int8_plan("y"))(model)
    assert op_types(model).count("QuantizeLinear") == 1
    assert node_of(model, "y").inputs[0].name == "d"
    np.testing.assert_allclose(run(model, x=X)["y"], expected(), rtol=1e-5, atol=1e-5)


def test_shared_weight_stays_one_int8_tensor():
    text = "g (float[3, 8] x) => (float[3, 6] a, float[3, 6] b) { h = Relu(x)  a = MatMul(x, w)  b = MatMul(h, w) }"
    model = graph(text, w=W)
    InsertQdqPass(int8_plan("a", "b"))(model)
    weights = [node_of(model, f"{name}/weight/DequantizeLinear").inputs[:2] for name in ("a", "b")]
    assert weights[0][0] is weights[1][0]
    assert weights[0][1] is weights[1][1]
    assert "w" not in model.graph.initializers
    np.testing.assert_allclose(run(model, x=X)["a"], expected(), rtol=1e-5, atol=1e-5)


def test_shared_weight_with_a_float_reader_stays_for_it():
    text = "g (float[3, 8] x) => (float[3, 6] a, float[3, 6] b) { a = MatMul(x, w)  b = MatMul(x, w) }"
    model = graph(text, w=W)
    InsertQdqPass(int8_plan("a"))(model)
    np.testing.assert_allclose(run(model, x=X)["b"], X @ W, rtol=1e-5, atol=1e-6)


def test_layers_in_other_types_are_left_alone():
    model = graph(ONE, w=W)
    assert not InsertQdqPass(plan(layer("y", 8, 6, "fp16")))(model).modified
    assert op_types(model) == ["MatMul"]


@pytest.mark.parametrize(
    ("made", "says"),
    [
        (plan(layer("y", 8, 6, "int8", 0.1)), "no 6 positive weight scales"),
        (plan(layer("y", 8, 6, "int8", 0.1), weight_scales={"y": np.zeros(6, np.float32)}), "positive weight scales"),
        (plan(layer("y", 8, 6, "int8"), weight_scales={"y": SCALE}), "no activation_scale"),
    ],
)
def test_missing_scales_are_refused(made, says):
    with pytest.raises(UserError, match=says):
        InsertQdqPass(made)(graph(ONE, w=W))


def test_old_opset_is_a_broken_contract():
    with pytest.raises(ir.passes.PreconditionError, match="needs opset 13"):
        InsertQdqPass(int8_plan("y"))(graph(ONE, opset=12, w=W))


@settings(max_examples=50)
@given(
    weight=arrays(np.float32, (4, 3), elements=st.floats(-1e4, 1e4, width=32)),
    mask=arrays(np.bool_, (4, 3)),
    transposed=st.booleans(),
)
def test_weights_round_to_the_nearest_step_and_zeros_stay_zero(weight, mask, transposed):
    scale = np.maximum(np.abs(weight).max(axis=0) / 127, 1e-6).astype(np.float32)
    text = f"g (float[1, 4] x) => (float[1, 3] y) {{ y = Gemm <transB = {int(transposed)}> (x, w) }}"
    model = graph(text, w=weight.T.copy() if transposed else weight)
    made = plan(layer("y", 4, 3, "int8", 1.0), masks={"y": mask}, weight_scales={"y": scale})
    ApplyMasksPass(made)(model)
    InsertQdqPass(made)(model)
    stored = array_of(model, "y/weight_q")
    stored = stored.T if transposed else stored
    assert np.abs(stored.astype(int)).max() <= 127
    assert not stored[~mask].any()
    error = np.abs(stored * scale.astype(np.float64) - weight)[mask]
    step = np.broadcast_to(scale, weight.shape)[mask]
    assert (error <= 0.5001 * step + 1e-9).all()
