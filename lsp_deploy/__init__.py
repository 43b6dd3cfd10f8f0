"""A vision transformer in ONNX goes in; a smaller, faster model, an engine and a measured account come out."""

from __future__ import annotations

__version__ = "0.1.0"
