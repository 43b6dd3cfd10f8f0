"""Calibration and evaluation data: readers, labels, preprocessing, synthetic images."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lsp_deploy.data.dataset import Dataset, Kind
    from lsp_deploy.data.image_input import ImageInput, image_input, image_size
    from lsp_deploy.data.opening import open_dataset
    from lsp_deploy.data.preprocess import METADATA_KEY, PRESETS, Preprocess, load_preprocess
    from lsp_deploy.data.splits import hold_out

__all__ = [
    "METADATA_KEY",
    "PRESETS",
    "Dataset",
    "ImageInput",
    "Kind",
    "Preprocess",
    "hold_out",
    "image_input",
    "image_size",
    "load_preprocess",
    "open_dataset",
]

_MODULES = {
    "METADATA_KEY": "preprocess",
    "PRESETS": "preprocess",
    "Dataset": "dataset",
    "ImageInput": "image_input",
    "Kind": "dataset",
    "Preprocess": "preprocess",
    "hold_out": "splits",
    "image_input": "image_input",
    "image_size": "image_input",
    "load_preprocess": "preprocess",
    "open_dataset": "opening",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that `import lsp_deploy.data` costs nothing."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value
