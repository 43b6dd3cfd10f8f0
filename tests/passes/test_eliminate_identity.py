"""Nodes that hand their input on, and the few that the graph needs."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from graphs import assert_same_outputs, graph, operators

from lsp_deploy.passes.eliminate_identity import EliminateIdentityPass

WEIGHTS = {
    "w": np.full((8, 8), 0.5, np.float32),
    "ratio": np.float32(0.5),
    "no": np.array(False),
    "yes": np.array(True),
}
BOTH = "float[2, 5, 8] y, float[2, 5, 8] z"


def eliminated(nodes: str, *, y: str = "float[2, 5, 8] y", weights: dict[str, np.ndarray] | None = None) -> ir.Model:
    before = graph(nodes, y=y, weights=WEIGHTS | (weights or {}))
    after = before.clone()
    modified = EliminateIdentityPass()(after).modified
    assert modified == (operators(after) != operators(before))
    assert_same_outputs(before, after)
    return after


@pytest.mark.parametrize(
    "nodes",
    [
        "v = Identity(w) y = MatMul(x, v)",
        "u = Identity(w) v = Identity(u) y = MatMul(x, v)",
        "a = Identity(x) y = MatMul(a, w)",
        "a = MatMul(x, w) y = Identity(a)",
        "a = Cast<to = 1>(x) y = MatMul(a, w)",
        "a = Dropout(x) y = MatMul(a, w)",
        "a = Dropout(x, ratio, no) y = MatMul(a, w)",
        "a, mask = Dropout(x, ratio) y = MatMul(a, w)",
    ],
)
def test_removes(nodes: str) -> None:
    after = eliminated(nodes)
    assert operators(after) == {"MatMul": 1}
    assert after.graph.node(0).inputs[1] is after.graph.initializers["w"]


@pytest.mark.parametrize(
    ("nodes", "y"),
    [
        ("y = Identity(x)", "float[2, 5, 8] y"),
        ("y = Exp(x) z = Identity(y)", BOTH),
        ("y = Exp(x) z = Identity(w)", "float[2, 5, 8] y, float[8, 8] z"),
        ("y, mask = Dropout(x, ratio)", "float[2, 5, 8] y, bool[2, 5, 8] mask"),
    ],
)
def test_keeps_what_separates_outputs_from_other_values(nodes: str, y: str) -> None:
    after = eliminated(nodes, y=y)
    assert operators(after)["Identity"] + operators(after)["Dropout"] == 1


def test_keeps_what_does_something() -> None:
    after = graph("a = Dropout(x, ratio, yes) b = Cast<to = 10>(a) y = Cast<to = 1>(b)", weights=WEIGHTS)
    assert not EliminateIdentityPass()(after).modified


def test_two_outputs_of_one_value_keep_both_names() -> None:
    after = eliminated("a = Exp(x) y = Identity(a) z = Identity(a)", y=BOTH)
    assert [output.name for output in after.graph.outputs] == ["y", "z"]
    assert operators(after) == {"Exp": 1, "Identity": 1}


def test_branch_that_hands_on_an_outer_value_keeps_its_identity() -> None:
    after = eliminated(
        """
        c = ReduceMax<keepdims = 0>(x) cond = Cast<to = 9>(c)
        y = If (cond) <
            then_branch = t () => (float[2, 5, 8] a) { a = Identity(x) },
            else_branch = e () => (float[2, 5, 8] b) { n = Neg(x) b = Identity(n) }
        >
        """
    )
    assert operators(after)["Identity"] == 1
