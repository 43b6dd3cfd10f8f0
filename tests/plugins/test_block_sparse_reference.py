"""The reference against plain arithmetic."""

import ml_dtypes
import numpy as np
import pytest
from block_sparse_cases import case, cpu_cases
from hypothesis import given, settings

from lsp_deploy.plugins.block_sparse.reference import activate, quantize


def test_float32_is_the_product_in_double_precision():
    one = case(K=300, N=70, residual=True)
    expected = one.x.astype(np.float64) @ one.weight.astype(np.float64) + one.bias + one.residual
    assert one.expected().dtype == np.float32
    np.testing.assert_allclose(one.expected(), expected, rtol=1e-7)


def test_bfloat16_rounds_x_to_nearest_even():
    one = case("bfloat16", bias=False)
    rounded = one.x.astype(ml_dtypes.bfloat16).astype(np.float64)
    assert (rounded != one.x).any()
    np.testing.assert_allclose(one.expected(), rounded @ one.weight.astype(np.float64), rtol=1e-6, atol=1e-9)


def test_int8_sums_exactly():
    one = case("int8", K=2000, zeros=0.0, x_type="int8", bias=False)
    sums = one.x.astype(object) @ one.weight.astype(object)
    np.testing.assert_array_equal(one.expected(), (sums * one.scale.astype(object)).astype(np.float32))


def test_float_x_is_quantized_around_its_offset():
    one = case("int8", x_offset=0.75, bias=False)
    q = np.clip(np.round((one.x - 0.75) / 2.0**-5), -128, 127)
    assert (np.abs(q) > 100).any()
    np.testing.assert_array_equal(one.expected(), (q @ one.weight.astype(np.float64) * one.scale).astype(np.float32))


def test_quantize_multiplies_with_the_rounded_reciprocal():
    # 0.5 / 0.1 is 5 by division; with the reciprocal in float32 a tie may fall to the other side.
    x, scale = np.float32(np.linspace(-3, 3, 2001)), 0.1
    expected = np.rint(x * (np.float32(1) / np.float32(scale)))
    np.testing.assert_array_equal(quantize(x, scale, 0.0), expected)
    np.testing.assert_array_equal(quantize(np.float32([1e9, -1e9, 0.25]), 0.1, 0.25), [127, -128, 0])


@settings(max_examples=40)
@given(one=cpu_cases())
def test_shape_type_and_range(one):
    y = one.expected()
    assert y.shape == (*one.x.shape[:-1], one.operator.N)
    assert y.dtype == one.operator.out_type.numpy()


def test_activation_comes_before_the_residual():
    one = case(activation="relu", residual=True)
    assert (one.expected() - one.residual >= -1e-6).all()


@pytest.mark.parametrize(
    ("activation", "at_one"), [("none", 1.0), ("relu", 1.0), ("gelu", 0.841344746), ("gelu_tanh", 0.841191990)]
)
def test_activations(activation, at_one):
    y = activate(np.array([1.0, 0.0, -20.0]), activation)
    np.testing.assert_allclose(y, [at_one, 0.0, -20.0 if activation == "none" else 0.0], atol=1e-9)
