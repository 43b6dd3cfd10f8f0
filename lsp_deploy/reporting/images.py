"""Small images for the page: one ink, as opaque as a number, so that they suit a light or a dark page."""

from __future__ import annotations

import base64
import io

import numpy as np
from numpy.typing import NDArray

__all__ = ["ink_image"]

_SHADES = 16
_INK = (58, 110, 232)


def ink_image(opacity: NDArray[np.floating]) -> str:
    """Return a PNG as a data URI.

    Args:
        opacity: [height, width], 0 to 1; shown in 16 shades.
    """
    from PIL import Image

    shades = np.round(opacity * (_SHADES - 1)).astype(np.uint8)
    image = Image.frombytes("P", shades.shape[::-1], shades.tobytes())
    image.putpalette(_INK * _SHADES)
    transparency = bytes(round(255 * shade / (_SHADES - 1)) for shade in range(_SHADES))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True, transparency=transparency, bits=4)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
