"""Linear layers as lsp::BlockSparseLinear: what is taken in, what stays outside, and that the outputs stay."""

from __future__ import annotations

import re

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pass_models import graph, layer, node_of, op_types, plan, run

from lsp_deploy.errors import UserError
from lsp_deploy.passes.center_activations import CenterActivationsPass
from lsp_deploy.passes.insert_block_sparse import InsertBlockSparsePass
from lsp_deploy.passes.insert_qdq import InsertQdqPass
from lsp_deploy.passes.lower_operators import LowerOperatorsPass
from lsp_deploy.plugins.block_sparse.operator import constant_inputs, from_node

RNG = np.random.default_rng(0)
K, N = 40, 24
MASK = np.zeros((K, N), np.float32)
MASK[:16, :16] = MASK[32:, 16:] = 1
W = (RNG.standard_normal((K, N)) * MASK).astype(np.float32)
B = RNG.standard_normal(N).astype(np.float32)
X = RNG.standard_normal((2, 5, K)).astype(np.float32)
R = RNG.standard_normal((2, 5, N)).astype(np.float32)
X_SCALE = float(np.float32(np.abs(X).max() / 127))

INPUTS = "float[batch, 5, 40] x, float[batch, 5, 24] r"
CONSTANTS = {
    "w": W,
    "t": W.T.copy(),
    "u": W.reshape(1, K, N),
    "b": B,
    "b3": B.reshape(1, 1, N),
    "c": np.float32(0.3),
    "half": np.float32(0.5),
    "one": np.float32(1),
    "sqrt2": np.float32(np.sqrt(2)),
}


def model_of(nodes, inputs=INPUTS, outputs="float[batch, 5, 24] y", opset=20, **constants):
    named = {name: a for name, a in {**CONSTANTS, **constants}.items() if re.search(rf"\b{name}\b", nodes)}
    return graph(f"g ({inputs}) => ({outputs}) {{ {nodes} }}", opset=opset, **named)


def plan_for(*names, dtype="fp32", block=(16, 16), scale=X_SCALE, offset=0.0, weight=W):
    made = plan(
        *(layer(name, *weight.shape, dtype, scale if dtype == "int8" else None) for name in names),
        weight_scales=dict.fromkeys(names, np.maximum(np.abs(weight).max(axis=0) / 127, 1e-6).astype(np.float32)),
    )
    made.block_shape = block
    for each in made.layers:
        each.execution.kernel = "block_sparse"
        each.precision.activation_offset = offset
    return made


def standard(model):
    """Return the model with its operators in standard ones."""
    copy = model.clone()
    LowerOperatorsPass("matmul")(copy)
    return copy


def replaced(nodes, *names, **options):
    """Replace layers (`m` if none is named), check that the outputs stay the same, and return the model."""
    model = model_of(nodes, **options)
    feeds = {}
    for value in model.graph.inputs:
        array = {"x": X, "r": R}[value.name]
        feeds[value.name] = array if len(value.shape) == 3 else array.reshape(10, -1)
    if "transA" in nodes:
        feeds["x"] = feeds["x"].T
    expected = run(model, **feeds)
    assert InsertBlockSparsePass(plan_for(*(names or ("m",))))(model).modified
    assert model.opset_imports["lsp"] == 1
    assert list(expected) == [value.name for value in model.graph.outputs]
    actual = run(standard(model), **feeds)
    for name, wanted in expected.items():
        assert actual[name].shape == wanted.shape
        np.testing.assert_allclose(actual[name], wanted, rtol=1e-5, atol=1e-5)
    return model


def test_everything_that_follows_is_taken_in():
    model = replaced("m = MatMul(x, w)  a = Add(b, m)  g = Gelu(a)  y = Add(r, g)")
    (node,) = model.graph
    operator = from_node(node)
    assert (node.name, node.domain, node.op_type) == ("m", "lsp", "BlockSparseLinear")
    assert [value.name for value in node.inputs] == ["x", "m/values", "m/bias", "m/scale", "r"]
    assert operator.activation == "gelu"
    np.testing.assert_array_equal(operator.mask, [[1, 0], [0, 0], [0, 1]])
    assert set(model.graph.initializers) == {"m/values", "m/bias", "m/scale"}
    assert str(node.outputs[0].shape) == "[batch,5,24]"
    assert node.outputs[0].dtype == ir.DataType.FLOAT


@pytest.mark.parametrize(
    ("nodes", "activation", "left"),
    [
        ("y = MatMul(x, w)", "none", []),
        ("m = MatMul(x, w)  y = Add(m, b)", "none", []),
        ("m = MatMul(x, w)  y = Add(m, r)", "none", []),
        ("m = MatMul(x, w)  y = Relu(m)", "relu", []),
        ('m = MatMul(x, w)  y = Gelu <approximate = "tanh"> (m)', "gelu_tanh", []),
        ("m = MatMul(x, w)  a = Add(m, b3)  y = Relu(a)", "relu", []),
        ("m = MatMul(x, u)  y = Add(m, b)", "none", []),
        ("m = MatMul(x, w)  y = Sigmoid(m)", "none", ["Sigmoid"]),
        ("m = MatMul(x, w)  s = Add(m, r)  y = Relu(s)", "none", ["Relu"]),
        ("m = MatMul(x, w)  s = Add(m, m)  y = Relu(s)", "none", ["Add", "Relu"]),
        ("m = MatMul(x, w)  s = Mul(m, r)  y = Relu(s)", "none", ["Mul", "Relu"]),
        ("m = MatMul(x, w)  a = Add(m, b)  d = Div(a, sqrt2)  e = Erf(d)  p = Add(e, one)  q = Mul(a, p)  "
         "y = Mul(q, half)", "gelu", []),
        ("m = MatMul(x, w)  d = Div(m, sqrt2)  e = Erf(d)  y = Add(e, one)", "none", ["Div", "Erf", "Add"]),
    ],
)  # fmt: skip
def test_epilogues(nodes, activation, left):
    name = "m" if "m =" in nodes else "y"
    model = replaced(nodes, name, inputs=INPUTS if " r)" in nodes or "(r" in nodes else "float[batch, 5, 40] x")
    assert op_types(model) == ["BlockSparseLinear", *left]
    assert from_node(node_of(model, name)).activation == activation


@pytest.mark.parametrize(
    "nodes",
    [
        "m = Gemm(x, w, b)  y = Add(r, m)",
        "m = Gemm <transB = 1, alpha = 0.5, beta = 2.0> (x, t, b)  y = Relu(m)",
        "y = Gemm <transB = 1> (x, t)",
    ],
)
def test_gemm(nodes):
    inputs = "float[10, 40] x, float[10, 24] r" if " r" in nodes or "(r" in nodes else "float[10, 40] x"
    name = "m" if "m =" in nodes else "y"
    model = replaced(nodes, name, inputs=inputs, outputs="float[10, 24] y")
    assert op_types(model) == ["BlockSparseLinear"]


@pytest.mark.parametrize(
    ("nodes", "left"),
    [
        ("y = Gemm <transA = 1> (x, w, b)", ["Transpose", "BlockSparseLinear"]),
        ("y = Gemm <beta = 2.0> (x, w, c)", ["BlockSparseLinear", "Mul", "Add"]),
        ("m = MatMul(x, u)  s = Squeeze(m)  y = Relu(s)", ["Unsqueeze", "BlockSparseLinear", "Squeeze", "Relu"]),
        ("m = MatMul(x, w)  s = Add(m, b3)  y = Squeeze(s)", ["BlockSparseLinear", "Add", "Squeeze"]),
    ],
)
def test_forms_that_are_no_plain_layer(nodes, left):
    x = "float[40, 10] x" if "transA" in nodes else "float[10, 40] x"
    name = "m" if "m =" in nodes else "y"
    model = replaced(nodes, name, inputs=x, outputs="float[10, 24] y")
    assert sorted(op_types(model)) == sorted(left)


@pytest.mark.parametrize(
    ("between", "left"), [("m", ["Add", "Relu", "Add"]), ("a", ["Relu", "Add"]), ("g", ["Add"]), ("y", [])]
)
def test_what_is_an_output_too_stays(between, left):
    outputs = "float[batch, 5, 24] y" + (f", float[batch, 5, 24] {between}" if between != "y" else "")
    model = replaced("m = MatMul(x, w)  a = Add(b, m)  g = Relu(a)  y = Add(r, g)", outputs=outputs)
    assert op_types(model) == ["BlockSparseLinear", *left]


@pytest.mark.parametrize(("between", "left"), [("m", 3), ("a", 2), ("g", 1)])
def test_what_has_another_reader_stays(between, left):
    nodes = f"m = MatMul(x, w)  a = Add(b, m)  g = Relu(a)  y = Add(r, g)  z = Neg({between})"
    model = replaced(nodes, outputs="float[batch, 5, 24] y, float[batch, 5, 24] z")
    assert len(op_types(model)) == 1 + left + 1


def test_an_erf_gelu_with_another_reader_of_its_input_stays():
    nodes = (
        "m = MatMul(x, w)  d = Div(m, sqrt2)  e = Erf(d)  p = Add(e, one)  q = Mul(m, p)  y = Mul(q, half)  z = Neg(m)"
    )
    outputs = "float[batch, 5, 24] y, float[batch, 5, 24] z"
    model = replaced(nodes, inputs="float[batch, 5, 40] x", outputs=outputs)
    assert len(op_types(model)) == 7


@pytest.mark.parametrize(
    "shape", ["float[1, 5, 24] r", "float[batch, 1, 24] r", "float[5, 24] r", "float[other, 5, 24] r"]
)
def test_a_residual_that_is_or_may_be_broadcast_stays_an_add(shape):
    model = model_of("m = MatMul(x, w)  y = Add(m, r)", inputs=f"float[batch, 5, 40] x, {shape}")
    InsertBlockSparsePass(plan_for("m"))(model)
    assert op_types(model) == ["BlockSparseLinear", "Add"]


def test_a_residual_that_is_computed_after_the_layer():
    model = replaced("m = MatMul(x, w)  s = Relu(r)  y = Add(m, s)")
    assert op_types(model) == ["Relu", "BlockSparseLinear"]


def test_two_layers_that_are_added_to_each_other():
    v = RNG.standard_normal((K, N)).astype(np.float32)
    nodes = "m = MatMul(x, w)  n = MatMul(x, v)  y = Add(m, n)"
    model = replaced(nodes, "m", "n", inputs="float[batch, 5, 40] x", v=v)
    assert op_types(model) == ["BlockSparseLinear", "BlockSparseLinear"]
    assert len(node_of(model, "m").inputs) == 5


def test_layers_one_behind_the_other():
    nodes = "m = MatMul(x, w)  a = Add(m, b)  g = Gelu(a)  n = MatMul(g, v)  y = Add(n, x)"
    v = RNG.standard_normal((N, K)).astype(np.float32)
    made = plan(layer("n", N, K), layer("m", K, N))
    for each in made.layers:
        each.execution.kernel = "block_sparse"
    model = model_of(nodes, inputs="float[batch, 5, 40] x", outputs="float[batch, 5, 40] y", v=v)
    expected = run(model, x=X)["y"]
    InsertBlockSparsePass(made)(model)
    assert op_types(model) == ["BlockSparseLinear", "BlockSparseLinear"]
    assert from_node(node_of(model, "n")).block_k == 32  # no blocks were asked for
    np.testing.assert_allclose(run(standard(model), x=X)["y"], expected, rtol=1e-5, atol=1e-5)


def test_a_weight_of_zeros_leaves_the_bias():
    model = model_of("m = MatMul(x, w)  y = Add(m, b)", inputs="float[batch, 5, 40] x", w=np.zeros((K, N), np.float32))
    InsertBlockSparsePass(plan_for("m"))(model)
    assert from_node(node_of(model, "m")).blocks == 0
    np.testing.assert_array_equal(run(standard(model), x=X)["y"], np.broadcast_to(B, (2, 5, N)))


def test_a_shared_weight_stays_for_other_layers():
    nodes = "m = MatMul(x, w)  n = MatMul(x, w)  y = Sub(m, n)"
    model = replaced(nodes, inputs="float[batch, 5, 40] x")
    assert op_types(model) == ["BlockSparseLinear", "MatMul", "Sub"]


def test_bf16_rounds_the_weight():
    model = model_of("m = MatMul(x, w)  y = Add(m, b)", inputs="float[batch, 5, 40] x")
    expected = run(model, x=X)["y"]
    InsertBlockSparsePass(plan_for("m", dtype="bf16"))(model)
    values, bias, scale = constant_inputs(node_of(model, "m"))
    assert values.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(bias, B)
    np.testing.assert_array_equal(scale, np.ones(N, np.float32))
    actual = run(standard(model), x=X)["y"]
    difference = np.abs(actual - expected).max()
    assert 0 < difference < 1e-2 * np.abs(expected).max()


@pytest.mark.parametrize("offset", [0.0, 0.7])
@pytest.mark.parametrize("nodes", ["m = MatMul(x, w)  a = Add(m, b)  y = Relu(a)", "m = MatMul(x, w)  y = Relu(m)"])
def test_int8_computes_what_qdq_computes(nodes, offset):
    model = model_of(nodes, inputs="float[batch, 5, 40] x")
    decided = plan_for("m", dtype="int8", offset=offset)
    qdq = model.clone()
    CenterActivationsPass(decided)(qdq)
    InsertQdqPass(decided)(qdq)
    InsertBlockSparsePass(decided)(model)
    node = node_of(model, "m")
    values, _, scale = constant_inputs(node)
    operator = from_node(node)
    assert values.dtype == np.int8
    assert (operator.x_scale, operator.x_offset) == (np.float32(X_SCALE), np.float32(offset))
    np.testing.assert_array_equal(scale, np.float32(X_SCALE) * decided.weight_scales["m"])
    expected = run(qdq, x=X)["y"]
    np.testing.assert_allclose(run(standard(model), x=X)["y"], expected, rtol=1e-5, atol=1e-5)


def test_layers_that_read_one_tensor_quantize_it_each_for_itself():
    nodes = "h = Relu(x)  m = MatMul(h, w)  n = MatMul(h, w)  y = Sub(m, n)"
    model = model_of(nodes, inputs="float[batch, 5, 40] x")
    decided = plan_for("m", "n", dtype="int8")
    decided.layer("n").precision.activation_scale = 2 * X_SCALE
    InsertBlockSparsePass(decided)(model)
    scales = [from_node(node_of(model, name)).x_scale for name in ("m", "n")]
    assert scales == [np.float32(X_SCALE), np.float32(2 * X_SCALE)]


def test_other_layers_are_left_alone():
    model = model_of("m = MatMul(x, w)  y = Add(m, b)", inputs="float[batch, 5, 40] x")
    decided = plan_for("m")
    decided.layers[0].execution.kernel = "engine"
    assert not InsertBlockSparsePass(decided)(model).modified
    assert op_types(model) == ["MatMul", "Add"]


@pytest.mark.parametrize(
    ("decided", "says"),
    [
        (plan_for("other"), "names a layer other that the model does not have"),
        (plan_for("y", dtype="fp16"), "y run by lsp::BlockSparseLinear in fp16"),
        (plan_for("y", dtype="int8", scale=None), "no activation_scale"),
    ],
)
def test_plans_that_cannot_be_carried_out_are_refused(decided, says):
    with pytest.raises(UserError, match=says):
        InsertBlockSparsePass(decided)(model_of("y = MatMul(x, w)", inputs="float[batch, 5, 40] x"))


def test_a_convolution_is_refused():
    nodes = "y = Conv <kernel_shape = [1, 1]> (x, k)"
    model = graph(f"g (float[1, 40, 4, 4] x) => (float[1, 24, 4, 4] y) {{ {nodes} }}", k=W.T.reshape(N, K, 1, 1).copy())
    with pytest.raises(UserError, match="it is a convolution; leave it to the engine"):
        InsertBlockSparsePass(plan_for("y"))(model)


@settings(max_examples=40)
@given(
    k=st.integers(1, 50),
    n=st.integers(1, 50),
    block=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    density=st.floats(0, 1),
    activation=st.sampled_from(["Identity", "Relu", "Gelu"]),
    transposed=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_size_block_and_mask(k, n, block, density, activation, transposed, seed):
    rng = np.random.default_rng(seed)
    weight = (rng.standard_normal((k, n)) * (rng.random((k, n)) < density)).astype(np.float32)
    x, bias, residual = (rng.standard_normal(shape).astype(np.float32) for shape in ((3, k), (n,), (3, n)))
    text = (
        f"g (float[3, {k}] x, float[3, {n}] r) => (float[3, {n}] y) "
        f"{{ m = Gemm <transB = {int(transposed)}> (x, w, b)  a = {activation}(m)  y = Add(a, r) }}"
    )
    model = graph(text, opset=20, w=weight.T.copy() if transposed else weight, b=bias)
    expected = run(model, x=x, r=residual)["y"]
    decided = plan_for("m", block=block, weight=weight)
    InsertBlockSparsePass(decided)(model)
    surviving = {(i // block[0], j // block[1]) for i, j in np.argwhere(weight)}
    assert from_node(node_of(model, "m")).blocks == len(surviving)
    np.testing.assert_allclose(run(standard(model), x=x, r=residual)["y"], expected, rtol=1e-5, atol=1e-5)
