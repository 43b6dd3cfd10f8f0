"""Block gradients on disk, written as a pass goes on, so that one that was interrupted can be resumed."""

from __future__ import annotations

import fcntl
import io
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from lsp_deploy.errors import UserError
from lsp_deploy.files import write_bytes

__all__ = ["GradientFiles"]


class GradientFiles:
    """A folder with one file a tensor, which holds A [samples, blocks] row by row, and a record of what is valid.

    What was added since the last `save` is not valid: a run that goes on begins there.
    """

    def __init__(self, folder: Path, samples: int, blocks: Sequence[int]) -> None:
        """Open or make the folder.

        Args:
            folder: the place; it belongs to one pass over one set of samples.
            samples: how many rows there will be.
            blocks: of each tensor.

        Raises:
            UserError: the folder cannot be written to.
        """
        self.folder = folder
        self.samples = samples
        self.done = 0
        """Samples that are valid."""
        self.taylor = [np.zeros(size) for size in blocks]
        """[blocks] of each tensor: sum over samples and over the block's entries of |W ∘ ∇_W f|."""
        self._blocks = list(blocks)
        self._open: list[BinaryIO] = []
        self._lock: list[BinaryIO] = []
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make the folder {folder}: {error.strerror or error}") from error
        if self._record.exists() and all(self._path(index).exists() for index in range(len(self._blocks))):
            with np.load(self._record, allow_pickle=False) as record:
                self.done = int(record["done"])
                self.taylor = [record[str(index)] for index in range(len(self._blocks))]

    @property
    def complete(self) -> bool:
        """Whether all samples are there."""
        return self.done == self.samples

    def append(self, tensor: int, rows: NDArray[np.float32], absolute: NDArray[np.float64]) -> None:
        """Add the next samples of one tensor.

        Args:
            tensor: its index.
            rows: A of these samples [n, blocks].
            absolute: [blocks]: sum over them of each block's sum of |W ∘ ∇_W f|.

        Raises:
            UserError: the disk is full, or another run is writing here.
        """
        if not self._open:
            self._take()
            self._open = [self._reopen(index) for index in range(len(self._blocks))]
        self.taylor[tensor] += absolute
        try:
            self._open[tensor].write(np.ascontiguousarray(rows, np.float32).tobytes())
        except OSError as error:
            raise UserError(f"cannot write {self._path(tensor)}: {error.strerror or error}") from error

    def save(self, done: int) -> None:
        """Make everything valid that was added: the rows of the first `done` samples, of every tensor.

        Raises:
            UserError: the disk is full.
        """
        try:
            for file in self._open:
                file.flush()
        except OSError as error:
            raise UserError(f"cannot write {self.folder}: {error.strerror or error}") from error
        content = io.BytesIO()
        sums: dict[str, Any] = {str(index): value for index, value in enumerate(self.taylor)}
        np.savez(content, done=np.int64(done), **sums)
        write_bytes(self._record, content.getvalue())
        self.done = done

    def close(self) -> None:
        """Close the files."""
        for file in [*self._open, *self._lock]:
            file.close()
        self._open, self._lock = [], []

    def remove(self) -> None:
        """Delete the folder."""
        self.close()
        shutil.rmtree(self.folder)

    def contributions(self, tensor: int) -> NDArray[np.float32]:
        """Return A [samples, blocks] of one tensor, mapped from disk."""
        shape = (self.samples, self._blocks[tensor])
        return np.memmap(self._path(tensor), np.float32, "r", shape=shape)

    def _take(self) -> None:
        """Keep other runs of the same analysis from writing here as well, until this one closes or ends."""
        lock = (self.folder / "lock").open("wb")
        self._lock = [lock]
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"another run is writing to {self.folder}; wait for it, or choose another cache") from error

    @property
    def _record(self) -> Path:
        return self.folder / "valid.npz"

    def _path(self, tensor: int) -> Path:
        return self.folder / f"{tensor:03}.float32"

    def _reopen(self, tensor: int) -> BinaryIO:
        path = self._path(tensor)
        try:
            path.touch()
            file = path.open("r+b")
            file.truncate(self.done * self._blocks[tensor] * 4)
            file.seek(0, io.SEEK_END)
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror or error}") from error
        return file
