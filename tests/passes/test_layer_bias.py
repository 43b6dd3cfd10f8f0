"""What is added to a bias: in place, beside other readers, or in an Add that an output hangs on."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from graphs import graph, only, operators, run

from lsp_deploy.passes.infer_shapes import InferShapesPass
from lsp_deploy.passes.layer_bias import add_to_bias

RANDOM = np.random.default_rng(0)
W = RANDOM.standard_normal((8, 6)).astype(np.float32)
B = RANDOM.standard_normal(6).astype(np.float32)
X = RANDOM.standard_normal((3, 8)).astype(np.float32)
CORRECTION = RANDOM.standard_normal(6)


def made(nodes: str, y: str = "float[3, 6] y") -> ir.Model:
    weights = {"w": W, "b": B, "wt": W.T.copy(), "column": B[:3, None]}
    model = graph(nodes, x="float[3, 8] x", y=y, weights=weights)
    InferShapesPass()(model)
    return model


@pytest.mark.parametrize(
    "nodes",
    [
        "y = MatMul(x, w)",
        "m = MatMul(x, w) y = Add(m, b)",
        "m = MatMul(x, w) y = Add(b, m)",
        "y = Gemm (x, w)",
        "y = Gemm <alpha = 2.0, beta = 0.5> (x, w, b)",
        "y = Gemm <transB = 1> (x, wt, b)",
        "y = Gemm (x, w, column)",
        "m = MatMul(x, w) n = Add(m, b) y = Mul(n, m)",
    ],
)
def test_the_output_moves_by_the_correction(nodes: str) -> None:
    model = made(nodes)
    linear = next(node for node in model.graph if node.op_type in ("MatMul", "Gemm"))
    (before,) = run(made(nodes), {"x": X})
    y = add_to_bias(model.graph, linear, CORRECTION)
    model.graph.sort()
    (after,) = run(model, {"x": X})
    assert [value.name for value in model.graph.outputs] == ["y"]
    if "n, m" in nodes:  # both readers of the product see it
        product = X @ W + CORRECTION
        np.testing.assert_allclose(after, (product + B) * product, rtol=1e-4, atol=1e-5)
    else:
        assert y is model.graph.outputs[0]
        np.testing.assert_allclose(after, before + CORRECTION, rtol=1e-5, atol=1e-5)


def test_a_bias_that_another_layer_reads_stays_for_that_layer() -> None:
    model = made("m = MatMul(x, w) y = Add(m, b) n = MatMul(x, w) z = Add(n, b)", y="float[3, 6] y, float[3, 6] z")
    before = run(model, {"x": X})
    add_to_bias(model.graph, next(iter(model.graph)), CORRECTION)
    after = run(model, {"x": X})
    np.testing.assert_allclose(after[0], before[0] + CORRECTION, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(after[1], before[1])


def test_a_convolution_takes_a_bias_itself() -> None:
    image = RANDOM.standard_normal((2, 8, 3, 3)).astype(np.float32)
    weights = {"k": W.T.reshape(6, 8, 1, 1).copy()}
    model = graph("y = Conv (x, k)", x="float[2, 8, 3, 3] x", y="float[2, 6, 3, 3] y", weights=weights)
    (before,) = run(model, {"x": image})
    add_to_bias(model.graph, only(model, "Conv"), CORRECTION)
    (after,) = run(model, {"x": image})
    np.testing.assert_allclose(after, before + CORRECTION[:, None, None], rtol=1e-5, atol=1e-5)
    assert operators(model) == {"Conv": 1}
