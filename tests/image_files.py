"""Small images, and what datasets are opened with, for the tests of calibration data."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SHAPES = {"pixels": (1, 3, 16, 16)}
DTYPES = {"pixels": np.dtype(np.float32)}
ARGUMENTS: dict[str, Any] = {"shapes": SHAPES, "dtypes": DTYPES, "preprocess": None}


def picture(seed: int = 0, size: tuple[int, int] = (20, 24)) -> Image.Image:
    """An RGB image of random colours, `size` = (height, width)."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


def encoded(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def png(seed: int = 0) -> bytes:
    return encoded(picture(seed))


def numbered(count: int) -> dict[str, bytes]:
    return {f"{index:03}.png": png(index) for index in range(count)}


def write_folder(folder: Path, files: Mapping[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def write_tar(path: Path, files: Mapping[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz" if path.name.endswith("gz") else "w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path
