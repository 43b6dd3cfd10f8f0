"""Views against numpy: where the entries of a value lie after any moves, and when they lie at no regular distances."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from graphs import graph
from hypothesis import given, settings
from hypothesis import strategies as st

from lsp_deploy.passes.infer_shapes import InferShapesPass
from lsp_deploy.passes.strided_views import ConcreteSizes, View


def entries(view: View) -> np.ndarray:
    """The positions that a view reads, in its own shape."""
    positions = np.array(view.offset)
    for axis in view.axes:
        steps = np.array(0)
        for size, stride in axis:
            steps = np.add.outer(steps, stride * np.arange(size))
        positions = np.add.outer(positions, steps.reshape(-1))
    return positions


@st.composite
def shapes_of(draw: st.DrawFn, count: int) -> list[int]:
    """Any shape of `count` entries."""
    shape = []
    while count > 1:
        divisors = [divisor for divisor in range(2, count + 1) if count % divisor == 0]
        shape.append(draw(st.sampled_from(divisors)))
        count //= shape[-1]
    return draw(st.permutations([*shape, *draw(st.lists(st.just(1), max_size=2))]))


@settings(max_examples=300)
@given(data=st.data(), shape=st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=1, max_size=4))
def test_moves_are_those_of_numpy(data: st.DataObject, shape: list[int]) -> None:
    view, array = View.whole(shape), np.arange(math.prod(shape)).reshape(shape)
    for _ in range(data.draw(st.integers(1, 5))):
        move = data.draw(st.sampled_from(["transpose", "reshape", "cut"]))
        after: View | None
        if move == "transpose":
            order = data.draw(st.permutations(range(array.ndim)))
            after, array = view.transposed(order), array.transpose(order)
        elif move == "reshape":
            new = data.draw(shapes_of(array.size))
            after, array = view.reshaped(new), array.reshape(new)
        else:
            axis = data.draw(st.integers(0, array.ndim - 1)) if array.ndim else None
            if axis is None:
                return
            start = data.draw(st.integers(0, array.shape[axis] - 1))
            length = data.draw(st.integers(1, array.shape[axis] - start))
            after, array = view.cut(axis, start, length), array.take(range(start, start + length), axis)
        if after is None:  # a reshape of what is only transposed is always regular along the axes that it keeps
            assert move in ("reshape", "cut")
            return
        view = after
        assert np.array_equal(entries(view), array)


@settings(max_examples=100)
@given(data=st.data(), shape=st.lists(st.sampled_from([2, 3, 4, 6]), min_size=1, max_size=3))
def test_a_value_as_it_is_takes_any_shape(data: st.DataObject, shape: list[int]) -> None:
    new = data.draw(shapes_of(math.prod(shape)))
    assert View.whole(shape).reshaped(new) == View.whole(new)


def test_equal_layouts_are_equal_however_they_were_made() -> None:
    heads = View.whole((5, 24)).reshaped((5, 4, 6))
    assert heads is not None
    other = View.whole((5, 4, 6)).transposed((1, 0, 2)).transposed((1, 0, 2))
    assert heads == other
    merged = heads.transposed((1, 0, 2)).reshaped((20, 6))
    assert merged is not None and merged.reshaped((4, 5, 6)) == heads.transposed((1, 0, 2))
    assert heads != heads.transposed((1, 0, 2))


@pytest.mark.parametrize(
    ("sizes", "new"),
    [((4, 3), (4, 3)), ((4, 3), (2, 6)), ((4, 3), (5, 2)), ((4, 3), (3, 5))],
)
def test_irregular_distances_are_no_view(sizes: tuple[int, ...], new: tuple[int, ...]) -> None:
    assert View.whole(sizes).transposed((1, 0)).reshaped(new) is None


def test_a_part_across_factors_is_no_view() -> None:
    merged = View.whole((2, 3, 4)).transposed((1, 0, 2)).reshaped((6, 4))
    assert merged is not None
    assert merged.cut(0, 1, 2) is None
    assert merged.cut(0, 2, 2) is not None


@pytest.mark.parametrize(
    ("node", "numpy"),
    [
        ("y = Transpose<perm = [2, 0, 1]>(x)", lambda x: x.transpose(2, 0, 1)),
        ("y = Transpose(x)", lambda x: x.transpose()),
        ("y = Reshape(x, shape)", lambda x: x.reshape(2, 3, 2, 8)),
        ("y = Unsqueeze(x, first)", lambda x: x[None]),
        ("y = Flatten<axis = 1>(x)", lambda x: x.reshape(2, 48)),
        ("a, y = Split<axis = 1>(x, lengths)", lambda x: x[:, 2:]),
        ("y = Gather<axis = 1>(x, minus_two)", lambda x: x[:, -2]),
        ("y = Slice(x, one, last, one)", lambda x: x[:, 1:]),
        ("y = Slice(x, minus_two_, last, two)", lambda x: x[..., -2:]),
        ("y = Slice(x, one, minus_one, one, one)", lambda x: x[:, 1:-1]),
        ("y = Slice(x, one, last, two, two)", None),
        ("y = Gather<axis = 1>(x, lengths)", None),
        ("y = Neg(x)", None),
    ],
)
def test_nodes_that_only_move(node: str, numpy: Any) -> None:
    constants = {
        "shape": np.array([2, 3, 2, 8]),
        "first": np.array([0]),
        "lengths": np.array([2, 4]),
        "minus_two": np.array(-2),
        "minus_two_": np.array([-2]),
        "one": np.array([1]),
        "two": np.array([2]),
        "minus_one": np.array([-1]),
        "last": np.array([np.iinfo(np.int64).max]),
    }
    model = graph(node, x="float[2, 6, 8] x", y="float y", weights=constants)
    model.graph.outputs[0].shape = None
    InferShapesPass()(model)
    view = View.whole((2, 6, 8)).through(model.graph.outputs[0], ConcreteSizes())
    if numpy is None:
        assert view is None
    else:
        assert view is not None
        assert np.array_equal(entries(view), numpy(np.arange(96).reshape(2, 6, 8)))


def test_names_stand_for_numbers() -> None:
    sizes = ConcreteSizes()
    batch, windows, unknown = ir.SymbolicDim("batch"), ir.SymbolicDim("batch") * 16, ir.SymbolicDim(None)
    first = sizes.of(ir.Value(name="x", shape=ir.Shape([batch, 4])))
    second = sizes.of(ir.Value(name="y", shape=ir.Shape([windows, ir.SymbolicDim("tokens")])))
    assert first is not None and second is not None
    assert second[0] == 16 * first[0] and second[1] != first[0]
    (more,) = sizes.of(ir.Value(name="more", shape=ir.Shape([batch + 1]))) or (0,)
    assert more == first[0] + 1 and sizes.has_name(more)
    assert sizes.has_name(first[0]) and sizes.has_name(second[0]) and not sizes.has_name(4)
    assert sizes.of(ir.Value(name="z", shape=ir.Shape([unknown, 4]))) is None
    assert sizes.of(ir.Value(name="z")) is None
    assert sizes.of(None) is None
