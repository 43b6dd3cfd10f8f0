"""Images to a model's pixels, as timm's evaluation transform makes them; then pixels to normalized floats."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from lsp_deploy.data.decode import UndecodableImageError
from lsp_deploy.data.preprocess import Preprocess

__all__ = ["normalize", "to_pixels"]

_RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
# A strip a thousand times as long as wide grows to gigabytes when its short side is resized.
_LARGEST_RESIZED = 2**26


def to_pixels(image: Image.Image, preprocess: Preprocess) -> NDArray[np.uint8]:
    """Resize and crop an RGB or L image to `preprocess.size`.

    Returns:
        [height, width, 3 or 1], uint8, channels in the order of `preprocess.channels`.

    Raises:
        UndecodableImageError: an image so long and narrow that resizing it would fill the memory.
    """
    height, width = _resized(image.height, image.width, preprocess)
    if height * width > _LARGEST_RESIZED:
        raise UndecodableImageError(f"{image.width} x {image.height} pixels are too long and narrow to resize")
    if (width, height) != image.size:
        image = image.resize((width, height), _RESAMPLING[preprocess.interpolation])
    pixels = np.asarray(_centre(image, preprocess))
    if pixels.ndim == 2:
        return pixels[:, :, None]
    return pixels if preprocess.channels == "RGB" else pixels[:, :, ::-1]


def normalize(pixels: NDArray[np.uint8], preprocess: Preprocess) -> NDArray[np.float32]:
    """Return (scale · pixels − mean) / std in float32, for pixels [..., 3 or 1].

    Three values of mean and std are averaged for images of one channel.
    """
    mean, std = (np.asarray(values, np.float32) for values in (preprocess.mean, preprocess.std))
    if pixels.shape[-1] == 1:
        mean, std = mean.mean(keepdims=True), std.mean(keepdims=True)
    result = pixels.astype(np.float32)
    result *= np.float32(preprocess.scale)
    result -= mean
    result /= std
    return result


def _resized(height: int, width: int, preprocess: Preprocess) -> tuple[int, int]:
    """Return height and width to resize to; the rounding is timm's and torchvision's."""
    target_height, target_width = _before_crop(preprocess)
    if preprocess.crop_mode == "squash":
        return target_height, target_width
    ratios = height / target_height, width / target_width
    if preprocess.crop_mode == "center" and target_height == target_width:
        short, long = min(height, width), max(height, width)
        long = int(target_height * long / short)
        return (long, target_height) if height > width else (target_height, long)
    ratio = max(ratios) if preprocess.crop_mode == "border" else min(ratios)
    return max(round(height / ratio), 1), max(round(width / ratio), 1)


def _before_crop(preprocess: Preprocess) -> tuple[int, int]:
    if preprocess.resize is None:
        height, width = (math.floor(side / preprocess.crop_pct) for side in preprocess.size)
        return height, width
    shorter = min(preprocess.size)
    height, width = (round(side * preprocess.resize / shorter) for side in preprocess.size)
    return height, width


def _centre(image: Image.Image, preprocess: Preprocess) -> Image.Image:
    """Cut the centre of `preprocess.size` out; what the image lacks is the mean colour (border) or black."""
    height, width = preprocess.size
    lacking_height, lacking_width = max(height - image.height, 0), max(width - image.width, 0)
    if lacking_height or lacking_width:
        before = lacking_width // 2, lacking_height // 2
        after = lacking_width - before[0], lacking_height - before[1]
        image = ImageOps.expand(image, (*before, *after), _fill(image, preprocess))
    top, left = round((image.height - height) / 2), round((image.width - width) / 2)
    return image.crop((left, top, left + width, top + height))


def _fill(image: Image.Image, preprocess: Preprocess) -> int | tuple[int, ...]:
    if preprocess.crop_mode != "border":
        return 0 if image.mode == "L" else (0, 0, 0)
    colour = [min(max(round(value / preprocess.scale), 0), 255) for value in preprocess.mean]
    if image.mode == "L":
        return round(sum(colour) / len(colour))
    colour = colour * (3 // len(colour))
    return tuple(colour if preprocess.channels == "RGB" else reversed(colour))
