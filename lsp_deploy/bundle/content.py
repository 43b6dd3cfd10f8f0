"""A bundle's model and what belongs to it."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from lsp_deploy.bundle.records import Records
from lsp_deploy.hardware.target import Target
from lsp_deploy.steps.preparation import Shapes

__all__ = ["Content"]


@dataclass(frozen=True)
class Content:
    """What is packed."""

    model: ir.Model
    """As the device takes it."""
    target: Target
    shapes: Shapes
    two_four: bool
    """Whether a weight has 2:4 zeros."""
    plugin: bool
    """Whether the model holds operators of ours."""
    records: Records | None
    """Of the run that made the model, where there was one."""

    @property
    def dynamic(self) -> bool:
        """Whether the engine takes more than one shape."""
        return self.shapes.min != self.shapes.max
