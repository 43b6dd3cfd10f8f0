"""Which input of a model takes images, and in which layout."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from lsp_deploy.errors import UserError

__all__ = ["ImageInput", "image_input", "image_size", "is_float"]

_CHANNELS = (1, 3)


@dataclass(frozen=True)
class ImageInput:
    """An input that takes images."""

    name: str
    channels: int
    size: tuple[int, int]
    """Height and width."""
    layout: Literal["NCHW", "NHWC"]
    dtype: np.dtype[Any]


def image_input(shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, np.dtype[Any]]) -> ImageInput:
    """Return the one input that images are fed to: float, rank 4, with 1 or 3 channels.

    Raises:
        UserError: the model has another input as well, or its input does not take images.
    """
    if len(shapes) != 1:
        names = ", ".join(shapes)
        raise UserError(f"images feed one input, and the model needs {names}; give arrays in an .npz, one key an input")
    ((name, shape),) = shapes.items()
    layout = _layout(shape)
    dtype = np.dtype(dtypes.get(name, np.dtype(np.float32)))
    if layout is None or not is_float(dtype):
        raise UserError(
            f"input {name} ({dtype.name} {list(shape)}) does not take images: that is a float input "
            "[batch, 1 or 3, height, width]; give arrays in an .npz or .npy"
        )
    channels, height, width = shape[1:] if layout == "NCHW" else (shape[3], shape[1], shape[2])
    return ImageInput(name, channels, (height, width), layout, dtype)


def image_size(shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, int]:
    """Return height and width of the first input that is laid out as images; (0, 0) if there is none."""
    for shape in shapes.values():
        layout = _layout(shape)
        if layout is not None:
            height, width = shape[2:4] if layout == "NCHW" else shape[1:3]
            return height, width
    return 0, 0


def is_float(dtype: np.dtype[Any]) -> bool:
    """Return whether `dtype` is a floating-point type; numpy does not count bfloat16 as one."""
    return dtype.kind == "f" or dtype.name == "bfloat16"


def _layout(shape: tuple[int, ...]) -> Literal["NCHW", "NHWC"] | None:
    if len(shape) != 4:
        return None
    if shape[1] in _CHANNELS:
        return "NCHW"
    return "NHWC" if shape[3] in _CHANNELS else None
