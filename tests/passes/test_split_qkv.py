"""Fused int8 projections cut into parts: which are, which are not, and that outputs stay."""

import numpy as np
import pytest
from pass_models import array_of, graph, layer, node_of, op_types, plan, run

from lsp_deploy.passes.cast_compute_type import CastComputeTypePass
from lsp_deploy.passes.insert_qdq import InsertQdqPass
from lsp_deploy.passes.split_qkv import SplitQkvPass

RNG = np.random.default_rng(0)
HEADS, D, TOKENS = 2, 4, 5
C = HEADS * D
W = RNG.standard_normal((C, 3 * C)).astype(np.float32)
X = RNG.standard_normal((2, TOKENS, C)).astype(np.float32)
CONSTANTS = {
    "w": W,
    "b": RNG.standard_normal(3 * C).astype(np.float32),
    "shape": np.array([-1, TOKENS, 3, HEADS, D]),
    "interleaved": np.array([-1, TOKENS, HEADS, 3, D]),
    "ones": np.array([1, 1, 1]),
    "thirds": np.array([C, C, C]),
    "wide": np.array([D, D, 4 * D]),
    "first": np.array([0]),
    "i0": np.array(0),
    "i1": np.array(1),
    "i2": np.array(2),
    "s1": np.array([1]),
    "s2": np.array([2]),
    "last": np.array([np.iinfo(np.int64).max]),
}
HEAD = "m = MatMul(x, w)  a = Add(b, m)"
HEADS_FIRST = f"{HEAD}  r = Reshape(a, shape)  t = Transpose <perm = [2, 0, 3, 1, 4]> (r)"
SQUEEZED = "q = Squeeze(c0, first)  k = Squeeze(c1, first)  v = Squeeze(c2, first)"
CUTS = {
    "Split of the heads": f"{HEADS_FIRST}  c0, c1, c2 = Split <axis = 0> (t, ones)  {SQUEEZED}",
    "Gather of the heads": f"{HEADS_FIRST}  v = Gather(t, i2)  q = Gather(t, i0)  k = Gather(t, i1)",
    "Slice of the heads": (
        f"{HEADS_FIRST}  c0 = Slice(t, first, s1, first)  c1 = Slice(t, s1, s2, first)"
        f"  c2 = Slice(t, s2, last, first, s1)  {SQUEEZED}"
    ),
    "Split of the columns": f"{HEAD}  q, k, v = Split <axis = 2> (a, thirds)",
    "uneven Split of the columns": f"{HEAD}  q, k, v = Split <axis = -1> (a, wide)",
}
LEFT = {
    "parts within each head": (
        f"{HEAD}  r = Reshape(a, interleaved)  t = Transpose <perm = [3, 0, 2, 1, 4]> (r)"
        f"  c0, c1, c2 = Split <axis = 0> (t, ones)  {SQUEEZED}"
    ),
    "cut along tokens": f"{HEADS_FIRST}  q = Gather <axis = 3> (t, i0)  k = Gather <axis = 3> (t, i1)  v = Neg(t)",
    "not all of it taken": f"{HEADS_FIRST}  q = Gather(t, i0)  k = Gather(t, i1)  v = Relu(k)",
    "not cut": f"{HEAD}  q = Relu(a)  k = Neg(a)  v = Abs(a)",
}


def model_of(nodes):
    words = set(nodes.replace(",", " ").replace(")", " ").replace("(", " ").split())
    used = {name: array for name, array in CONSTANTS.items() if name in words}
    return graph(f"g (float[batch, {TOKENS}, {C}] x) => (float[] q, float[] k, float[] v) {{ {nodes} }}", **used)


def quantize(model):
    scales = (np.abs(W).max(axis=0) / 127).astype(np.float32)
    InsertQdqPass(plan(layer("m", C, 3 * C, "int8", 0.03, role="qkv"), weight_scales={"m": scales}))(model)
    return model


@pytest.mark.parametrize("cut", CUTS)
def test_int8_projection_is_cut(cut):
    model = quantize(model_of(CUTS[cut]))
    before = run(model.clone(), x=X)
    assert SplitQkvPass()(model).modified
    widths = [D, D, 4 * D] if "uneven" in cut else [C, C, C]
    weights = [array_of(model, f"m/weight_q/{number}") for number in range(3)]
    assert [weight.shape for weight in weights] == [(C, width) for width in widths]
    assert "m/weight_q" not in model.graph.initializers
    assert op_types(model).count("MatMul") == 3
    assert [value.name for value in node_of(model, "m/Concat").inputs] == ["m/0", "m/1", "m/2"]
    assert {node_of(model, f"m/{number}").inputs[0].name for number in range(3)} == {"m/x_dq"}
    after = run(model, x=X)
    for name, value in before.items():
        np.testing.assert_allclose(after[name], value, rtol=1e-5, atol=1e-5)


def test_16_bit_projection_is_cut_as_well():
    model = quantize(model_of(CUTS["Split of the heads"]))
    CastComputeTypePass("fp16")(model)
    before = run(model.clone(), x=X)
    assert SplitQkvPass()(model).modified
    assert array_of(model, "m/weight_scale/2").dtype == np.float16
    for name, value in run(model, x=X).items():
        np.testing.assert_allclose(value, before[name], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("cut", LEFT)
def test_other_projections_are_left(cut):
    model = quantize(model_of(LEFT[cut]))
    nodes = op_types(model)
    assert not SplitQkvPass()(model).modified
    assert op_types(model) == nodes


def test_float_projection_is_left():
    assert not SplitQkvPass()(model_of(CUTS["Split of the heads"])).modified


def test_shared_weight_stays_for_its_other_reader():
    nodes = CUTS["Split of the columns"] + "  o = MatMul(h, w)"
    text = (
        f"g (float[batch, {TOKENS}, {C}] x) => (float[] q, float[] k, float[] v, float[] o) {{ h = Relu(x)  {nodes} }}"
    )
    model = graph(text, w=W, b=CONSTANTS["b"], thirds=CONSTANTS["thirds"])
    scales = {name: (np.abs(W).max(axis=0) / 127).astype(np.float32) for name in ("m", "o")}
    layers = [layer(name, C, 3 * C, "int8", 0.03) for name in ("m", "o")]
    InsertQdqPass(plan(*layers, weight_scales=scales))(model)
    before = run(model.clone(), x=X)
    assert SplitQkvPass()(model).modified
    assert "m/weight_q" in model.graph.initializers
    for name, value in run(model, x=X).items():
        np.testing.assert_allclose(value, before[name], rtol=1e-5, atol=1e-5)
