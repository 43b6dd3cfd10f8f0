"""Masks that mask nothing go, and with them the guard behind the softmax; all others stay."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from graphs import assert_same_outputs, graph, operators

from lsp_deploy.passes.canonicalize import canonicalize
from lsp_deploy.passes.infer_shapes import InferShapesPass
from lsp_deploy.passes.remove_void_masks import RemoveVoidMasksPass

LOWEST = np.float32(np.finfo(np.float32).min)
SOME = np.ones((1, 5, 5), bool)
SOME[0, :, 3] = False
NONE = np.zeros((1, 5, 5), bool)
WEIGHTS = {
    "w": np.random.default_rng(0).standard_normal((8, 8)).astype(np.float32),
    "all": np.ones((1, 5, 1), bool),
    "some": SOME,
    "none": NONE,
    "zero": np.float32(0),
    "one": np.float32(1),
    "lowest": LOWEST,
    "zeros": np.zeros((1, 5, 5), np.float32),
    "bias": np.float32([-1e4, 0, 1, 2, 3]),
    "low_bias": np.full(5, LOWEST),
}
SCORES = "k = Transpose<perm = [0, 2, 1]>(x) s = MatMul(x, k) n = Shape(s)"
MASK = "m = Expand(all, n) z = Where(m, zero, lowest) t = Add(s, z)"
SOFTMAX = "p = Softmax<axis = -1>(t)"
GUARD = "i = IsNaN(p) a = Where(i, zero, p) y = MatMul(a, x)"
X, Y = "float[batch, 5, 8] x", "float[batch, 5, 8] y"


def cleaned(nodes: str) -> ir.Model:
    before = graph(nodes, x=X, y=Y, weights=WEIGHTS)
    after = before.clone()
    InferShapesPass()(after)
    modified = RemoveVoidMasksPass()(after).modified
    assert modified == (operators(after) != operators(before))
    assert not RemoveVoidMasksPass()(after).modified
    assert_same_outputs(before, after)
    return after


@pytest.mark.parametrize(
    "mask",
    [
        MASK,
        "m = Expand(all, n) z = Where(m, zero, lowest) t = Add(z, s)",
        "m = Expand(none, n) z = Where(m, lowest, zero) t = Add(s, z)",
        "z = Expand(zero, n) t = Add(s, z)",
    ],
)
def test_zeros_and_the_guard_behind_them_go(mask: str) -> None:
    after = operators(cleaned(f"{SCORES} {mask} {SOFTMAX} {GUARD}"))
    assert after["Add"] == 0
    assert after["Where"] == mask.count("Where")  # what made the mask, which nothing reads


@pytest.mark.parametrize("scores", ["t = Mul(s, one)", "t = Add(s, bias)", "u = Mul(s, one) t = Add(bias, u)"])
def test_the_guard_of_scores_that_are_finite_goes(scores: str) -> None:
    assert operators(cleaned(f"{SCORES} {scores} {SOFTMAX} {GUARD}"))["Where"] == 0


@pytest.mark.parametrize(
    "mask",
    [
        "m = Expand(some, n) z = Where(m, zero, lowest) t = Add(s, z)",
        "m = Expand(none, n) z = Where(m, zero, lowest) t = Add(s, z)",
        "z = Expand(one, n) t = Add(s, z)",
        "t = Add(s, low_bias)",
        "l = Log(s) t = Add(l, bias)",
    ],
)
def test_what_may_mask_stays_and_so_does_its_guard(mask: str) -> None:
    nodes = f"{SCORES} {mask} {SOFTMAX} {GUARD}"
    before = graph(nodes, x=X, y=Y, weights=WEIGHTS)
    after = before.clone()
    InferShapesPass()(after)
    assert not RemoveVoidMasksPass()(after).modified
    assert operators(after) == operators(before)


@pytest.mark.parametrize(
    "nodes",
    [
        "t = Add(x, zeros3) y = MatMul(t, w)",  # a bias of zeros is a constant: it belongs to its layer
        "r = ReduceMax<axes = [1], keepdims = 1>(x) n = Shape(x) z = Expand(zero, n) t = Add(r, z) y = MatMul(t, w)",
        "n = Shape(x) z = Expand(zero, n) y = Add(x, z)",
    ],
)
def test_what_only_looks_like_it_stays(nodes: str) -> None:
    before = graph(nodes, x=X, y=Y, weights=WEIGHTS | {"zeros3": np.zeros(8, np.float32)})
    after = before.clone()
    InferShapesPass()(after)
    assert not RemoveVoidMasksPass()(after).modified


def test_nothing_of_it_is_left_in_canonical_form() -> None:
    before = graph(f"{SCORES} {MASK} {SOFTMAX} {GUARD}", x=X, y=Y, weights=WEIGHTS)
    after = canonicalize(before.clone(), max_opset=20)
    assert operators(after) == {"Transpose": 1, "MatMul": 2, "Softmax": 1}
    assert_same_outputs(before, after)
