"""The steps of a gradual search on disk, so that one that was interrupted goes on where it was."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lsp_deploy import console
from lsp_deploy.errors import UserError
from lsp_deploy.files import write_bytes

__all__ = ["Checkpoints", "SearchState"]

_FIELDS = ("gone", "scores", "token_weights")


@dataclass
class SearchState:
    """Where a gradual search is, by layer name."""

    gone: dict[str, NDArray[np.bool_]]
    """bool [blocks], True where the block is gone."""
    scores: dict[str, NDArray[np.float64]]
    """[blocks], averaged over the steps."""
    token_weights: dict[str, NDArray[np.float64]]
    """[tokens], of the last step."""


class Checkpoints:
    """One file a step, named by the budget that it reached."""

    def __init__(self, folder: Path) -> None:
        """Take a folder that belongs to one search alone; it is made when the first step is saved."""
        self.folder = folder

    def save(self, budget: float, state: SearchState) -> None:
        """Keep a step.

        Raises:
            UserError: the folder cannot be written to.
        """
        from safetensors.numpy import save

        tensors: dict[str, NDArray[Any]] = {}
        for field in _FIELDS:
            for name, array in getattr(state, field).items():
                tensors[f"{field}:{name}"] = np.ascontiguousarray(array)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make the folder {self.folder}: {error.strerror}") from error
        write_bytes(self._path(budget), save(tensors))

    def latest(self, budgets: Sequence[float], start: SearchState) -> tuple[int, SearchState]:
        """Return how many of the budgets, in order, are done, and the state there; `start` where none is."""
        done = 0
        while done < len(budgets) and self._path(budgets[done]).exists():
            done += 1
        if done == 0:
            return 0, start
        console.say(f"the search goes on at {budgets[done - 1]:.1%}, from {self.folder}")
        return done, self._load(budgets[done - 1])

    def remove(self) -> None:
        """Delete all steps."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _load(self, budget: float) -> SearchState:
        from safetensors.numpy import load_file

        fields: dict[str, dict[str, Any]] = {field: {} for field in _FIELDS}
        for key, array in load_file(self._path(budget)).items():
            field, _, name = key.partition(":")
            fields[field][name] = array
        return SearchState(**fields)

    def _path(self, budget: float) -> Path:
        return self.folder / f"{budget:.6f}.safetensors"
