"""The C library of the GPU kernels, from Python: for tests, benchmarks, and a plugin written in Python.

Nothing here needs a GPU but `Plan.launch`, and that neither where the library is an emulation (emulation/).
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Literal

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from lsp_deploy.plugins.block_sparse.operator import BlockSparseLinear

__all__ = ["CudaLibrary", "Plan"]

ACTIVATIONS = ("none", "gelu", "gelu_tanh", "relu")
ResidualType = Literal[ir.DataType.FLOAT16, ir.DataType.BFLOAT16]

_Pointer = ctypes.c_void_p
_Indices = ctypes.POINTER(ctypes.c_int64)


class _Description(ctypes.Structure):
    """`lsp_cuda_desc`."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("K", "N", "block_k", "block_n")),
        ("col_ptr", _Indices),
        ("col_ptr_count", ctypes.c_size_t),
        ("k_idx", _Indices),
        ("k_idx_count", ctypes.c_size_t),
        ("values_type", ctypes.c_int),
        ("activation", ctypes.c_int),
        ("out_type", ctypes.c_int),
        ("out_scale", ctypes.c_float),
        ("out_offset", ctypes.c_float),
        ("residual_type", ctypes.c_int),
    )


_OPERANDS = (ctypes.c_int, ctypes.c_int64, *[_Pointer] * 7)  # tactic, M, x, values, bias, scale, residual, y, table
_SIGNATURES = {
    "lsp_cuda_plan_create": (ctypes.c_char_p, ctypes.POINTER(_Description), ctypes.POINTER(_Pointer)),
    "lsp_cuda_plan_destroy": (None, _Pointer),
    "lsp_cuda_sub_blocks": (ctypes.c_int64, _Pointer),
    "lsp_cuda_tactics": (ctypes.c_int, _Pointer),
    "lsp_cuda_tactic_name": (ctypes.c_char_p, _Pointer, ctypes.c_int),
    "lsp_cuda_tactic_density": (ctypes.c_double, _Pointer, ctypes.c_int),
    "lsp_cuda_default_tactic": (ctypes.c_char_p, _Pointer, ctypes.c_int64, ctypes.POINTER(ctypes.c_int)),
    "lsp_cuda_table": (_Pointer, _Pointer, ctypes.c_int, ctypes.POINTER(ctypes.c_size_t)),
    "lsp_cuda_launch": (ctypes.c_char_p, _Pointer, *_OPERANDS, _Pointer),
}


class CudaLibrary:
    """The library at a path.

    Raises:
        OSError: it cannot be loaded.
    """

    def __init__(self, path: Path) -> None:
        self.c = ctypes.CDLL(str(path))
        for name, (result, *arguments) in _SIGNATURES.items():
            function = getattr(self.c, name)
            function.restype, function.argtypes = result, arguments

    def plan(
        self, operator: BlockSparseLinear, values_type: ir.DataType, residual_type: ResidualType | None = None
    ) -> Plan:
        """Return the plan of a layer, to be closed after use.

        Args:
            operator: the attributes; `out_type` is that of y.
            values_type: float16, bfloat16 or int8, of the values and x.
            residual_type: None where there is no residual.

        Raises:
            ValueError: what the kernels cannot do, in the library's words.
        """
        col_ptr = (ctypes.c_int64 * len(operator.col_ptr))(*operator.col_ptr)
        k_idx = (ctypes.c_int64 * len(operator.k_idx))(*operator.k_idx)
        description = _Description(
            *(operator.K, operator.N, operator.block_k, operator.block_n),
            *(col_ptr, len(col_ptr), k_idx, len(k_idx)),
            *(values_type.value, ACTIVATIONS.index(operator.activation)),
            *(operator.out_type.value, operator.out_scale, operator.out_offset),
            residual_type.value if residual_type is not None else 0,
        )
        handle = _Pointer()
        _raise(self.c.lsp_cuda_plan_create(description, handle))
        return Plan(self, handle)


class Plan:
    """What follows from a layer's sizes and mask: a context manager around `lsp_cuda_plan`."""

    def __init__(self, library: CudaLibrary, handle: ctypes.c_void_p) -> None:
        self._c, self._handle = library.c, handle

    def __enter__(self) -> Plan:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free the plan; it is not used afterwards."""
        self._c.lsp_cuda_plan_destroy(self._handle)

    @property
    def sub_blocks(self) -> int:
        """How many sub-blocks of 512 bytes the values have."""
        return int(self._c.lsp_cuda_sub_blocks(self._handle))

    @property
    def tactics(self) -> Sequence[str]:
        """Names of the tactics, by number."""
        count = self._c.lsp_cuda_tactics(self._handle)
        return [self._c.lsp_cuda_tactic_name(self._handle, i).decode() for i in range(count)]

    def density(self, tactic: int) -> float:
        """Return the share of x's slices that a tactic loads, over its column tiles."""
        return float(self._c.lsp_cuda_tactic_density(self._handle, tactic))

    def default_tactic(self, rows: int) -> int:
        """Return the tactic that is estimated to be the fastest for so many rows on the current device.

        Raises:
            ValueError: there is no device, or no tactic runs on it.
        """
        tactic = ctypes.c_int()
        _raise(self._c.lsp_cuda_default_tactic(self._handle, rows, tactic))
        return tactic.value

    def table(self, tactic: int) -> NDArray[np.int32]:
        """Return a copy of the table that a launch of this tactic wants in the device's memory, int32 [words]."""
        size = ctypes.c_size_t()
        address = self._c.lsp_cuda_table(self._handle, tactic, size)
        return np.frombuffer(ctypes.string_at(address, size.value), np.int32)

    def launch(self, tactic: int, rows: int, pointers: Sequence[int | None], stream: int) -> None:
        """Enqueue one kernel on a CUDA stream.

        Args:
            tactic: its number.
            rows: M.
            pointers: the device's addresses of x, values, bias, scale, residual, y and the table.
            stream: a cudaStream_t.

        Raises:
            ValueError: it was not launched, and why.
        """
        _raise(self._c.lsp_cuda_launch(self._handle, tactic, rows, *pointers, stream))


def _raise(error: bytes | None) -> None:
    if error is not None:
        raise ValueError(error.decode())
