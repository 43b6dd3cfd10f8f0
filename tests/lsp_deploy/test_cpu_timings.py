"""Measured times: what lies between them, and which candidate is the fastest."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lsp_deploy.hardware.cpu_timings import CANDIDATES, DENSITIES, CpuTimings, LayerTimes, LinearShape, type_of

SHAPE = LinearShape(M=197, K=384, N=1152)


def times(**curves: dict[float, float]) -> LayerTimes:
    """Times by candidate, with _ for the space in its name."""
    return LayerTimes(SHAPE, {" ".join(name.rsplit("_", 1)): curve for name, curve in curves.items()})


FULL = times(
    matmul_fp32={1.0: 100.0},
    qgemm_int8={1.0: 40.0},
    block_sparse_fp32={1.0: 90.0, 0.5: 50.0, 0.1: 20.0},
    block_sparse_int8={1.0: 48.0, 0.5: 28.0, 0.1: 14.0},
    gather_fp32={1.0: 120.0, 0.5: 80.0},
)


def test_times_between_densities_are_interpolated() -> None:
    assert FULL.at("block_sparse fp32", 0.75) == pytest.approx(70.0)
    np.testing.assert_allclose(FULL.at("block_sparse fp32", [0.5, 0.3]), [50.0, 35.0])


def test_what_is_not_skipped_takes_the_same_at_every_density() -> None:
    np.testing.assert_array_equal(FULL.at("matmul fp32", [0.0, 0.5, 1.0]), [100.0] * 3)


def test_below_the_least_density_nothing_is_promised() -> None:
    assert FULL.at("block_sparse fp32", 0.0) == 20.0


@given(
    st.lists(st.floats(1, 1e6), min_size=len(DENSITIES), max_size=len(DENSITIES)),
    st.lists(st.floats(0, 1), min_size=2, max_size=20),
)
def test_times_never_grow_where_blocks_are_removed(measured: list[float], densities: list[float]) -> None:
    found = times(block_sparse_fp32=dict(zip(DENSITIES, measured, strict=True))).at(
        "block_sparse fp32", np.sort(densities)
    )
    assert (np.diff(found) >= -1e-9 * found[1:]).all()
    assert found.max() <= measured[0], "the dense time stands"


@pytest.mark.parametrize(
    ("dtype", "density", "fastest"),
    [
        (None, 1.0, "qgemm int8"),
        (None, 0.5, "block_sparse int8"),
        ("int8", 0.9, "qgemm int8"),
        ("fp32", 1.0, "block_sparse fp32"),
        ("fp32", 0.5, "block_sparse fp32"),
    ],
)
def test_the_fastest_of_a_type_at_a_density(dtype, density: float, fastest: str) -> None:
    assert FULL.fastest(dtype, density) == fastest
    if dtype is not None:
        assert FULL.least_us(dtype, density) == FULL.at(fastest, density)


def test_stock_operators_are_taken_where_they_gain_a_tenth() -> None:
    stock = times(matmul_fp32={1.0: 100.0}, gather_fp32={1.0: 120.0, 0.5: 89.0, 0.1: 20.0})
    assert [stock.fastest("fp32", density) for density in (1.0, 0.55, 0.5)] == ["matmul fp32"] * 2 + ["gather fp32"]
    np.testing.assert_array_equal(stock.least_us("fp32", [1.0, 0.55, 0.5, 0.1]), [100.0, 100.0, 89.0, 20.0])
    lucky = times(matmul_fp32={1.0: 100.0}, gather_fp32={1.0: 80.0, 0.5: 60.0})
    assert lucky.fastest("fp32") == "matmul fp32"
    slow = times(
        matmul_fp32={1.0: 100.0}, gather_fp32={1.0: 120.0, 0.5: 60.0}, block_sparse_fp32={1.0: 400.0, 0.5: 70.0}
    )
    assert slow.fastest("fp32", 0.5) == "gather fp32", "where the operator is slower, too"


def test_what_was_not_timed_has_no_time() -> None:
    assert FULL.usable("bf16") == []
    with pytest.raises(KeyError):
        FULL.at("block_sparse bf16")
    with pytest.raises(ValueError):
        FULL.fastest("bf16")
    with pytest.raises(ValueError, match="not one of"):
        type_of("magic int8")


def test_the_time_of_a_convolution_is_that_of_all_types() -> None:
    conv = LayerTimes(replace(SHAPE, is_conv=True), {"matmul fp32": {1.0: 100.0}})
    assert conv.fastest("int8") == "matmul fp32" and conv.least_us("int8") == 100.0


def test_zeros_gain_where_the_fastest_gets_faster() -> None:
    assert FULL.gain_from_zeros() == pytest.approx(40.0 - 14.0)
    assert times(matmul_fp32={1.0: 10.0}, block_sparse_fp32={1.0: 30.0, 0.1: 12.0}).gain_from_zeros() == 0


def test_names_and_words() -> None:
    assert [type_of(name) for name in CANDIDATES] == ["fp32", "int8", "fp32", "bf16", "int8", "fp32"]
    assert CpuTimings(1, {}).conditions == "measured, 1 thread"
    assert CpuTimings(2, {}).conditions == "measured, 2 threads"
