"""How weights are stored: whole blocks, and the order of tensor cores against its index formulas."""

import ml_dtypes
import numpy as np
import pytest
from block_sparse_cases import BSL16_SHAPES, case
from hypothesis import given, settings
from hypothesis import strategies as st

from lsp_deploy.plugins.block_sparse.bsl16 import bsl16_shape, from_bsl16, to_bsl16
from lsp_deploy.plugins.block_sparse.packing import pack, unpack
from lsp_deploy.plugins.block_sparse.weights import dense_weight, values_in_layout

DTYPES = [np.float32, np.float16, ml_dtypes.bfloat16, np.int8]
SIZES = st.integers(1, 150)


@settings(max_examples=80)
@given(
    K=SIZES,
    N=SIZES,
    block=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    density=st.sampled_from([0.0, 0.2, 0.7, 1.0]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_unpack_undoes_pack(K, N, block, density, dtype, seed):
    random = np.random.default_rng(seed)
    weight = random.integers(-100, 101, (K, N)).astype(dtype)
    mask = random.random((K, N)) < density / 20
    blocks = pack(weight, mask, block)
    np.testing.assert_array_equal(unpack(blocks, (K, N)), np.where(mask, weight, 0))
    assert blocks.values.dtype == weight.dtype and blocks.values.shape[1:] == block
    assert len(blocks.col_ptr) == -(-N // block[1]) + 1
    survives = [
        [k for k in range(-(-K // block[0])) if mask[k * block[0] :, n * block[1] :][: block[0], : block[1]].any()]
        for n in range(-(-N // block[1]))
    ]
    assert list(blocks.k_idx) == [k for column in survives for k in column]
    assert list(np.diff(blocks.col_ptr)) == [len(column) for column in survives]


def test_without_a_mask_the_blocks_that_are_not_zero_survive():
    weight = np.zeros((4, 6), np.float32)
    weight[2, 5] = 3
    blocks = pack(weight, None, (2, 4))
    assert (blocks.col_ptr, blocks.k_idx) == ((0, 0, 1), (1,))
    np.testing.assert_array_equal(blocks.values, [[[0, 3, 0, 0], [0, 0, 0, 0]]])


def test_a_block_that_the_mask_keeps_survives_although_it_is_zero():
    blocks = pack(np.zeros((4, 4), np.float32), np.eye(4, dtype=bool), (2, 2))
    assert (blocks.col_ptr, blocks.k_idx) == ((0, 1, 2), (0, 1))


def test_no_surviving_block_is_one_of_zeros():
    blocks = pack(np.ones((5, 5), np.int8), np.zeros((5, 5), bool), (2, 3))
    assert (blocks.col_ptr, blocks.k_idx) == ((0, 0, 0), ())
    assert blocks.values.shape == (1, 2, 3) and not blocks.values.any()


def by_formula(values, operator, exists):
    """Return the weight, padded to whole sub-blocks, that sub-blocks hold by the formulas of docs/operator.md."""
    size = values.dtype.itemsize
    rows, entries = 32 // size, 4 // size
    groups, slices = exists.shape
    weight = np.zeros((slices * rows, groups * 16), values.dtype)
    places = np.argwhere(exists)
    assert len(values) == max(len(places), 1)
    for stored, (group, slice_) in zip(values, places, strict=False):
        for index, value in enumerate(stored):
            lane, rest = divmod(index, 4 * entries)
            register, entry = divmod(rest, entries)
            tile, half = divmod(register, 2)
            eighth, low, quad = lane // 8, lane // 4 % 2, lane % 4
            row = slice_ * rows + half * 16 // size + quad * entries + entry
            column = group * 16 + 4 * eighth + 2 * tile + low
            weight[row, column] = value
    return weight


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int8"])
@pytest.mark.parametrize("block", BSL16_SHAPES)
@pytest.mark.parametrize(("K", "N", "zeros"), [(128, 128, 0.6), (100, 77, 0.5), (16, 1, 0.0), (80, 96, 1.0)])
def test_bsl16_follows_its_formulas(dtype, block, K, N, zeros):
    one = case(dtype, K=K, N=N, block=block, zeros=zeros)
    values = to_bsl16(one.operator, one.values)
    size = values.dtype.itemsize
    assert values.shape == bsl16_shape(one.operator, size)
    padded = one.operator.grid[0] * block[0], one.operator.grid[1] * block[1]
    mask = one.operator.mask.repeat(block[0], axis=0).repeat(block[1], axis=1)
    rows = 32 // size
    mask = np.pad(mask, ((0, -padded[0] % rows), (0, 0)))
    exists = mask.reshape(-1, rows, padded[1] // 16, 16).any(axis=(1, 3)).T
    weight = by_formula(values, one.operator, exists)
    np.testing.assert_array_equal(weight[:K, :N], one.weight)
    assert not weight[K:].any() and not weight[:, N:].any()


@settings(max_examples=60)
@given(
    K=SIZES,
    N=SIZES,
    block=st.sampled_from(BSL16_SHAPES),
    zeros=st.sampled_from([0.0, 0.5, 0.9, 1.0]),
    dtype=st.sampled_from(["float16", "bfloat16", "int8"]),
    seed=st.integers(0, 99),
)
def test_bsl16_there_and_back(K, N, block, zeros, dtype, seed):
    one = case(dtype, K=K, N=N, block=block, zeros=zeros, seed=seed)
    values = to_bsl16(one.operator, one.values)
    assert values.dtype == one.values.dtype
    np.testing.assert_array_equal(from_bsl16(one.operator, values), one.values)
    np.testing.assert_array_equal(dense_weight(one.in_layout("bsl16.v1").operator, values), one.weight)


def test_bsl16_refuses_what_it_cannot_hold():
    one = case("float32")
    with pytest.raises(ValueError, match="float16, bfloat16 or int8 only"):
        values_in_layout(one.operator, one.values, "bsl16.v1")
    one = case("int8", block=(24, 16))
    with pytest.raises(ValueError, match="no blocks of 24x16"):
        values_in_layout(one.operator, one.values, "bsl16.v1")
