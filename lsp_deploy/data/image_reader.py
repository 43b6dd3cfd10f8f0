"""Images read, decoded and prepared as they are needed, by all cores."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from lsp_deploy import console
from lsp_deploy.data.decode import UndecodableImageError, decode_image
from lsp_deploy.data.image_input import ImageInput
from lsp_deploy.data.images import ReadImage
from lsp_deploy.data.preprocess import Preprocess
from lsp_deploy.data.transform import normalize, to_pixels
from lsp_deploy.errors import UserError

__all__ = ["ImageReader"]

_CACHE_BYTES = 512 * 2**20
_CHUNK = 64  # images handed to the threads at once: what an interrupt waits for

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class ImageReader:
    """Feeds images to one input. Pixels are kept, 8 bits each, of as many images as fit in 512 MB."""

    def __init__(self, names: Sequence[str], read: ReadImage, target: ImageInput, preprocess: Preprocess) -> None:
        """Decode every image once.

        Args:
            names: the images; row i is `names[i]`.
            read: returns an image's encoded bytes by name.
            target: the input that takes them.
            preprocess: how they are prepared, at the size that the input takes.
        """
        self._names = names
        self._read = read
        self._target = target
        self._preprocess = preprocess
        height, width = preprocess.size
        cached = min(len(names), _CACHE_BYTES // (height * width * target.channels))
        self._cache = np.empty((cached, height, width, target.channels), np.uint8)
        self.undecodable: dict[int, str] = {}
        """Reasons by row, of the images that cannot be used."""
        self.identity = self._decode_all()

    def read(self, rows: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        """Return {input: images}, [len(rows), ...] in the input's layout and dtype.

        Raises:
            UserError: an image that was there when the data was opened cannot be read any more.
        """
        pixels = np.stack(list(_parallel(self._pixels, rows.tolist())))
        values = normalize(pixels, self._preprocess)
        if self._target.layout == "NCHW":
            values = values.transpose(0, 3, 1, 2)
        return {self._target.name: np.ascontiguousarray(values, self._target.dtype)}

    def _pixels(self, row: int) -> NDArray[np.uint8]:
        if row < len(self._cache):
            cached: NDArray[np.uint8] = self._cache[row]
            return cached
        try:
            return self._decode(self._read(self._names[row]))
        except UndecodableImageError as error:
            raise UserError(f"image {self._names[row]} changed while it was in use: {error}") from error

    def _decode_all(self) -> str:
        settings = (self._preprocess.model_dump_json(), self._target.layout, self._target.channels, self._target.dtype)
        digest = hashlib.sha256(repr(settings).encode())
        with console.progress("reading images", len(self._names)) as advance:
            for row, (content, reason) in enumerate(_parallel(self._check, range(len(self._names)))):
                digest.update(content)
                if reason is not None:
                    self.undecodable[row] = reason
                advance(1)
        return digest.hexdigest()

    def _check(self, row: int) -> tuple[bytes, str | None]:
        """Decode one image into the cache where it has room; returns the hash of its content and what is wrong."""
        try:
            content = self._read(self._names[row])
        except UndecodableImageError as error:
            return b"", str(error)
        digest = hashlib.sha256(content).digest()
        try:
            pixels = self._decode(content)
        except UndecodableImageError as error:
            return digest, str(error)
        if row < len(self._cache):
            self._cache[row] = pixels
        return digest, None

    def _decode(self, content: bytes) -> NDArray[np.uint8]:
        image = decode_image(content, "L" if self._target.channels == 1 else "RGB")
        return to_pixels(image, self._preprocess)


def _parallel(function: Callable[[_Item], _Result], items: Sequence[_Item]) -> Iterable[_Result]:
    """Yield function(item) in order, computed by as many threads as there are cores (Pillow releases the lock)."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(items), _CHUNK):
            yield from pool.map(function, items[start : start + _CHUNK])
