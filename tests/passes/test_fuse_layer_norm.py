"""LayerNorm in the forms that exporters write, and in forms that only look like it."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from graphs import assert_same_outputs, graph, only, operators
from hypothesis import given, settings
from hypothesis import strategies as st

from lsp_deploy.passes.canonicalize import canonicalize
from lsp_deploy.passes.fuse_layer_norm import FuseLayerNormPass

RANDOM = np.random.default_rng(0)
WEIGHTS = {
    "gamma": RANDOM.standard_normal(8).astype(np.float32) + 1,
    "beta": RANDOM.standard_normal(8).astype(np.float32),
    "epsilon": np.float32(0.001),
    "two": np.float32(2),
    "one": np.float32(1),
    "half": np.float32(0.5),
    "minus_half": np.float32(-0.5),
}
MEAN = "mean = ReduceMean<axes = [-1]>(x) deviation = Sub(x, mean)"
VARIANCE = "square = Pow(deviation, two) variance = ReduceMean<axes = [-1]>(square)"
DIVIDE = "shifted = Add(variance, epsilon) deviance = Sqrt(shifted) normal = Div(deviation, deviance)"
AFFINE = "scaled = Mul(normal, gamma) y = Add(scaled, beta)"
TORCH = (MEAN, VARIANCE, DIVIDE, AFFINE)


def model(*parts: str, weights: dict[str, Any] | None = None, **options: Any) -> ir.Model:
    return graph(" ".join(parts), weights=WEIGHTS | (weights or {}), **options)


def canonical(before: ir.Model, *, max_opset: int = 20) -> ir.Model:
    return canonicalize(before.clone(), max_opset=max_opset)


def fused(before: ir.Model) -> ir.Node:
    """Check that nothing but one LayerNormalization is left, and that it computes the same."""
    after = canonical(before)
    assert operators(after) == {"LayerNormalization": 1}
    assert_same_outputs(before, after)
    return only(after, "LayerNormalization")


FORMS = {
    "torch": TORCH,
    "square by Mul": (
        MEAN,
        "square = Mul(deviation, deviation) variance = ReduceMean<axes = [-1]>(square)",
        DIVIDE,
        AFFINE,
    ),
    "two deviations": (
        MEAN,
        "again = Sub(x, mean) square = Pow(again, two) variance = ReduceMean<axes = [-1]>(square)",
        DIVIDE,
        AFFINE,
    ),
    "reciprocal": (
        MEAN,
        VARIANCE,
        "shifted = Add(epsilon, variance) deviance = Sqrt(shifted) inverse = Reciprocal(deviance) "
        "normal = Mul(inverse, deviation)",
        AFFINE,
    ),
    "one by root": (
        MEAN,
        VARIANCE,
        "shifted = Add(variance, epsilon) deviance = Sqrt(shifted) inverse = Div(one, deviance) "
        "normal = Mul(deviation, inverse)",
        AFFINE,
    ),
    "power of -1/2": (
        MEAN,
        VARIANCE,
        "shifted = Add(variance, epsilon) inverse = Pow(shifted, minus_half) normal = Mul(deviation, inverse)",
        AFFINE,
    ),
    "power of 1/2": (
        MEAN,
        VARIANCE,
        "shifted = Add(variance, epsilon) deviance = Pow(shifted, half) normal = Div(deviation, deviance)",
        AFFINE,
    ),
    "operands swapped": (MEAN, VARIANCE, DIVIDE, "scaled = Mul(gamma, normal) y = Add(beta, scaled)"),
    "axis counted from the front": (
        "mean = ReduceMean<axes = [2]>(x) deviation = Sub(x, mean)",
        "square = Pow(deviation, two) variance = ReduceMean<axes = [2], keepdims = 1>(square)",
        DIVIDE,
        AFFINE,
    ),
    "Keras": (
        MEAN,
        "square = Mul(deviation, deviation) variance = ReduceMean<axes = [-1]>(square)",
        "shifted = Add(variance, epsilon) deviance = Sqrt(shifted) inverse = Reciprocal(deviance)",
        "scale = Mul(inverse, gamma) first = Mul(x, scale) moved = Mul(mean, scale) rest = Sub(beta, moved) "
        "y = Add(first, rest)",
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_fuses_form(form: str) -> None:
    node = fused(model(*FORMS[form]))
    assert node.attributes["axis"].as_int() == -1
    assert node.attributes["epsilon"].as_float() == pytest.approx(0.001)
    assert len(node.inputs) == 3


@pytest.mark.parametrize("opset", [13, 14, 16, 17])
def test_fuses_in_every_opset_with_axes_as_attribute(opset: int) -> None:
    fused(model(*TORCH, opset=opset))


def test_fuses_with_axes_as_input() -> None:
    axes = "axes = Constant<value = int64[1] {-1}>()"
    mean = "mean = ReduceMean(x, axes) deviation = Sub(x, mean)"
    variance = "square = Pow(deviation, two) variance = ReduceMean(square, axes)"
    fused(model(axes, mean, variance, DIVIDE, AFFINE, opset=18))


def test_fuses_without_gamma_and_beta() -> None:
    node = fused(model(MEAN, VARIANCE, DIVIDE, "y = Identity(normal)"))
    assert len(node.inputs) == 2
    np.testing.assert_array_equal(node.inputs[1].const_value.numpy(), np.ones(8))


@settings(max_examples=20)
@given(
    epsilon=st.floats(1e-12, 0.1),
    width=st.integers(2, 33),
    leading=st.integers(0, 2),
    rank=st.integers(1, 4),
)
def test_fuses_every_epsilon_width_and_rank(epsilon: float, width: int, leading: int, rank: int) -> None:
    shape = [2] * (rank - 1) + [width]
    leading_ones = (1,) * min(leading, rank - 1)
    weights: dict[str, Any] = {
        name: RANDOM.standard_normal((*leading_ones, width)).astype(np.float32) for name in ("gamma", "beta")
    }
    weights["epsilon"] = np.full([1] * min(leading, 1), epsilon, dtype=np.float32)
    node = fused(model(*TORCH, x=f"float{shape} x", y=f"float{shape} y", weights=weights))
    assert node.attributes["epsilon"].as_float() == pytest.approx(epsilon, rel=1e-6)
    assert node.inputs[1].const_value.shape.numpy() == (width,)


HALF_WEIGHTS = {name: array.astype(np.float16) for name, array in WEIGHTS.items()}


def test_fuses_half_precision_with_the_variance_in_a_wider_type() -> None:
    wide = "wide = Cast<to = 11>(deviation) square = Pow(wide, two64) variance = ReduceMean<axes = [-1]>(square)"
    divide = "shifted = Add(variance, epsilon64) deviance = Sqrt(shifted) quotient = Div(wide, deviance)"
    narrow = "normal = Cast<to = 10>(quotient)"
    weights = HALF_WEIGHTS | {"two64": np.float64(2), "epsilon64": np.float64(0.001)}
    before = model(MEAN, wide, divide, narrow, AFFINE, x="float16[2, 5, 8] x", y="float16[2, 5, 8] y", weights=weights)
    after = canonical(before)
    assert operators(after) == {"LayerNormalization": 1}
    assert only(after, "LayerNormalization").attributes["stash_type"].as_int() == ir.DataType.FLOAT
    assert_same_outputs(before, after, relative=1e-2)


def test_half_precision_with_all_of_it_in_float32_keeps_its_casts() -> None:
    nodes = [part.replace("(x", "(wide") for part in TORCH[:-1]]
    affine = "scaled = Mul(normal, gamma) shifted_ = Add(scaled, beta) y = Cast<to = 10>(shifted_)"
    before = model("wide = Cast<to = 1>(x)", *nodes, affine, x="float16[2, 5, 8] x", y="float16[2, 5, 8] y")
    after = canonical(before)
    assert operators(after) == {"LayerNormalization": 1, "Cast": 2}
    assert_same_outputs(before, after, relative=1e-3)


def test_scales_in_a_row_are_multiplied() -> None:
    before = model(
        MEAN, VARIANCE, DIVIDE, "scaled = Mul(normal, gamma) halved = Mul(scaled, half) y = Add(halved, beta)"
    )
    node = fused(before)
    np.testing.assert_allclose(node.inputs[1].const_value.numpy(), WEIGHTS["gamma"] / 2)


def test_existing_layer_norm_takes_in_what_follows() -> None:
    node = fused(model("n = LayerNormalization<axis = 2, epsilon = 0.01>(x, gamma) s = Mul(n, half) y = Add(s, beta)"))
    assert node.attributes["epsilon"].as_float() == pytest.approx(0.01)


# What looks like LayerNorm but is something else; each keeps its divisions.
LOOKALIKES = {
    "other axis": [part.replace("[-1]", "[1]") for part in TORCH],
    "two axes": [part.replace("[-1]", "[-2, -1]") for part in TORCH],
    "mean and variance over different axes": (MEAN, VARIANCE.replace("[-1]", "[1]"), DIVIDE, AFFINE),
    "two epsilons": (
        MEAN,
        VARIANCE,
        DIVIDE.replace("(shifted)", "(shifted) more = Add(deviance, epsilon)").replace("n, deviance", "n, more"),
        AFFINE,
    ),
    "variance of another tensor": (MEAN, VARIANCE.replace("Pow(deviation", "Pow(x"), DIVIDE, AFFINE),
    "cubed": (MEAN, VARIANCE.replace("two", "three"), DIVIDE, AFFINE),
    "epsilon computed": (
        "computed = ReduceMax<keepdims = 0>(x)",
        MEAN,
        VARIANCE,
        DIVIDE.replace("epsilon", "computed"),
        AFFINE,
    ),
    "numerator is x": (MEAN, VARIANCE, DIVIDE.replace("Div(deviation", "Div(x"), AFFINE),
    "Keras with another mean moved": [
        part.replace("Mul(mean, scale)", "Mul(variance, scale)") for part in FORMS["Keras"]
    ],
    "half by root": (
        MEAN,
        VARIANCE,
        "shifted = Add(variance, epsilon) deviance = Sqrt(shifted) inverse = Div(half, deviance) "
        "normal = Mul(deviation, inverse)",
        AFFINE,
    ),
}


@pytest.mark.parametrize("kind", LOOKALIKES)
def test_leaves_lookalikes(kind: str) -> None:
    before = model(
        *LOOKALIKES[kind],
        weights={"three": np.float32(3), "epsilon": np.float32(2)},
        x="float[2, 8, 8] x",
        y="float[2, 8, 8] y",
    )
    after = canonical(before)
    assert operators(after)["LayerNormalization"] == 0
    assert_same_outputs(before, after)


@pytest.mark.parametrize(("value", "width"), [("mean", 1), ("deviation", 8), ("variance", 1), ("deviance", 1)])
def test_leaves_layer_norm_whose_parts_are_outputs(value: str, width: int) -> None:
    before = model(*TORCH, y=f"float[2, 5, 8] y, float[2, 5, {width}] {value}")
    after = canonical(before)
    assert operators(after)["LayerNormalization"] == 0
    assert_same_outputs(before, after)


@pytest.mark.parametrize("value", ["deviation", "variance"])
def test_leaves_layer_norm_whose_parts_are_used_elsewhere(value: str) -> None:
    before = model(*TORCH[:-1], f"other = Exp({value})", AFFINE.replace("y =", "z ="), "y = Add(z, other)")
    after = canonical(before)
    assert operators(after)["LayerNormalization"] == 0
    assert_same_outputs(before, after)


@pytest.mark.parametrize("value", ["normal", "scaled"])
def test_takes_in_only_what_nothing_else_uses(value: str) -> None:
    before = model(*TORCH, y=f"float[2, 5, 8] y, float[2, 5, 8] {value}")
    after = canonical(before)
    assert operators(after)["LayerNormalization"] == 1
    assert operators(after)["Add"] == 1
    assert_same_outputs(before, after)


def test_a_vector_along_another_axis_is_not_gamma() -> None:
    before = model(
        MEAN,
        VARIANCE,
        DIVIDE,
        "y = Mul(normal, column)",
        x="float[2, 8, 8] x",
        y="float[2, 8, 8] y",
        weights={"column": np.ones((8, 1), np.float32) * 3},
    )
    after = canonical(before)
    assert operators(after) == {"LayerNormalization": 1, "Mul": 1}
    assert_same_outputs(before, after)


def test_a_constant_that_adds_dimensions_is_not_beta() -> None:
    before = model(
        MEAN,
        VARIANCE,
        DIVIDE,
        "y = Add(normal, tall)",
        y="float[3, 2, 5, 8] y",
        weights={"tall": np.ones((3, 1, 1, 8), np.float32)},
    )
    after = canonical(before)
    assert operators(after) == {"LayerNormalization": 1, "Add": 1}
    assert_same_outputs(before, after)


def test_needs_opset_17() -> None:
    with pytest.raises(ir.passes.PreconditionError, match="needs opset 17, not 16"):
        FuseLayerNormPass()(model(*TORCH, opset=16))
