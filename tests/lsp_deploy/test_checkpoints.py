"""Steps of a gradual search on disk: they come back as they were, and only in one row from the start."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lsp_deploy.errors import UserError
from lsp_deploy.search.checkpoints import Checkpoints, SearchState

BUDGETS = (0.95, 0.9, 0.85, 0.83)


def state(seed: int, *, weights: bool = True) -> SearchState:
    generator = np.random.default_rng(seed)
    names = ("/blocks.0/fc1/MatMul", "fc:2")  # names of ONNX nodes may hold anything
    return SearchState(
        gone={name: generator.random(6) < 0.5 for name in names},
        scores={name: generator.random(6) for name in names},
        token_weights={name: generator.random(3) for name in names} if weights else {},
    )


def assert_equal(one: SearchState, other: SearchState) -> None:
    for field in ("gone", "scores", "token_weights"):
        ours, theirs = getattr(one, field), getattr(other, field)
        assert ours.keys() == theirs.keys()
        for name in ours:
            assert ours[name].dtype == theirs[name].dtype
            np.testing.assert_array_equal(ours[name], theirs[name])


@pytest.mark.parametrize("weights", [True, False])
def test_a_step_comes_back_as_it_was(tmp_path: Path, weights: bool) -> None:
    Checkpoints(tmp_path / "a" / "b").save(0.95, state(1, weights=weights))
    done, back = Checkpoints(tmp_path / "a" / "b").latest(BUDGETS, state(0))
    assert done == 1
    assert_equal(back, state(1, weights=weights))


def test_without_a_step_the_start_is_returned_and_nothing_is_made(tmp_path: Path) -> None:
    start = state(0)
    assert Checkpoints(tmp_path / "none").latest(BUDGETS, start) == (0, start)
    assert not (tmp_path / "none").exists()


def test_the_latest_is_the_end_of_the_row_from_the_start(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoints = Checkpoints(tmp_path)
    for seed, budget in enumerate((0.95, 1 - 2 * 0.05, 0.83)):  # 0.85 is missing; 0.83 was reached another way
        checkpoints.save(budget, state(seed))
    done, back = checkpoints.latest(BUDGETS, state(9))
    assert done == 2
    assert_equal(back, state(1))
    assert "the search goes on at 90.0%" in "".join(capsys.readouterr())


def test_removed_steps_are_gone(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "one")
    checkpoints.remove()  # nothing there is no error
    checkpoints.save(0.95, state(0))
    checkpoints.remove()
    assert not checkpoints.folder.exists()


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot make the folder"):
        Checkpoints(tmp_path / "file" / "in").save(0.95, state(0))
