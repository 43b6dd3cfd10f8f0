"""The operators of the domain lsp: one definition for ONNX Runtime and TensorRT."""

from __future__ import annotations

from lsp_deploy.plugins.native import NativeLibrary, instruction_sets, library, register

__all__ = ["NativeLibrary", "instruction_sets", "library", "register"]
