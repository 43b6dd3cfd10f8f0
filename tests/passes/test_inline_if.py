"""Branches on conditions that are known."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from graphs import assert_same_outputs, graph, operators

from lsp_deploy.passes.canonicalize import canonicalize
from lsp_deploy.passes.inline_if import InlineIfPass

SIZE_IS_ONE = """
    s = Shape(x) axis = Constant<value = int64[1] {AXIS}>() n = Gather(s, axis) one = Constant<value = int64[1] {1}>()
    is_one = Equal(n, one)
    y = If (is_one) <
        then_branch = t () => (float[1, 5, 8] a) { a = Exp(x) },
        else_branch = e () => (float[1, 5, 8] b) { b = Neg(x) }
    >
"""


@pytest.mark.parametrize(("axis", "left"), [("0", "Exp"), ("1", "Neg")])
def test_inlines_the_branch_that_is_taken(axis: str, left: str) -> None:
    before = graph(SIZE_IS_ONE.replace("AXIS", axis), x="float[1, 5, 8] x", y="float[1, 5, 8] y")
    after = canonicalize(before.clone(), max_opset=20)
    assert operators(after) == {left: 1}
    assert_same_outputs(before, after)


def test_branches_may_use_the_same_names() -> None:
    branches = """
        NAME = If (yes) <
            then_branch = t () => (float[2, 5, 8] a) <float k = {3.0}> { a = Mul(x, k) },
            else_branch = e () => (float[2, 5, 8] a) { a = Neg(x) }
        >
    """
    second = branches.replace("NAME", "w").replace("3.0", "5.0")
    before = graph(branches.replace("NAME", "z") + second + "y = Sub(w, z)", weights={"yes": np.array(True)})
    after = before.clone()
    assert InlineIfPass()(after).modified
    assert operators(after) == {"Mul": 2, "Sub": 1, "Identity": 2}
    assert_same_outputs(before, after)


def test_leaves_a_branch_on_data() -> None:
    nodes = """
        m = ReduceMax<keepdims = 0>(x) c = Cast<to = 9>(m)
        y = If (c) <
            then_branch = t () => (float[2, 5, 8] a) { a = Exp(x) },
            else_branch = e () => (float[2, 5, 8] b) { b = Neg(x) }
        >
    """
    before = graph(nodes)
    after: ir.Model = before.clone()
    assert not InlineIfPass()(after).modified
    assert operators(canonicalize(after, max_opset=20)) == operators(before)
    assert_same_outputs(before, after)
