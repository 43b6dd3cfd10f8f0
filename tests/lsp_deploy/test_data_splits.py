"""What is held out, and what is chosen of many."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import lsp_deploy.data
from lsp_deploy.data import Dataset, hold_out
from lsp_deploy.data.splits import choose


class Rows:
    identity = "rows"

    def read(self, rows):
        return {"row": rows}


def dataset(count, labels=None):
    rows = np.arange(count, dtype=np.int64)
    return Dataset("rows", "arrays", Rows(), rows, tuple(map(str, rows)), labels)


def rows_of(part):
    return part.feeds(range(len(part)))["row"].tolist()


def test_every_fifth_sample_is_held_out():
    calibration, held_out = hold_out(dataset(12))
    assert rows_of(held_out) == [0, 5, 10]
    assert rows_of(calibration) == [1, 2, 3, 4, 6, 7, 8, 9, 11]
    assert held_out.sample_names == ("0", "5", "10")


@pytest.mark.parametrize("count", [5, 6, 9])
def test_at_least_one_is_held_out(count):
    calibration, held_out = hold_out(dataset(count))
    assert len(held_out) >= 1
    assert sorted(rows_of(calibration) + rows_of(held_out)) == list(range(count))


@pytest.mark.parametrize("count", [1, 4])
def test_fewer_than_five_are_all_on_both_sides(count):
    whole = dataset(count)
    calibration, held_out = hold_out(whole)
    assert calibration is whole
    assert held_out is whole


def test_classes_that_take_turns_are_on_both_sides():
    calibration, held_out = hold_out(dataset(100, np.arange(100) % 10))
    assert np.bincount(held_out.labels).tolist() == [2] * 10
    assert np.bincount(calibration.labels).tolist() == [8] * 10
    assert rows_of(held_out) == sorted(rows_of(held_out))


@given(st.lists(st.integers(0, 6), min_size=1, max_size=80), st.integers(1, 90), st.integers(0, 5))
def test_choice_is_even_ascending_and_deterministic(groups, wanted, seed):
    chosen = choose(groups, wanted, seed)
    assert np.array_equal(chosen, choose(groups, wanted, seed))
    assert len(chosen) == min(wanted, len(groups))
    assert (np.diff(chosen) > 0).all()
    taken = np.bincount(np.asarray(groups)[chosen], minlength=7)
    there = np.bincount(groups, minlength=7)
    # No group that has more to give is more than one sample behind another.
    assert taken[there > taken].min(initial=100) >= taken.max() - 1


def test_without_groups_the_choice_spans_the_list():
    chosen = choose(np.zeros(1000), 10, 0)
    assert (chosen // 100).tolist() == list(range(10))
    assert not np.array_equal(chosen, choose(np.zeros(1000), 10, 1))
    assert len(set((chosen % 10).tolist())) > 3


def test_all_are_chosen_where_no_number_is_named():
    assert choose(np.zeros(7), None, 0).tolist() == list(range(7))


def test_public_names_are_found_lazily():
    for name in lsp_deploy.data.__all__:
        assert getattr(lsp_deploy.data, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'absent'"):
        _ = lsp_deploy.data.absent
