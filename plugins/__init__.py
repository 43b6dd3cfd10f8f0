"""The operators of the domain lsp: one definition for ONNX Runtime and TensorRT."""

from __future__ import annotations

from lsp_deploy.plugins.native import NativeLibrary, library, register

__all__ = ["NativeLibrary", "library", "register"]
