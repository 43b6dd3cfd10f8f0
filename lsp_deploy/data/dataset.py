"""The view of data that everything else has: samples in a fixed order, fed to the model in batches."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

__all__ = ["Dataset", "Indices", "Kind", "SampleReader"]

Kind = Literal["images", "arrays", "synthetic", "random"]
Indices = Sequence[int] | NDArray[np.integer[Any]]


class SampleReader(Protocol):
    """Where samples come from; a row is a sample's place in the source, whatever a dataset selects of it."""

    @property
    def identity(self) -> str:
        """Hash of the content of all rows and of how it is prepared, in hex; the same on every machine."""

    def read(self, rows: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        """Return the model's inputs for `rows`, each [len(rows), ...], in the order and dtype that the model takes."""


@dataclass(frozen=True)
class Dataset:
    """Samples in a fixed order. Nothing is kept in memory but what the reader caches, which subsets share."""

    name: str
    """Of the file or folder; `synthetic`, `random`."""
    kind: Kind
    reader: SampleReader
    rows: NDArray[np.int64]
    """[samples]: the reader's row of each sample."""
    sample_names: tuple[str, ...]
    """[samples]: path inside the folder or archive; the row for arrays."""
    labels: NDArray[np.int64] | None = None
    """[samples]: class indices."""
    class_names: tuple[str, ...] | None = None
    """Sorted class folders, where those gave the labels: index i of `labels` is folder `class_names[i]`."""
    skipped: int = 0
    """Images that were asked for and did not decode."""

    def __len__(self) -> int:
        return len(self.rows)

    def feeds(self, indices: Indices) -> dict[str, NDArray[Any]]:
        """Return the model's inputs by name for the samples at `indices`, each [len(indices), ...]."""
        return self.reader.read(self.rows[np.asarray(indices, np.int64)])

    def batch(self, size: int) -> dict[str, NDArray[Any]]:
        """Return the feeds of `size` samples, the first ones; where there are fewer, from the first again."""
        return self.feeds([index % len(self) for index in range(size)])

    def batches(self, size: int) -> Iterator[dict[str, NDArray[Any]]]:
        """Yield feeds of `size` samples in order; the last batch may be smaller."""
        for start in range(0, len(self), size):
            yield self.reader.read(self.rows[start : start + size])

    def subset(self, indices: Indices) -> Dataset:
        """Return the dataset of the samples at `indices`, in that order."""
        chosen = np.asarray(indices, np.int64)
        return replace(
            self,
            rows=self.rows[chosen],
            sample_names=tuple(self.sample_names[index] for index in chosen),
            labels=None if self.labels is None else self.labels[chosen],
        )

    def without_labels(self) -> Dataset:
        """Return the same samples with their labels forgotten."""
        return replace(self, labels=None, class_names=None)

    @property
    def identity(self) -> str:
        """Hash of what the samples are, in hex: content, preparation, order and labels; no paths, no dates."""
        digest = hashlib.sha256(self.reader.identity.encode())
        digest.update(self.rows.astype("<i8").tobytes())
        digest.update(b"" if self.labels is None else self.labels.astype("<i8").tobytes())
        return digest.hexdigest()
