"""Constants that hold the same are stored once."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from graphs import assert_same_outputs, graph

from lsp_deploy.passes.merge_initializers import MergeInitializersPass

ONES = np.ones((8, 8), np.float32)


def merged(before: ir.Model) -> list[str]:
    after = before.clone()
    modified = MergeInitializersPass()(after).modified
    assert modified == (len(after.graph.initializers) < len(before.graph.initializers))
    assert_same_outputs(before, after)
    assert not MergeInitializersPass()(after).modified
    return sorted(after.graph.initializers)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.int8])
def test_merges_equal_constants_of_every_type(dtype: type) -> None:
    weights = {"a": ONES.astype(dtype), "b": ONES.astype(dtype), "c": (ONES * 2).astype(dtype)}
    nodes = (
        "d = Cast<to = 1>(a) e = Cast<to = 1>(b) f = Cast<to = 1>(c) u = MatMul(x, d) v = MatMul(u, e) y = MatMul(v, f)"
    )
    assert merged(graph(nodes, weights=weights)) == ["a", "c"]


def test_keeps_constants_of_other_shape_or_type_apart() -> None:
    weights = {"a": ONES, "b": ONES.reshape(1, 8, 8), "c": ONES.view(np.int32)}
    nodes = "u = MatMul(x, a) v = MatMul(u, b) d = Cast<to = 1>(c) y = MatMul(v, d)"
    assert merged(graph(nodes, weights=weights)) == ["a", "b", "c"]


def test_keeps_constants_that_are_outputs_or_inputs() -> None:
    before = graph(
        "u = MatMul(x, a) y = MatMul(u, b) z = Identity(b)",
        y="float[2, 5, 8] y, float[8, 8] a",
        weights={"a": ONES, "b": ONES},
    )
    assert merged(before) == ["a", "b"]


def test_negative_zero_is_not_zero() -> None:
    weights = {"a": np.zeros((8, 8), np.float32), "b": -np.zeros((8, 8), np.float32)}
    assert merged(graph("u = MatMul(x, a) v = MatMul(u, b) y = Add(v, x)", weights=weights)) == ["a", "b"]


def test_constants_that_only_begin_alike_stay_apart() -> None:
    end = ONES.copy()
    end[-1, -1] = 2
    big = {"a": np.tile(ONES, (16, 16)), "b": np.tile(end, (16, 16)), "c": np.tile(end, (16, 16)).T.copy()}
    nodes = "u = MatMul(x, a) v = MatMul(u, b) y = MatMul(v, c)"
    assert merged(graph(nodes, x="float[2, 128] x", y="float[2, 128] y", weights=big)) == ["a", "b"]
