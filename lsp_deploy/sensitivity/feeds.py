"""A dataset's samples as the tensors that a float32 graph takes, and the outputs that belong to them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch

from lsp_deploy.data.image_input import is_float

if TYPE_CHECKING:
    from lsp_deploy.data import Dataset
    from lsp_deploy.data.dataset import Indices

__all__ = ["real_samples", "tensor_feeds"]


def tensor_feeds(dataset: Dataset, indices: Indices, device: str, *, fill_to: int = 0) -> dict[str, torch.Tensor]:
    """Return the model's inputs by name for the samples at `indices`, on `device`; 16-bit floats become float32.

    Args:
        dataset: the samples.
        indices: which.
        device: torch device.
        fill_to: the batch of a graph that takes no other: copies of the last sample make it up.
    """
    indices = np.asarray(indices)
    indices = np.concatenate([indices, np.full(max(0, fill_to - len(indices)), indices[-1])])
    return {
        name: torch.from_numpy(
            value.astype(np.float32) if is_float(value.dtype) and value.dtype.itemsize == 2 else value
        ).to(device)
        for name, value in dataset.feeds(indices).items()
    }


def real_samples(outputs: Mapping[str, torch.Tensor], count: int, size: int) -> dict[str, torch.Tensor]:
    """Return the outputs of the first `count` of `size` samples: what fills up a batch counts for nothing.

    An output that has no row for each sample stays as it is.
    """
    return {name: value[:count] if value.dim() and len(value) == size else value for name, value in outputs.items()}
