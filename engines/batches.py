"""A dataset through an engine, batch by batch, whatever batch the engine takes."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import repeat
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from lsp_deploy.engines.protocol import Engine

__all__ = ["Batches", "run_batches", "without_padding"]


class Batches(Protocol):
    """Samples that come in batches, as lsp_deploy.data.Dataset gives them."""

    def __len__(self) -> int: ...

    def batches(self, size: int, /) -> Iterator[dict[str, NDArray[Any]]]:
        """Yield feeds of `size` samples in order; the last batch may be smaller."""
        ...


def run_batches(
    engine: Engine, dataset: Batches, batch_size: int
) -> Iterator[tuple[int, int, dict[str, NDArray[Any]]]]:
    """Yield how many samples a run held, its size with padding, and its outputs.

    An engine of a fixed batch runs at that; its last run is filled up with copies of the last sample.
    """
    fixed = _fixed_batch(engine)
    for feeds in dataset.batches(fixed or batch_size):
        count = len(next(iter(feeds.values())))
        if fixed is not None and count < fixed:
            feeds = {name: np.concatenate([value, *repeat(value[-1:], fixed - count)]) for name, value in feeds.items()}
        yield count, max(count, fixed or 0), engine.run(feeds)


def without_padding(value: NDArray[Any], count: int, size: int) -> NDArray[Any]:
    """Cut an inner value of a run, whose first dimension is the batch alone or merged with tokens or windows."""
    if count == size or value.ndim == 0 or len(value) % size:
        return value
    return value[: len(value) // size * count]


def _fixed_batch(engine: Engine) -> int | None:
    first = next(iter(engine.inputs.values())).shape[0]
    return first if isinstance(first, int) else None
