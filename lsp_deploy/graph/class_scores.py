"""Which output of a model holds class scores, and how many classes there are."""

from __future__ import annotations

import onnx_ir as ir

__all__ = ["class_count", "class_output"]


def class_output(model: ir.Model) -> str | None:
    """Return the name of the output that holds class scores [batch, classes], or None.

    A second dimension that is not fixed is no number of classes: CLIP's similarities are [images, texts].
    """
    for output in model.graph.outputs:
        is_score = output.dtype is not None and output.dtype.is_floating_point()
        if is_score and output.shape is not None and len(output.shape) == 2 and _size(output, 1) not in (None, 1):
            return str(output.name)
    return None


def class_count(model: ir.Model) -> int | None:
    """Return how many classes the model scores, or None where it scores none."""
    name = class_output(model)
    return next((_size(output, 1) for output in model.graph.outputs if output.name == name), None)


def _size(value: ir.Value, axis: int) -> int | None:
    size = None if value.shape is None else value.shape[axis]
    return size if isinstance(size, int) else None
