"""Attention as one node: every way of writing it, what is left as it is, and that outputs stay."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from exports import export_clip, export_family, export_huggingface_vit, export_timm
from graphs import assert_same_outputs, graph, move_weights, operators

from lsp_deploy.model import load_model
from lsp_deploy.passes.canonicalize import canonicalize
from lsp_deploy.passes.fuse_attention import FuseAttentionPass
from lsp_deploy.passes.lower_operators import LowerOperatorsPass

RANDOM = np.random.default_rng(0)
HEADS, SIZE, TOKENS = 3, 8, 5
WIDTH = HEADS * SIZE


def weight(*shape: int) -> np.ndarray:
    return (RANDOM.standard_normal(shape) / np.sqrt(shape[0])).astype(np.float32)


WEIGHTS = {
    "w_qkv": weight(WIDTH, 3 * WIDTH),
    "w_q": weight(WIDTH, WIDTH),
    "w_k": weight(WIDTH, WIDTH),
    "w_v": weight(WIDTH, WIDTH),
    "w_kv": weight(WIDTH, 2 * WIDTH),
    "w_out": weight(WIDTH, WIDTH),
    "w_small": weight(WIDTH, HEADS * 4),
    "to_five": np.array([0, 0, 3, HEADS, SIZE]),
    "to_interleaved": np.array([0, 0, HEADS, 3, SIZE]),
    "to_kv": np.array([0, 0, 2, HEADS, SIZE]),
    "to_heads": np.array([0, 0, HEADS, SIZE]),
    "to_small_heads": np.array([0, 0, HEADS, 4]),
    "to_rows": np.array([0, 0, WIDTH]),
    "to_small_rows": np.array([0, 0, HEADS * 4]),
    "ones": np.array([1, 1, 1]),
    "thirds": np.array([WIDTH] * 3),
    "first": np.array([0]),
    "zero": np.array(0),
    "one": np.array(1),
    "two": np.array(2),
    "scale": np.float32(0.3),
    "root": np.array([0.3**0.5], np.float32),
    "divisor": np.float32(1 / 0.3),
    "matrix": weight(TOKENS, TOKENS),
    "for_heads": weight(HEADS, TOKENS, TOKENS),
    "for_all": weight(1, HEADS, TOKENS, TOKENS),
    "for_keys": weight(1, 1, 1, TOKENS),
    "causal": np.tril(np.ones((TOKENS, TOKENS), bool)),
    "nowhere": np.zeros((TOKENS, TOKENS), bool),
    "low": np.float32(-1e9),
    "not_low": np.float32(-5),
}

QKV = "qkv = MatMul(x, w_qkv)"
FIVE = "five = Reshape(qkv, to_five) t = Transpose<perm = [2, 0, 3, 1, 4]>(five)"
PACKED = f"{QKV} {FIVE} q = Gather<axis = 0>(t, zero) k = Gather<axis = 0>(t, one) v = Gather<axis = 0>(t, two)"
SCORES = "kt = Transpose<perm = [0, 1, 3, 2]>(k) m = MatMul(q, kt)"
SCALED = f"{SCORES} s = Mul(m, scale)"
WEIGHTED = "p = Softmax<axis = -1>(s) o = MatMul(p, v)"
ROWS = "ot = Transpose<perm = [0, 2, 1, 3]>(o) r = Reshape(ot, to_rows)"
OUT = f"{WEIGHTED} {ROWS} y = MatMul(r, w_out)"


def heads(name: str, projection: str, permutation: str = "0, 2, 1, 3") -> str:
    return (
        f"{name}p = MatMul(x, {projection}) {name}h = Reshape({name}p, to_heads) "
        f"{name} = Transpose<perm = [{permutation}]>({name}h)"
    )


def fuse(before: ir.Model, **options: Any) -> tuple[ir.Model, FuseAttentionPass]:
    """Fuse a copy in canonical form, see that its outputs stay and that a second run finds nothing."""
    fused = canonicalize(before.clone(), max_opset=max(20, before.opset_imports[""]))
    rewrite = FuseAttentionPass(**options)
    assert rewrite(fused).modified == (rewrite.found > 0)
    assert not FuseAttentionPass(**options)(fused.clone()).modified
    lowered = fused.clone()
    LowerOperatorsPass()(lowered)
    assert_same_outputs(before, lowered, batch=6)
    return fused, rewrite


def example(*parts: str, x: str = "float[N, 5, 24] x", y: str = "float[N, 5, 24] y", opset: int = 17) -> ir.Model:
    return graph(" ".join(parts), x=x, y=y, opset=opset, weights=WEIGHTS)


def attention_of(model: ir.Model) -> ir.Node:
    (node,) = (node for node in model.graph if node.domain == "lsp")
    return node


PROJECTIONS = {
    "Gather": PACKED,
    "Split": f"{QKV} {FIVE} a, b, c = Split<axis = 0>(t, ones) "
    "q = Squeeze(a, first) k = Squeeze(b, first) v = Squeeze(c, first)",
    "Split of rows": f"{QKV} a, b, c = Split<axis = -1>(qkv, thirds) "
    + " ".join(
        f"{name}h = Reshape({part}, to_heads) {name} = Transpose<perm = [0, 2, 1, 3]>({name}h)"
        for name, part in zip("qkv", "abc", strict=True)
    ),
}


@pytest.mark.parametrize("projection", PROJECTIONS)
@pytest.mark.parametrize("x", ["float[N, 5, 24] x", "float[2, 5, 24] x", "float[1, 5, 24] x", "float[N, T, 24] x"])
def test_reads_the_fused_projection(projection: str, x: str) -> None:
    fused, rewrite = fuse(example(PROJECTIONS[projection], SCALED, OUT, x=x, y=x.replace("x", "y")))
    assert rewrite.found == 1 and not rewrite.left
    assert operators(fused) == {"MatMul": 2, "Attention": 1}
    node = attention_of(fused)
    assert node.attributes["packed_qkv"].as_int() == 1 and len(node.inputs) == 1
    assert node.attributes["num_heads"].as_int() == HEADS
    assert node.attributes["scale"].as_float() == pytest.approx(0.3)
    assert fused.opset_imports["lsp"] == 1


SCALINGS = {
    "scores": f"{SCORES} s = Mul(m, scale)",
    "scores, divided": f"{SCORES} s = Div(m, divisor)",
    "q": "qs = Mul(scale, q) kt = Transpose<perm = [0, 1, 3, 2]>(k) s = MatMul(qs, kt)",
    "k": "ks = Mul(k, scale) kt = Transpose<perm = [0, 1, 3, 2]>(ks) s = MatMul(q, kt)",
    "both": "qs = Mul(q, root) kt = Transpose<perm = [0, 1, 3, 2]>(k) ks = Mul(kt, root) s = MatMul(qs, ks)",
}


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("separate", [True, False])
def test_takes_the_scale_from_wherever_it_is(scaling: str, separate: bool) -> None:
    projection = " ".join(heads(name, f"w_{name}") for name in "qkv") if separate else PACKED
    fused, _ = fuse(example(projection, SCALINGS[scaling], OUT))
    assert operators(fused) == {"MatMul": 4 if separate else 2, "Attention": 1}
    node = attention_of(fused)
    assert node.attributes["scale"].as_float() == pytest.approx(0.3)
    assert len(node.inputs) == (3 if separate else 1)


def test_without_a_scale_it_is_one() -> None:
    fused, _ = fuse(example(PACKED, SCORES, "s = Identity(m)", OUT))
    assert attention_of(fused).attributes["scale"].as_float() == 1


BIASES = {
    "s = Add(ms, matrix)": [1, 1, 5, 5],
    "s = Add(for_heads, ms)": [1, 3, 5, 5],
    "s = Add(ms, for_all)": [1, 3, 5, 5],
    "s = Add(ms, for_keys)": [1, 1, 5, 5],
    "b = Add(ms, matrix) s = Add(for_all, b)": [1, 3, 5, 5],
    "s = Where(causal, ms, low)": [1, 1, 5, 5],
    "b = Add(ms, for_all) s = Where(causal, b, low)": [1, 3, 5, 5],
}


@pytest.mark.parametrize("bias", BIASES)
def test_constants_become_a_bias(bias: str) -> None:
    fused, rewrite = fuse(example(PACKED, f"{SCORES} ms = Mul(m, scale) {bias}", OUT))
    assert rewrite.found == 1
    assert operators(fused) == {"MatMul": 2, "Attention": 1}
    array = attention_of(fused).inputs[1].const_value
    assert list(array.shape) == BIASES[bias] and array.dtype == ir.DataType.FLOAT


COMPUTED = {
    "float[1, 3, 5, 5] b": {},
    "float[N, 1, 5, 5] b": {},
    "float[N, 1, 1, 5] b": {"Expand": 1},
    "float[3, 5, 5] b": {"Unsqueeze": 1},
    "float[5] b": {"Expand": 1},
}


@pytest.mark.parametrize("bias", COMPUTED)
def test_computed_biases_become_an_input(bias: str) -> None:
    before = example(PACKED, f"{SCALED.replace('s =', 'a =')} s = Add(b, a)", OUT, x=f"float[N, 5, 24] x, {bias}")
    fused, _ = fuse(before)
    assert operators(fused) == {"MatMul": 2, "Attention": 1, **COMPUTED[bias]}


def test_constant_and_computed_biases_are_added() -> None:
    before = example(
        PACKED,
        f"{SCALED.replace('s =', 'a =')} c = Add(b, a) s = Add(c, matrix)",
        OUT,
        x="float[N, 5, 24] x, float[N, 3, 5, 5] b",
    )
    fused, _ = fuse(before)
    assert operators(fused) == {"MatMul": 2, "Attention": 1, "Add": 1}


def test_queries_of_another_number_than_keys() -> None:
    """Class attention, and attention to pooled tokens with a fused kv."""
    projection = (
        "qp = MatMul(z, w_q) qh = Reshape(qp, to_heads) q = Transpose<perm = [0, 2, 1, 3]>(qh) "
        "kv = MatMul(x, w_kv) five = Reshape(kv, to_kv) t = Transpose<perm = [2, 0, 3, 1, 4]>(five) "
        "k = Gather<axis = 0>(t, zero) v = Gather<axis = 0>(t, one)"
    )
    before = example(projection, SCALED, OUT, x="float[N, 5, 24] x, float[N, 1, 24] z", y="float[N, 1, 24] y")
    fused, _ = fuse(before)
    assert operators(fused) == {"MatMul": 3, "Attention": 1, "Slice": 2}


COPIED = {
    # q, k and v of a head side by side
    f"{QKV} five = Reshape(qkv, to_interleaved) t = Transpose<perm = [3, 0, 2, 1, 4]>(five) "
    "q = Gather<axis = 0>(t, zero) k = Gather<axis = 0>(t, one) v = Gather<axis = 0>(t, two)": {
        "Gather": 3,
        "Reshape": 4,
        "Transpose": 4,
    },
    # something is computed head by head, as rotary positions are
    PACKED.replace("q = G", "q_ = G").replace("k = G", "k_ = G") + " q = Sin(q_) k = Cos(k_)": {
        "Gather": 2,
        "Sin": 1,
        "Cos": 1,
        "Slice": 1,
        "Reshape": 3,
        "Transpose": 3,
    },
}


@pytest.mark.parametrize("projection", COPIED)
def test_other_layouts_are_copied(projection: str) -> None:
    fused, rewrite = fuse(example(projection, SCALED, OUT))
    assert rewrite.found == 1
    assert operators(fused) == {"MatMul": 2, "Attention": 1, **COPIED[projection]}
    assert len(attention_of(fused).inputs) == 3


def test_heads_as_inputs_and_outputs() -> None:
    x = "float[N, 3, 5, 8] q, float[N, 3, 7, 8] k, float[N, 3, 7, 8] v"
    fused, _ = fuse(example(SCALED, WEIGHTED.replace("o =", "y ="), x=x, y="float[N, 3, 5, 8] y"))
    assert operators(fused) == {"Attention": 1, "Transpose": 4, "Reshape": 4}


def test_what_else_reads_the_projection_stays() -> None:
    fused, rewrite = fuse(example(PACKED, SCALED, OUT, y="float[N, 5, 24] y, float[N, 3, 5, 8] v"))
    assert rewrite.found == 1
    assert operators(fused) == {"MatMul": 2, "Attention": 1, "Reshape": 1, "Transpose": 1, "Gather": 1}


ALSO = ", float[N, 3, 5, 5] "
SMALL_V = (
    "vp = MatMul(x, w_small) vh = Reshape(vp, to_small_heads) v = Transpose<perm = [0, 2, 1, 3]>(vh) "
    + heads("q", "w_q")
    + " "
    + heads("k", "w_k")
)
LEFT = {
    "weights are an output": (PACKED, SCALED, OUT, ALSO + "p", "something else reads the attention weights"),
    "scores are an output": (PACKED, SCALED, OUT, ALSO + "m", "something else reads the scores"),
    "talking heads": (
        PACKED,
        SCALED,
        OUT.replace("MatMul(p, v)", "MatMul(p_, v)").replace(" o =", " p_ = Neg(p) o ="),
        "",
        "Neg reads the attention weights, not a product with values",
    ),
    "another axis": (PACKED, SCALED, OUT.replace("-1", "2", 1), "", "its scores are not [batch, heads, queries, keys]"),
    "between scores and softmax": (PACKED, f"{SCORES} s = Tanh(m)", OUT, "", "Tanh lies between the scores"),
    "scaled after the bias": (
        PACKED,
        f"{SCORES} b = Add(m, matrix) s = Mul(b, scale)",
        OUT,
        "",
        "after something was added",
    ),
    "mask that is not low": (
        PACKED,
        f"{SCORES} s = Where(causal, m, not_low)",
        OUT,
        "",
        "or masked scores are not low",
    ),
    "everything is masked": (PACKED, f"{SCORES} s = Where(nowhere, m, low)", OUT, "", "a query has no key"),
    "v of another size": (
        SMALL_V,
        SCALED,
        OUT.replace("to_rows", "to_small_rows").replace("y = MatMul(r, w_out)", "z = Identity(r)"),
        ", float[N, 5, 12] z",
        "v is not of the size of q, 8 for each of 3 heads",
    ),
}


def test_an_unknown_number_of_heads_is_left() -> None:
    x = ", ".join(f"float[N, H, 5, 8] {name}" for name in "qkv")
    rewrite = FuseAttentionPass()
    rewrite(canonicalize(example(SCALED, WEIGHTED.replace("o =", "y ="), x=x, y="float[N, H, 5, 8] y"), max_opset=20))
    assert list(rewrite.left.values()) == ["how many heads there are, or how large they are, is not known"]


def test_values_have_types_and_shapes_afterwards() -> None:
    fused, _ = fuse(example(next(iter(COPIED)), SCALED, OUT))
    assert all(value.shape is not None and value.dtype for node in fused.graph for value in node.outputs)


@pytest.mark.parametrize("case", LEFT)
def test_what_cannot_be_fused_is_left_with_a_reason(case: str) -> None:
    *nodes, also, reason = LEFT[case]
    y = also.removeprefix(", ") if case == "v of another size" else f"float[N, 5, 24] y{also}"
    fused, rewrite = fuse(example(*nodes, y=y))
    assert rewrite.found == 0 and "Attention" not in operators(fused)
    (left,) = rewrite.left.values()
    assert reason in left


def test_a_softmax_over_classes_is_no_attention() -> None:
    _, rewrite = fuse(graph("y = Softmax<axis = -1>(x)", x="float[N, 10] x", y="float[N, 10] y"))
    assert rewrite.found == 0 and not rewrite.left


def test_only_selected_ones() -> None:
    layer = f"{PACKED} {SCALED} {OUT}"
    second = re.sub(r"\b(qkv|five|t|q|k|v|kt|m|s|p|o|ot|r|y)\b", r"\1_2", layer).replace("(x,", "(y,")
    before = example(layer, second, "z = Identity(y_2)", y="float[N, 5, 24] z")
    names = [str(node.name) for node in canonicalize(before.clone(), max_opset=20).graph if node.op_type == "Softmax"]
    assert len(names) == 2
    fused, rewrite = fuse(before, selected=lambda name: name == names[1])
    assert rewrite.found == 1 and not rewrite.left
    assert [str(node.name) for node in fused.graph if node.op_type == "Softmax"] == names[:1]


ONNX = {
    "y = Attention(q, k, v)": ("float[N, 3, 5, 8] {}", 8**-0.5, []),
    "y = Attention<scale = 0.5>(q, k, v, matrix)": ("float[N, 3, 5, 8] {}", 0.5, [1, 1, 5, 5]),
    "y = Attention(q, k, v, causal)": ("float[N, 3, 5, 8] {}", 8**-0.5, [1, 1, 5, 5]),
    "y = Attention<q_num_heads = 3, kv_num_heads = 3>(q, k, v)": ("float[N, 5, 24] {}", 8**-0.5, []),
}


@pytest.mark.parametrize("node", ONNX)
def test_attention_of_onnx(node: str) -> None:
    declared, scale, bias = ONNX[node]
    x = ", ".join(declared.format(name) for name in "qkv")
    fused, rewrite = fuse(example(node, x=x, y=declared.format("y"), opset=23))
    assert rewrite.found == 1
    attention = attention_of(fused)
    assert attention.attributes["scale"].as_float() == pytest.approx(scale)
    assert [list(value.shape) for value in attention.inputs[3:]] == ([bias] if bias else [])


@pytest.mark.parametrize(
    ("node", "reason"),
    [
        ("y = Attention<is_causal = 1>(q, k, v)", "it has is_causal"),
        ("y = Attention<softcap = 2.0>(q, k, v)", "it has softcap"),
    ],
)
def test_other_attention_of_onnx_is_left(node: str, reason: str) -> None:
    x = ", ".join(f"float[N, 3, 5, 8] {name}" for name in "qkv")
    _, rewrite = fuse(example(node, x=x, y="float[N, 3, 5, 8] y", opset=23))
    assert rewrite.left == {"node_0": reason} or list(rewrite.left.values()) == [reason]


# How many attentions are fused, how many of them read a fused projection, and shapes of biases.
EXPORTS: dict[str, tuple[Any, int, int, list[str]]] = {
    "vit": (lambda: export_family("vit_tiny_patch16_224"), 2, 2, []),
    "vit, written out": (lambda: export_family("vit_tiny_patch16_224", fused_attention=False), 2, 2, []),
    "vit, one image": (lambda: export_family("vit_tiny_patch16_224", dynamic=False), 2, 2, []),
    "vit, dynamo": (lambda: export_family("vit_tiny_patch16_224", exporter="dynamo", opset=20), 2, 2, []),
    "vit, Attention": (lambda: export_family("vit_tiny_patch16_224", exporter="dynamo", opset=23), 2, 2, []),
    "hugging face": (lambda: export_huggingface_vit(), 2, 0, []),
    "hugging face, dynamo": (lambda: export_huggingface_vit(exporter="dynamo", opset=18), 2, 0, []),
    "swin": (
        lambda: export_family("swin_tiny_patch4_window7_224", fused_attention=False),
        4,
        4,
        ["[1,3,49,49]", "[16,3,49,49]", "[1,6,49,49]", "[4,6,49,49]"],
    ),
    "beit": (lambda: export_family("beit_base_patch16_224"), 2, 2, ["[1,3,17,17]"] * 2),
    "cait": (lambda: export_family("cait_xxs24_224"), 2, 0, []),
    "eva02": (lambda: export_family("eva02_tiny_patch14_224"), 2, 0, []),
    "mobilevit": (lambda: export_family("mobilevit_xxs"), 9, 9, []),
    "clip": (lambda: export_clip(), 4, 0, ["[1,1,16,16]"] * 2),
    "pvt": (lambda: export_timm("pvt_v2_b0", depths=(1, 1, 1, 1)), 4, 0, []),
}


@pytest.mark.parametrize("name", EXPORTS)
def test_exported_models(name: str) -> None:
    export, found, packed, biases = EXPORTS[name]
    model = load_model(export())
    before = canonicalize(model, max_opset=model.opset_imports[""] if name == "vit, Attention" else 20)
    move_weights(before)
    fused = before.clone()
    rewrite = FuseAttentionPass("bfloat16")
    rewrite(fused)
    nodes = [node for node in fused.graph if node.domain == "lsp"]
    assert (rewrite.found, len(nodes)) == (found, found)
    assert sum(node.attributes["packed_qkv"].as_int() for node in nodes) == packed
    assert {node.attributes["compute"].as_string() for node in nodes} == {"bfloat16"}
    operands = [1 if node.attributes["packed_qkv"].as_int() else 3 for node in nodes]
    shapes = [
        str(node.inputs[-1].shape) for node, count in zip(nodes, operands, strict=True) if len(node.inputs) > count
    ]
    assert shapes == biases
    LowerOperatorsPass()(fused)
    assert_same_outputs(before, fused, relative=2e-5)
