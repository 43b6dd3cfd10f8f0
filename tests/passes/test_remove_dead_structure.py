"""Dead neurons, heads and layers leave the graph, and the outputs stay; what only looks dead stays too."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from graphs import assert_same_outputs, graph, only, operators
from hypothesis import given, settings
from hypothesis import strategies as st

from lsp_deploy.passes.canonicalize import canonicalize
from lsp_deploy.passes.remove_dead_structure import DeadStructure, RemoveDeadStructurePass, dead_structure

RANDOM = np.random.default_rng(0)
GELUS = {
    "erf": "d = Div(h, root) e = Erf(d) f = Add(e, one) g = Mul(h, f) a = Mul(g, half)",
    "gelu": "a = Gelu(h)",
    "tanh": "a = Tanh(h)",
    "relu": "a = Relu(h)",
    "quick_gelu": "s = Mul(h, factor) t = Sigmoid(s) a = Mul(h, t)",
    "scaled": "s = Relu(h) a = Mul(s, channels)",
    "none": "a = Neg(h)",
}


def normal(*shape: int) -> Any:
    return RANDOM.standard_normal(shape).astype(np.float32)


def weights(**changes: Any) -> dict[str, Any]:
    """Return the weights of an MLP of width 8 and 12 neurons."""
    scalars = {"root": 2**0.5, "one": 1.0, "half": 0.5, "factor": 1.702}
    arrays = {"w1": normal(8, 12), "b1": normal(12), "w2": normal(12, 8), "b2": normal(8), "channels": normal(12)}
    return {**{name: np.float32(value) for name, value in scalars.items()}, **arrays, **changes}


def mlp(activation: str = "gelu", opset: int = 20, y: str = "y = Add(x, o)", **changes: Any) -> ir.Model:
    text = f"m = MatMul(x, w1) h = Add(m, b1) {GELUS[activation]} n = MatMul(a, w2) o = Add(n, b2) {y}"
    return canonical(graph(text, opset=opset, weights=weights(**changes)))


def canonical(model: ir.Model) -> ir.Model:
    for node in model.graph:
        node.name = node.name or node.outputs[0].name
    return canonicalize(model, max_opset=20)


def removed(model: ir.Model, *, batch: int = 2) -> DeadStructure:
    """Remove from `model`; check the outputs, that it was said beforehand, and that a second time changes nothing."""
    before = model.clone()
    content = ir.to_proto(model).SerializeToString(deterministic=True)
    expected = dead_structure(model)
    assert ir.to_proto(model).SerializeToString(deterministic=True) == content
    removal = RemoveDeadStructurePass()
    result = removal(model)
    assert result.modified == bool(expected.removed)
    assert [layer.after for layer in removal.found.removed] == [layer.after for layer in expected.removed]
    assert_same_outputs(before, model, batch=batch)
    after = ir.to_proto(model).SerializeToString(deterministic=True)
    assert not RemoveDeadStructurePass()(model).modified
    assert ir.to_proto(model).SerializeToString(deterministic=True) == after
    return removal.found


def shapes(found: DeadStructure) -> dict[str, tuple[int, int]]:
    return {layer.name: layer.after for layer in found.removed}


def shape(model: ir.Model, name: str) -> list[int]:
    return list(next(node for node in model.graph if node.name == name).inputs[1].shape)


def without(array: Any, *, rows: Any = (), columns: Any = ()) -> Any:
    array = array.copy()
    array[list(rows)] = 0
    array[:, list(columns)] = 0
    return array


@pytest.mark.parametrize("activation", GELUS)
def test_neurons_whose_columns_are_zero(activation: str) -> None:
    model = mlp(activation, opset=20 if activation == "gelu" else 17, w1=without(normal(8, 12), columns=[1, 4, 11]))
    found = removed(model)
    assert shapes(found) == {"m": (8, 9), "n": (9, 8)}
    assert found.removed[0].columns.tolist() == [0, 2, 3, 5, 6, 7, 8, 9, 10]
    assert found.removed[1].rows.tolist() == found.removed[0].columns.tolist()
    assert "3 of 12 neurons are dead" in found.removed[0].reasons
    assert (shape(model, "m"), shape(model, "n")) == ([8, 9], [9, 8])
    assert not found.kept


def test_parts_that_a_maximum_hides_are_not_taken_for_dead() -> None:
    """A random probe of Max(p, far) would see no dependence on p."""
    text = (
        "m = MatMul(x, w) h = Add(m, b) p, q = Split <axis = -1> (h, halves) t = Max(p, far) a = Mul(t, q)"
        "n = MatMul(a, w2) y = Add(x, n)"
    )
    made = {"w": without(normal(8, 24), columns=range(12, 16)), "b": normal(24), "halves": np.array([12, 12])}
    model = canonical(graph(text, weights={**made, "far": np.float32(50), "w2": normal(12, 8)}))
    assert not removed(model).removed


def test_neurons_that_nothing_reads() -> None:
    found = removed(mlp(w2=without(normal(12, 8), rows=range(4, 8))))
    assert shapes(found) == {"m": (8, 8), "n": (8, 8)}


def test_dead_on_either_side_together() -> None:
    found = removed(mlp(w1=without(normal(8, 12), columns=[0, 1]), w2=without(normal(12, 8), rows=[1, 2])))
    assert found.removed[0].columns.tolist() == list(range(3, 12))


@settings(max_examples=15)
@given(st.sets(st.integers(0, 11)), st.sets(st.integers(0, 11)))
def test_any_dead_neurons(columns: set[int], rows: set[int]) -> None:
    model = mlp(w1=without(normal(8, 12), columns=columns), w2=without(normal(12, 8), rows=rows))
    found = removed(model)
    dead = len(columns | rows)
    expected = {} if dead == 0 else {"m": (8, 12 - dead), "n": (12 - dead, 8)}
    assert shapes(found) == (expected if dead < 12 else {"m": (0, 0), "n": (0, 0)})


@settings(max_examples=15)
@given(st.sets(st.integers(0, 11)))
def test_layer_with_two_four_zeros_loses_rows_in_fours(columns: set[int]) -> None:
    before = mlp(w1=without(normal(8, 12), columns=columns))
    model = before.clone()
    removal = RemoveDeadStructurePass(rows_in_fours=["n"])
    removal(model)
    assert_same_outputs(before, model)
    dead = [row for first in (0, 4, 8) for row in range(first, first + 4) if set(range(first, first + 4)) <= columns]
    left = {layer.name: layer.rows.tolist() for layer in removal.found.removed}
    assert left.get("n", list(range(12))) == [row for row in range(12) if row not in dead]
    if columns and not dead:
        assert "four in a row" in removal.found.kept[0].reason


@pytest.mark.parametrize("transposed", [0, 1])
@pytest.mark.parametrize("bias", [", b1", ""])
def test_gemm(transposed: int, bias: str) -> None:
    w1, w2 = without(normal(8, 12), columns=[2, 3]), without(normal(12, 8), rows=[7])
    if transposed:
        w1, w2 = w1.T.copy(), w2.T.copy()
    text = (
        f"h = Gemm <transB = {transposed}, alpha = 0.5, beta = 2.0> (x, w1{bias}) a = Tanh(h)"
        f"y = Gemm <transB = {transposed}, alpha = 3.0, beta = 0.25> (a, w2{bias and ', b2'})"
    )
    model = canonical(graph(text, x="float[5, 8] x", y="float[5, 8] y", weights=weights(w1=w1, w2=w2)))
    assert shapes(removed(model)) == {"h": (8, 9), "y": (9, 8)}


def test_second_layer_without_bias_gets_one_and_the_output_keeps_its_name() -> None:
    text = "m = MatMul(x, w1) h = Add(m, b1) a = Relu(h) y = MatMul(a, w2)"
    made = weights(w1=without(normal(8, 12), columns=[5]), b1=np.abs(normal(12)))
    model = canonical(graph(text, weights=made))
    assert shapes(removed(model)) == {"m": (8, 11), "y": (11, 8)}
    assert operators(model)["Add"] == 2
    assert model.graph.outputs[0].name == "y"


@pytest.mark.parametrize("biases", [", b1", ""])
def test_pointwise_convolutions(biases: str) -> None:
    text = f"h = Conv (x, w1{biases}) a = Sigmoid(h) n = Conv (a, w2{biases and ', b2'}) y = Add(x, n)"
    w1, w2 = without(normal(8, 12), columns=[2, 3]), without(normal(12, 8), rows=[7])
    made = weights(w1=w1.T.reshape(12, 8, 1, 1).copy(), w2=w2.T.reshape(8, 12, 1, 1).copy())
    image = "float[2, 8, 3, 3]"
    model = canonical(graph(text, x=f"{image} x", y=f"{image} y", weights=made))
    assert shapes(removed(model)) == {"h": (8, 9), "n": (9, 8)}
    assert operators(model) == {"Conv": 2, "Sigmoid": 1, "Add": 1}


def test_convolution_that_pads_would_see_the_padding_and_stays() -> None:
    text = "h = Conv (x, w1, b1) a = Sigmoid(h) n = Conv <pads = [1, 1, 1, 1]> (a, w2, b2) y = Relu(n)"
    w1 = without(normal(8, 12), columns=[2, 3]).T.reshape(12, 8, 1, 1).copy()
    made = weights(w1=w1, w2=normal(8, 12, 1, 1))
    found = removed(canonical(graph(text, x="float[2, 8, 3, 3] x", y="float[2, 8, 5, 5] y", weights=made)))
    assert not found.removed and "Conv n" in found.kept[0].reason


def test_gated_neurons_need_both_columns_zero() -> None:
    text = (
        "m = MatMul(x, w) h = Add(m, b) p, q = Split <axis = -1> (h, halves) s = Sigmoid(p) t = Mul(p, s)"
        "a = Mul(t, q) n = MatMul(a, w2) y = Add(x, n)"
    )
    w = without(normal(8, 24), columns=[0, 1, 2, 13, 14])
    made = {"w": w, "b": normal(24), "halves": np.array([12, 12]), "w2": normal(12, 8)}
    model = canonical(graph(text, weights=made))
    found = removed(model)
    assert shapes(found) == {"m": (8, 20), "n": (10, 8)}
    assert found.removed[0].columns.tolist() == [0, *range(3, 12), 12, *range(15, 24)]
    assert only(model, "Split").inputs[1].const_value.numpy().tolist() == [10, 10]


def test_constant_that_differs_from_token_to_token_is_not_folded() -> None:
    text = "m = MatMul(x, w1) h = Add(m, tokens) a = Relu(h) n = MatMul(a, w2) y = Add(x, n)"
    w1 = without(normal(8, 12), columns=[3])
    model = canonical(graph(text, weights={"w1": w1, "tokens": normal(5, 12), "w2": normal(12, 8)}))
    (kept,) = removed(model).kept
    assert kept.zero_columns == 1 and "token" in kept.reason
    text = text.replace("w2)", "w3)")
    w3 = without(normal(12, 8), rows=[3])
    model = canonical(graph(text, weights={"w1": w1, "tokens": normal(5, 12), "w3": w3}))
    assert shapes(removed(model)) == {"m": (8, 11), "n": (11, 8)}


@pytest.mark.parametrize(
    ("between", "reason"),
    [("LayerNormalization(h, channels)", "LayerNormalization"), ("Softmax <axis = -1> (h)", "Softmax")],
)
def test_what_mixes_neurons_stays(between: str, reason: str) -> None:
    text = f"m = MatMul(x, w1) h = Add(m, b1) a = {between} n = MatMul(a, w2) y = Add(x, n)"
    model = canonical(graph(text, weights=weights(w1=without(normal(8, 12), columns=[3]))))
    found = removed(model)
    assert not found.removed
    assert [(kept.name, kept.zero_columns) for kept in found.kept] == [("m", 1)]
    assert reason in found.kept[0].reason


def test_activations_that_are_an_output_stay() -> None:
    text = "m = MatMul(x, w1) h = Add(m, b1) a = Relu(h) n = MatMul(a, w2) y = Add(x, n)"
    made = weights(w1=without(normal(8, 12), columns=[3]))
    model = canonical(graph(text, y="float[2, 5, 8] y, float[2, 5, 12] a", weights=made))
    found = removed(model)
    assert not found.removed and "output" in found.kept[0].reason


def test_shared_weights_stay() -> None:
    text = (
        "m = MatMul(x, w1) h = Add(m, b1) a = Relu(h) n = MatMul(a, w2) p = Add(x, n)"
        "q = MatMul(p, w1) r = Relu(q) s = MatMul(r, w2) y = Add(p, s)"
    )
    found = removed(canonical(graph(text, weights=weights(w1=without(normal(8, 12), columns=[3])))))
    assert not found.removed
    assert all("shares its weight" in kept.reason for kept in found.kept)


def test_shared_bias_stays_as_it_is_for_the_other_layer() -> None:
    text = (
        "m = MatMul(x, w1) h = Add(m, b1) a = Relu(h) n = MatMul(a, w2) o = Add(n, b2) p = Add(x, o)"
        "q = MatMul(p, w3) r = Add(q, b1) s = Relu(r) t = MatMul(s, w4) u = Add(t, b2) y = Add(p, u)"
    )
    made = weights(w1=without(normal(8, 12), columns=[3]), w3=normal(8, 12), w4=normal(12, 8))
    assert shapes(removed(canonical(graph(text, weights=made)))) == {"m": (8, 11), "n": (11, 8)}


@pytest.mark.parametrize("dead", [{"w1": np.zeros((8, 12))}, {"w2": np.zeros((12, 8))}])
def test_whole_mlp_becomes_a_constant(dead: dict[str, Any]) -> None:
    model = mlp(**{name: array.astype(np.float32) for name, array in dead.items()})
    assert shapes(removed(model)) == {"m": (0, 0), "n": (0, 0)}
    assert operators(model) == {"Add": 1}


def test_branch_of_zeros_vanishes() -> None:
    zero = {"w2": np.zeros((12, 8), np.float32), "b2": np.zeros(8, np.float32)}
    model = mlp(y="y = Relu(z) z = Add(x, o)".replace("y = Relu(z) z = Add(x, o)", "z = Add(x, o) y = Relu(z)"), **zero)
    removed(model)
    assert operators(model) == {"Relu": 1}


def test_layer_of_zeros_that_gives_an_output_keeps_its_shape() -> None:
    model = mlp(y="y = Mul(o, b2)", w2=np.zeros((12, 8), np.float32))
    found = removed(model)
    assert shapes(found) == {"m": (8, 1), "n": (1, 8)}
    assert "output" in found.kept[0].reason


def test_last_group_of_four_stays_where_the_output_needs_a_layer() -> None:
    model = mlp(y="y = Mul(o, b2)", w2=np.zeros((12, 8), np.float32))
    removal = RemoveDeadStructurePass(rows_in_fours=["n"])
    removal(model)
    assert shapes(removal.found) == {"m": (8, 4), "n": (4, 8)}
    assert not RemoveDeadStructurePass(rows_in_fours=["n"])(model).modified


HEADS, WIDTH = 3, 12


def attention(form: str, *, mask: str = "float[2, 1, 5, 5]", scores: str = "", **changes: Any) -> ir.Model:
    """Return an attention of three heads of four channels; the fused form holds q, k and v in one weight."""
    made = {name: normal(WIDTH, WIDTH) for name in ("wq", "wk", "wv", "wo")}
    made |= {name: normal(WIDTH) for name in ("bq", "bk", "bv", "bo")}
    made |= {"position": normal(1, HEADS, 5, 5), "split": np.array([0, 0, HEADS, 4]), "merge": np.array([0, 0, WIDTH])}
    made |= {"five": np.array([0, 5, 3, HEADS, 4]), "ones": np.array([1, 1, 1]), "axis": np.array([0])}
    made |= changes
    made |= {"w": np.concatenate([made[name] for name in ("wq", "wk", "wv")], axis=1)}
    made |= {"b": np.concatenate([made[name] for name in ("bq", "bk", "bv")], axis=-1)}
    made |= {name: np.array(index) for index, name in enumerate(("i0", "i1", "i2"))}
    order = "perm = [0, 2, 1, 3]"
    fused = "m = MatMul(x, w) h = Add(m, b) r = Reshape(h, five) t = Transpose <perm = [2, 0, 3, 1, 4]> (r)"
    starts = {
        "split": f"{fused} q0, k0, v0 = Split <axis = 0> (t, ones) q = Squeeze(q0, axis) k = Squeeze(k0, axis)"
        "v = Squeeze(v0, axis)",
        "gather": f"{fused} q = Gather(t, i0) k = Gather(t, i1) v = Gather(t, i2)",
        "separate": "".join(
            f"m{n} = MatMul(x, w{n}) h{n} = Add(m{n}, b{n}) r{n} = Reshape(h{n}, split){n} = Transpose <{order}> (r{n})"
            for n in "qkv"
        ),
    }
    text = (
        f"{starts[form]} kt = Transpose <perm = [0, 1, 3, 2]> (k) s = MatMul(q, kt) sp = Add(s, position) {scores}"
        f"p = Softmax <axis = -1> ({'sm' if scores else 'sp'}) c = MatMul(p, v) ct = Transpose <{order}> (c)"
        "cm = Reshape(ct, merge) o = MatMul(cm, wo) ob = Add(o, bo) y = Add(x, ob)"
    )
    x = f"float[2, 5, {WIDTH}] x" + (f", {mask} mask" if scores else "")
    return canonical(graph(text, x=x, y=f"float[2, 5, {WIDTH}] y", weights=made))


FORMS = ["split", "gather", "separate"]


def head(*heads: int) -> list[int]:
    return [4 * number + channel for number in heads for channel in range(4)]


def projections(form: str, channels: int) -> dict[str, tuple[int, int]]:
    if form == "separate":
        return {name: (WIDTH, channels) for name in ("mq", "mk", "mv")}
    return {"m": (WIDTH, 3 * channels)}


@pytest.mark.parametrize("form", FORMS)
def test_head_whose_values_are_zero(form: str) -> None:
    model = attention(form, wv=without(normal(WIDTH, WIDTH), columns=head(1)))
    found = removed(model)
    assert shapes(found) == {**projections(form, 8), "o": (8, WIDTH)}
    assert found.removed[-1].rows.tolist() == head(0, 2)
    assert "1 of 3 heads are dead" in found.removed[-1].reasons
    position = next(value for node in model.graph for value in node.inputs if value.shape == ir.Shape([1, 2, 5, 5]))
    assert position.is_initializer()


@pytest.mark.parametrize("form", FORMS)
def test_head_that_nothing_reads(form: str) -> None:
    found = removed(attention(form, wo=without(normal(WIDTH, WIDTH), rows=head(0, 2))))
    assert shapes(found) == {**projections(form, 4), "o": (4, WIDTH)}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dead", ["wq", "wk"])
def test_head_without_queries_or_keys_takes_a_mean_and_stays(form: str, dead: str) -> None:
    found = removed(attention(form, **{dead: without(normal(WIDTH, WIDTH), columns=head(1))}))
    assert not found.removed
    assert [kept.zero_columns for kept in found.kept] == [4]
    assert "no whole head" in found.kept[0].reason


def test_single_channels_of_a_head_stay() -> None:
    found = removed(attention("split", wv=without(normal(WIDTH, WIDTH), columns=[0, 1, 2, 5])))
    assert not found.removed and found.kept[0].zero_columns == 4


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dead", ["wv", "wo"])
def test_whole_attention_becomes_a_constant(form: str, dead: str) -> None:
    model = attention(form, **{dead: np.zeros((WIDTH, WIDTH), np.float32)})
    found = removed(model)
    assert set(shapes(found).values()) == {(0, 0)}
    assert operators(model) == {"Add": 1}


@pytest.mark.parametrize("form", FORMS)
def test_mask_that_is_computed_is_the_same_for_all_heads(form: str) -> None:
    model = attention(form, scores="sm = Add(sp, mask)", wv=without(normal(WIDTH, WIDTH), columns=head(2)))
    assert shapes(removed(model))["o"] == (8, WIDTH)


def test_mask_of_each_head_that_is_computed_stays() -> None:
    changes = {"wv": without(normal(WIDTH, WIDTH), columns=head(2))}
    model = attention("split", scores="sm = Add(sp, mask)", mask="float[2, 3, 5, 5]", **changes)
    found = removed(model)
    assert not found.removed and "input of the model" in found.kept[0].reason


def test_values_that_differ_from_token_to_token_by_a_constant_are_not_folded() -> None:
    zero = without(normal(WIDTH, WIDTH), columns=head(1))
    model = attention("separate", **{n: normal(5, WIDTH) for n in ("bq", "bk", "bv")}, wv=zero)
    found = removed(model)
    assert not found.removed and "token" in found.kept[0].reason


def test_quantized_models_are_refused() -> None:
    text = "q = QuantizeLinear(x, s) d = DequantizeLinear(q, s) y = Relu(d)"
    model = graph(text, weights={"s": np.float32(0.1)})
    with pytest.raises(ir.passes.PreconditionError, match="quantizes"):
        RemoveDeadStructurePass()(model)
