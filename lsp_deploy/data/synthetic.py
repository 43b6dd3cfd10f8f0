"""Inputs made up where no data is named: images with the spectrum of natural ones, or plain noise."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from lsp_deploy.data.image_input import is_float

__all__ = ["SyntheticReader"]

# Red, green and blue of natural images rise and fall together: this share of the variance is common to them.
_SHARED_VARIANCE = 0.9


class SyntheticReader:
    """Draws inputs from a seed; row i is the same whatever else is read.

    `synthetic` gives inputs of rank 4 images whose amplitude falls with 1 / frequency, as that of natural images does
    (Field, "Relations between the statistics of natural images and the response properties of cortical cells",
    JOSA A 4(12), 1987), every channel with mean 0 and standard deviation 1: what normalization makes of photographs.
    Float inputs of other ranks, and all of them under `random`, are standard normal. Whole numbers and booleans are 1,
    the one value that is valid as a token and as a mask alike.
    """

    def __init__(
        self,
        kind: Literal["synthetic", "random"],
        shapes: Mapping[str, tuple[int, ...]],
        dtypes: Mapping[str, np.dtype[Any]],
        seed: int,
    ) -> None:
        """Take shapes (dimension 0 is the batch) and dtypes of the inputs; a dtype that is not given is float32."""
        self._kind = kind
        self._shapes = {name: tuple(shape[1:]) for name, shape in shapes.items()}
        self._dtypes = {name: np.dtype(dtypes.get(name, np.dtype(np.float32))) for name in shapes}
        self._seed = seed
        settings = [(name, shape, self._dtypes[name].name) for name, shape in self._shapes.items()]
        self.identity = hashlib.sha256(repr((kind, settings, seed)).encode()).hexdigest()

    def read(self, rows: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        """Return the inputs for `rows`, each [len(rows), ...]."""
        return {
            name: np.stack([self._draw(place, name, row) for row in rows.tolist()]).astype(self._dtypes[name])
            for place, name in enumerate(self._shapes)
        }

    def _draw(self, place: int, name: str, row: int) -> NDArray[Any]:
        shape = self._shapes[name]
        if not is_float(self._dtypes[name]):
            return np.ones(shape)
        rng = np.random.default_rng([self._seed, place, row])
        if self._kind == "random" or len(shape) != 3:
            return rng.standard_normal(shape, np.float32)
        if shape[2] in (1, 3) and shape[0] not in (1, 3):
            return _natural_image(rng, shape[2], shape[0], shape[1]).transpose(1, 2, 0)
        return _natural_image(rng, *shape)


def _natural_image(rng: np.random.Generator, channels: int, height: int, width: int) -> NDArray[np.float32]:
    """Return noise [channels, height, width] whose amplitude falls with 1 / frequency."""
    noise = rng.standard_normal((channels, height, width)) * np.sqrt(1 - _SHARED_VARIANCE)
    noise += rng.standard_normal((height, width)) * np.sqrt(_SHARED_VARIANCE)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None, :])
    frequency[0, 0] = np.inf  # no constant part: mean 0
    image = np.fft.irfft2(np.fft.rfft2(noise) / frequency, s=(height, width))
    image /= np.maximum(image.std(axis=(1, 2), keepdims=True), np.finfo(np.float32).tiny)
    return image.astype(np.float32)
