"""Types and shapes of every value, and what is known of computed sizes."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from graphs import graph

from lsp_deploy.passes.infer_shapes import InferShapesPass


def inferred(nodes: str, **options: Any) -> dict[str, ir.Value]:
    model = graph(nodes, **options)
    assert InferShapesPass()(model).modified
    assert not InferShapesPass()(model).modified
    return {str(value.name): value for node in model.graph for value in node.outputs}


def test_every_value_gets_type_and_shape() -> None:
    weights = {"w": np.ones((8, 3), np.float32), "b": np.ones(3, np.float16)}
    values = inferred("a = MatMul(x, w) c = Cast<to = 10>(a) d = Add(c, b) y = Softmax(d)", weights=weights)
    assert {name: (value.dtype, value.shape) for name, value in values.items() if name in "acd"} == {
        "a": (ir.DataType.FLOAT, ir.Shape([2, 5, 3])),
        "c": (ir.DataType.FLOAT16, ir.Shape([2, 5, 3])),
        "d": (ir.DataType.FLOAT16, ir.Shape([2, 5, 3])),
    }


def test_declared_outputs_keep_their_shape() -> None:
    values = inferred("a = Exp(x) y = Neg(a)", x="float[N, 5, 8] x", y="float[M, 5, 8] y")
    assert values["a"].shape == ir.Shape(["N", 5, 8])
    assert values["y"].shape == ir.Shape(["M", 5, 8])


def test_unknown_sizes_get_names_of_their_own_and_keep_them() -> None:
    nodes = "n = NonZero(x) t = Transpose<perm = [1, 0]>(n) f = Cast<to = 1>(t) e = Exp(f) y = ReduceSum(e)"
    values = inferred(nodes, y="float[1, 1] y")
    assert values["n"].shape == ir.Shape([3, "unknown_0"])
    assert values["e"].shape == ir.Shape(["unknown_0", 3])


def test_declared_shapes_fill_what_cannot_be_inferred() -> None:
    model = graph("a = com.microsoft.Other(x) b = Exp(a) y = Neg(b)")
    custom = model.graph.node(0).outputs[0]
    custom.shape, custom.dtype = ir.Shape([2, 5, 8]), ir.DataType.FLOAT
    InferShapesPass()(model)
    assert custom.shape == model.graph.node(1).outputs[0].shape == ir.Shape([2, 5, 8])


def test_nodes_after_an_unknown_operator_stay_without_type() -> None:
    values = inferred("w = Exp(x) a = com.microsoft.Other(w) b = Exp(a) y = Neg(b)")
    assert values["w"].dtype == ir.DataType.FLOAT
    assert values["b"].dtype is None and values["b"].shape is None


def test_contradictory_shapes_do_not_stop_the_rest() -> None:
    weights = {"w": np.ones((7, 3), np.float32)}
    values = inferred("a = MatMul(x, w) b = Exp(x) y = Neg(b)", weights=weights)
    assert values["a"].shape is None
    assert values["b"].shape == ir.Shape([2, 5, 8])


SIZES = "s = Shape(x)"


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [
        ("t = Gather(s, reverse)", [8, 5, "N"]),
        ("a = Slice(s, one, three) b = Gather(s, first) t = Concat<axis = 0>(a, b)", [5, 8, "N"]),
        ("a = Slice(s, last, end, zero) b = Slice(s, zero, last, zero, one) t = Concat<axis = 0>(a, b)", [8, "N", 5]),
        ("b = Gather(s, zeroth) c = Unsqueeze(b, zero) t = Concat<axis = 0>(c, c, one)", ["N", "N", 1]),
        ("c = Gather(s, first) b = Squeeze(c, zero) d = Reshape(b, one) t = Concat<axis = 0>(d, three)", ["N", 3]),
        ("c = Cast<to = 6>(s) d = Cast<to = 7>(c) t = Gather(d, reverse)", [8, 5, "N"]),
        ("t = Shape<start = 1>(x)", [5, 8]),
        ("t = Shape<start = -3, end = -1>(x)", ["N", 5]),
        ("b = Add(s, s) t = Gather(b, first)", ["unknown_0"]),
        ("b = Mul(s, five) t = Gather(b, reverse)", [40, 25, "5*N"]),
        ("b = Mul(five, s) c = Div(b, five) t = Gather(c, reverse)", [8, 5, "N"]),
        ("b = Div(s, five) t = Gather(b, reverse)", ["unknown_0", 1, "unknown_1"]),
        ("q = Equal(s, five) t = Where(q, three, s)", ["unknown_0", 3, 8]),
        ("q = Equal(s, s) t = Where(q, s, five)", ["N", 5, 8]),
        ("q = Equal(s, minus) t = Where(q, five, s)", ["N", 5, 8]),
        ("g = Gather(s, zeroth) q = Equal(g, five) t = Where(q, five, five)", [5]),
    ],
)
def test_sizes_are_followed_element_by_element(sizes: str, shape: list[int | str]) -> None:
    names = {"one": [1], "three": [3], "last": [2], "end": [9], "zero": [0], "first": [0], "five": [5], "minus": [-1]}
    weights: dict[str, Any] = {name: np.array(numbers, np.int64) for name, numbers in names.items()}
    weights |= {"reverse": np.array([2, 1, 0], np.int64), "zeroth": np.int64(0)}
    values = inferred(f"{SIZES} {sizes} out = ConstantOfShape(t) y = Neg(out)", x="float[N, 5, 8] x", weights=weights)
    assert values["out"].shape == ir.Shape(shape)


@pytest.mark.parametrize(
    ("x", "sizes", "shape"),
    [
        ("float[1, 5, 8] x, float[N] z", "Concat<axis = 0>(n, one, one)", ["N", 5, 8]),
        ("float[N, 5, 8] x, float[N] z", "Concat<axis = 0>(n, one, one)", ["N", 5, 8]),
        ("float[M, 5, 8] x, float[N] z", "Concat<axis = 0>(n, one, one)", ["unknown_0", 5, 8]),
        ("float[M, 5, 8] x, float[N] z", "Concat<axis = 0>(three, one, eight)", [3, 5, 8]),
        ("float[1, 8] x, float[N] z", "Concat<axis = 0>(n, three, one)", ["N", 3, 8]),
        ("float[4, 5, 8] x, float[N] z", "Identity(n)", [4, 5, 8]),
    ],
)
def test_expand_broadcasts_sizes_that_are_partly_known(x: str, sizes: str, shape: list[int | str]) -> None:
    weights = {name: np.array([size], np.int64) for name, size in {"one": 1, "three": 3, "eight": 8}.items()}
    nodes = f"n = Shape(z) t = {sizes} e = Expand(x, t) y = Neg(e)"
    assert inferred(nodes, x=x, y="float[A, B, C] y", weights=weights)["e"].shape == ir.Shape(shape)
