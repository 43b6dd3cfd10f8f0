"""16-bit compute: what is cast, what stays float32, and that outputs stay close."""

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from exports import export_clip, export_family
from onnx_ir.passes.common import CheckerPass
from packaging.version import Version
from pass_models import array_of, graph, node_of, op_types, run

from lsp_deploy.errors import UserError
from lsp_deploy.model import load_model, resolve_shapes
from lsp_deploy.passes.cast_compute_type import CastComputeTypePass
from lsp_deploy.passes.infer_shapes import InferShapesPass
from lsp_deploy.passes.to_float32 import ToFloat32Pass

RNG = np.random.default_rng(0)
FLOAT16, BFLOAT16, FLOAT = ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.FLOAT
W = RNG.standard_normal((8, 6)).astype(np.float32)
X = RNG.standard_normal((3, 8)).astype(np.float32)
ROWS = "(float[3, 8] x) => (float[3, 8] y)"

LINEAR = "g (float[3, 8] x) => (float[3, 6] y) { m = MatMul(x, w)  y = Add(m, b) }"


def cast(model, dtype="fp16", **options):
    assert CastComputeTypePass(dtype, **options)(model).modified
    CheckerPass(full_check=True)(model)
    return model


def rms_norm(x, epsilon=1e-6):
    return x / np.sqrt(np.mean(np.square(x, dtype=np.float64), axis=-1, keepdims=True) + epsilon)


def type_of(model, name):
    values = {value.name: value for node in model.graph for value in node.outputs}
    return (values | dict(model.graph.initializers))[name].dtype


@pytest.mark.parametrize(("dtype", "stored"), [("fp16", FLOAT16), ("bf16", BFLOAT16)])
def test_weights_and_values_become_16_bit_and_io_stays(dtype, stored):
    model = cast(graph(LINEAR, w=W, b=np.ones(6, np.float32)), dtype)
    assert op_types(model) == ["Cast", "MatMul", "Add", "Cast"]
    assert {type_of(model, name) for name in ("w", "b", "m")} == {stored}
    assert [(value.name, value.dtype) for value in (*model.graph.inputs, *model.graph.outputs)] == [
        ("x", FLOAT),
        ("y", FLOAT),
    ]


def test_io_becomes_16_bit_when_asked():
    model = cast(graph(LINEAR, w=W, b=np.ones(6, np.float32)), keep_io=False)
    assert op_types(model) == ["MatMul", "Add"]
    assert [(value.name, value.dtype) for value in (*model.graph.inputs, *model.graph.outputs)] == [
        ("x", FLOAT16),
        ("y", FLOAT16),
    ]
    outputs = run(model, x=X.astype(np.float16))["y"]
    np.testing.assert_allclose(outputs.astype(np.float32), X @ W + 1, rtol=1e-2, atol=1e-2)


def test_outputs_stay_close():
    model = cast(graph(LINEAR, w=W, b=np.ones(6, np.float32)))
    np.testing.assert_allclose(run(model, x=X)["y"], X @ W + 1, rtol=1e-2, atol=1e-2)


def test_a_clone_stays_float32():
    model = graph(LINEAR, w=W, b=np.ones(6, np.float32))
    clone = model.clone()
    cast(clone)
    np.testing.assert_allclose(run(model, x=X)["y"], X @ W + 1, rtol=1e-5, atol=1e-6)


def test_weight_out_of_range_is_refused_by_name():
    model = graph(LINEAR, w=W * 1e6, b=np.ones(6, np.float32))
    with pytest.raises(UserError, match=r"constant w holds .* fp16 cannot hold; .* bf16"):
        CastComputeTypePass("fp16")(model)
    assert type_of(cast(graph(LINEAR, w=W * 1e6, b=np.ones(6, np.float32)), "bf16"), "w") == BFLOAT16


@pytest.mark.parametrize(("large", "kept"), [(-1e9, -65504), (-3.4028235e38, -65504), (-np.inf, -np.inf)])
def test_attention_masks_stay_masks(large, kept):
    mask = np.where(np.eye(8) > 0, 0, large).astype(np.float32)[:3]
    model = cast(graph(f"g {ROWS} {{ m = Add(x, mask)  y = Softmax(m) }}", mask=mask))
    assert array_of(model, "mask").min() == kept
    np.testing.assert_allclose(run(model, x=X)["y"], np.eye(3, 8), atol=1e-3)


def test_large_positive_summand_is_refused():
    with pytest.raises(UserError, match="constant c holds 1e\\+06"):
        CastComputeTypePass("fp16")(graph(f"g {ROWS} {{ y = Add(x, c) }}", c=np.float32(1e6)))


def test_bounds_that_are_never_met_stay_bounds():
    model = cast(graph(f"g {ROWS} {{ y = Clip(x, low, high) }}", low=np.float32(0), high=np.float32(3e38)))
    assert array_of(model, "high") == 65504
    np.testing.assert_allclose(run(model, x=X)["y"], np.maximum(X, 0), rtol=1e-3)


def test_layer_norm_computes_its_statistics_in_float32():
    model = graph(
        f"g {ROWS} {{ y = LayerNormalization(x, s, b) }}", s=np.ones(8, np.float32), b=np.zeros(8, np.float32)
    )
    cast(model)
    assert op_types(model) == ["Cast", "LayerNormalization", "Cast"]
    assert node_of(model, "y").attributes.get_int("stash_type") == FLOAT
    x = X * 1000  # whose squares overflow float16
    centred = x - x.mean(axis=-1, keepdims=True)
    np.testing.assert_allclose(run(model, x=x)["y"], rms_norm(centred, 1e-5), rtol=1e-2, atol=1e-2)


DECOMPOSED = {
    "Pow": ("p = Pow(h, two)  v = ReduceMean(p, axes)  e = Add(v, eps)  r = Sqrt(e)  y = Div(h, r)", "h"),
    "Mul and reciprocal": (
        "p = Mul(h, h)  v = ReduceMean(p, axes)  e = Add(eps, v)  r = Sqrt(e)  i = Reciprocal(r)  y = Mul(h, i)",
        "h",
    ),
    "one divided by the root": (
        "p = Mul(h, h)  v = ReduceMean(p, axes)  e = Add(v, eps)  r = Sqrt(e)  i = Div(one, r)  y = Mul(i, h)",
        "h",
    ),
    "sum over the width": (
        "p = Pow(h, two)  s = ReduceSum(p, axes)  v = Mul(s, eighth)  e = Add(v, eps)  r = Sqrt(e)  y = Div(h, r)",
        "h",
    ),
    "with the mean taken off": (
        "u = ReduceMean(h, axes)  d = Sub(h, u)  p = Pow(d, two)  v = ReduceMean(p, axes)  e = Add(v, eps)"
        "  r = Sqrt(e)  y = Div(d, r)",
        "d",
    ),
}


@pytest.mark.parametrize("form", DECOMPOSED)
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_decomposed_norms_stay_float32(form, dtype):
    nodes, numerator = DECOMPOSED[form]
    constants = {
        "axes": np.array([-1]),
        "two": np.float32(2),
        "one": np.float32(1),
        "eighth": np.float32(1 / 8),
        "eps": np.float32(1e-6),
    }
    used = {name: array for name, array in constants.items() if f"{name})" in nodes or f"({name}" in nodes}
    model = graph(f"g {ROWS} {{ h = MatMul(x, m)  {nodes} }}", m=np.eye(8, dtype=np.float32), **used)
    cast(model, dtype)
    assert {type_of(model, value.name) for value in node_of(model, "y").inputs} == {FLOAT}
    assert type_of(model, "h") in (FLOAT16, BFLOAT16)
    assert array_of(model, "eps").dtype == np.float32
    if dtype == "bf16":  # ONNX Runtime has no such MatMul on CPUs
        return
    x = (X * 1000).astype(np.float16).astype(np.float32)
    centred = x - x.mean(axis=-1, keepdims=True) if numerator == "d" else x
    np.testing.assert_allclose(run(model, x=x)["y"], rms_norm(centred), rtol=1e-2, atol=1e-2)


def test_l2_norm_stays_float32():
    nodes = "n = ReduceL2(x, axes)  c = Clip(n, low)  e = Expand(c, shape)  y = Div(x, e)"
    constants = {"axes": np.array([-1]), "low": np.float32(1e-12), "shape": np.array([3, 8])}
    model = cast(graph(f"g {ROWS} {{ {nodes} }}", **constants))
    x = X * 10000
    expected = x / np.linalg.norm(x.astype(np.float64), axis=-1, keepdims=True)
    np.testing.assert_allclose(run(model, x=x)["y"], expected, rtol=1e-2, atol=1e-3)


def test_an_epsilon_that_vanishes_keeps_its_division_in_float32():
    nodes = "a = Relu(x)  e = Add(a, eps)  y = Div(a, e)  z = Mul(a, a)"
    text = f"g (float[3, 8] x) => (float[3, 8] y, float[3, 8] z) {{ {nodes} }}"
    model = cast(graph(text, eps=np.float32(1e-15)))
    assert np.isfinite(run(model, x=X)["y"]).all()
    assert type_of(model, node_of(model, "z").inputs[0].name) == FLOAT16
    # bfloat16 has float32's range: nothing vanishes.
    assert op_types(cast(graph(text, eps=np.float32(1e-15)), "bf16")).count("Cast") == 3


def test_sums_over_long_axes_are_float32():
    model = cast(graph("g (float[1, 4096] x) => (float[1, 1] y) { y = ReduceMean(x, axes) }", axes=np.array([-1])))
    assert run(model, x=np.full((1, 4096), 1000, np.float32))["y"] == 1000


def test_a_constant_read_in_both_types_is_held_in_both():
    nodes = "s = ReduceSum(c, axes)  h = Mul(x, c)  y = Add(h, s)"
    c = (RNG.standard_normal(8) / 3).astype(np.float32)
    model = cast(graph(f"g {ROWS} {{ {nodes} }}", c=c, axes=np.array([0])))
    assert array_of(model, "c").dtype == np.float32
    assert array_of(model, "c_as_float16").dtype == np.float16
    np.testing.assert_allclose(run(model, x=X)["y"], X * c + c.sum(), rtol=1e-2, atol=1e-2)


# ONNX Runtime up to 1.23, the last for Python 3.10, misreads a weight without zero points.
QUANTIZED = (
    "g (float[3, 8] x) => (float[3, 6] y) { q = QuantizeLinear(x, s, z)  d = DequantizeLinear(q, s, z)"
    "  w = DequantizeLinear <axis = 1> (wq, ws, wz)  y = MatMul(d, w) }"
)


def quantized(opset=19, weight_scale=0.01):
    weight = RNG.integers(-127, 128, (8, 6)).astype(np.int8)
    scales = np.full(6, weight_scale, np.float32)
    return graph(QUANTIZED, opset, s=np.float32(0.0234375), z=np.int8(0), wq=weight, ws=scales, wz=np.zeros(6, np.int8))


@pytest.mark.parametrize(("dtype", "stored"), [("fp16", FLOAT16), ("bf16", BFLOAT16)])
@pytest.mark.parametrize("opset", [19, 21, 23])
def test_scales_become_16_bit_and_int8_stays(dtype, stored, opset):
    model = cast(quantized(opset), dtype)
    assert op_types(model) == ["Cast", "QuantizeLinear", "DequantizeLinear", "DequantizeLinear", "MatMul", "Cast"]
    assert {type_of(model, name) for name in ("s", "ws", "d", "w")} == {stored}
    assert {type_of(model, name) for name in ("z", "wq", "q")} == {ir.DataType.INT8}


@pytest.mark.skipif(
    Version(onnxruntime.__version__) < Version("1.24"), reason="ONNX Runtime 1.23 quantizes fp16 without rounding"
)
def test_quantized_outputs_stay_close():
    model = quantized()
    before = run(model.clone(), x=X)["y"]
    np.testing.assert_allclose(run(cast(model), x=X)["y"], before, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("scale", [1e-9, 1.3e-7])
def test_a_scale_that_underflows_is_refused(scale):
    with pytest.raises(UserError, match=r"scale ws of w is .* fp16 cannot hold"):
        CastComputeTypePass("fp16")(quantized(weight_scale=scale))
    assert type_of(cast(quantized(weight_scale=scale), "bf16"), "ws") == BFLOAT16


def test_16_bit_scales_need_opset_19():
    with pytest.raises(ir.passes.PreconditionError, match="need opset 19"):
        CastComputeTypePass("fp16")(quantized(opset=18))


def test_a_16_bit_model_is_a_broken_contract():
    model = cast(graph(LINEAR, w=W, b=np.ones(6, np.float32)), keep_io=False)
    with pytest.raises(ir.passes.PreconditionError, match="16-bit already"):
        CastComputeTypePass("fp16")(model)


def test_missing_types_are_inferred():
    model = graph(LINEAR, w=W, b=np.ones(6, np.float32))
    node_of(model, "m").outputs[0].type = None
    assert type_of(cast(model), "m") == FLOAT16


def test_an_operator_of_unknown_type_is_refused():
    model = graph(f"g {ROWS} {{ h = lsp.Unheard(x)  y = Relu(h) }}")
    with pytest.raises(UserError, match="element type of h \\(lsp::Unheard h\\) is not known"):
        CastComputeTypePass("fp16")(model)


def test_resize_keeps_its_scales_float32():
    text = 'g (float[1, 2, 4, 4] x) => (float[1, 2, 8, 8] y) { y = Resize <mode = "linear"> (x, , scales) }'
    model = cast(graph(text, scales=np.array([1, 1, 2, 2], np.float32)))
    assert type_of(model, "scales") == FLOAT
    image = RNG.standard_normal((1, 2, 4, 4)).astype(np.float32)
    original = graph(text, scales=np.array([1, 1, 2, 2], np.float32))
    np.testing.assert_allclose(run(model, x=image)["y"], run(original, x=image)["y"], rtol=1e-2, atol=1e-2)


def test_sizes_computed_in_float_stay_exact():
    # 4097 is no float16 number.
    nodes = (
        "s = Shape(x)  f = Cast <to = 1> (s)  h = Mul(f, half)  r = Floor(h)  n = Cast <to = 7> (r)"
        "  o = Squeeze(n)  i = Range(zero, o, one)  c = Cast <to = 1> (i)  y = ReduceMax <keepdims = 0> (c)"
    )
    text = f"g (float[L] x) => (float y) {{ {nodes} }}"
    model = graph(text, half=np.float32(0.5), zero=np.int64(0), one=np.int64(1))
    cast(model)
    # Counted from 0, so one less than half the length, rounded to float16 as the model's output.
    assert run(model, x=np.zeros(2 * 4097, np.float32))["y"] == 4096
    assert run(model, x=np.zeros(8, np.float32))["y"] == 3


def test_constants_and_generators():
    nodes = (
        "s = Shape(x)  zeros = ConstantOfShape(s)  ones = ConstantOfShape <value = float[1] {1.0}> (s)"
        "  half = Constant <value_float = 0.5> ()  p = Add(zeros, ones)  q = Mul(p, half)  y = Add(x, q)"
    )
    model = cast(graph(f"g {ROWS} {{ {nodes} }}"))
    assert {type_of(model, name) for name in ("zeros", "ones", "half")} == {FLOAT16}
    np.testing.assert_allclose(run(model, x=X)["y"], X + 0.5, rtol=1e-2, atol=1e-2)


def test_integers_cast_to_float_are_cast_to_16_bit():
    model = cast(
        graph("g (int64[3, 8] x) => (float[3, 8] y) { f = Cast <to = 1> (x)  y = Mul(f, c) }", c=np.float32(2))
    )
    assert node_of(model, "f").attributes.get_int("to") == FLOAT16
    np.testing.assert_array_equal(run(model, x=np.arange(24).reshape(3, 8))["y"], 2 * np.arange(24).reshape(3, 8))


def test_control_flow_stays_float32():
    text = (
        "g (float[3, 8] x, bool c) => (float[3, 8] y) { h = Mul(x, k)  i = If (c) <"
        "then_branch = t () => (float[3, 8] a) { a = Add(h, k) },"
        "else_branch = e () => (float[3, 8] b) { b = Neg(h) }>  y = Relu(i) }"
    )
    model = cast(graph(text, k=np.float32(2)))
    assert type_of(model, "h") == FLOAT16
    assert type_of(model, "i") == FLOAT
    np.testing.assert_allclose(run(model, x=X, c=np.array(True))["y"], np.maximum(2 * X + 2, 0), rtol=1e-2, atol=1e-2)
    np.testing.assert_allclose(run(model, x=X, c=np.array(False))["y"], np.maximum(-2 * X, 0), rtol=1e-2, atol=1e-2)


def test_operators_of_other_domains_stay_float32():
    model = graph(f"g {ROWS} {{ h = Mul(x, k)  o = com.microsoft.QuickGelu(h)  y = Mul(o, k) }}", k=np.float32(2))
    node_of(model, "o").outputs[0].type = ir.TensorType(FLOAT)
    node_of(model, "y").outputs[0].type = ir.TensorType(FLOAT)
    CastComputeTypePass("fp16")(model)
    assert type_of(model, "o") == FLOAT
    assert type_of(model, node_of(model, "o").inputs[0].name) == FLOAT
    assert type_of(model, node_of(model, "y").inputs[0].name) == FLOAT16


def test_bf16_convolution_stays_float32_until_its_schema_has_bfloat16():
    text = "g (float[1, 2, 4, 4] x) => (float[1, 3, 3, 3] y) { r = Relu(x)  y = Conv(r, w) }"
    weight = RNG.standard_normal((3, 2, 2, 2)).astype(np.float32)
    assert type_of(cast(graph(text, 19, w=weight), "bf16"), "w") == FLOAT
    assert type_of(cast(graph(text, 22, w=weight), "bf16"), "w") == BFLOAT16


FAMILIES = [
    ("deit_tiny_distilled_patch16_224", {}),
    ("cait_xxs24_224", {}),
    ("levit_128s", {}),
    ("convnext_atto", {}),
    ("swin_tiny_patch4_window7_224", {"exporter": "dynamo", "opset": 18}),
    (None, {}),
]


@pytest.mark.parametrize(("family", "options"), FAMILIES)
def test_vision_transformers_agree_with_float32(family, options):
    model = load_model(export_family(family, **options) if family else export_clip())
    InferShapesPass()(model)
    feeds = random_feeds(model)
    expected = run(model, optimize=True, **feeds)
    limits = {"fp16": 1e-2, "bf16": 5e-2}
    for dtype, limit in limits.items():
        twin = cast(model.clone(), dtype)
        if dtype == "bf16":
            ToFloat32Pass()(twin)
        for name, value in run(twin, optimize=True, **feeds).items():
            error = np.abs(value - expected[name]).max() / np.abs(expected[name]).max()
            assert error < limit, f"{dtype}: {name} is off by {error:.1e}"


def random_feeds(model):
    shapes = resolve_shapes(model, None, batch=2)
    by_name = {value.name: value for value in model.graph.inputs}
    return {
        name: RNG.standard_normal(shape).astype(np.float32)
        if by_name[name].dtype == FLOAT
        else np.ones(shape, by_name[name].dtype.numpy())
        for name, shape in shapes.items()
    }
