"""New weights and biases take the place of the dense ones, in every orientation, and of those alone."""

import numpy as np
import pytest
from pass_models import graph, layer, plan, run

from lsp_deploy.errors import UserError
from lsp_deploy.passes.own_constants import OwnConstantsPass
from lsp_deploy.passes.replace_parameters import ReplaceParametersPass

RNG = np.random.default_rng(0)
W, V = RNG.standard_normal((2, 8, 6)).astype(np.float32)
B, C = RNG.standard_normal((2, 6)).astype(np.float32)
X = RNG.standard_normal((3, 8)).astype(np.float32)

TWO_LAYERS = (
    "g (float[3, 8] x) => (float[3, 6] a, float[3, 6] b)"
    "{ p = MatMul(x, w)  a = Add(p, c)  q = MatMul(x, w)  b = Add(q, c) }"
)


def replaced(model, *layers, weights=None, biases=None):
    made = plan(*layers)
    made.weights.update(weights or {})
    made.biases.update(biases or {})
    assert ReplaceParametersPass(made)(model).modified
    return model


def test_matmul_with_a_bias_of_its_own_node():
    text = "g (float[3, 8] x) => (float[3, 6] y) { p = MatMul(x, w)  y = Add(c, p) }"
    model = replaced(graph(text, w=W, c=B), layer("p", 8, 6), weights={"p": V}, biases={"p": C})
    assert len(model.graph.initializers) == 2
    np.testing.assert_allclose(run(model, x=X)["y"], X @ V + C, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("transposed", [0, 1])
def test_gemm_with_factors(transposed):
    gemm = f"Gemm <transB = {transposed}, alpha = 0.5, beta = 4.0> (x, w, c)"
    text = f"g (float[3, 8] x) => (float[3, 6] y) {{ y = {gemm} }}"
    model = graph(text, w=W.T.copy() if transposed else W, c=B)
    replaced(model, layer("y", 8, 6), weights={"y": V}, biases={"y": C})
    np.testing.assert_allclose(run(model, x=X)["y"], X @ V + C, rtol=1e-5, atol=1e-6)


def test_patch_embedding():
    text = (
        "g (float[1, 2, 4, 4] x) => (float[1, 6, 2, 2] y)"
        "{ y = Conv <kernel_shape = [2, 2], strides = [2, 2]> (x, w, c) }"
    )
    image = RNG.standard_normal((1, 2, 4, 4)).astype(np.float32)
    patches = image.reshape(1, 2, 2, 2, 2, 2).transpose(0, 2, 4, 1, 3, 5).reshape(4, 8)
    model = graph(text, w=W.T.reshape(6, 2, 2, 2).copy(), c=B)
    replaced(model, layer("y", 8, 6), weights={"y": V}, biases={"y": C})
    np.testing.assert_allclose(run(model, x=image)["y"].reshape(6, 4).T, patches @ V + C, rtol=1e-5, atol=1e-6)


def test_what_another_layer_reads_stays():
    model = replaced(graph(TWO_LAYERS, w=W, c=B), layer("p", 8, 6), weights={"p": V}, biases={"p": C})
    outputs = run(model, x=X)
    np.testing.assert_allclose(outputs["a"], X @ V + C, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(outputs["b"], X @ W + B, rtol=1e-5, atol=1e-6)


def test_constants_of_other_nodes():
    text = "g (float[3, 8] x) => (float[3, 6] y) { p = MatMul(x, w)  q = Add(p, c)  y = Mul(q, c) }"
    made = plan(layer("p", 8, 6))
    made.constants["y:1"] = C
    model = graph(text, w=W, c=B)
    assert ReplaceParametersPass(made)(model).modified
    np.testing.assert_allclose(run(model, x=X)["y"], (X @ W + B) * C, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("key", ["z:1", "y:7", "y:0"])
def test_constants_that_the_model_does_not_have_are_refused(key):
    made = plan(layer("p", 8, 6))
    made.constants[key] = C
    model = graph("g (float[3, 8] x) => (float[3, 6] y) { p = MatMul(x, w)  y = Add(p, c) }", w=W, c=B)
    with pytest.raises(UserError, match=f"holds a constant for {key}"):
        ReplaceParametersPass(made)(model)


def test_a_bias_for_a_layer_without_one_is_refused():
    model = graph("g (float[3, 8] x) => (float[3, 6] y) { y = MatMul(x, w) }", w=W)
    made = plan(layer("y", 8, 6))
    made.biases["y"] = C
    with pytest.raises(UserError, match="holds a bias for layer y"):
        ReplaceParametersPass(made)(model)


def test_every_node_gets_constants_of_its_own_but_weights_stay_shared():
    model = graph(TWO_LAYERS, w=W, c=B)
    before = run(model, x=X)
    assert OwnConstantsPass({"w"})(model).modified
    assert len({node.inputs[1].name for node in model.graph if node.op_type == "Add"}) == 2
    assert {node.inputs[1].name for node in model.graph if node.op_type == "MatMul"} == {"w"}
    for name, value in run(model, x=X).items():
        np.testing.assert_array_equal(value, before[name])
    assert not OwnConstantsPass({"w"})(model).modified
