"""How an image becomes the numbers that a model was trained on."""

from __future__ import annotations

import difflib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from lsp_deploy.errors import UserError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["METADATA_KEY", "PRESETS", "Preprocess", "load_preprocess"]

METADATA_KEY = "lsp_deploy.preprocess"


class Preprocess(BaseModel):
    """Resize, crop and normalization: y = (scale · x − mean) / std, x the 8-bit pixels. A TOML file has these keys.

    The defaults are those of the `imagenet` preset, and of timm's evaluation transform.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    size: tuple[int, int] = Field((224, 224), description="Height and width; one number for a square.")
    crop_pct: float = Field(0.875, gt=0, le=1, description="Share of the resized image's side that the crop keeps.")
    resize: int | None = Field(None, ge=1, description="Shorter side after resizing, in pixels; wins over crop_pct.")
    crop_mode: Literal["center", "squash", "border"] = Field(
        "center",
        description="center: shorter side resized, centre cropped. squash: both sides resized, aspect ratio lost. "
        "border: longer side resized, the rest filled with the mean colour.",
    )
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos"] = "bicubic"
    mean: tuple[float, ...] = Field((0.485, 0.456, 0.406), description="One value or three, in the order of channels.")
    std: tuple[float, ...] = Field((0.229, 0.224, 0.225), description="One value or three, in the order of channels.")
    scale: float = Field(1 / 255, gt=0, allow_inf_nan=False, description="What the 8-bit pixels are multiplied by.")
    channels: Literal["RGB", "BGR"] = "RGB"

    @field_validator("size", mode="before")
    @classmethod
    def _square(cls, value: Any) -> Any:
        return (value, value) if isinstance(value, int) else value

    @field_validator("size")
    @classmethod
    def _some_pixels(cls, value: tuple[int, int]) -> tuple[int, int]:
        if min(value) < 1:
            raise ValueError(f"is at least 1 x 1 pixels; got {list(value)}")
        return value

    @field_validator("mean", "std", mode="before")
    @classmethod
    def _one_value(cls, value: Any) -> Any:
        return (value,) if isinstance(value, (int, float)) else value

    @field_validator("mean", "std")
    @classmethod
    def _one_or_three(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if len(value) not in (1, 3) or not all(abs(number) < float("inf") for number in value):
            raise ValueError(f"has one finite value or three; got {list(value)}")
        return value

    @field_validator("std")
    @classmethod
    def _positive(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if min(value) <= 0:
            raise ValueError(f"is above 0; got {list(value)}")
        return value


_HALF = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}

PRESETS: Mapping[str, Mapping[str, Any]] = {
    "imagenet": {},
    "inception": _HALF,
    "clip": {
        "crop_pct": 1.0,
        "mean": (0.48145466, 0.4578275, 0.40821073),
        "std": (0.26862954, 0.26130258, 0.27577711),
    },
    "siglip": {"crop_pct": 1.0, "crop_mode": "squash", **_HALF},
    "none": {"crop_pct": 1.0, "crop_mode": "squash", "interpolation": "bilinear", "mean": (0.0,), "std": (1.0,)},
}
"""What each preset changes of the defaults."""


def load_preprocess(spec: str | None, metadata: Mapping[str, str], size: tuple[int, int]) -> tuple[Preprocess, str]:
    """Return the preprocessing to use and where it came from.

    Args:
        spec: a preset's name or a TOML file; None to ask the model.
        metadata: the model's metadata properties; an export writes `lsp_deploy.preprocess` there, as JSON.
        size: height and width that the model takes (`image_size`); it wins over the size in the metadata.

    Returns:
        The settings, and `--preprocess <spec>`, `model metadata` or `default` (the `imagenet` preset, a guess).

    Raises:
        UserError: an unknown preset, a file that cannot be read, keys or values that are not valid, or a file that
            names another size than the model takes.
    """
    if spec is not None:
        if spec in PRESETS:
            return _validated({**PRESETS[spec], **_size(size)}, f"--preprocess {spec}"), f"--preprocess {spec}"
        values = _read_toml(spec)
        if {"resize", "crop_pct"} <= values.keys():
            raise UserError(f"--preprocess {spec}: resize and crop_pct say the same thing; leave one of them out")
        settings = _validated({**_size(size), **values}, f"--preprocess {spec}")
        if _size(size) and settings.size != size:
            named, taken = (" x ".join(map(str, pair)) for pair in (settings.size, size))
            raise UserError(f"--preprocess {spec}: size is {named}, and the model takes {taken}; leave size out")
        return settings, f"--preprocess {spec}"
    if METADATA_KEY in metadata:
        return _validated({**_read_metadata(metadata[METADATA_KEY]), **_size(size)}, _METADATA_WORDS), "model metadata"
    return _validated({**PRESETS["imagenet"], **_size(size)}, "default"), "default"


_METADATA_WORDS = f"the model's metadata {METADATA_KEY} (--preprocess overrides it)"


def _size(size: tuple[int, int]) -> dict[str, tuple[int, int]]:
    # (0, 0): the model takes no images.
    return {"size": size} if min(size) > 0 else {}


def _read_toml(spec: str) -> dict[str, Any]:
    path = Path(spec)
    if path.suffix != ".toml" and not path.is_file():
        near = difflib.get_close_matches(spec, PRESETS, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UserError(f"--preprocess {spec}: {hint}the presets are {', '.join(PRESETS)}; or name a TOML file")
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read --preprocess {spec}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"--preprocess {spec} is not valid TOML: {error}") from error


def _read_metadata(text: str) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except ValueError as error:
        raise UserError(f"{_METADATA_WORDS} is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{_METADATA_WORDS} is not a JSON object")
    return values


def _validated(values: Mapping[str, Any], origin: str) -> Preprocess:
    try:
        return Preprocess.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        if first["type"] == "extra_forbidden":
            raise UserError(f"{origin}: there is no key {key!r}; keys: {', '.join(Preprocess.model_fields)}") from error
        message = first["msg"].removeprefix("Value error, ")
        raise UserError(f"{origin}: {f'{key} ' if key else ''}{message[:1].lower()}{message[1:]}") from error
