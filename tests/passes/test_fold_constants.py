"""What can be computed before the model runs, and what has to stay."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from graphs import assert_same_outputs, graph, only, operators, run
from onnx_ir.passes.common import LiftConstantsToInitializersPass, RemoveUnusedNodesPass

from lsp_deploy.passes.fold_constants import FoldConstantsPass

RANDOM = np.random.default_rng(0)
WEIGHT = RANDOM.standard_normal((8, 8)).astype(np.float32)
SCALE = RANDOM.uniform(0.01, 0.02, 8).astype(np.float32)
QUANTIZED = RANDOM.integers(-127, 128, (8, 8)).astype(np.int8)


def folded(before: ir.Model, *, batch: int = 2) -> ir.Model:
    after = before.clone()
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(after)
    assert FoldConstantsPass()(after).modified
    RemoveUnusedNodesPass()(after)
    assert not FoldConstantsPass()(after).modified
    assert_same_outputs(before, after, batch=batch)
    return after


WEIGHT_CHAINS = {
    "Transpose": "w = Transpose<perm = [1, 0]>(weight)",
    "Identity": "w = Identity(weight)",
    "Cast": "narrow = Cast<to = 10>(weight) w = Cast<to = 1>(narrow)",
    "Reshape": "shape = Constant<value = int64[2] {8, 8}>() flat = Flatten<axis = 0>(weight) w = Reshape(flat, shape)",
    "DequantizeLinear": "w = DequantizeLinear<axis = 1>(quantized, scale)",
    "com.microsoft.DequantizeLinear": "w = com.microsoft.DequantizeLinear<axis = 1>(quantized, scale)",
    "QuantizeLinear and back": "q = QuantizeLinear(weight, scale, z) w = DequantizeLinear(q, scale, z)",
    "sum of two": "w = Add(weight, weight)",
    "half of a split": "a, b = Split<axis = 0>(stacked) w = Add(a, b)",
}


@pytest.mark.parametrize("chain", WEIGHT_CHAINS)
def test_weight_behind_a_chain_becomes_a_direct_initializer(chain: str) -> None:
    weights = {
        "weight": WEIGHT,
        "scale": SCALE,
        "quantized": QUANTIZED,
        "z": np.zeros(8, np.int8),
        "stacked": np.concatenate([WEIGHT, WEIGHT]),
    }
    after = folded(graph(WEIGHT_CHAINS[chain] + " y = MatMul(x, w)", weights=weights))
    assert operators(after) == {"MatMul": 1}
    assert only(after, "MatMul").inputs[1].is_initializer()


def test_folds_int4_blocks() -> None:
    weights = {"quantized": (QUANTIZED // 32).astype(ml_dtypes.int4), "scales": np.stack([SCALE] * 2)}
    before = graph(
        "w = DequantizeLinear<axis = 0, block_size = 4>(quantized, scales) y = MatMul(x, w)", opset=21, weights=weights
    )
    before.ir_version = 10
    assert operators(folded(before)) == {"MatMul": 1}


def test_folds_bfloat16() -> None:
    before = graph("w = Cast<to = 1>(weight) y = MatMul(x, w)", weights={"weight": WEIGHT.astype(ml_dtypes.bfloat16)})
    assert operators(folded(before)) == {"MatMul": 1}


def test_activations_stay_quantized() -> None:
    nodes = """
        q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z)
        w = DequantizeLinear<axis = 1>(quantized, scale) y = MatMul(d, w)"""
    weights = {"quantized": QUANTIZED, "scale": SCALE, "s": np.float32(0.02), "z": np.int8(0)}
    assert operators(folded(graph(nodes, weights=weights))) == {"QuantizeLinear": 1, "DequantizeLinear": 1, "MatMul": 1}


def test_shared_weight_keeps_its_other_orientation() -> None:
    after = folded(
        graph("w = Transpose<perm = [1, 0]>(weight) a = MatMul(x, w) y = MatMul(a, weight)", weights={"weight": WEIGHT})
    )
    assert operators(after) == {"MatMul": 2}
    assert len(after.graph.initializers) == 2


def expansion(size: int) -> dict[str, Any]:
    return {"shape": np.array([size, 8], np.int64), "row": np.ones((1, 8), np.float32)}


def test_does_not_blow_up_a_constant() -> None:
    before = graph(
        "big = Expand(row, shape) y = Add(x, big)",
        x=f"float[{1 << 16}, 8] x",
        y=f"float[{1 << 16}, 8] y",
        weights=expansion(1 << 16),
    )
    after = before.clone()
    FoldConstantsPass()(after)
    assert operators(after) == {"Expand": 1, "Add": 1}
    assert after.graph.node(0).outputs[0].shape == ir.Shape([1 << 16, 8])


def test_expands_small_constants() -> None:
    after = folded(
        graph("big = Expand(row, shape) y = Add(x, big)", x="float[16, 8] x", y="float[16, 8] y", weights=expansion(16))
    )
    assert operators(after) == {"Add": 1}


def test_expands_a_large_weight() -> None:
    nodes = "big = Expand(row, shape) w = Transpose<perm = [1, 0]>(big) y = MatMul(x, w)"
    after = folded(graph(nodes, x="float[1, 8] x", y=f"float[1, {1 << 16}] y", weights=expansion(1 << 16)))
    assert operators(after) == {"MatMul": 1}


def test_does_not_fold_random_numbers() -> None:
    after = graph("r = RandomNormal<shape = [2, 5, 8]>() y = Add(x, r)")
    FoldConstantsPass()(after)
    assert operators(after) == {"RandomNormal": 1, "Add": 1}


def test_does_not_fold_what_another_domain_defines() -> None:
    after = graph("w = com.microsoft.Gelu(weight) y = MatMul(x, w)", weights={"weight": WEIGHT})
    FoldConstantsPass()(after)
    assert operators(after) == {"Gelu": 1, "MatMul": 1}


def test_a_constant_output_stays_an_output() -> None:
    before = graph("y = Add(x, one) c = Mul(one, one)", y="float[2, 5, 8] y, float c", weights={"one": np.float32(1)})
    after = before.clone()
    FoldConstantsPass()(after)
    assert_same_outputs(before, after)


def test_sizes_of_a_static_shape_are_constants() -> None:
    nodes = "s = Shape(x) i = Constant<value = int64 {1}>() n = Gather(s, i) f = Cast<to = 1>(n) y = Mul(x, f)"
    assert operators(folded(graph(nodes))) == {"Mul": 1}


BATCH = """
    s = Shape(x) zero = Constant<value = int64 {0}>() b = Gather(s, zero)
    first = Constant<value = int64[1] {0}>() bs = Unsqueeze(b, first)"""


def test_reshape_with_a_dynamic_batch_copies_it() -> None:
    nodes = (
        BATCH
        + " rest = Constant<value = int64[3] {5, 2, 4}>() shape = Concat<axis = 0>(bs, rest) y = Reshape(x, shape)"
    )
    after = folded(graph(nodes, x="float[N, 5, 8] x", y="float[N, 5, 2, 4] y"), batch=3)
    assert operators(after) == {"Reshape": 1}
    assert only(after, "Reshape").inputs[1].const_value.numpy().tolist() == [0, 5, 2, 4]


def test_reshape_to_one_unknown_size_finds_it_at_run_time() -> None:
    nodes = (
        BATCH
        + """
        five = Constant<value = int64[1] {5}>() rows = Mul(bs, five) eight = Constant<value = int64[1] {8}>()
        shape = Concat<axis = 0>(rows, eight) y = Reshape(x, shape)"""
    )
    after = folded(graph(nodes, x="float[N, 5, 8] x", y="float[M, 8] y"), batch=3)
    assert operators(after) == {"Reshape": 1}
    assert only(after, "Reshape").inputs[1].const_value.numpy().tolist() == [-1, 8]


def test_a_size_that_the_others_determine_is_computed() -> None:
    nodes = (
        BATCH
        + """
        two = Constant<value = int64[1] {2}>() twice = Mul(bs, two) minus = Constant<value = int64[2] {-1, 4}>()
        shape = Concat<axis = 0>(twice, minus) y = Reshape(x, shape)"""
    )
    after = folded(graph(nodes, x="float[N, 6, 8] x", y="float[A, 6, 4] y"), batch=3)
    assert only(after, "Reshape").inputs[1].const_value.numpy().tolist() == [-1, 6, 4]


def test_reshape_to_two_unknown_sizes_stays() -> None:
    nodes = """
        s = Shape(z) minus = Constant<value = int64[2] {-1, 4}>() shape = Concat<axis = 0>(s, minus)
        y = Reshape(x, shape)"""
    after = folded(graph(nodes, x="float[N, 6, 8] x, float[M] z", y="float[A, B, 4] y"), batch=3)
    assert operators(after) == {"Shape": 1, "Concat": 1, "Reshape": 1}


@pytest.mark.parametrize("name", ["batch size", "x:0", "4", "a/b", "Max"])
def test_dimensions_may_have_any_name(name: str) -> None:
    nodes = (
        BATCH
        + """
        two = Constant<value = int64[1] {2}>() twice = Mul(bs, two) rest = Constant<value = int64[2] {3, 8}>()
        shape = Concat<axis = 0>(twice, rest) y = Reshape(x, shape)"""
    )
    before = graph(nodes, x="float[N, 6, 8] x", y="float[M, 3, 8] y")
    before.graph.inputs[0].shape = ir.Shape([name, 6, 8])
    assert only(folded(before, batch=3), "Reshape").inputs[1].const_value.numpy().tolist() == [-1, 3, 8]


def test_a_size_of_another_axis_is_not_copied() -> None:
    nodes = """
        t = Transpose<perm = [1, 0, 2]>(x) s = Shape(x) first = Constant<value = int64[1] {0}>() n = Gather(s, first)
        rest = Constant<value = int64[2] {5, 8}>() shape = Concat<axis = 0>(n, rest) y = Reshape(t, shape)"""
    after = folded(graph(nodes, x="float[N, 5, 8] x", y="float[N, 5, 8] y"), batch=3)
    assert only(after, "Reshape").inputs[1].const_value.numpy().tolist() == [-1, 5, 8]


def test_reshape_with_allowzero_stays() -> None:
    nodes = (
        BATCH
        + """
        rest = Constant<value = int64[2] {5, 8}>() shape = Concat<axis = 0>(bs, rest)
        y = Reshape<allowzero = 1>(x, shape)"""
    )
    before = graph(nodes, x="float[N, 5, 8] x", y="float[N, 5, 8] y")
    assert operators(folded(before, batch=3))["Concat"] == 1
    assert operators(folded(before, batch=0))["Concat"] == 1


def test_shapes_known_through_torch_expand() -> None:
    """torch writes x.expand(batch, -1, -1) with a Where over the sizes that are -1."""
    nodes = (
        BATCH
        + """
        minus = Constant<value = int64[2] {-1, -1}>() sizes = Concat<axis = 0>(bs, minus)
        three = Constant<value = int64[1] {3}>() ones = ConstantOfShape<value = int64[1] {1}>(three)
        none = Constant<value = int64 {-1}>() minuses = Mul(ones, none) same = Equal(sizes, minuses)
        shape = Where(same, ones, sizes) tokens = Expand(token, shape) y = Concat<axis = 1>(tokens, x)"""
    )
    before = graph(nodes, x="float[N, 5, 8] x", y="float[N, 6, 8] y", weights={"token": np.ones((1, 1, 8), np.float32)})
    after = folded(before, batch=3)
    assert only(after, "Expand").outputs[0].shape == ir.Shape(["N", 1, 8])


def test_wrong_constants_are_left_to_the_runtime() -> None:
    before = graph(
        "w = MatMul(weight, three) y = Add(x, w)", weights={"weight": WEIGHT, "three": np.ones((3, 3), np.float32)}
    )
    after = before.clone()
    FoldConstantsPass()(after)
    assert operators(after) == operators(before)


def test_nothing_of_the_weights_is_lost() -> None:
    """A weight whose transpose is folded is dropped only if nothing else reads it."""
    nodes = "w = Transpose<perm = [1, 0]>(weight) a = MatMul(x, w) y = Add(a, bias)"
    weights = {"weight": WEIGHT, "bias": WEIGHT[0]}
    before = graph(nodes, weights=weights)
    after = folded(before)
    assert sorted(after.graph.initializers) == ["bias", "w"]
    np.testing.assert_array_equal(after.graph.initializers["w"].const_value.numpy(), WEIGHT.T)
    x = RANDOM.standard_normal((2, 5, 8)).astype(np.float32)
    np.testing.assert_allclose(run(after, {"x": x})[0], x @ WEIGHT.T + WEIGHT[0], rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("error")
def test_infinities_are_folded_without_a_warning() -> None:
    nodes = "m = Log(zeros) n = Sub(m, m) k = IsNaN(n) y = Where(k, x, m)"
    after = folded(graph(nodes, weights={"zeros": np.zeros(8, np.float32)}))
    assert operators(after) == {"Where": 1}
