"""GELU in every order of writing it, and what only looks like it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from graphs import assert_same_outputs, graph, only, operators
from hypothesis import given, settings
from hypothesis import strategies as st

from lsp_deploy.passes.canonicalize import canonicalize
from lsp_deploy.passes.fuse_gelu import FuseGeluPass, find_gelus

WEIGHTS = {
    "one": np.float32(1),
    "half": np.float32(0.5),
    "two": np.float32(2),
    "three": np.float32(3),
    "root_two": np.float32(math.sqrt(2)),
    "inverse_root_two": np.float32(math.sqrt(0.5)),
    "cubic": np.float32(0.044715),
    "outer": np.float32(math.sqrt(2 / math.pi)),
    "sigmoid_factor": np.float32(1.702),
}

ERF = "scaled = Div(x, root_two) f = Erf(scaled)"
TANH = "cube = Pow(x, three) small = Mul(cubic, cube) sum = Add(x, small) inner = Mul(outer, sum) f = Tanh(inner)"
RESULT = "shifted = Add(f, one) product = Mul(x, shifted) y = Mul(product, half)"


def model(*parts: str, opset: int = 20, weights: dict[str, Any] | None = None, **options: Any) -> ir.Model:
    return graph(" ".join(parts), opset=opset, weights=WEIGHTS | (weights or {}), **options)


def fused(before: ir.Model, *, relative: float = 1e-5) -> str:
    """Check that nothing but one Gelu is left, and that it computes the same; return its form."""
    after = canonicalize(before.clone(), max_opset=20)
    assert operators(after) == {"Gelu": 1}
    assert_same_outputs(before, after, relative=relative)
    attributes = only(after, "Gelu").attributes
    return attributes["approximate"].as_string() if "approximate" in attributes else "none"


def left_alone(before: ir.Model) -> None:
    after = canonicalize(before.clone(), max_opset=20)
    assert operators(after)["Gelu"] == 0
    assert_same_outputs(before, after)


ERF_ARGUMENTS = {
    "divided": ERF,
    "multiplied": "scaled = Mul(x, inverse_root_two) f = Erf(scaled)",
    "multiplied from the left": "scaled = Mul(inverse_root_two, x) f = Erf(scaled)",
}
TANH_ARGUMENTS = {
    "power": TANH,
    "products": "s = Mul(x, x) cube = Mul(s, x) small = Mul(cubic, cube) sum = Add(small, x) inner = Mul(sum, outer) "
    "f = Tanh(inner)",
    "x taken out": "s = Mul(x, x) small = Mul(s, cubic) sum = Add(one, small) part = Mul(x, outer) "
    "inner = Mul(part, sum) f = Tanh(inner)",
    "squared": "s = Pow(x, two) small = Mul(s, cubic) sum = Add(small, one) part = Mul(x, sum) "
    "inner = Mul(outer, part) f = Tanh(inner)",
}
RESULTS = {
    "x (1 + f), halved": RESULT,
    "x/2 (1 + f)": "halved = Mul(x, half) shifted = Add(one, f) y = Mul(halved, shifted)",
    "x (1 + f)/2": "shifted = Add(f, one) halved = Mul(half, shifted) y = Mul(halved, x)",
    "halved by division": "shifted = Add(f, one) product = Mul(shifted, x) y = Div(product, two)",
    "multiplied out": "halved = Mul(x, half) product = Mul(halved, f) y = Add(product, halved)",
}


@pytest.mark.parametrize("result", RESULTS)
@pytest.mark.parametrize("argument", ERF_ARGUMENTS)
def test_fuses_erf_form(argument: str, result: str) -> None:
    assert fused(model(ERF_ARGUMENTS[argument], RESULTS[result])) == "none"


@pytest.mark.parametrize("result", RESULTS)
@pytest.mark.parametrize("argument", TANH_ARGUMENTS)
def test_fuses_tanh_form(argument: str, result: str) -> None:
    assert fused(model(TANH_ARGUMENTS[argument], RESULTS[result])) == "tanh"


@st.composite
def products(draw: st.DrawFn, factors: tuple[str, ...], name: str) -> str:
    """Multiply the factors in any order and with any brackets."""
    values, nodes = list(factors), []
    while len(values) > 1:
        first = values.pop(draw(st.integers(0, len(values) - 1)))
        second = values.pop(draw(st.integers(0, len(values) - 1)))
        result = name if not values else f"{name}_{len(values)}"
        nodes.append(f"{result} = Mul({first}, {second})")
        values.append(result)
    return " ".join(nodes)


@settings(max_examples=30)
@given(result=products(("x", "half", "shifted"), "y"), swap=st.booleans())
def test_fuses_erf_form_in_any_order(result: str, swap: bool) -> None:
    shifted = "shifted = Add(one, f)" if swap else "shifted = Add(f, one)"
    assert fused(model(ERF, shifted, result)) == "none"


@settings(max_examples=30)
@given(
    cube=products(("x", "x", "x", "cubic"), "small"),
    inner=products(("sum", "outer"), "inner"),
    result=products(("shifted", "x", "half"), "y"),
)
def test_fuses_tanh_form_in_any_order(cube: str, inner: str, result: str) -> None:
    assert fused(model(cube, "sum = Add(x, small)", inner, "f = Tanh(inner) shifted = Add(f, one)", result)) == "tanh"


@pytest.mark.parametrize("opset", [13, 16, 17, 19])
def test_raises_the_opset_to_20_where_a_gelu_needs_it(opset: int) -> None:
    before = model(ERF, RESULT, opset=opset)
    after = canonicalize(before.clone(), max_opset=22)
    assert after.opset_imports[""] == 20
    assert_same_outputs(before, after)


def test_recognises_but_keeps_gelu_where_the_target_stops_below_opset_20() -> None:
    before = model(ERF, RESULT, opset=17)
    after = canonicalize(before.clone(), max_opset=19)
    assert after.opset_imports[""] == 17
    assert operators(after)["Gelu"] == 0
    (gelu,) = find_gelus(after.graph)
    assert (gelu.x.name, gelu.y.name, gelu.approximate) == ("x", "y", "none")
    assert gelu.nodes == set(after.graph)
    assert_same_outputs(before, after)


def test_fuses_half_precision() -> None:
    weights = {name: np.float16(number) for name, number in WEIGHTS.items()}
    before = model(ERF, RESULT, x="float16[2, 5, 8] x", y="float16[2, 5, 8] y", weights=weights)
    assert fused(before, relative=1e-2) == "none"


def test_fuses_constants_of_shape_one() -> None:
    weights = {name: np.full(1, number, np.float32) for name, number in WEIGHTS.items()}
    assert fused(model(ERF, RESULT, weights=weights)) == "none"


def test_fuses_where_x_is_itself_a_product() -> None:
    before = model("z = Mul(w, half)", ERF.replace("(x", "(z"), RESULT.replace("(x", "(z"), x="float[2, 5, 8] w")
    after = canonicalize(before.clone(), max_opset=20)
    assert operators(after) == {"Mul": 1, "Gelu": 1}
    assert_same_outputs(before, after)


def test_keeps_name_and_place_of_an_output() -> None:
    before = model(ERF, RESULT, "z = Exp(y)", y="float[2, 5, 8] y, float[2, 5, 8] z")
    after = canonicalize(before.clone(), max_opset=20)
    assert operators(after) == {"Gelu": 1, "Exp": 1}
    assert_same_outputs(before, after)


LOOKALIKES = {
    "QuickGELU": "scaled = Mul(x, sigmoid_factor) f = Sigmoid(scaled) y = Mul(x, f)",
    "erf of x/2": ("scaled = Div(x, two) f = Erf(scaled)", RESULT),
    "erf of x": ("f = Erf(x)", RESULT),
    "not halved": (ERF, "shifted = Add(f, one) y = Mul(x, shifted)"),
    "shifted by two": (ERF, RESULT.replace("one", "two")),
    "times another tensor": ("other = Exp(x)", ERF, RESULT.replace("Mul(x", "Mul(other")),
    "tanh without the cube": ("inner = Mul(outer, x) f = Tanh(inner)", RESULT),
    "tanh with a square": (TANH.replace("three", "two"), RESULT),
    "tanh with another factor": (TANH.replace("Mul(cubic", "Mul(half"), RESULT),
    "minus": (ERF, RESULT.replace("Add(f, one)", "Sub(f, one)")),
}


@pytest.mark.parametrize("kind", LOOKALIKES)
def test_leaves_lookalikes(kind: str) -> None:
    parts = LOOKALIKES[kind]
    left_alone(model(*([parts] if isinstance(parts, str) else parts)))


@pytest.mark.parametrize("value", ["scaled", "f", "shifted", "product"])
def test_leaves_gelu_whose_parts_are_outputs(value: str) -> None:
    left_alone(model(ERF, RESULT, y=f"float[2, 5, 8] y, float[2, 5, 8] {value}"))


@pytest.mark.parametrize("value", ["scaled", "f", "shifted", "product"])
def test_leaves_gelu_whose_parts_are_used_elsewhere(value: str) -> None:
    left_alone(model(ERF, RESULT.replace("y =", "z ="), f"other = Exp({value}) y = Add(z, other)"))


def test_leaves_gelu_whose_constants_add_dimensions() -> None:
    weights = {"half": np.full((1, 1, 1, 1), 0.5, np.float32)}
    left_alone(model(ERF, RESULT, y="float[1, 2, 5, 8] y", weights=weights))


def test_leaves_double_precision() -> None:
    weights = {name: np.float64(number) for name, number in WEIGHTS.items()}
    left_alone(model(TANH, RESULT, x="double[2, 5, 8] x", y="double[2, 5, 8] y", weights=weights))


def test_needs_opset_20() -> None:
    with pytest.raises(ir.passes.PreconditionError, match="needs opset 20, not 17"):
        FuseGeluPass()(model(ERF, RESULT, opset=17))
