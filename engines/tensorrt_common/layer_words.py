"""The words that TensorRT has for layers, types and origins, in its log and in its inspector."""

from __future__ import annotations

import re

__all__ = ["element_type", "is_plugin", "multiplies", "onnx_nodes"]

# Origins are set apart by a record or unit separator.
_ORIGIN = re.compile(r"\[ONNX Layer: (.*?)\](?=[\x1e\x1f]?\[ONNX Layer: |$)")
_TYPES = {
    "float": "fp32",
    "float32": "fp32",
    "half": "fp16",
    "float16": "fp16",
    "bfloat16": "bf16",
    "e4m3": "fp8",
    "boolean": "bool",
}
_TYPE = re.compile(
    r"\b(bfloat16|bf16|float32|float16|float|half|fp32|fp16|fp8|e4m3|fp4|u?int(?:4|8|16|32|64)|bool(?:ean)?)\b",
    re.IGNORECASE,
)
_MULTIPLIES = re.compile("gemm|matmul|matrixmultiply|conv|correlation|fully_?connected|linear|runtime_fusion", re.I)
_PLUGIN = re.compile("plugin|custom_layer", re.I)


def element_type(text: str) -> str:
    """Return the element type in e.g. "Half" or "Row major linear FP16 format"; "unknown" where none is named."""
    match = _TYPE.search(text)
    if match is None:
        return text.lower() if text.isalnum() else "unknown"
    word = match[1].lower()
    return _TYPES.get(word, word)


def multiplies(kind: str) -> bool:
    """Return whether a layer of this kind multiplies by a matrix, and does not only prepare or move operands."""
    return _MULTIPLIES.search(kind) is not None


def is_plugin(kind: str) -> bool:
    """Return whether a layer of this kind is a plugin. Ours computes in the type of its first input, x."""
    return _PLUGIN.search(kind) is not None


def onnx_nodes(metadata: str) -> list[str]:
    """Return the names of the ONNX nodes in a layer's metadata."""
    return _ORIGIN.findall(metadata)
