"""Inputs checked against what an engine takes, so that a wrong one is a sentence and not a runtime's error."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lsp_deploy.engines.protocol import TensorSpec
from lsp_deploy.errors import UserError

__all__ = ["check_feeds"]


def check_feeds(
    feeds: Mapping[str, NDArray[Any]], inputs: Mapping[str, TensorSpec], label: str
) -> dict[str, NDArray[Any]]:
    """Return `feeds` in the order and types of `inputs`; floating-point values of another width are converted.

    Raises:
        UserError: an input is missing, unknown, or of another shape or kind of type; `label` names the model.
    """
    if feeds.keys() != inputs.keys():
        raise UserError(f"{label} takes the inputs {', '.join(inputs)}; given: {', '.join(feeds) or 'none'}")
    return {name: _checked(np.asarray(feeds[name]), spec, f"input {name} of {label}") for name, spec in inputs.items()}


def _checked(value: NDArray[Any], spec: TensorSpec, what: str) -> NDArray[Any]:
    fits = value.ndim == len(spec.shape) and all(
        isinstance(wanted, str) or wanted == size for wanted, size in zip(spec.shape, value.shape, strict=True)
    )
    if not fits:
        raise UserError(f"{what}: expected the shape {_text(spec.shape)}, got {_text(value.shape)}")
    both_float = np.issubdtype(value.dtype, np.floating) and np.issubdtype(spec.dtype, np.floating)
    if value.dtype != spec.dtype and not both_float:
        raise UserError(f"{what}: expected {spec.dtype}, got {value.dtype}")
    return value.astype(spec.dtype, copy=False)


def _text(shape: Sequence[int | str]) -> str:
    return "x".join(str(size) for size in shape) or "scalar"
