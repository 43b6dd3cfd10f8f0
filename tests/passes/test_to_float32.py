"""The float32 twin: the same values, wider."""

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from block_sparse_cases import case
from onnx_ir.passes.common import CheckerPass
from pass_models import array_of, graph, layer, node_of, op_types, plan, run

from lsp_deploy.passes.cast_compute_type import CastComputeTypePass
from lsp_deploy.passes.insert_qdq import InsertQdqPass
from lsp_deploy.passes.lower_operators import LowerOperatorsPass
from lsp_deploy.passes.to_float32 import ToFloat32Pass
from lsp_deploy.plugins.block_sparse.operator import constant_inputs, from_node
from lsp_deploy.plugins.block_sparse.reference import block_sparse_linear
from lsp_deploy.plugins.block_sparse.weights import dense_weight

RNG = np.random.default_rng(0)
W = RNG.standard_normal((8, 6)).astype(np.float32)
X = RNG.standard_normal((3, 8)).astype(np.float32)
FLOAT = ir.DataType.FLOAT
SIXTEEN_BITS = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)

BLOCK = (
    "g (float[3, 8] x) => (float[3, 6] y) { n = LayerNormalization(x, s, b)  m = MatMul(n, w)  p = Softmax(m)"
    "  q = Mul(p, p)  r = ReduceMean(q, axes)  e = Add(r, eps)  t = Sqrt(e)  y = Div(p, t) }"
)


def block(opset=19):
    constants = {"axes": np.array([-1]), "eps": np.float32(1e-6)}
    return graph(BLOCK, opset, s=np.ones(8, np.float32), b=np.zeros(8, np.float32), w=W, **constants)


def twin_of(model):
    twin = model.clone()
    assert ToFloat32Pass()(twin).modified
    CheckerPass(full_check=True)(twin)
    values = [*twin.graph.inputs, *twin.graph.initializers.values(), *(v for node in twin.graph for v in node.outputs)]
    assert not any(value.dtype in SIXTEEN_BITS for value in values)
    return twin


@pytest.mark.parametrize(("dtype", "numpy_type"), [("fp16", np.float16), ("bf16", ml_dtypes.bfloat16)])
def test_weights_keep_exactly_their_16_bit_values(dtype, numpy_type):
    model = block()
    CastComputeTypePass(dtype)(model)
    twin = twin_of(model)
    np.testing.assert_array_equal(array_of(twin, "w"), W.astype(numpy_type).astype(np.float32))
    assert array_of(model, "w").dtype == numpy_type
    assert "Cast" not in op_types(twin)


@pytest.mark.parametrize("keep_io", [True, False])
def test_outputs_agree_within_rounding(keep_io):
    model = block()
    CastComputeTypePass("fp16", keep_io=keep_io)(model)
    twin = twin_of(model)
    assert [(value.name, value.dtype) for value in (*twin.graph.inputs, *twin.graph.outputs)] == [
        ("x", FLOAT),
        ("y", FLOAT),
    ]
    expected = run(model, x=X if keep_io else X.astype(np.float16))["y"].astype(np.float32)
    np.testing.assert_allclose(run(twin, x=X)["y"], expected, rtol=1e-2, atol=1e-2)


def test_int8_stays_int8_and_scales_widen():
    scales = (np.abs(W).max(axis=0) / 127).astype(np.float16).astype(np.float32)
    model = graph("g (float[3, 8] x) => (float[3, 6] y) { y = MatMul(x, w) }", w=W)
    InsertQdqPass(plan(layer("y", 8, 6, "int8", 0.0234375), weight_scales={"y": scales}))(model)
    before = run(model.clone(), x=X)["y"]
    CastComputeTypePass("fp16")(model)
    twin = twin_of(model)
    assert array_of(twin, "y/weight_q").dtype == np.int8
    np.testing.assert_array_equal(array_of(twin, "y/weight_scale"), scales)
    np.testing.assert_array_equal(run(twin, x=X)["y"], before)


def test_attributes_that_name_a_type_follow():
    # ONNX text gives float16 values as their bits: 15872 is 1.5, 16640 is 2.5.
    nodes = (
        "s = Shape(x)  f = ConstantOfShape <value = float16[1] {15872}> (s)  c = Constant <value = float16 {16640}> ()"
        "  i = Cast <to = 10> (n)  a = Mul(x, f)  d = Add(a, c)  y = Mul(d, i)"
    )
    model = graph(f"g (float16[3, 8] x, int64[3, 8] n) => (float16[3, 8] y) {{ {nodes} }}")
    twin = twin_of(model)
    assert node_of(twin, "i").attributes.get_int("to") == FLOAT
    n = np.arange(24).reshape(3, 8)
    np.testing.assert_allclose(run(twin, x=X, n=n)["y"], (X * 1.5 + 2.5) * n, rtol=1e-5)


def test_layer_norm_of_16_bit_statistics_gets_float32_ones():
    text = "g (bfloat16[3, 8] x) => (bfloat16[3, 8] y) { y = LayerNormalization <stash_type = 16> (x, s) }"
    twin = twin_of(graph(text, s=np.ones(8, ml_dtypes.bfloat16)))
    assert node_of(twin, "y").attributes.get_int("stash_type") == FLOAT


def test_casts_at_outputs_leave_names_and_values_in_place():
    nodes = "h = Cast <to = 10> (x)  a = Relu(h)  y = Cast <to = 1> (a)  z = Cast <to = 1> (h)"
    model = graph(f"g (float[3, 8] x) => (float[3, 8] y, float[3, 8] z) {{ {nodes} }}")
    twin = twin_of(model)
    outputs = run(twin, x=X)
    assert list(outputs) == ["y", "z"]
    np.testing.assert_array_equal(outputs["y"], np.maximum(X, 0))
    np.testing.assert_array_equal(outputs["z"], X)


def test_subgraphs_widen_too():
    # 16384 are the bits of 2.0.
    text = (
        "g (float16[3, 8] x, bool c) => (float16[3, 8] y) { y = If (c) <"
        "then_branch = t () => (float16[3, 8] a) { k = Constant <value = float16 {16384}> ()  a = Mul(x, k) },"
        "else_branch = e () => (float16[3, 8] b) { b = Neg(x) }> }"
    )
    twin = twin_of(graph(text))
    np.testing.assert_array_equal(run(twin, x=X, c=np.array(True))["y"], 2 * X)


def test_a_float32_model_is_not_modified():
    assert not ToFloat32Pass()(block()).modified


@pytest.mark.parametrize("layout", ["canonical", "bsl16.v1"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int8"])
def test_block_sparse_layers_of_gpu_models(dtype, layout):
    half = "float16" if dtype == "int8" else dtype
    one = case(dtype, K=64, N=48, x_type=half, out_type=half).in_layout(layout)
    model = one.model()
    twin = model.clone()
    ToFloat32Pass()(twin)
    (node,) = twin.graph
    operator = from_node(node)
    assert operator.out_type == FLOAT and twin.graph.inputs[0].dtype == FLOAT
    values = constant_inputs(node)[0]
    assert values.dtype == (np.int8 if dtype == "int8" else np.float32)
    np.testing.assert_array_equal(dense_weight(operator, values), one.weight.astype(values.dtype))
    x = one.x.astype(np.float32)
    expected = block_sparse_linear(operator, x, values, one.bias, one.scale)
    LowerOperatorsPass()(twin)
    np.testing.assert_allclose(run(twin, x=x)["y"], expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    assert from_node(model.graph[0]) == one.operator


def test_block_sparse_layers_of_cpu_models_stay():
    model = case("bfloat16").model()
    assert not ToFloat32Pass()(model).modified
    assert constant_inputs(model.graph[0])[0].dtype == ml_dtypes.bfloat16
