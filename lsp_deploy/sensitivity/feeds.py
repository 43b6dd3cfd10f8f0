"""A dataset's samples as the tensors that a float32 graph takes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from lsp_deploy.data.image_input import is_float

if TYPE_CHECKING:
    from lsp_deploy.data import Dataset
    from lsp_deploy.data.dataset import Indices

__all__ = ["tensor_feeds"]


def tensor_feeds(dataset: Dataset, indices: Indices, device: str) -> dict[str, torch.Tensor]:
    """Return the model's inputs by name for the samples at `indices`, on `device`; 16-bit floats become float32."""
    return {
        name: torch.from_numpy(
            value.astype(np.float32) if is_float(value.dtype) and value.dtype.itemsize == 2 else value
        ).to(device)
        for name, value in dataset.feeds(indices).items()
    }
