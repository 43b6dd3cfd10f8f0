"""Masks: the patterns hold exactly, and the best scores survive."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from lsp_deploy.allocation.masks import activation_score, block_mask, block_sums, magnitude_score, two_four_mask

SCORES = st.integers(1, 6).flatmap(
    lambda k: st.integers(1, 7).flatmap(lambda n: arrays(np.float32, (4 * k, n), elements=st.floats(0, 10, width=32)))
)


@given(SCORES)
def test_two_of_every_four_along_k_survive_and_are_the_largest(score: np.ndarray) -> None:
    mask = two_four_mask(score)
    K, N = score.shape
    groups, kept = score.reshape(K // 4, 4, N), mask.reshape(K // 4, 4, N)
    assert (kept.sum(axis=1) == 2).all()
    survivors = np.where(kept, groups, np.inf).min(axis=1)
    removed = np.where(kept, -np.inf, groups).max(axis=1)
    assert (survivors >= removed).all()


def test_ties_are_broken_by_index() -> None:
    np.testing.assert_array_equal(two_four_mask(np.ones((4, 1), np.float32))[:, 0], [True, True, False, False])


@given(
    st.integers(1, 70), st.integers(1, 70), st.sampled_from([(16, 16), (16, 32), (32, 16), (64, 64)]), st.floats(0, 1)
)
def test_block_masks_are_constant_on_blocks_and_keep_the_asked_share(
    K: int, N: int, block: tuple[int, int], keep: float
) -> None:
    score = np.random.default_rng(K * 71 + N).random((K, N), np.float32)
    mask = block_mask(score, block, keep)
    sums, sizes = block_sums(mask.astype(np.float32), block), block_sums(np.ones((K, N), np.float32), block)
    assert np.isin(sums / sizes, [0.0, 1.0]).all()
    assert int((sums > 0).sum()) == max(1, int(sums.size * keep + 1e-6))


def test_the_highest_mean_score_survives_on_ragged_edges() -> None:
    score = np.zeros((20, 20), np.float32)
    score[16:, 16:] = 1.0  # the ragged corner block: 4 x 4, sum small, mean highest
    score[:16, :16] = 0.5
    mask = block_mask(score, (16, 16), 0.25)
    assert mask[16:, 16:].all()
    assert mask.sum() == 16


def test_scores() -> None:
    weight = np.array([[-2.0, 1.0], [3.0, -4.0]], np.float32)
    np.testing.assert_array_equal(magnitude_score(weight), np.abs(weight))
    np.testing.assert_array_equal(activation_score(weight, np.array([10.0, 1.0], np.float32)), [[20, 10], [3, 4]])


def test_block_sums_against_a_loop() -> None:
    values = np.random.default_rng(0).random((37, 21), np.float32)
    sums = block_sums(values, (16, 8))
    for i in range(3):
        for j in range(3):
            expected = values[16 * i : 16 * (i + 1), 8 * j : 8 * (j + 1)].sum(dtype=np.float64)
            assert sums[i, j] == pytest.approx(expected)
