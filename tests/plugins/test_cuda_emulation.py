"""The GPU kernels, run on this CPU by a machine that takes every freedom that a GPU has."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from cuda_emulation import SHAPES, Layer, emulation, expected, make_layer, small_integers
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from lsp_deploy.plugins.cuda.library import ACTIVATIONS, CudaLibrary

FLOAT16, BFLOAT16, INT8 = ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.INT8
TYPES = (FLOAT16, BFLOAT16, INT8)

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to compile the emulation with")


@pytest.fixture(scope="module")
def library(request: pytest.FixtureRequest) -> CudaLibrary:
    return emulation(Path(request.config.cache.mkdir("cuda")))


def all_of_int8(random: np.random.Generator, shape: tuple[int, ...]) -> NDArray[Any]:
    return random.integers(-128, 128, shape)


def reals(random: np.random.Generator, shape: tuple[int, ...]) -> NDArray[Any]:
    return random.uniform(-1, 1, shape)


@st.composite
def integer_layers(draw: st.DrawFn) -> Layer:
    values_type = draw(st.sampled_from(TYPES))
    out_type = draw(st.sampled_from((INT8, FLOAT16, BFLOAT16) if values_type == INT8 else (INT8, values_type)))
    residual = draw(
        st.sampled_from(
            (None, FLOAT16 if out_type == INT8 else out_type) if values_type == INT8 else (None, values_type)
        )
    )
    int8 = {"out_scale": draw(st.sampled_from((0.5, 1.0, 4.0))), "out_offset": draw(st.sampled_from((-3.0, 0.0, 8.0)))}
    return make_layer(
        draw(st.one_of(st.just(1), st.integers(2, 150))),
        (draw(st.integers(1, 140)), draw(st.integers(1, 150))),
        draw(st.sampled_from([(k, n) for k in (16, 32, 64) for n in (16, 32, 64)])),
        density=draw(st.sampled_from((0.0, 0.1, 0.3, 0.6, 1.0))),
        values_type=values_type,
        draw=small_integers,
        seed=draw(st.integers(0, 1 << 30)),
        residual=residual,
        activation=draw(st.sampled_from(("none", "relu"))),
        out_type=out_type,
        **int8 if out_type == INT8 else {},
    )


@given(integer_layers(), st.integers(1, 5), st.sampled_from((1, 1 << 15, 1 << 26)), st.integers(0, 1 << 30))
@settings(max_examples=150)
def test_every_tactic_is_exact_on_integers(
    library: CudaLibrary, layer: Layer, multiprocessors: int, l2_bytes: int, seed: int
) -> None:
    library.c.lsp_cuda_emulated_device(multiprocessors, l2_bytes, seed)
    with layer.plan(library) as plan:
        for tactic in range(len(plan.tactics)):
            y = layer.run(plan, tactic)
            np.testing.assert_array_equal(y, expected(layer), err_msg=plan.tactics[tactic])


@pytest.mark.parametrize("block", SHAPES, ids=lambda block: f"{block[0]}x{block[1]}")
@pytest.mark.parametrize("values_type", TYPES, ids=lambda dtype: dtype.name)
def test_reals_agree_with_float64(library: CudaLibrary, values_type: ir.DataType, block: tuple[int, int]) -> None:
    for number, (shape, m) in enumerate((((192, 320), 70), ((384, 96), 1), ((100, 90), 197))):
        layer = make_layer(
            m,
            shape,
            block,
            density=(0.5, 0.25, 0.8)[number],
            values_type=values_type,
            draw=all_of_int8 if values_type == INT8 else reals,
            seed=number,
            activation=ACTIVATIONS[number + 1 - number // 2],
            out_type=FLOAT16 if values_type == INT8 else values_type,
        )
        if values_type == INT8:
            layer.scale *= np.float32(2**-14)
        exact = expected(layer, ir.DataType.FLOAT)
        with layer.plan(library) as plan:
            for tactic, name in enumerate(plan.tactics):
                y = layer.run(plan, tactic).astype(np.float32)
                rounding = 2**-8 if values_type == BFLOAT16 else 2**-11
                np.testing.assert_allclose(y, exact, rtol=rounding, atol=1e-5, err_msg=name)


def test_int8_sums_are_exact(library: CudaLibrary) -> None:
    layer = make_layer(40, (256, 64), (32, 32), density=1, values_type=INT8, draw=all_of_int8, seed=0, out_type=FLOAT16)
    layer.x[0], layer.values[:] = -128, -128  # the largest sum
    layer.scale[:] = 2**-8
    with layer.plan(library) as plan:
        for tactic in range(len(plan.tactics)):
            np.testing.assert_array_equal(layer.run(plan, tactic), expected(layer))


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_activations_hold_over_their_whole_range(library: CudaLibrary, activation: str) -> None:
    x = np.linspace(-60, 60, 4001)[:, None].repeat(16, axis=1)
    layer = make_layer(
        len(x), (16, 16), (16, 16), density=1, values_type=FLOAT16, draw=small_integers, seed=0,
        activation=activation, out_type=FLOAT16,
    )  # fmt: skip
    layer.bias[:] = 0
    layer.x[:] = x
    with layer.plan(library) as plan:
        y = layer.run(plan, 0).astype(np.float32)
    np.testing.assert_allclose(y, expected(layer, ir.DataType.FLOAT), rtol=2**-11, atol=2e-6)


@pytest.mark.parametrize("activation", ["none", "relu", "gelu", "gelu_tanh"])
def test_infinite_and_missing_numbers_pass_through(library: CudaLibrary, activation: str) -> None:
    layer = make_layer(
        5, (32, 32), (32, 32), density=1, values_type=FLOAT16, draw=small_integers, seed=0, out_type=FLOAT16,
        activation=activation,
    )  # fmt: skip
    layer.bias[0], layer.bias[1] = np.inf, -np.inf
    layer.x[0] = np.nan
    with layer.plan(library) as plan:
        y = layer.run(plan, 0)
    assert np.isnan(y[0]).all()
    assert (y[1:, 0] == np.inf).all()
    assert (y[1:, 1] == (-np.inf if activation == "none" else 0)).all()


def test_clustering_lets_tiles_share_their_slices(library: CudaLibrary) -> None:
    """Block columns 0, 2, 4… keep the upper half of K, the others the lower: as they lie, no two neighbours share."""
    layer = make_layer(
        64, (128, 256), (32, 32), density=1, values_type=FLOAT16, draw=small_integers, seed=0, out_type=FLOAT16
    )
    columns = 8
    k_idx = tuple(k for column in range(columns) for k in ((0, 1) if column % 2 else (2, 3)))
    operator = dataclasses.replace(layer.operator, col_ptr=tuple(range(0, 2 * columns + 1, 2)), k_idx=k_idx)
    layer = dataclasses.replace(layer, operator=operator, values=layer.values[: len(layer.values) // 2])
    with layer.plan(library) as plan:
        assert plan.density(plan.tactics.index("64x64")) == 0.5
        for tactic in range(len(plan.tactics)):
            np.testing.assert_array_equal(layer.run(plan, tactic), expected(layer))


def test_the_default_tactic_follows_rows_and_device(library: CudaLibrary) -> None:
    """Few rows are dealt out in small tiles; where there are many for each multiprocessor, large ones load less."""
    layer = make_layer(
        1, (768, 768), (32, 32), density=0.5, values_type=FLOAT16, draw=small_integers, seed=0, out_type=FLOAT16
    )

    def tile_rows(rows: int, multiprocessors: int) -> int:
        library.c.lsp_cuda_emulated_device(multiprocessors, 1 << 20, 0)
        return int(plan.tactics[plan.default_tactic(rows)].split("x")[0])

    with layer.plan(library) as plan:
        assert tile_rows(1, 132) == 32
        assert tile_rows(200, 132) < 128 <= tile_rows(200, 2)
        assert tile_rows(100_000, 132) >= 128
        with pytest.raises(ValueError, match="M must be at least 1"):
            plan.default_tactic(0)


def test_a_wrong_order_of_values_is_noticed(library: CudaLibrary) -> None:
    layer = make_layer(33, (64, 64), (32, 32), density=0.5, values_type=FLOAT16, draw=reals, seed=1, out_type=FLOAT16)
    right = expected(layer)
    lanes = layer.values.reshape(len(layer.values), 32, 8)
    layer.values = np.ascontiguousarray(lanes[:, [1, 0, *range(2, 32)]]).reshape(layer.values.shape)
    with layer.plan(library) as plan:
        for tactic in range(len(plan.tactics)):
            assert not np.allclose(layer.run(plan, tactic), right, atol=1e-2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"out_type": BFLOAT16}, "y must be int8 or of the type of values"),
        ({"block_k": 48, "col_ptr": (0, 0, 0), "k_idx": ()}, "block_k and block_n must be 16, 32 or 64"),
    ],
)
def test_what_the_kernels_cannot_do_is_refused(library: CudaLibrary, change: dict[str, Any], message: str) -> None:
    layer = make_layer(
        4, (64, 64), (32, 32), density=1, values_type=FLOAT16, draw=small_integers, seed=0, out_type=FLOAT16
    )
    if "block_k" in change:
        operator = dataclasses.replace(layer.operator, layout="canonical", **change)
    else:
        operator = dataclasses.replace(layer.operator, **change)
    with pytest.raises(ValueError, match=message):
        library.plan(operator, FLOAT16)


def test_misaligned_operands_are_refused(library: CudaLibrary) -> None:
    layer = make_layer(
        4, (64, 64), (32, 32), density=1, values_type=FLOAT16, draw=small_integers, seed=0, out_type=FLOAT16
    )
    pointers = [8, *[16] * 6]
    with layer.plan(library) as plan, pytest.raises(ValueError, match="aligned to 16 bytes"):
        plan.launch(0, 4, pointers, 0)
