"""Encoded images to upright 8-bit pixels."""

from __future__ import annotations

import io
import warnings
from functools import lru_cache
from typing import Literal

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

__all__ = ["SUFFIXES", "UndecodableImageError", "decode_image"]

SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp"})

# Named, because Pillow goes by content: some of its other readers (EPS) run a program on what they are given.
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")

# What Pillow warns of either decodes all the same or is counted as undecodable.
warnings.filterwarnings("ignore", module=r"PIL\.")


class UndecodableImageError(Exception):
    """An image that cannot be used, with the reason."""


def decode_image(content: bytes, mode: Literal["RGB", "L"]) -> Image.Image:
    """Decode an image, turn it upright by its EXIF orientation, and convert it to 8-bit `mode`.

    Alpha is dropped, not blended, as timm and torchvision do. 16-bit grayscale keeps its upper 8 bits. Of an
    animation the first frame is taken.

    Raises:
        UndecodableImageError: unknown format, truncated or corrupt, or so large that it may be a decompression bomb.
    """
    try:
        with Image.open(io.BytesIO(content), formats=_formats()) as image:
            image.load()
            return _to_8_bit(ImageOps.exif_transpose(image)).convert(mode)
    except UndecodableImageError:
        raise
    except UnidentifiedImageError as error:
        raise UndecodableImageError("not an image in a known format") from error
    # Decoders meet arbitrary bytes here and raise nearly anything; only Pillow runs inside.
    except Exception as error:
        raise UndecodableImageError(" ".join(str(error).split()) or type(error).__name__) from error


def _to_8_bit(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise UndecodableImageError("floating-point pixels have no agreed range")
    if not image.mode.startswith("I"):
        return image
    # Pillow's own conversion clips at 255, which turns most of a 16-bit image white.
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise UndecodableImageError("32-bit pixels have no agreed range")
    return Image.fromarray((values >> 8).astype(np.uint8))


@lru_cache(maxsize=1)
def _formats() -> list[str]:
    Image.init()
    return [name for name in _FORMATS if name in Image.OPEN]
