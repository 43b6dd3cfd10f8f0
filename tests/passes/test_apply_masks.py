"""Masks become zeros, in every orientation and with shared weights."""

import numpy as np
import pytest
from pass_models import array_of, graph, layer, node_of, plan, run

from lsp_deploy.errors import UserError
from lsp_deploy.passes.apply_masks import ApplyMasksPass

RNG = np.random.default_rng(0)
W = RNG.standard_normal((8, 6)).astype(np.float32)
MASK = RNG.random((8, 6)) < 0.5
X = RNG.standard_normal((3, 8)).astype(np.float32)

SHARED = "g (float[3, 8] x) => (float[3, 6] a, float[3, 6] b) { a = MatMul(x, w)  b = MatMul(x, w) }"


def test_matmul_weight():
    model = graph("g (float[3, 8] x) => (float[3, 6] y) { y = MatMul(x, w) }", w=W)
    result = ApplyMasksPass(plan(layer("y", 8, 6), masks={"y": MASK}))(model)
    assert result.modified
    np.testing.assert_array_equal(array_of(model, "w"), np.where(MASK, W, 0))
    np.testing.assert_allclose(run(model, x=X)["y"], X @ (W * MASK), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("transposed", [0, 1])
def test_gemm_weight(transposed):
    text = f"g (float[3, 8] x) => (float[3, 6] y) {{ y = Gemm <transB = {transposed}> (x, w, c) }}"
    model = graph(text, w=W.T.copy() if transposed else W, c=np.ones(6, np.float32))
    ApplyMasksPass(plan(layer("y", 8, 6), masks={"y": MASK}))(model)
    np.testing.assert_allclose(run(model, x=X)["y"], X @ (W * MASK) + 1, rtol=1e-5, atol=1e-6)


def test_patch_embedding_weight():
    text = (
        "g (float[1, 2, 4, 4] x) => (float[1, 6, 2, 2] y) { y = Conv <kernel_shape = [2, 2], strides = [2, 2]> (x, w) }"
    )
    image = RNG.standard_normal((1, 2, 4, 4)).astype(np.float32)
    patches = image.reshape(1, 2, 2, 2, 2, 2).transpose(0, 2, 4, 1, 3, 5).reshape(4, 8)
    model = graph(text, w=W.T.reshape(6, 2, 2, 2).copy())
    ApplyMasksPass(plan(layer("y", 8, 6), masks={"y": MASK}))(model)
    np.testing.assert_allclose(run(model, x=image)["y"].reshape(6, 4).T, patches @ (W * MASK), rtol=1e-5, atol=1e-6)


def test_shared_weight_with_equal_masks_stays_shared():
    model = graph(SHARED, w=W)
    ApplyMasksPass(plan(layer("a", 8, 6), layer("b", 8, 6), masks={"a": MASK, "b": MASK.copy()}))(model)
    assert list(model.graph.initializers) == ["w"]
    np.testing.assert_array_equal(array_of(model, "w"), np.where(MASK, W, 0))


def test_shared_weight_with_different_masks_is_unshared():
    model = graph(SHARED, w=W)
    ApplyMasksPass(plan(layer("a", 8, 6), layer("b", 8, 6), masks={"a": MASK, "b": ~MASK}))(model)
    assert sorted(model.graph.initializers) == ["a/weight", "b/weight"]
    outputs = run(model, x=X)
    np.testing.assert_allclose(outputs["a"], X @ (W * MASK), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(outputs["b"], X @ (W * ~MASK), rtol=1e-5, atol=1e-6)


def test_another_reader_of_the_weight_keeps_it():
    model = graph(SHARED, w=W)
    ApplyMasksPass(plan(layer("a", 8, 6), layer("b", 8, 6), masks={"a": MASK}))(model)
    outputs = run(model, x=X)
    np.testing.assert_allclose(outputs["a"], X @ (W * MASK), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(outputs["b"], X @ W, rtol=1e-5, atol=1e-6)


def test_a_clone_keeps_its_weights():
    model = graph(SHARED, w=W)
    clone = model.clone()
    ApplyMasksPass(plan(layer("a", 8, 6), layer("b", 8, 6), masks={"a": MASK, "b": MASK}))(clone)
    np.testing.assert_array_equal(array_of(model, "w"), W)


def test_float16_weight_stays_float16():
    model = graph("g (float16[3, 8] x) => (float16[3, 6] y) { y = MatMul(x, w) }", w=W.astype(np.float16))
    ApplyMasksPass(plan(layer("y", 8, 6), masks={"y": MASK}))(model)
    assert array_of(model, "w").dtype == np.float16
    assert not array_of(model, "w")[~MASK].any()


def test_no_masks_change_nothing():
    model = graph(SHARED, w=W)
    result = ApplyMasksPass(plan(layer("a", 8, 6), layer("b", 8, 6)))(model)
    assert not result.modified
    assert node_of(model, "a").inputs[1] is node_of(model, "b").inputs[1]


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (layer("z", 8, 6), "a layer z that the model does not have"),
        (layer("a", 6, 8), "K×N = 6×8, but the model has a weight of K×N = 8×6"),
    ],
)
def test_plan_of_another_model_is_refused(wrong, says):
    with pytest.raises(UserError, match=says):
        ApplyMasksPass(plan(wrong, masks={wrong.name: np.ones((wrong.K, wrong.N), bool)}))(graph(SHARED, w=W))


def test_layer_without_constant_weight_is_refused():
    model = graph("g (float[3, 8] x, float[8, 6] w) => (float[3, 6] y) { y = MatMul(x, w) }")
    with pytest.raises(UserError, match="no constant weight there"):
        ApplyMasksPass(plan(layer("y", 8, 6), masks={"y": MASK}))(model)


def test_mask_of_another_size_is_refused():
    with pytest.raises(UserError, match=r"mask of layer a is \(4, 6\)"):
        ApplyMasksPass(plan(layer("a", 8, 6), masks={"a": np.ones((4, 6), bool)}))(graph(SHARED, w=W))
