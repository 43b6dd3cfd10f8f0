"""The canonical form of small graphs: what holds afterwards, and what is refused."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from graphs import assert_same_outputs, graph, only, operators, signature

from lsp_deploy.errors import UserError
from lsp_deploy.passes.canonicalize import canonicalize

WEIGHT = np.random.default_rng(0).standard_normal((8, 8)).astype(np.float32)
WEIGHTS = {
    "weight": WEIGHT,
    "same": WEIGHT.copy(),
    "unused": WEIGHT * 2,
    "gamma": np.full(8, 1.5, np.float32),
    "beta": np.full(8, 0.5, np.float32),
    "epsilon": np.float32(1e-5),
    "two": np.float32(2),
    "root_two": np.float32(2**0.5),
    "one": np.float32(1),
    "half": np.float32(0.5),
}
BLOCK = """
    mean = ReduceMean<axes = [-1]>(x) deviation = Sub(x, mean) square = Pow(deviation, two)
    variance = ReduceMean<axes = [-1]>(square) shifted = Add(variance, epsilon) deviance = Sqrt(shifted)
    normal = Div(deviation, deviance) scaled = Mul(normal, gamma) n = Add(scaled, beta)
    w = Transpose<perm = [1, 0]>(weight) v = Identity(same) f = MatMul(n, w)
    s = Div(f, root_two) e = Erf(s) t = Add(e, one) p = Mul(f, t) g = Mul(p, half)
    o = MatMul(g, v) y = Add(o, x) dead = Exp(x)
"""


def block(opset: int = 13) -> ir.Model:
    return graph(BLOCK, opset=opset, weights=WEIGHTS)


def test_a_block_in_canonical_form() -> None:
    before = block()
    after = canonicalize(before.clone(), max_opset=23)
    assert operators(after) == {"LayerNormalization": 1, "MatMul": 2, "Gelu": 1, "Add": 1}
    assert after.opset_imports == {"": 20}
    first, second = (node for node in after.graph if node.op_type == "MatMul")
    assert first.inputs[1].is_initializer() and second.inputs[1].is_initializer()
    assert set(after.graph.initializers) == {
        value.name for node in after.graph for value in node.inputs if value.is_initializer()
    }
    assert all(value.dtype is not None and value.shape is not None for node in after.graph for value in node.outputs)
    assert_same_outputs(before, after)


@pytest.mark.parametrize(
    ("opset", "max_opset", "needed", "expected"),
    [(13, 23, 17, 20), (13, 19, 17, 17), (16, 19, 19, 19), (17, 21, 21, 21), (13, 20, 19, 20), (17, 17, 13, 17)],
)
def test_opset_is_as_low_as_it_can_be(opset: int, max_opset: int, needed: int, expected: int) -> None:
    before = block(opset)
    after = canonicalize(before.clone(), max_opset=max_opset, needed_opset=needed)
    assert after.opset_imports[""] == expected
    assert operators(after)["LayerNormalization"] == 1
    assert operators(after)["Gelu"] == (max_opset >= 20)
    assert_same_outputs(before, after)


def test_opset_17_is_enough_without_gelu() -> None:
    assert canonicalize(graph("y = MatMul(x, weight)", opset=13, weights=WEIGHTS), max_opset=23).opset_imports[""] == 17


def test_newer_opset_is_lowered_to_what_the_target_takes() -> None:
    before = graph("g = Gelu(x) m = ReduceMean(g, axes) y = Add(g, m)", opset=21, weights={"axes": np.array([-1])})
    after = canonicalize(before.clone(), max_opset=20)
    assert after.opset_imports[""] == 20
    assert_same_outputs(before, after)


def test_newer_opset_is_kept_where_the_target_takes_it() -> None:
    assert canonicalize(graph("y = Gelu(x)", opset=22), max_opset=23).opset_imports[""] == 22


@pytest.mark.parametrize("bounds", [{"max_opset": 20, "needed_opset": 21}, {"max_opset": 16}])
def test_needed_opset_above_the_targets_is_refused(bounds: dict[str, int]) -> None:
    with pytest.raises(UserError, match=r"opset (21|17) or later, but the target takes at most (20|16)"):
        canonicalize(block(), **bounds)


def test_operator_that_is_too_new_is_refused_by_name() -> None:
    newer = graph("a = Exp(x) y = RMSNormalization(a, gamma)", opset=23, weights=WEIGHTS)
    newer.graph.node(1).name = "norm"
    with pytest.raises(UserError, match="node norm: RMSNormalization cannot be expressed in opset 20"):
        canonicalize(newer, max_opset=20)


@pytest.mark.parametrize("max_opset", [19, 23])
def test_a_second_time_changes_nothing(max_opset: int) -> None:
    model = canonicalize(block(), max_opset=max_opset)
    once = ir.to_proto(model).SerializeToString(deterministic=True)
    canonicalize(model, max_opset=max_opset)
    assert ir.to_proto(model).SerializeToString(deterministic=True) == once


def test_it_works_in_place_and_leaves_a_clone_alone() -> None:
    model = block()
    original = model.clone()
    before = ir.to_proto(original).SerializeToString(deterministic=True)
    assert canonicalize(model, max_opset=20) is model
    assert ir.to_proto(original).SerializeToString(deterministic=True) == before


def test_shared_weight_stays_shared() -> None:
    nodes = "a = Identity(weight) u = MatMul(x, a) v = MatMul(u, weight) w = MatMul(v, same) y = Exp(w)"
    after = canonicalize(graph(nodes, weights=WEIGHTS), max_opset=20)
    assert len({node.inputs[1] for node in after.graph if node.op_type == "MatMul"}) == 1


def test_repeated_nodes_are_computed_once() -> None:
    before = graph("a = Exp(x) b = Exp(x) y = Add(a, b)")
    after = canonicalize(before.clone(), max_opset=20)
    assert operators(after) == {"Exp": 1, "Add": 1}
    assert_same_outputs(before, after)


def test_an_initializer_that_is_an_input_becomes_a_constant() -> None:
    before = graph(
        "w = Transpose<perm = [1, 0]>(weight) y = MatMul(x, w)",
        x="float[2, 5, 8] x, float[8, 8] weight",
        weights=WEIGHTS,
    )
    after = canonicalize(before.clone(), max_opset=20)
    assert [value.name for value in after.graph.inputs] == ["x"]
    assert only(after, "MatMul").inputs[1].is_initializer()


def test_nodes_of_other_domains_stay() -> None:
    nodes = "a = Exp(x) b = com.microsoft.FusedMatMul<transB = 1>(a, weight) y = Mul(b, two)"
    before = graph(nodes, opset=13, weights=WEIGHTS)
    after = canonicalize(before.clone(), max_opset=20)
    assert operators(after) == {"Exp": 1, "FusedMatMul": 1, "Mul": 1}
    assert signature(after) == signature(before)
    assert after.opset_imports == {"": 17, "com.microsoft": 1}
    assert_same_outputs(before, after)


def test_names_are_unique_and_outputs_keep_theirs() -> None:
    before = block()
    after = before.clone()
    for node in after.graph:
        node.name = "same"
    canonicalize(after, max_opset=20)
    names = [node.name for node in after.graph]
    values = [value.name for node in after.graph for value in node.outputs] + list(after.graph.initializers)
    assert len(set(names)) == len(names) and all(names)
    assert len(set(values)) == len(values) and all(values)
    assert_same_outputs(before, after)


def test_fused_nodes_are_named_after_their_place() -> None:
    model = block()
    for node in model.graph:
        node.name = (
            f"/block/norm/{node.op_type}" if node.outputs[0].name == "mean" else f"/block/{node.outputs[0].name}"
        )
    only(model, "Erf").name = "/block/act/Erf_1"
    canonicalize(model, max_opset=20)
    assert only(model, "LayerNormalization").name == "/block/norm/LayerNormalization"
    assert only(model, "Gelu").name == "/block/act/Gelu"


def test_unsorted_nodes_are_sorted() -> None:
    before = block()
    shuffled = before.clone()
    nodes = list(shuffled.graph)
    shuffled.graph.remove(nodes)
    shuffled.graph.extend(reversed(nodes))
    after = canonicalize(shuffled, max_opset=20)
    assert operators(after) == {"LayerNormalization": 1, "MatMul": 2, "Gelu": 1, "Add": 1}
    assert_same_outputs(before, after)
