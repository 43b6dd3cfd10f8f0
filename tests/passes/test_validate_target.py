"""Every refusal of a target, and that what the passes make is not refused."""

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from block_sparse_cases import case
from pass_models import graph, layer, plan

from lsp_deploy.errors import UserError
from lsp_deploy.passes.cast_compute_type import CastComputeTypePass
from lsp_deploy.passes.insert_qdq import InsertQdqPass
from lsp_deploy.passes.validate_target import TargetRefusesError, TargetRules, ValidateTargetPass, refusals

ALL = frozenset({"fp32", "fp16", "bf16", "int8", "int4", "fp8"})
A100 = TargetRules("a100", 22, ALL - {"fp8"}, tensorrt=True, compute_capability="8.0")
CPU = TargetRules("cpu", 23, frozenset({"fp32", "int8"}), tensorrt=False)

RNG = np.random.default_rng(0)
WQ = RNG.integers(-127, 128, (8, 6)).astype(np.int8)
PAIR = "q = QuantizeLinear(x, s, z)  d = DequantizeLinear(q, s, z)"
WEIGHT = "w = DequantizeLinear <axis = 1> (wq, ws)"
IO = "(float[3, 8] x) => (float[3, 6] y)"


def model_of(nodes, opset=21, io=IO, **changes):
    """Return a model with the constants that `nodes` name, `changes` over the usual ones."""
    usual = {"s": np.float32(0.1), "z": np.int8(0), "wq": WQ, "ws": np.full(6, 0.01, np.float32)}
    words = set(nodes.replace("(", " ").replace(")", " ").replace(",", " ").split())
    return graph(f"g {io} {{ {nodes} }}", opset, **{k: v for k, v in (usual | changes).items() if k in words})


def test_int8_linear_layer_is_taken():
    model = model_of(f"{PAIR}  {WEIGHT}  y = MatMul(d, w)")
    assert refusals(model, A100) == []
    assert not ValidateTargetPass(A100)(model).modified


@pytest.mark.parametrize("target", [A100, CPU], ids=["a100", "cpu"])
def test_what_the_passes_make_is_taken(target):
    weight = RNG.standard_normal((8, 6)).astype(np.float32)
    model = graph(f"g {IO} {{ y = Gemm <transB = 1> (x, w, c) }}", w=weight.T.copy(), c=np.ones(6, np.float32))
    InsertQdqPass(plan(layer("y", 8, 6, "int8", 0.1), weight_scales={"y": np.full(6, 0.02, np.float32)}))(model)
    if target is A100:
        CastComputeTypePass("fp16")(model)
    assert refusals(model, target) == []


@pytest.mark.parametrize(
    "nodes",
    [
        f"{PAIR}  w = DequantizeLinear <axis = 0> (wt, ws)  t = Transpose <perm = [1, 0]> (w)  y = MatMul(d, t)",
        f"{PAIR}  w = DequantizeLinear <axis = 0> (wt, ws)  y = Gemm <transB = 1> (d, w)",
        f"{PAIR}  r = Reshape(d, shape)  {WEIGHT}  y = MatMul(r, w)",
        f"{PAIR}  v = QuantizeLinear <axis = 1> (wf, ws, wz)  w = DequantizeLinear <axis = 1> (v, ws, wz)"
        "  y = MatMul(d, w)",
    ],
    ids=["weight behind Transpose", "Gemm transB", "activation behind Reshape", "weight quantized in the graph"],
)
def test_other_forms_are_taken(nodes):
    constants = {
        "wt": WQ.T.copy(),
        "shape": np.array([3, 8]),
        "wf": WQ.astype(np.float32),
        "wz": np.zeros(6, np.int8),
    }
    assert refusals(model_of(nodes, **constants), A100) == []


def test_uint8_with_zero_point_0_is_taken():
    assert refusals(model_of(f"{PAIR}  {WEIGHT}  y = MatMul(d, w)", z=np.uint8(0)), A100) == []


def test_a_plugin_may_read_the_quantized_tensor():
    nodes = 'q = QuantizeLinear(x, s, z)  y = lsp.BlockSparseLinear <layout = "bsl16.v1"> (q)'
    assert refusals(model_of(nodes), A100) == []


def test_the_plugin_needs_a_newer_gpu():
    model = case("float16", x_type="float16", out_type="float16").in_layout("bsl16.v1").model()
    assert refusals(model, A100) == []
    older = TargetRules("t4", 22, ALL - {"fp8", "bf16"}, tensorrt=True, compute_capability="7.5")
    assert refusals(model, older) == ["layer: lsp::BlockSparseLinear needs compute capability 8.0 (t4 has 7.5)"]


REFUSED = {
    "asymmetric activation": (
        f"{PAIR}  {WEIGHT}  y = MatMul(d, w)",
        {"z": np.uint8(128)},
        "q: its zero point is not 0",
    ),
    "asymmetric weight": (
        f"{PAIR}  w = DequantizeLinear <axis = 1> (wq, ws, wz)  y = MatMul(d, w)",
        {"wz": np.ones(6, np.int8)},
        "w: its zero point is not 0",
    ),
    "zero scale": (
        f"{PAIR}  {WEIGHT}  y = MatMul(d, w)",
        {"ws": np.zeros(6, np.float32)},
        "w: its scale is not positive everywhere",
    ),
    "computed scale": (
        "m = ReduceMax <keepdims = 0> (x)  q = QuantizeLinear(x, m, z)  d = DequantizeLinear(q, m, z)"
        f"  {WEIGHT}  y = MatMul(d, w)",
        {},
        "q: its scale is not a constant",
    ),
    "computed zero point": (
        "m = ReduceMax <keepdims = 0> (x)  c = Cast <to = 3> (m)  q = QuantizeLinear(x, s, c)"
        f"  d = DequantizeLinear(q, s, c)  {WEIGHT}  y = MatMul(d, w)",
        {},
        "q: its zero point is not a constant",
    ),
    "scale for each channel of an activation": (
        "q = QuantizeLinear <axis = 1> (x, xs, xz)  d = DequantizeLinear <axis = 1> (q, xs, xz)"
        f"  {WEIGHT}  y = MatMul(d, w)",
        {"xs": np.full(8, 0.1, np.float32), "xz": np.zeros(8, np.int8)},
        "q: it gives an activation several scales",
    ),
    "Q without DQ": (
        "q = QuantizeLinear(x, s, z)  c = Cast <to = 1> (q)  y = MatMul(c, wf)",
        {"wf": WQ.astype(np.float32)},
        "q: no DequantizeLinear follows it",
    ),
    "DQ before Add": (
        f"{PAIR}  a = Add(d, x)  y = MatMul(a, wf)",
        {"wf": WQ.astype(np.float32)},
        "d: it feeds Add a, which does not compute in a quantized type",
    ),
    "DQ as output": (
        f"{PAIR}  {WEIGHT}  p = MatMul(d, w)  y = MatMul(p, k)  o = DequantizeLinear(q, s, z)",
        {"k": np.eye(6, dtype=np.float32), "io": "(float[3, 8] x) => (float[3, 6] y, float[3, 8] o)"},
        "o: it feeds no MatMul, Gemm or Conv",
    ),
    "int32 bias": (
        f"{PAIR}  {WEIGHT}  p = MatMul(d, w)  b = DequantizeLinear(bq, s)  y = Add(p, b)",
        {"bq": np.zeros(6, np.int32)},
        "b: it dequantizes int32, which TensorRT cannot",
    ),
    "scales along K": (
        f"{PAIR}  w = DequantizeLinear <axis = 0> (wq, ks)  y = MatMul(d, w)",
        {"ks": np.full(8, 0.01, np.float32)},
        "w: its scales lie along K of y",
    ),
    "scales along K behind Transpose": (
        f"{PAIR}  w = DequantizeLinear <axis = 1> (wt, ks)  t = Transpose <perm = [1, 0]> (w)  y = MatMul(d, t)",
        {"wt": WQ.T.copy(), "ks": np.full(8, 0.01, np.float32)},
        "w: its scales lie along K of y",
    ),
    "scales along K of a Gemm": (
        f"{PAIR}  w = DequantizeLinear <axis = 1> (wt, ks)  y = Gemm <transB = 1> (d, w)",
        {"wt": WQ.T.copy(), "ks": np.full(8, 0.01, np.float32)},
        "w: its scales lie along K of y",
    ),
    "int8 blocks": (
        f"{PAIR}  w = DequantizeLinear <axis = 0, block_size = 4> (wq, bs)  y = MatMul(d, w)",
        {"bs": np.full((2, 6), 0.01, np.float32)},
        "w: TensorRT has no int8 with a scale for each block",
    ),
    "int4 weight with int8 activation": (
        f"{PAIR}  w = DequantizeLinear <axis = 0, block_size = 4> (w4, bs)  y = MatMul(d, w)",
        {"w4": np.ones((8, 6), ml_dtypes.int4), "bs": np.full((2, 6), 0.01, np.float32)},
        "y: an int4 weight with a quantized activation",
    ),
    "int4 activation": (
        "q = QuantizeLinear(x, s, z4)  d = DequantizeLinear(q, s, z4)  y = MatMul(d, wf)",
        {"z4": np.array(0, ml_dtypes.int4), "wf": WQ.astype(np.float32)},
        "q: it quantizes an activation to int4",
    ),
    "MatMulInteger": (
        "q = QuantizeLinear(x, s, z)  i = MatMulInteger(q, wq)  y = Cast <to = 1> (i)",
        {},
        "i: TensorRT has no MatMulInteger",
    ),
    "QLinearMatMul": (
        "q = QuantizeLinear(x, s, z)  i = QLinearMatMul(q, s, z, wq, s, z, s, z)  y = DequantizeLinear(i, s, z)",
        {},
        "i: TensorRT has no QLinearMatMul",
    ),
    "DynamicQuantizeLinear": (
        f"q, qs, qz = DynamicQuantizeLinear(x)  d = DequantizeLinear(q, qs, qz)  {WEIGHT}  y = MatMul(d, w)",
        {},
        "q: TensorRT has no DynamicQuantizeLinear",
    ),
    "com.microsoft": (
        "g = com.microsoft.QuickGelu(x)  y = MatMul(g, wf)",
        {"wf": WQ.astype(np.float32)},
        "g: TensorRT has no com.microsoft::QuickGelu",
    ),
    "one weight, two scales": (
        f"{PAIR}  {WEIGHT}  v = DequantizeLinear <axis = 1> (wq, vs)"
        "  a = MatMul(d, w)  b = MatMul(d, v)  y = Add(a, b)",
        {"vs": np.full(6, 0.02, np.float32)},
        "v: it shares wq with w, but has other scales",
    ),
    "int16 weight": (
        f"{PAIR}  w = DequantizeLinear(w16, s)  y = MatMul(d, w)",
        {"w16": WQ.astype(np.int16)},
        "w16: TensorRT reads no INT16 initializers",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_tensorrt_refuses(case):
    nodes, changes, says = REFUSED[case]
    model = model_of(nodes, **changes)
    assert any(line.startswith(says) for line in refusals(model, A100)), refusals(model, A100)
    with pytest.raises(TargetRefusesError):
        ValidateTargetPass(A100)(model)
    # ONNX Runtime takes all of these; its types are another matter.
    assert refusals(model, TargetRules("cpu", 23, ALL, tensorrt=False)) == []


def test_opset_above_the_parsers():
    assert refusals(model_of("y = MatMul(x, wf)", 23, wf=WQ.astype(np.float32)), A100) == [
        "model: opset 23, but a100 takes 22 at most"
    ]


def test_types_that_the_target_does_not_have():
    text = "g (float[3, 8] x) => (float[3, 6] y) { m = MatMul(x, w)  y = Relu(m) }"
    model = graph(text, w=WQ.astype(np.float32))
    CastComputeTypePass("bf16")(model)
    t4 = TargetRules("t4", 22, frozenset({"fp32", "fp16", "int8"}), tensorrt=True, compute_capability="7.5")
    assert refusals(model, t4) == ["w: bf16, which t4 does not have (it has fp16, fp32, int8)"]


@pytest.mark.parametrize(
    ("name", "capability", "needs"),
    [("fp8", "8.6", "8.9"), ("int4", "7.5", "8.0"), ("bf16", "7.5", "8.0"), ("fp4", "9.0", "12.0")],
)
def test_types_that_the_gpu_cannot_have(name, capability, needs):
    dtype = {
        "fp8": ml_dtypes.float8_e4m3fn,
        "int4": ml_dtypes.int4,
        "bf16": ml_dtypes.bfloat16,
        "fp4": ml_dtypes.float4_e2m1fn,
    }[name]
    model = graph("g (float[3, 8] x) => (float[3, 8] y) { y = Relu(x) }", 23)
    tensor = ir.tensor(np.ones((2, 2), dtype), name="k")
    value = ir.Value(name="k", const_value=tensor, shape=ir.Shape([2, 2]), type=ir.TensorType(tensor.dtype))
    model.graph.register_initializer(value)
    target = TargetRules("gpu", 23, ALL | {"fp4"}, tensorrt=True, compute_capability=capability)
    assert refusals(model, target) == [f"k: {name}, which needs compute capability {needs} (gpu has {capability})"]
    newer = TargetRules("gpu", 23, ALL | {"fp4"}, tensorrt=True, compute_capability="12.0")
    assert refusals(model, newer) == []


def test_16_bit_scales_below_opset_19():
    model = model_of(f"{PAIR}  {WEIGHT}  y = MatMul(d, w)", 17, s=np.float16(0.1), ws=np.full(6, 0.01, np.float16))
    assert refusals(model, A100) == [
        f"{name}: its 16-bit scale needs opset 19, the model has 17" for name in ("q", "d", "w")
    ]


def test_16_bit_inputs_and_outputs_do_not_matter_where_a_cast_follows():
    nodes = "c = Cast <to = 1> (x)  m = MatMul(c, wf)  y = Cast <to = 10> (m)"
    weight = WQ.astype(np.float32)
    assert refusals(model_of(nodes, io="(float16[3, 8] x) => (float16[3, 6] y)", wf=weight), CPU) == []
    text = "g (float16[3, 8] x) => (float16[3, 8] y) { y = Relu(x) }"
    assert refusals(graph(text), CPU) == ["x: fp16, which cpu does not have (it has fp32, int8)"]


def test_the_error_lists_every_refusal():
    nodes = f"{PAIR}  a = Add(d, x)  i = QuantizeLinear(a, s, z)  y = Cast <to = 1> (i)"
    model = model_of(nodes, io="(float[3, 8] x) => (float[3, 8] y)")
    with pytest.raises(UserError) as caught:
        ValidateTargetPass(A100)(model)
    assert isinstance(caught.value, TargetRefusesError)
    assert caught.value.refusals == refusals(model, A100)
    assert len(caught.value.refusals) == 2
    first, second = str(caught.value).splitlines()
    assert first.startswith("a100 cannot take this model: d: it feeds Add a")
    assert first.endswith("(and 1 more)")
    assert second.strip() == "i: no DequantizeLinear follows it"


@pytest.mark.parametrize(
    ("options", "layout", "reason"),
    [
        ({"dtype": "float16", "x_type": "float16", "out_type": "float16"}, "bsl16.v1", None),
        ({"dtype": "int8", "x_type": "int8", "out_type": "float16"}, "bsl16.v1", None),
        ({"dtype": "float32"}, "canonical", "its values are stored for CPUs; compress the model for a GPU target"),
        ({"dtype": "int8"}, "bsl16.v1", "it reads FLOAT, which TensorRT's plugin does not make INT8; compress the"),
        ({"dtype": "bfloat16"}, "bsl16.v1", "it reads FLOAT, which TensorRT's plugin does not make BFLOAT16"),
    ],
)
def test_operators_are_as_the_plugin_reads_them(options, layout, reason):
    model = case(**options).in_layout(layout).model()
    found = refusals(model, A100)
    assert found == [] if reason is None else found[0].startswith(f"layer: {reason}") and len(found) == 1
    assert not any("CPUs" in one or "plugin" in one for one in refusals(model, CPU))


def test_an_operator_without_a_plugin_is_refused():
    text = "y = lsp.Attention <num_heads = 1, scale = 1.0, packed_qkv = 0> (x, x, x)"
    model = graph(f"g (float[1, 3, 8] x) => (float[1, 3, 8] y) {{ {text} }}")
    assert refusals(model, A100) == [
        "y: TensorRT has no lsp::Attention; `lsp-deploy lower` writes it in standard operators"
    ]
